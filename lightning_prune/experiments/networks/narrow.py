"""Modern families for 32x32 images, narrow and short: torchvision's own layers, fewer of them.

Each fills its parameters as torchvision fills that family's, by the shapes that they have at the moment, so that
``reset_parameters()`` also serves a network that has lost channels or blocks.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_prune.errors import ConfigError
from lightning_prune.experiments.networks.init import (
    check_classes,
    conv_normal,
    initialize,
    linear_normal,
    no_draws,
    scaled,
)


def mobilenet_v2_cifar(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """MobileNetV2 with eight inverted residuals on 16x16, 8x8 and 4x4 pixels; 16 to 96 channels, 256 at the end.

    Paper: Sandler et al. 2018, arXiv:1801.04381. The first convolution has stride 2, later ones fewer than there.

    Args:
        num_classes: Outputs.
        width: Multiplies all channel counts.

    Returns:
        torchvision's ``MobileNetV2`` with ``reset_parameters()``: images (N, 3, 32, 32) to logits (N, num_classes).

    Raises:
        ConfigError: ``num_classes`` below 2 or ``width`` not positive.
    """
    from torchvision.models import MobileNetV2  # slow to import
    from torchvision.ops import Conv2dNormActivation

    stages = [(1, 16, 1, 1), (4, 24, 2, 1), (4, 40, 2, 2), (4, 64, 2, 2), (4, 96, 1, 1)]
    settings = [[expand, scaled(channels, width), blocks, stride] for expand, channels, blocks, stride in stages]
    last = scaled(256, width)
    with no_draws():
        network = MobileNetV2(check_classes(num_classes), 1.0, settings, round_nearest=1, dropout=0.0)
        stem = scaled(16, width)
        network.features[0] = Conv2dNormActivation(3, stem, stride=2, activation_layer=nn.ReLU6)
        network.features[1] = type(network.features[1])(stem, settings[0][1], 1, 1)
        network.features[-1] = Conv2dNormActivation(settings[-1][1], last, 1, activation_layer=nn.ReLU6)
        network.last_channel = last
        network.classifier[1] = nn.Linear(last, num_classes)
    return _resetting(network, _fill_mobile)


def efficientnet_cifar(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """EfficientNet with seven MBConv blocks (squeeze-and-excitation, SiLU) on 16x16, 8x8 and 4x4 pixels.

    Paper: Tan and Le 2019, arXiv:1905.11946; widths and depths are smaller than B0's, kernels and expansions its own.

    Args:
        num_classes: Outputs.
        width: Multiplies all channel counts.

    Returns:
        torchvision's ``EfficientNet`` with ``reset_parameters()``: images (N, 3, 32, 32) to logits (N, num_classes).

    Raises:
        ConfigError: ``num_classes`` below 2 or ``width`` not positive.
    """
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig  # slow to import

    stages = [
        (1, 3, 1, 16, 16, 1),
        (6, 3, 1, 16, 24, 1),
        (6, 5, 2, 24, 40, 2),
        (6, 3, 2, 40, 64, 2),
        (6, 5, 1, 64, 80, 1),
    ]
    settings = []
    for expand, kernel, stride, before, after, blocks in stages:
        config = MBConvConfig(expand, kernel, stride, before, after, blocks)
        config.input_channels, config.out_channels = scaled(before, width), scaled(after, width)  # not multiples of 8
        settings.append(config)
        before = after
    with no_draws():
        network = EfficientNet(
            settings,
            0.0,
            stochastic_depth_prob=0.0,
            num_classes=check_classes(num_classes),
            last_channel=scaled(240, width),
        )
    return _resetting(network, _fill_efficient)


def shufflenet_v2_cifar(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """ShuffleNetV2 with eight units on 8x8, 4x4 and 2x2 pixels; 16, 48, 96 and 192 channels, 256 at the end.

    Paper: Ma et al. 2018, arXiv:1807.11164. The pooling after the first convolution is left out: images are small.

    Args:
        num_classes: Outputs.
        width: Multiplies all channel counts; those of the units become even.

    Returns:
        torchvision's ``ShuffleNetV2`` with ``reset_parameters()``: images (N, 3, 32, 32) to logits (N, num_classes).

    Raises:
        ConfigError: ``num_classes`` below 2 or ``width`` not positive.
    """
    from torchvision.models import ShuffleNetV2  # slow to import

    units = [2 * scaled(channels, width) for channels in (24, 48, 96)]
    with no_draws():
        network = ShuffleNetV2(
            [3, 3, 2], [scaled(16, width), *units, scaled(256, width)], num_classes=check_classes(num_classes)
        )
        network.maxpool = nn.Identity()
    return _resetting(network, _fill_default)


def convnext_cifar(num_classes: int = 10, width: float = 1.0, patch_size: int = 4) -> nn.Module:
    """ConvNeXt with six blocks on 8x8, 4x4 and 2x2 patches; 32, 64 and 128 channels.

    Paper: Liu et al. 2022, arXiv:2201.03545. Layer scales begin at 0.1 instead of 1e-6, with which blocks would
    contribute nothing in short trainings; no stochastic depth.

    Args:
        num_classes: Outputs.
        width: Multiplies all channel counts.
        patch_size: Height, width and stride of the first convolution; 2 suits images of 16x16.

    Returns:
        torchvision's ``ConvNeXt`` with ``reset_parameters()``: images (N, 3, 32, 32) to logits (N, num_classes).

    Raises:
        ConfigError: ``num_classes`` below 2 or ``width`` not positive.
    """
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt  # slow to import

    first, second, third = (scaled(channels, width) for channels in (32, 64, 128))
    settings = [CNBlockConfig(first, second, 2), CNBlockConfig(second, third, 2), CNBlockConfig(third, None, 2)]
    with no_draws():
        network = ConvNeXt(settings, 0.0, layer_scale=_LAYER_SCALE, num_classes=check_classes(num_classes))
        network.features[0][0] = nn.Conv2d(3, first, patch_size, stride=patch_size)
    return _resetting(network, _fill_convnext)


def vit_cifar(num_classes: int = 10, width: float = 1.0, image_size: int = 32, patch_size: int = 4) -> nn.Module:
    """Vision transformer with four blocks on patches of 4x4 pixels: 64 wide, 4 heads, MLPs 256 wide.

    Paper: Dosovitskiy et al. 2021, arXiv:2010.11929.

    Args:
        num_classes: Outputs.
        width: Multiplies all widths; the number of heads stays.
        image_size: Height and width of the images, pixels; a multiple of ``patch_size``.
        patch_size: Height and width of a patch, pixels.

    Returns:
        torchvision's ``VisionTransformer`` with ``reset_parameters()``: images (N, 3, image_size, image_size) to logits
        (N, num_classes).

    Raises:
        ConfigError: ``num_classes`` below 2, ``width`` not positive, or patches that do not fill the image.
    """
    from torchvision.models import VisionTransformer  # slow to import

    if min(image_size, patch_size) < 1 or image_size % patch_size:
        raise ConfigError(f"image_size={image_size!r} must be a multiple of patch_size={patch_size!r}, at least 1.")
    with no_draws():
        hidden, inner = 4 * scaled(16, width), scaled(256, width)
        network = VisionTransformer(image_size, patch_size, 4, 4, hidden, inner, num_classes=check_classes(num_classes))
    return _resetting(network, _fill_vit)


_LAYER_SCALE = 0.1


def _resetting(network: nn.Module, fill: Callable[[nn.Module], None]) -> nn.Module:
    fill(network)
    # a partial, not a bound method: copies and pickles of the network then reset themselves, not the original
    object.__setattr__(network, "reset_parameters", partial(fill, network))
    return network


def _fill_default(network: nn.Module) -> None:
    """Every layer as torch fills it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.LayerNorm):
            module.reset_parameters()


def _fill_mobile(network: nn.Module) -> None:
    initialize(network, conv=conv_normal, linear=linear_normal)


def _fill_efficient(network: nn.Module) -> None:
    def by_outputs(weight: Tensor) -> Tensor:
        bound = 1 / math.sqrt(weight.shape[0])
        return nn.init.uniform_(weight, -bound, bound)

    initialize(network, conv=conv_normal, linear=by_outputs)


def _fill_convnext(network: nn.Module) -> None:
    narrow = partial(nn.init.trunc_normal_, std=0.02)
    _fill_default(network)
    initialize(network, conv=narrow, linear=narrow)
    for name, parameter in network.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.constant_(parameter, _LAYER_SCALE)


def _fill_vit(network: Any) -> None:
    _fill_default(network)
    stem = network.conv_proj
    nn.init.trunc_normal_(stem.weight, std=math.sqrt(1 / stem.weight[0].numel()))
    nn.init.zeros_(stem.bias)
    nn.init.zeros_(network.class_token)
    nn.init.normal_(network.encoder.pos_embedding, std=0.02)
    for block in network.encoder.layers:
        attention = block.self_attention
        nn.init.xavier_uniform_(attention.in_proj_weight)
        nn.init.zeros_(attention.in_proj_bias)
        nn.init.zeros_(attention.out_proj.bias)
        for layer in block.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)
    nn.init.zeros_(network.heads.head.weight)
    nn.init.zeros_(network.heads.head.bias)

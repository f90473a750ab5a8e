"""Narrow networks of modern families: torchvision's layers and initialisation, whatever channels have left."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from lightning_prune import Budget, ConfigError, compact, plan_removal, save_compact, trace_channels
from lightning_prune.experiments import (
    convnext_cifar,
    efficientnet_cifar,
    mobilenet_v2_cifar,
    shaped_like,
    shufflenet_v2_cifar,
    vit_cifar,
)

BUILDERS = (mobilenet_v2_cifar, efficientnet_cifar, shufflenet_v2_cifar, convnext_cifar, vit_cifar)
IMAGES = torch.rand(2, 3, 32, 32)


def same(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("build", BUILDERS)
def test_logits_gradients_and_a_fresh_start(build: Callable[..., nn.Module]) -> None:
    torch.manual_seed(3)
    network = build(num_classes=7)
    logits = network(IMAGES)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    expected = copy.deepcopy(network).eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.add_(1)
    copied = pickle.loads(pickle.dumps(network))
    torch.manual_seed(3)
    copied.reset_parameters()  # of the copy, not of the original
    assert not same(network, expected)
    for other in (expected, copied):
        torch.manual_seed(3)
        other.reset_parameters()
    assert same(copied, expected)


@pytest.mark.parametrize("build", BUILDERS)
def test_width_scales_channels_and_costs(build: Callable[..., nn.Module]) -> None:
    sizes = [sum(p.numel() for p in build(width=width).parameters()) for width in (0.25, 0.5, 0.51, 1.0)]
    assert sizes == sorted(set(sizes))
    assert sizes[1] < 0.5 * sizes[3]
    with pytest.raises(ConfigError, match="width=0"):
        build(width=0)
    with pytest.raises(ConfigError, match="num_classes=1"):
        build(num_classes=1)


BLOCK = "encoder.layers.encoder_layer_1"
SPREADS: list[tuple[Callable[..., nn.Module], Callable[..., nn.Module], str]] = [
    (mobilenet_v2_cifar, models.mobilenet_v2, "features.3.conv.0.0.weight"),
    (mobilenet_v2_cifar, models.mobilenet_v2, "classifier.1.weight"),
    (efficientnet_cifar, models.efficientnet_b0, "features.3.0.block.0.0.weight"),
    (efficientnet_cifar, models.efficientnet_b0, "classifier.1.weight"),
    (shufflenet_v2_cifar, models.shufflenet_v2_x1_0, "stage3.1.branch2.0.weight"),
    (convnext_cifar, models.convnext_tiny, "features.1.0.block.3.weight"),
    (vit_cifar, models.vit_b_32, f"{BLOCK}.mlp.0.weight"),
    (vit_cifar, models.vit_b_32, f"{BLOCK}.self_attention.in_proj_weight"),
    (vit_cifar, models.vit_b_32, "encoder.pos_embedding"),
    (vit_cifar, models.vit_b_32, "heads.head.weight"),
]


def fan_scale(name: str, weight: torch.Tensor) -> float:
    """What each family's standard deviation is to be multiplied by, so that widths cancel."""
    outputs, inputs = weight.shape[0], weight[0].numel()
    if "mlp" in name or "in_proj" in name:
        return float((inputs + outputs) ** 0.5)  # Xavier
    if "branch2" in name:
        return float(inputs**0.5)  # torch's own
    if ".block.0.0" in name or ".conv.0.0" in name or "classifier.1" in name:
        return float(outputs**0.5)
    return 1.0


@pytest.mark.parametrize(("build", "original", "name"), SPREADS)
def test_spreads_are_those_of_torchvision(
    build: Callable[..., nn.Module], original: Callable[..., nn.Module], name: str
) -> None:
    torch.manual_seed(0)
    ours = build().get_parameter(name).detach()
    theirs = original(num_classes=10).get_parameter(name).detach()
    scaled = [tensor.std().item() * fan_scale(name, tensor) for tensor in (ours, theirs)]
    assert scaled[0] == pytest.approx(scaled[1], rel=0.1)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_network_that_lost_channels_starts_afresh(build: Callable[..., nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    pruned = build().eval()
    compact(pruned, plan_removal(trace_channels(pruned, IMAGES), Budget(macs=0.6)), IMAGES)
    save_compact(pruned, tmp_path / "compact.safetensors")
    torch.manual_seed(5)
    control = shaped_like(build(), tmp_path / "compact.safetensors")
    shapes = {name: tensor.shape for name, tensor in pruned.state_dict().items()}
    assert {name: tensor.shape for name, tensor in control.state_dict().items()} == shapes
    assert not same(control, pruned)
    assert control(IMAGES).shape == (2, 10)


def test_patches_fill_the_image() -> None:
    assert vit_cifar(image_size=16, patch_size=2)(torch.rand(1, 3, 16, 16)).shape == (1, 10)
    assert convnext_cifar(patch_size=2)(torch.rand(1, 3, 16, 16)).shape == (1, 10)
    with pytest.raises(ConfigError, match="image_size=30 must be a multiple of patch_size=4"):
        vit_cifar(image_size=30)

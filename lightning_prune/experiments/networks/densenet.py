"""DenseNet-40 for 32x32 images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.channels import ChannelSelection
from lightning_prune.errors import ConfigError
from lightning_prune.experiments.networks.init import check_classes, conv_normal, initialize, linear_normal, no_draws


class _DenseLayer(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution; its output is appended to its input."""

    def __init__(self, in_channels: int, growth: int, selection: bool) -> None:
        super().__init__()
        self.select = ChannelSelection(in_channels) if selection else nn.Identity()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images, self.conv(F.relu(self.bn(self.select(images))))], dim=1)


class _Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution of equal width, 2x2 average pooling."""

    def __init__(self, channels: int, selection: bool) -> None:
        super().__init__()
        self.select = ChannelSelection(channels) if selection else nn.Identity()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(self.select(images)))), 2)


class DenseNet40(nn.Module):
    """DenseNet-40 for CIFAR: three blocks of 12 dense layers, no bottlenecks, no compression.

    1,059,298 parameters with 10 classes (1,040,568 of them weights of convolutions and linear layers), 1,100,428 with
    100.

    Papers: Huang et al. 2017, arXiv:1608.06993; Liu et al. 2017 (Network Slimming), arXiv:1708.06519, whose width of
    the first convolution (twice the growth) and initialisation this follows: convolutions N(0, 2 / (k k out)),
    BatchNorm scales 0.5, linear layer N(0, 0.01^2).

    Args:
        num_classes: Outputs.
        growth: Channels that each dense layer adds.
        norm_scale: Initial scale of BatchNorm.
        selection: Put a :class:`ChannelSelection` before each BatchNorm, as Network Slimming does: each reader of the
            concatenated channels then loses its own.

    Shape:
        input: (N, 3, 32, 32); output: (N, num_classes) logits.

    Raises:
        ConfigError: ``num_classes`` below 2 or ``growth`` below 1.
    """

    def __init__(
        self, num_classes: int = 10, growth: int = 12, norm_scale: float = 0.5, selection: bool = False
    ) -> None:
        super().__init__()
        if growth < 1:
            raise ConfigError(f"growth={growth!r}: each dense layer must add at least one channel.")
        self.norm_scale = norm_scale
        channels = 2 * growth
        layers: list[nn.Module] = []
        with no_draws():
            self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
            for block in range(3):
                layers += [_Transition(channels, selection)] if block > 0 else []
                for _ in range(12):
                    layers.append(_DenseLayer(channels, growth, selection))
                    channels += growth
            self.features = nn.Sequential(*layers)
            self.select = ChannelSelection(channels) if selection else nn.Identity()
            self.bn = nn.BatchNorm2d(channels)
            self.linear = nn.Linear(channels, check_classes(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new initialisation: what building the network anew under the same seed would give."""
        initialize(self, conv=conv_normal, linear=linear_normal, norm_scale=self.norm_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        out = F.relu(self.bn(self.select(self.features(self.conv1(images)))))
        return self.linear(out.mean(dim=(2, 3)))

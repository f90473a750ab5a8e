"""Residual networks for 32x32 images: ResNet-20/32/56/110, and pre-activation ResNet-164 with bottlenecks."""

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.channels import ChannelSelection
from lightning_prune.experiments.networks.init import (
    check_classes,
    conv_normal,
    initialize,
    linear_normal,
    no_draws,
    scaled,
)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A): every second pixel, zero channels added."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        added = channels - in_channels
        self.padding = (0, 0, 0, 0, added // 2, added - added // 2)

    def forward(self, images: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        if self.stride > 1:
            images = F.pad(images[:, :, :: self.stride, :: self.stride], self.padding)
        return F.relu(out + images)


class _CifarResNet(nn.Module):
    """Three stages of ``blocks`` basic blocks, 16, 32 and 64 channels wide."""

    blocks: int

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        first, second, third = (scaled(channels, width) for channels in (16, 32, 64))
        with no_draws():
            self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(first)
            self.layer1 = self._stage(first, first, stride=1)
            self.layer2 = self._stage(first, second, stride=2)
            self.layer3 = self._stage(second, third, stride=2)
            self.linear = nn.Linear(third, check_classes(num_classes))
        self.reset_parameters()

    def _stage(self, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        rest = [_BasicBlock(channels, channels, 1) for _ in range(self.blocks - 1)]
        return nn.Sequential(_BasicBlock(in_channels, channels, stride), *rest)

    def reset_parameters(self) -> None:
        """Draw a new initialisation: what building the network anew under the same seed would give."""
        initialize(self, conv=nn.init.kaiming_normal_, linear=nn.init.kaiming_normal_)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        out = F.relu(self.bn1(self.conv1(images)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean(dim=(2, 3)))


class ResNet20(_CifarResNet):
    """CIFAR ResNet-20: 269,722 parameters with 10 classes (0.27M in the paper).

    A 3x3 convolution, three stages of basic blocks with 16, 32 and 64 channels, mean over positions, one linear layer.
    Shortcuts between stages have no parameters (option A). He-normal weights.

    Paper: He et al. 2016, arXiv:1512.03385, section 4.2.

    Args:
        num_classes: Outputs.
        width: Multiplies the channel counts.

    Shape:
        input: (N, 3, 32, 32); output: (N, num_classes) logits.

    Raises:
        ConfigError: ``num_classes`` below 2 or ``width`` not positive.
    """

    blocks = 3


class ResNet32(_CifarResNet):
    """CIFAR ResNet-32: 464,154 parameters with 10 classes (0.46M). See :class:`ResNet20`."""

    blocks = 5


class ResNet56(_CifarResNet):
    """CIFAR ResNet-56: 853,018 parameters with 10 classes (0.85M). See :class:`ResNet20`."""

    blocks = 9


class ResNet110(_CifarResNet):
    """CIFAR ResNet-110: 1,727,962 parameters with 10 classes (1.7M). See :class:`ResNet20`."""

    blocks = 18


class _PreActBottleneck(nn.Module):
    """BatchNorm, ReLU, convolution three times (1x1, 3x3, 1x1 to four times the channels) beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, project: bool, selection: bool) -> None:
        super().__init__()
        self.select = ChannelSelection(in_channels) if selection else nn.Identity()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, 4 * channels, 1, stride=stride, bias=False) if project else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(self.select(images))))
        out = self.conv2(F.relu(self.bn2(out)))
        return self.conv3(F.relu(self.bn3(out))) + self.shortcut(images)


class PreActResNet164(nn.Module):
    """Pre-activation ResNet-164 with bottlenecks for CIFAR, as Network Slimming prunes it; 1.70M parameters.

    Three stages of 18 blocks, 16, 32 and 64 channels inside, four times as many between blocks; a 1x1 convolution in
    the shortcut of each stage's first block; a last BatchNorm and ReLU before the mean over positions.

    Papers: He et al. 2016, arXiv:1603.05027; Liu et al. 2017, arXiv:1708.06519, whose initialisation this follows:
    convolutions N(0, 2 / (k k out)), BatchNorm scales 0.5, no biases in convolutions.

    Args:
        num_classes: Outputs.
        width: Multiplies the channel counts.
        norm_scale: Initial scale of BatchNorm.
        selection: Put a :class:`ChannelSelection` before the BatchNorm that opens each block and before the last one,
            as Network Slimming does: channels between blocks then stay, and each reader loses its own.

    Shape:
        input: (N, 3, 32, 32); output: (N, num_classes) logits.

    Raises:
        ConfigError: ``num_classes`` below 2 or ``width`` not positive.
    """

    def __init__(
        self, num_classes: int = 10, width: float = 1.0, norm_scale: float = 0.5, selection: bool = False
    ) -> None:
        super().__init__()
        self.norm_scale = norm_scale
        in_channels = scaled(16, width)
        with no_draws():
            self.conv1 = nn.Conv2d(3, in_channels, 3, padding=1, bias=False)
            stages = []
            for stage, channels in enumerate(scaled(c, width) for c in (16, 32, 64)):
                blocks = []
                for block in range(18):
                    stride = 2 if stage > 0 and block == 0 else 1
                    blocks.append(_PreActBottleneck(in_channels, channels, stride, block == 0, selection))
                    in_channels = 4 * channels
                stages.append(nn.Sequential(*blocks))
            self.layer1, self.layer2, self.layer3 = stages
            self.select = ChannelSelection(in_channels) if selection else nn.Identity()
            self.bn = nn.BatchNorm2d(in_channels)
            self.linear = nn.Linear(in_channels, check_classes(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new initialisation: what building the network anew under the same seed would give."""
        initialize(self, conv=conv_normal, linear=linear_normal, norm_scale=self.norm_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        out = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.linear(F.relu(self.bn(self.select(out))).mean(dim=(2, 3)))

"""VGG with BatchNorm for 32x32 images: the VGG-16 that HRank prunes, the VGG-19 that Network Slimming prunes."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_prune.experiments.networks.init import (
    check_classes,
    conv_normal,
    initialize,
    linear_normal,
    no_draws,
    scaled,
)


class _VGG(nn.Module):
    """Stages of 3x3 convolutions with BatchNorm and ReLU, 2x2 max-pooling between stages, mean over positions."""

    stages: Sequence[int]
    conv_bias: bool

    def __init__(self, num_classes: int, width: float, norm_scale: float) -> None:
        super().__init__()
        self.norm_scale = norm_scale
        layers: list[nn.Module] = []
        in_channels = 3
        with no_draws():
            for stage, depth in enumerate(self.stages):
                channels = scaled(min(64 * 2**stage, 512), width)
                layers += [nn.MaxPool2d(2)] if stage > 0 else []
                for _ in range(depth):
                    layers += [
                        nn.Conv2d(in_channels, channels, 3, padding=1, bias=self.conv_bias),
                        nn.BatchNorm2d(channels),
                        nn.ReLU(inplace=True),
                    ]
                    in_channels = channels
            self.features = nn.Sequential(*layers)
            self.classifier = self._classifier(in_channels, check_classes(num_classes))
        self.reset_parameters()

    def _classifier(self, channels: int, num_classes: int) -> nn.Module:
        return nn.Linear(channels, num_classes)

    def reset_parameters(self) -> None:
        """Draw a new initialisation: what building the network anew under the same seed would give."""
        initialize(self, conv=conv_normal, linear=linear_normal, norm_scale=self.norm_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))


class VGG16BN(_VGG):
    """VGG-16 with BatchNorm for CIFAR, one hidden layer of 512 in the classifier.

    14,982,474 parameters in convolutions and linear layers (HRank's 14.98M), 14,991,946 with those of BatchNorm.

    Papers: Simonyan and Zisserman 2015, arXiv:1409.1556; Lin et al. 2020 (HRank), arXiv:2002.10179. Convolutions are
    N(0, 2 / (k k out)), linear layers N(0, 0.01^2), biases 0.

    Args:
        num_classes: Outputs.
        width: Multiplies the channel counts.
        norm_scale: Initial scale of BatchNorm.

    Shape:
        input: (N, 3, H, W), H and W at least 16 (32 in the papers); output: (N, num_classes) logits.

    Raises:
        ConfigError: ``num_classes`` below 2 or ``width`` not positive.
    """

    stages = (2, 2, 3, 3, 3)
    conv_bias = True

    def __init__(self, num_classes: int = 10, width: float = 1.0, norm_scale: float = 1.0) -> None:
        super().__init__(num_classes, width, norm_scale)

    def _classifier(self, channels: int, num_classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(channels, channels),
            nn.BatchNorm1d(channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, num_classes),
        )


class VGG19BN(_VGG):
    """VGG-19 with BatchNorm for CIFAR as Network Slimming prunes it: 20,035,018 parameters with 10 classes (20.04M).

    No biases in convolutions, one linear layer. Convolutions are N(0, 2 / (k k out)), the linear layer N(0, 0.01^2),
    BatchNorm scales 0.5.

    Paper: Liu et al. 2017, arXiv:1708.06519, section 4.2.

    Args:
        num_classes: Outputs.
        width: Multiplies the channel counts.
        norm_scale: Initial scale of BatchNorm.

    Shape:
        input: (N, 3, H, W), H and W at least 16 (32 in the paper); output: (N, num_classes) logits.

    Raises:
        ConfigError: ``num_classes`` below 2 or ``width`` not positive.
    """

    stages = (2, 2, 4, 4, 4)
    conv_bias = False

    def __init__(self, num_classes: int = 10, width: float = 1.0, norm_scale: float = 0.5) -> None:
        super().__init__(num_classes, width, norm_scale)

"""The small networks: LeNet-300-100, Conv-2/4/6 of the lottery ticket hypothesis, and one for 8x8 digits."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_prune.experiments.networks.init import check_classes, initialize, no_draws, scaled


class LeNet300100(nn.Module):
    """Fully connected 784-300-100-10 network with ReLU; 266,610 parameters, 266,200 of them weights.

    Paper: Frankle and Carbin 2019, arXiv:1803.03635, figure 2 ("Lenet"); Gaussian Glorot weights, biases 0.

    Args:
        num_classes: Outputs.
        in_features: Inputs after flattening; 784 for 28x28 grey images.
        width: Multiplies the two hidden widths.

    Shape:
        input: (N, ...) with ``in_features`` values an image; output: (N, num_classes) logits.

    Raises:
        ConfigError: ``num_classes`` below 2 or ``width`` not positive.

    Example:
        >>> sum(p.numel() for p in LeNet300100().parameters())
        266610
    """

    def __init__(self, num_classes: int = 10, in_features: int = 784, width: float = 1.0) -> None:
        super().__init__()
        first, second = scaled(300, width), scaled(100, width)
        with no_draws():
            self.fc1 = nn.Linear(in_features, first)
            self.fc2 = nn.Linear(first, second)
            self.fc3 = nn.Linear(second, check_classes(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new initialisation: what building the network anew under the same seed would give."""
        initialize(self, conv=nn.init.xavier_normal_, linear=nn.init.xavier_normal_)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        hidden = self.fc1(images.flatten(1)).relu()
        return self.fc3(self.fc2(hidden).relu())


class MLP500300(nn.Module):
    """Fully connected 784-500-300-10 network with BatchNorm and ReLU; 546,610 parameters, 545,000 of them weights.

    Paper: Liu et al. 2017 (Network Slimming), arXiv:1708.06519, section 4.4 (MNIST). BatchNorm after both hidden layers
    scales their neurons. He-normal weights; scales 0.5 as in the authors' other networks.

    Args:
        num_classes: Outputs.
        in_features: Inputs after flattening; 784 for 28x28 grey images.
        width: Multiplies the two hidden widths.
        norm_scale: Initial scale of BatchNorm.

    Shape:
        input: (N, ...) with ``in_features`` values an image; output: (N, num_classes) logits.

    Raises:
        ConfigError: ``num_classes`` below 2 or ``width`` not positive.
    """

    def __init__(
        self, num_classes: int = 10, in_features: int = 784, width: float = 1.0, norm_scale: float = 0.5
    ) -> None:
        super().__init__()
        self.norm_scale = norm_scale
        first, second = scaled(500, width), scaled(300, width)
        with no_draws():
            self.fc1, self.bn1 = nn.Linear(in_features, first, bias=False), nn.BatchNorm1d(first)
            self.fc2, self.bn2 = nn.Linear(first, second, bias=False), nn.BatchNorm1d(second)
            self.fc3 = nn.Linear(second, check_classes(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new initialisation: what building the network anew under the same seed would give."""
        he = nn.init.kaiming_normal_
        initialize(self, conv=he, linear=he, norm_scale=self.norm_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        hidden = self.bn1(self.fc1(images.flatten(1))).relu()
        return self.fc3(self.bn2(self.fc2(hidden)).relu())


class _ConvNet(nn.Module):
    """Pairs of 3x3 convolutions, each followed by 2x2 max-pooling, then two hidden layers of 256."""

    channels: Sequence[int]

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        hidden = scaled(256, width)
        with no_draws():
            for channels in (scaled(c, width) for c in self.channels):
                layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
                layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
                in_channels, image_size = channels, image_size // 2
            self.features = nn.Sequential(*layers)
            self.classifier = nn.Sequential(
                nn.Linear(in_channels * image_size**2, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, check_classes(num_classes)),
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new initialisation: what building the network anew under the same seed would give."""
        initialize(self, conv=nn.init.xavier_normal_, linear=nn.init.xavier_normal_)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.classifier(self.features(images).flatten(1))


class Conv2(_ConvNet):
    """Conv-2 for CIFAR: two convolutions of 64 channels; 4.3M parameters. Arguments as :class:`Conv6`."""

    channels = (64,)


class Conv4(_ConvNet):
    """Conv-4 for CIFAR: two convolutions each of 64 and 128 channels; 2.4M parameters. Arguments as :class:`Conv6`."""

    channels = (64, 128)


class Conv6(_ConvNet):
    """Conv-6 for CIFAR: two convolutions each of 64, 128 and 256 channels; hidden layers 256-256; 2.3M parameters.

    Paper: Frankle and Carbin 2019, arXiv:1803.03635, figure 2; Gaussian Glorot weights, biases 0. The figure's layers
    hold 2,261,184 weights, 1.1M of them in convolutions as it says; the total it prints, 1.7M, does not follow.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
        image_size: Height and width of the images, pixels; halved (rounded down) by each pooling.
        width: Multiplies all hidden widths.

    Shape:
        input: (N, in_channels, image_size, image_size); output: (N, num_classes) logits.

    Raises:
        ConfigError: ``num_classes`` below 2 or ``width`` not positive.
    """

    channels = (64, 128, 256)


class SmallConvNet(nn.Module):
    """A quick convolutional network with BatchNorm for small grey images, such as scikit-learn's 8x8 digits.

    Three 3x3 convolutions (32, 64, 64 channels, BatchNorm, ReLU; the second halves the image), mean over positions,
    one linear layer. He-normal weights. Not from a paper.

    Args:
        num_classes: Outputs.
        in_channels: Channels of the images.
        width: Multiplies the channel counts.

    Shape:
        input: (N, in_channels, H, W), any H and W; output: (N, num_classes) logits.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        with no_draws():
            for channels, stride in ((32, 1), (64, 2), (64, 1)):
                out_channels = scaled(channels, width)
                layers += [
                    nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(),
                ]
                in_channels = out_channels
            self.features = nn.Sequential(*layers)
            self.classifier = nn.Linear(in_channels, check_classes(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new initialisation: what building the network anew under the same seed would give."""
        initialize(self, conv=nn.init.kaiming_normal_, linear=nn.init.kaiming_normal_)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))

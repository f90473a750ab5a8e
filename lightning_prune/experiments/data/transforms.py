"""What happens to a batch of images held as bytes: augmentation, then scaling to floats; whole batches at once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prune.errors import ConfigError


class Pixels:
    """Turn bytes into float32: pixel / 255, then (x - mean) / std by channel where those are given.

    Args:
        mean: One number a channel, in [0, 1].
        std: One number a channel, above 0.

    Shape:
        input: (N, C, H, W) uint8; output: the same, float32.

    Raises:
        ConfigError: Only one of the two is given, their lengths differ, or a deviation is not positive.
    """

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        self.scale: Tensor | None = None
        if mean is None and std is None:
            return
        if mean is None or std is None or len(mean) != len(std) or not all(deviation > 0 for deviation in std):
            raise ConfigError(f"mean={mean!r}, std={std!r}: expected one number a channel in both, deviations above 0.")
        deviation = torch.tensor(std).view(-1, 1, 1)
        self.scale, self.shift = 1 / (255 * deviation), torch.tensor(mean).view(-1, 1, 1) / deviation

    def __call__(self, images: Tensor) -> Tensor:
        """Scale a batch."""
        return images / 255 if self.scale is None else images.float().mul_(self.scale).sub_(self.shift)


class CropFlip:
    """Shift each image by up to ``padding`` pixels (black comes in from outside) and mirror half of them.

    The usual CIFAR augmentation. Every image has its own shift and flip, drawn from torch's global generator.

    Args:
        padding: Pixels added on each side before a window of the image's size is cut out.
        then: Applied to the result.

    Shape:
        input and output: (N, C, H, W), any type.
    """

    def __init__(self, padding: int = 4, then: Pixels | None = None) -> None:
        self.padding, self.then = padding, then

    def __call__(self, images: Tensor) -> Tensor:
        """Augment a batch."""
        count, channels, height, width = images.shape
        top, left = torch.randint(2 * self.padding + 1, (2, count, 1))
        mirrored = torch.randint(2, (count, 1), dtype=torch.bool)
        across = torch.arange(width)
        rows = top + torch.arange(height)
        columns = left + torch.where(mirrored, across.flip(0), across)
        pixels = rows.unsqueeze(2) * (width + 2 * self.padding) + columns.unsqueeze(1)
        pixels = pixels.view(count, 1, -1).expand(-1, channels, -1)
        images = F.pad(images, (self.padding,) * 4).flatten(2).gather(2, pixels).view(images.shape)
        return images if self.then is None else self.then(images)

"""A loader for data that fits in memory: tensors in, whole batches out, nothing per image in Python."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, RandomSampler, Sampler, SequentialSampler

from lightning_prune.errors import ConfigError

BatchTransform = Callable[[Tensor], Tensor]


class TensorLoader:
    """Serve images and labels held as tensors, a batch at a time.

    The order of an epoch is drawn when ``iter()`` is called, from torch's global generator, and so are the numbers a
    ``transform`` uses, batch by batch. So an epoch can be resumed in the middle: set the generator as it was before
    ``iter()``, iterate anew, drop the batches already seen. With several processes (``replicas`` above 1) each gets its
    share by torch's ``DistributedSampler``: the order follows from ``seed`` and the sampler's ``set_epoch``, which
    Lightning calls, and the first images are repeated until all shares are equally long.

    Args:
        images: (N, ...), any type.
        labels: (N,).
        batch_size: Images a batch (of this process).
        shuffle: Draw a new order for every epoch; else the given order, without copies.
        drop_last: Leave out a last batch that is not full.
        transform: Applied to the images of each batch: augmentation, scaling. Must draw only from torch's global
            generator.
        replicas: Processes that share the data.
        rank: Index of this process, below ``replicas``.
        seed: Seed of the order with several processes; the same in all of them.

    Raises:
        ConfigError: No images, lengths that differ, a batch size below 1, or no batch left after ``drop_last``.

    Example:
        >>> loader = TensorLoader(torch.zeros(10, 1, 8, 8), torch.zeros(10), batch_size=4)
        >>> [len(labels) for _, labels in loader]
        [4, 4, 2]
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        transform: BatchTransform | None = None,
        replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        if len(images) != len(labels) or len(images) == 0:
            raise ConfigError(
                f"{len(images)} images and {len(labels)} labels: expected one label an image, at least one."
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r}: expected a whole number of images, at least 1.")
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.transform = transform
        self.sampler = _sampler(len(images), shuffle, replicas, rank, seed)
        self.batch_sampler = None  # Lightning asks whoever has a sampler for this, too
        if len(self) == 0:
            raise ConfigError(
                f"no batch: {len(images)} images over {replicas} process(es) do not fill one batch of {batch_size} "
                "and drop_last=True; lower batch_size or set drop_last=False."
            )

    def __len__(self) -> int:
        """Batches an epoch."""
        count = len(self.sampler)  # type: ignore[arg-type]  # all three kinds have a length
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw the order now, not at the first batch; see the class."""
        order = None if isinstance(self.sampler, SequentialSampler) else torch.tensor(list(self.sampler))
        return self._batches(order)

    def _batches(self, order: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(len(self)):
            part = slice(index * self.batch_size, (index + 1) * self.batch_size)
            if order is None:
                images, labels = self.images[part], self.labels[part]
            else:
                chosen = order[part]
                images, labels = self.images.index_select(0, chosen), self.labels.index_select(0, chosen)
            yield (images if self.transform is None else self.transform(images)), labels


def _sampler(count: int, shuffle: bool, replicas: int, rank: int, seed: int) -> Sampler[int]:
    positions = range(count)  # the samplers only read its length
    if replicas > 1:
        return DistributedSampler(positions, replicas, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
    return RandomSampler(positions) if shuffle else SequentialSampler(positions)

"""Training images for a measurement inside a fit, drawn by a seed; the fit's own order of data is not touched."""

import random
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.callbacks.examples import arguments_of, to_batch
from lightning_prune.errors import ConfigError

_BATCH = 128


def share(images: int, trainer: pl.Trainer) -> int:
    """This process's part of a number of images."""
    return images // trainer.world_size + (trainer.global_rank < images % trainer.world_size)


def check_images(images: int, trainer: pl.Trainer) -> None:
    """See that there are so many training images, where their number is known.

    Raises:
        ConfigError: There are fewer.
    """
    loader = trainer.train_dataloader
    there = len(loader.dataset) if _can_be_indexed(loader) else None  # type: ignore[union-attr]
    if there is not None and images > there:
        raise ConfigError(f"images={images} asks for more than the {there} training images; ask for fewer.")


def _can_be_indexed(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def training_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, module: nn.Module, images: int, seed: int
) -> Iterator[Any]:
    """Batches of this process's share of the training images, as arguments of ``module``.

    A data set that can be indexed gives images at places drawn by ``seed``; any other loader is iterated under it.
    The global generators are set: the caller puts them back.

    Args:
        trainer: The trainer, in a fit.
        pl_module: Its module.
        module: What is going to be called.
        images: How many, over all processes.
        seed: Of the choice and of augmentation.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (a data set may draw from the global generator)
    torch.manual_seed(seed)
    loader: Any = trainer.train_dataloader
    if not _can_be_indexed(loader):
        for batch in loader:
            yield arguments_of(to_batch(batch, trainer, pl_module), module)
        return
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(seed))[:images]
    own = order[trainer.global_rank :: trainer.world_size].tolist()
    size = min(loader.batch_size or _BATCH, _BATCH)
    for first in range(0, len(own), size):
        batch = loader.collate_fn([loader.dataset[i] for i in own[first : first + size]])
        yield arguments_of(to_batch(batch, trainer, pl_module), module)

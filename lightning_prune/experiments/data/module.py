"""What the data modules over tensors share: splits held in memory, loaders over them."""

from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_prune.errors import ConfigError
from lightning_prune.experiments.data.loader import BatchTransform, TensorLoader


class Split(NamedTuple):
    """Images (N, ...) and their labels (N,), in one order."""

    images: Tensor
    labels: Tensor

    def take(self, chosen: Tensor) -> "Split":
        """The images and labels at the positions ``chosen``."""
        return Split(self.images[chosen], self.labels[chosen])


class Splits(NamedTuple):
    """Training, validation and test data."""

    train: Split
    val: Split
    test: Split


class TensorDataModule(LightningDataModule):
    """Hold the splits of a data set as tensors and serve them by :class:`TensorLoader`.

    A subclass gives ``num_classes`` and defines :meth:`load`.

    Args:
        batch_size: Images a training batch, of one process.
        eval_batch_size: Images a batch in validation and test.
        drop_last: Leave out a last training batch that is not full.
        watch_test: Give the test data as a second validation loader, so that it is shown (``watch_test_acc``) after
            every epoch; it chooses nothing.
        seed: Of the order of the training images with several processes.
    """

    num_classes: int
    train_transform: BatchTransform | None = None
    eval_transform: BatchTransform | None = None

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int = 1000,
        drop_last: bool = False,
        watch_test: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.watch_test, self.seed = watch_test, seed
        self._splits: Splits | None = None

    def load(self) -> Splits:
        """Read the data."""
        raise NotImplementedError

    @property
    def splits(self) -> Splits:
        """The data, read at the first use."""
        if self._splits is None:
            self._splits = self.load()
        return self._splits

    def setup(self, stage: str) -> None:
        """Read the data, so that a missing folder is reported before training starts."""
        _ = self.splits

    def train_dataloader(self) -> TensorLoader:
        """Shuffled (unless the Trainer is asked to overfit some batches) and augmented."""
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        return self._loader(self.splits.train, train=True, shuffle=not overfit)

    def train_eval_dataloader(self) -> TensorLoader:
        """Training data as evaluation sees data: in order, without augmentation."""
        return self._loader(self.splits.train)

    def val_dataloader(self) -> TensorLoader | list[TensorLoader]:
        """Validation data; with ``watch_test`` the test data as a second loader."""
        validation = self._loader(self.splits.val)
        return [validation, self._loader(self.splits.test)] if self.watch_test else validation

    def test_dataloader(self) -> TensorLoader:
        """Test data."""
        return self._loader(self.splits.test)

    def predict_dataloader(self) -> TensorLoader:
        """Test data, with its labels."""
        return self._loader(self.splits.test)

    def _loader(self, split: Split, train: bool = False, shuffle: bool = False) -> TensorLoader:
        share = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        return TensorLoader(
            split.images,
            split.labels,
            self.batch_size if train else self.eval_batch_size,
            shuffle=shuffle,
            drop_last=train and self.drop_last,
            transform=self.train_transform if train else self.eval_transform,
            replicas=share.get("num_replicas", 1),
            rank=share.get("rank", 0),
            seed=self.seed,
        )


def hold_out(full: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Split off ``count`` images drawn without replacement, the same ones for the same seed: (rest, held out).

    Raises:
        ConfigError: ``count`` leaves one of the two empty.
    """
    if not 0 < count < len(full.labels):
        raise ConfigError(
            f"val_size={count!r}: validation data must leave some of the {len(full.labels)} training images and take "
            "at least one (rounds of pruning are judged on it)."
        )
    order = torch.randperm(len(full.labels), generator=torch.Generator().manual_seed(seed))
    return full.take(order[count:].sort().values), full.take(order[:count].sort().values)

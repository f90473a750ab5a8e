"""Keeping the networks of a run's rounds, to compare what is measured inside with what is measured afterwards."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Keeper(Callback):
    """Keeps every round's trained network, of this process."""

    prune_order = -2

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: Any) -> None:
        self.kept.append({n: t.clone() for n, t in pl_module.state_dict().items()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_prune(trainer, pl_module, None)

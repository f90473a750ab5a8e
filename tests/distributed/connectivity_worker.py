"""One process of two that train together: barriers between rounds, and branches; started by torchrun."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import IterativeMagnitudePruner, LRRewind, RoundConnectivity, TrainTime, WeightRewind
from lightning_prune.instability.branches import BranchPoints, SGDNoise
from tests._helpers.keeping import Keeper
from tests._helpers.models import ToyModule, loaders, toy_data, toy_network

NETWORKS = "networks.pt"


def trainer(*callbacks: Callback) -> pl.Trainer:
    return pl.Trainer(
        callbacks=list(callbacks), accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip


class Answering(ToyModule):
    """Has a forward, as the default error needs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def statistic(module: Any) -> float:
    """Tells apart networks whose predictions are equal."""
    return float(module.network[1].running_mean.abs().sum())


def rounds(folder: Path, validated: bool) -> dict[str, Any]:
    torch.manual_seed(int(os.environ["RANK"]))
    folder = folder / ("validated" if validated else "own error")
    train, val = loaders()
    keeper = Keeper()
    measured = RoundConnectivity(points=3, dirpath=folder, error=None if validated else statistic)
    pruner = IterativeMagnitudePruner(fraction=0.5, rounds=2, verbose=False)
    fit = trainer(pruner, WeightRewind("0st"), LRRewind("0st"), keeper, measured)
    fit.fit(Answering(toy_network(norm=True)), train, val if validated else None)
    if fit.global_rank == 0:
        torch.save(keeper.kept, folder / NETWORKS)
    return {"rows": measured.rows, "means": [float(state["network.1.running_mean"].sum()) for state in keeper.kept]}


class Indexed(ToyModule):
    """Remembers which examples it saw."""

    def __init__(self) -> None:
        super().__init__(toy_network(dropout=0.2))
        self.seen: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, index = batch
        self.seen += index.tolist()
        return super().training_step([x, y], batch_idx)

    def train_dataloader(self) -> DataLoader:
        data = toy_data()
        x, y = data.tensors
        return DataLoader(TensorDataset(x, y, torch.arange(len(x))), 8, shuffle=True)


def branches(folder: Path) -> dict[str, Any]:
    points = BranchPoints([TrainTime.parse("0st"), TrainTime.parse("2st")], folder / "points")
    trainer(SGDNoise(), points).fit(Indexed())
    found: dict[str, Any] = {}
    for point in ("0st", "2st"):
        for name, seed in (("one", 1), ("again", 1), ("two", 2)):
            module = Indexed()
            trainer(SGDNoise(seed)).fit(module, ckpt_path=points.path(point))
            weights = torch.cat([p.detach().flatten() for p in module.parameters()])
            found[f"{point} {name}"] = {"seen": module.seen, "weights": weights.tolist()}
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {
        "validated": rounds(folder, True),
        "own error": rounds(folder, False),
        "branches": branches(folder),
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(results))

"""One process of fits that learn masks under DDP on gloo; started twice by the test, with the same free port."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_prune import LearnedSupermask, MaskSet, PruneError
from tests._helpers.models import ToyModule, loaders, trainer


class Seen(pl.Callback):
    """The mask that each layer computed with, batch by batch; what a process draws elsewhere changes nothing."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_rank == 1:
            torch.rand(3)  # the global generators differ
            pl_module.network[0].weight.sum()  # a stray reading, on one process only

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        weights = {name: pl_module.network[int(name)].weight.detach() for name in ("0", "2")}
        self.digests.append(MaskSet({name: weight != 0 for name, weight in weights.items()}).digest())


class Drifts(pl.Callback):
    """Moves one process's scores."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.network[0].get_parameter("weight_scores").neg_().add_(torch.rand(16, 12))


def run(folder: Path, job: str) -> dict[str, Any]:
    torch.manual_seed(0)
    module = ToyModule(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)))
    options: dict[str, Any] = {"method": "edge_popup", "density": 0.4, "init": "kaiming_normal"}
    if job in ("stochastic", "drifts"):
        options = {"method": "stochastic", "density": None, "rescale": True}
    learn, seen = LearnedSupermask(**options), Seen()
    torch.manual_seed(int(os.environ["RANK"]))
    strategy = DDPStrategy(process_group_backend="gloo")
    callbacks = [learn, seen, *([Drifts()] if job == "drifts" else [])]
    fitted = trainer(folder, callbacks, devices=2, strategy=strategy, max_epochs=2, logger=False)
    try:
        fitted.fit(module, *loaders())
    except PruneError as error:
        return {"error": str(error)}
    assert learn.masks is not None
    weights = [p.detach().flatten().tolist() for p in module.parameters()]
    return {"seen": seen.digests, "masks": learn.masks.digest(), "density": learn.masks.density, "weights": weights}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {job: run(folder / job, job) for job in sys.argv[2:]}
    (folder / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(results))

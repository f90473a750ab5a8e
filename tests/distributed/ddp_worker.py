"""One process of some fits under DDP on gloo; started twice by the test, with the same free port."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune import Budget, ChannelPruner, CostProfiler, LRRewind, TicketWriter, WeightRewind
from tests._helpers.channels import Chain, Watch, wide_network, widths
from tests._helpers.models import ToyModule, loaders, trainer


class Gradients(pl.Callback):
    """Sees that after every backward pass the processes have the same gradients, and that DDP's wrapper is new."""

    def __init__(self) -> None:
        self.sums: list[float] = []
        self.wrappers: set[int] = set()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        own = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
        other = own.clone()
        torch.distributed.broadcast(other, src=0)
        assert torch.equal(own, other), "gradients differ between processes"
        self.sums.append(float(own.abs().sum()))
        self.wrappers.add(id(trainer.strategy.model))


def chain() -> ToyModule:
    """Residual blocks without BatchNorm."""
    net = Chain()
    for name in net.names:
        getattr(net, name).bn = torch.nn.Identity()
    return ToyModule(net)


def module(norm: bool) -> ToyModule:
    net = wide_network()
    if not norm:  # without BatchNorm, whose statistics are each process's own, two processes equal one
        net[1] = net[5] = torch.nn.Identity()
    return ToyModule(net)


class Failing(ChannelPruner):
    """One process cannot score."""

    def score(self, trainer: pl.Trainer, pl_module: pl.LightningModule, graph: Any) -> Any:
        if trainer.global_rank == 1:
            raise ValueError("this process cannot score")
        return super().score(trainer, pl_module, graph)


def run(folder: Path, job: str) -> dict[str, Any]:
    norm = job != "equal"
    granularity = "block" if job == "blocks" else "channel"
    criterion, at = {"equal": ("l2", ["7st", "1ep"]), "failing": ("l2", "1ep")}.get(job, ("taylor", ["3st", "100%"]))
    budgets: Any = Budget(channels=0.5)
    kind = Failing if job == "failing" else ChannelPruner
    prune = kind(criterion, budgets, at, monitor="val_acc", verbose=False, granularity=granularity)
    watch, gradients = Watch(moving=False), Gradients()
    saver = ModelCheckpoint(folder / "ckpt", every_n_train_steps=4, save_top_k=-1)
    callbacks = [prune, watch, gradients, saver] + ([LRRewind("0st")] if job in ("rewound", "resumed", "wandb") else [])
    callbacks += [WeightRewind("2st"), LRRewind("2st")] if job == "blocks" else []
    more: dict[str, Any] = {}
    if job == "wandb":
        callbacks += [TicketWriter(), CostProfiler(seconds=0.01, verbose=False)]
        more["logger"] = WandbLogger(save_dir=folder, project="pruning", version="two", offline=True)
    strategy = DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=job == "equal")
    fitted = trainer(
        folder,
        callbacks,
        devices=2,
        strategy=strategy,
        max_epochs=2,
        enable_checkpointing=True,
        use_distributed_sampler=False,
        **more,
    )
    net = chain() if job == "blocks" else module(norm)
    found = sorted((folder / "ckpt").glob("*step=4-*.ckpt")) if job == "resumed" else []
    if job == "resumed":
        saver.dirpath = str(folder / "ckpt-resumed")
    whole, val = loaders()
    sampler = DistributedSampler(whole.dataset, 2, int(os.environ["RANK"]), shuffle=False)
    train = DataLoader(whole.dataset, 4, sampler=sampler)
    try:
        fitted.fit(net, train, val, ckpt_path=found[0] if found else None)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if job == "wandb":
        wandb.finish()
    return {
        "widths": widths(net),
        "left": [[entry["block"] for entry in event.plan.left] for event in watch.events],
        "steps": [event.step for event in watch.events],
        "digests": [event.plan.digest() for event in watch.events],
        "wrappers": len(gradients.wrappers),
        "gradients": gradients.sums,
        "weights": [p.detach().flatten().tolist() for p in net.parameters()],
        "folder": str(prune.folder),
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {job: run(folder / ("rewound" if job == "resumed" else job), job) for job in sys.argv[2:]}
    (folder / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(results))

"""The same fits on one process and on several, by any strategy; in float64, so that the order of sums weighs little."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from lightning_prune import (
    Budget,
    EarlyBird,
    HRankPruner,
    IterativeMagnitudePruner,
    LRRewind,
    SlimmingPruner,
    SlimmingRegularizer,
    SupermaskScorer,
    TicketWriter,
    WeightRewind,
)
from tests._helpers.channels import Residual, images, wide_network
from tests._helpers.models import ToyModule, sgd, toy_data, toy_network, trainer

BATCH = 8  # over all processes


def momentum(network: nn.Module) -> Any:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24), "interval": "step"}]


def adam(network: nn.Module) -> Any:
    return torch.optim.Adam(network.parameters(), lr=0.01)


class Task(ToyModule):
    """A module whose validation is that of all data, sharded if told to be."""

    def __init__(self, network: nn.Module | None = None, how: str = "", configure: Any = momentum) -> None:
        super().__init__((toy_network(norm=False) if network is None else network).double(), configure)
        self.how = how

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0].double(), batch[1]]

    def log(self, *args: Any, **options: Any) -> None:
        super().log(*args, sync_dist=True, **options)

    def configure_model(self) -> None:
        if self.how and not hasattr(self.network, "reshard"):
            shard(self.network, self.how, self.device_mesh)


def shard(network: nn.Module, how: str, mesh: Any) -> None:
    """Over the mesh's two dimensions as ``how`` says: "data", "tensor" or both."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    layers = [name for name, layer in network.named_children() if isinstance(layer, nn.Linear)]
    if "tensor" in how:
        plan: Any = {layers[0]: ColwiseParallel(), layers[1]: RowwiseParallel()}
        parallelize_module(network, mesh["tensor_parallel"], plan)
    if "data" in how:
        fully_shard(network.get_submodule(layers[0]), mesh=mesh["data_parallel"])
        fully_shard(network, mesh=mesh["data_parallel"])


def strategy(how: str, world: int, whole_checkpoints: bool = False) -> Any:
    if how == "one":
        return "auto"
    if how == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    tensor = {"data": 1, "tensor": world, "data and tensor": 2}[how]
    return ModelParallelStrategy(
        world // tensor, tensor, save_distributed_checkpoint=not whole_checkpoints, process_group_backend="gloo"
    )


def replicas(how: str, world: int) -> int:
    """How many different parts of a batch there are."""
    return {"one": 1, "tensor": 1, "data and tensor": world // 2}.get(how, world)


def data(world: int, train: Any = None, val: Any = None) -> tuple[DataLoader, DataLoader]:
    """Batches of 8 over all processes, shuffled alike whatever their number; by default 11, and one of 4."""
    train = Subset(toy_data(), range(92)) if train is None else train
    sampler = DistributedSampler(train, 1, 0, seed=0) if world == 1 else None  # Lightning's own is this one
    return DataLoader(train, BATCH // world, sampler=sampler), DataLoader(val or toy_data(32, seed=1), 16 // world)


class Cuts(pl.Callback):
    """Notes what each cut was, and sees that pruned entries hold 0 from then on, wherever they lie."""

    def __init__(self) -> None:
        self.digests: list[str] = []
        self.densities: list[float] = []
        self.masks: Any = None
        self.steps = 0

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: Any) -> None:
        self.masks = event.masks
        if trainer.is_global_zero:  # one process alone may ask: nothing of this is a collective any more
            self.digests.append(event.masks.digest())
            self.densities.append(event.density)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.masks is None:
            return
        self.steps += 1
        for name, parameter in pl_module.named_parameters():
            if name in self.masks:
                own, mask = part(parameter), part(self.masks[name])
                assert bool((own[~mask] == 0).all()), name
                assert not bool(mask.any()) or bool((own[mask] != 0).any()), name


def part(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def prune(
    folder: Path,
    how: str,
    world: int,
    whole_checkpoints: bool = False,
    resume: str = "",
    configure: Any = momentum,
    **options: Any,
) -> dict[str, Any]:
    """Two cuts with rewinding to step 3; what this process saw."""
    sharded = how not in ("one", "ddp")
    cuts, pruner = Cuts(), IterativeMagnitudePruner(0.3, 2, monitor="val_acc", verbose=False, **options)
    saver = ModelCheckpoint(folder / "ckpt", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    callbacks = [pruner, WeightRewind("3st"), LRRewind("3st"), TicketWriter(), cuts, saver]
    if "control" not in options:
        callbacks.append(EarlyBird(0.07, window=3, every="2st"))
    scorer = SupermaskScorer(["large_final", "random", "movement", "snip"], "signed_constant", "zero", "val_acc")
    fitted = trainer(
        folder,
        callbacks if sharded else [*callbacks, scorer],
        strategy=strategy(how, world, whole_checkpoints),
        devices=world,
        max_epochs=2,
        enable_checkpointing=True,
    )
    module = Task(how=how if sharded else "", configure=configure)
    if resume:
        saver.dirpath = str(folder / "ckpt-resumed")
    fitted.fit(module, *data(replicas(how, world)), ckpt_path=resume or None)
    return {
        "digests": cuts.digests,
        "densities": cuts.densities,
        "steps": cuts.steps,
        "folder": str(pruner.folder),
        "weights": {name: whole(p).tolist() for name, p in module.named_parameters()},
        "parts": {name: part(p).numel() for name, p in module.named_parameters()},
        "supermasks": [] if sharded else scorer.rows,
        "checkpoints": sorted(path.name for path in Path(str(saver.dirpath)).glob("*")),
    }


def record(folder: str) -> Any:
    """A run's record without what equal runs do not share."""
    content = json.loads((Path(folder) / "record.json").read_text())
    return {key: value for key, value in content.items() if key not in ("environment", "timing")}


class FrozenNorm(Task):
    """BatchNorm by its running statistics, which are the same on every process."""

    def on_train_epoch_start(self) -> None:
        self.train()

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()
        return self


class Wrappers(pl.Callback):
    """Notes the wrappers that steps go through, and the plans."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.plans: list[str] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.add(id(trainer.strategy.model))

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: Any) -> None:
        self.plans.append(event.plan.digest())


class SeenRanks(HRankPruner):
    """Keeps the scores of its cut."""

    def score(self, trainer: pl.Trainer, pl_module: pl.LightningModule, graph: Any) -> Any:
        scores = super().score(trainer, pl_module, graph)
        self.seen = {name: score.tolist() for name, score in scores.items()}
        return scores


def remove_channels(folder: Path, method: str, how: str, world: int) -> dict[str, Any]:
    """One cut by network slimming or HRank, and training on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, loaders = (Residual(), images()) if method == "hrank" else (wide_network(), None)
    callbacks: list[Any] = [SeenRanks(Budget(channels=0.5), at="1ep", images=20, monitor="val_acc", verbose=False)]
    if method == "slimming":
        pruner = SlimmingPruner(Budget(channels=0.5), at="7st", monitor="val_acc", verbose=False)
        callbacks = [SlimmingRegularizer(1e-2), pruner]
    wrappers = Wrappers()
    fitted = trainer(folder, [*callbacks, wrappers], strategy=strategy(how, world), devices=world, max_epochs=2)
    module = FrozenNorm(network, configure=sgd)
    fitted.fit(module, *data(world, *([loader.dataset for loader in loaders] if loaders else [])))
    return {
        "plans": wrappers.plans,
        "wrappers": len(wrappers.seen),
        "ranks": getattr(callbacks[0], "seen", {}),
        "folder": str(callbacks[-1].folder),
        "weights": {name: p.tolist() for name, p in module.named_parameters()},
    }

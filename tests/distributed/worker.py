"""One of several processes: runs the jobs that it is told, and writes what it saw. Started by `launch.py`."""

import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Subset

from lightning_prune import (
    Budget,
    ChannelPruner,
    CostProfiler,
    IterativeMagnitudePruner,
    SlimmingRegularizer,
    SupermaskScorer,
    WeightRewind,
    load_ticket,
)
from tests._helpers.models import sgd, toy_data, toy_network, trainer
from tests.distributed import selections
from tests.distributed.fits import (
    Task,
    adam,
    data,
    prune,
    remove_channels,
    shard,
    strategy,
    whole,
)


class Drift(pl.Callback):
    """One process's weights go their own way."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.add_(torch.randn_like(parameter))


def drift(folder: Path, world: int) -> Any:
    pruner = IterativeMagnitudePruner(0.3, 1, verbose=False)
    fitted = trainer(folder, [pruner, Drift()], strategy=strategy("ddp", world), devices=world, max_epochs=1)
    return error_of(lambda: fitted.fit(Task(), *data(world)))


def uneven(folder: Path, world: int) -> Any:
    """The last process has two batches, each other seven; then two for all."""
    rank = torch.distributed.get_rank()
    train = DataLoader(Subset(toy_data(), range(8) if rank == world - 1 else range(8, 36)), 4)
    errors = []
    for limit in (1.0, 2):
        fitted = trainer(
            folder,
            [IterativeMagnitudePruner(0.3, 1, verbose=False)],
            strategy=strategy("ddp", world),
            devices=world,
            max_epochs=1,
            logger=False,
            use_distributed_sampler=False,
            limit_train_batches=limit,
        )
        errors.append(error_of(lambda fitted=fitted: fitted.fit(Task(), train)))
    return errors


def refused(folder: Path, world: int) -> Any:
    """What does not work sharded says so before anything is trained."""
    rewound = WeightRewind("0st", reinit=True)
    groups: dict[str, list[Any]] = {
        "ChannelPruner": [ChannelPruner("l2", Budget(channels=0.5), at="1ep")],
        "SlimmingRegularizer": [SlimmingRegularizer(1e-4)],
        "SupermaskScorer": [IterativeMagnitudePruner(0.3, 1), SupermaskScorer(monitor="val_acc")],
        "CostProfiler": [IterativeMagnitudePruner(0.3, 1), CostProfiler()],
        "WeightRewind": [IterativeMagnitudePruner(0.3, 1), rewound],
        "counting": [IterativeMagnitudePruner(0.3, 1, counting="open_lth", verbose=False)],
    }
    found = {}
    for name, callbacks in groups.items():
        fitted = trainer(folder, callbacks, strategy=strategy("data", world), devices=world, max_epochs=1, logger=False)
        found[name] = error_of(lambda fitted=fitted: fitted.fit(Task(how="data", configure=sgd), *data(world)))
    return found


def apply_ticket(folder: Path, world: int) -> Any:
    """A ticket of one process, loaded into a network that is sharded over these."""
    from torch.distributed.device_mesh import init_device_mesh

    network = toy_network(seed=5, norm=False).double()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    shard(network, "data and tensor", mesh)
    module = Task(network)
    load_ticket(folder / "one.safetensors").apply_(module)
    weights = {name: whole(p).tolist() for name, p in module.named_parameters()}
    rewind = WeightRewind("0st")
    of_one: Any = {"callbacks": {rewind.state_key: {"snapshot": dict(toy_network().named_parameters())}}}
    fitting: Any = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    return {"weights": weights, "resumed": error_of(lambda: rewind.on_load_checkpoint(fitting, module, of_one))}


def error_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def resume_from(folder: Path) -> str:
    """The last checkpoint of round 1."""
    found = folder.glob("ckpt/step=*-round01.ckpt")
    return str(max(found, key=lambda path: int(path.name.split("=")[1].split("-")[0])))


JOBS: dict[str, Callable[[Path, int], Any]] = {
    "ddp": lambda folder, world: prune(folder / "ddp", "ddp", world),
    "drift": lambda folder, world: drift(folder / "drift", world),
    "slimming": lambda folder, world: remove_channels(folder / "slimming", "slimming", "ddp", world),
    "hrank": lambda folder, world: remove_channels(folder / "hrank", "hrank", "ddp", world),
    "uneven": lambda folder, world: uneven(folder / "uneven", world),
    "data": lambda folder, world: prune(folder / "data", "data", world),
    "data resumed": lambda folder, world: prune(folder / "data", "data", world, resume=resume_from(folder / "data")),
    "tensor": lambda folder, world: prune(folder / "tensor", "tensor", world, control="random_pruning"),
    "both": lambda folder, world: prune(folder / "both", "data and tensor", world, configure=adam),
    "both resumed": lambda folder, world: prune(
        folder / "both", "data and tensor", world, resume=resume_from(folder / "both"), configure=adam
    ),
    "whole": lambda folder, world: prune(folder / "whole", "data", world, whole_checkpoints=True),
    "whole resumed": lambda folder, world: prune(
        folder / "whole", "data", world, whole_checkpoints=True, resume=resume_from(folder / "whole")
    ),
    "refused": lambda folder, world: refused(folder / "refused", world),
    "ticket": apply_ticket,
    "selection": lambda folder, world: selections.check(folder, world),
}


def main(folder: Path, world: int, jobs: list[str]) -> None:
    found = {}
    try:
        for job in jobs:
            begin = time.perf_counter()
            torch.manual_seed(0)
            found[job] = JOBS[job](folder, world)
            print(f"{job}: {time.perf_counter() - begin:.1f} s", flush=True)
    except BaseException:
        found["failure"] = f"{job}: {traceback.format_exc()}"
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.part").write_text(json.dumps(found))
    (folder / f"{rank}.part").rename(folder / f"{rank}.json")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

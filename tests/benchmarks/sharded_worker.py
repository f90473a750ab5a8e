"""One of several processes: selects over sharded weights, or takes masked steps. Started by test_sharded.py."""

import json
import pickle
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from lightning_prune import IterativeMagnitudePruner
from lightning_prune.scores import MagnitudeScores
from lightning_prune.selection import select
from tests.benchmarks.test_masked_step import Switch
from tests.distributed.fits import strategy

TENSORS = 100
ROUNDS = 21


class Traffic:
    """Counts what this process gives to collectives, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0
        for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "send"):
            self._watch(name, getattr(torch.distributed, name))

    def _watch(self, name: str, original: Any) -> None:
        def counted(*args: Any, **options: Any) -> Any:
            given = args[1] if name == "all_gather_object" else args[0]
            is_tensor = isinstance(given, Tensor)
            self.bytes += given.numel() * given.element_size() if is_tensor else len(pickle.dumps(given))
            return original(*args, **options)

        setattr(torch.distributed, name, counted)


def weights(side: int, first: int = 0, last: int | None = None) -> dict[str, Tensor]:
    """Rows of 100 tensors of ``side`` by ``side``, each drawn by its number."""
    parts = {}
    for number in range(TENSORS):
        whole = torch.randn(side, side, generator=torch.Generator().manual_seed(number))
        parts[f"w{number:03d}"] = whole[first:last].clone()
    return parts


def selection(side: int) -> dict[str, Any]:
    """By turns on this process's shards alone and on all together, while the others do the same."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mesh, traffic = init_device_mesh("cpu", (world,)), Traffic()
    rows = side // world
    parts = weights(side, rank * rows, (rank + 1) * rows)
    sharded = {name: DTensor.from_local(part, mesh, [Shard(0)], run_check=False) for name, part in parts.items()}
    taken: dict[str, list[float]] = {"alone": [], "together": [], "cpu alone": [], "cpu together": []}
    for _ in range(ROUNDS):
        for how, tensors in (("alone", parts), ("together", sharded)):
            torch.distributed.barrier()
            traffic.bytes = 0
            begin, busy = time.perf_counter(), time.process_time()
            masks = select(MagnitudeScores(tensors), density=0.2)
            taken[how].append(time.perf_counter() - begin)
            taken[f"cpu {how}"].append(time.process_time() - busy)
    sent = traffic.bytes
    return taken | {"sent": sent, "kept": masks.kept, "digest": masks.digest()}


class Network(pl.LightningModule):
    """ResNet-18, sharded block by block if told to be."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.network, self.how = resnet18(), how

    def configure_model(self) -> None:
        if self.how != "data" or hasattr(self.network, "reshard"):
            return
        from torch.distributed.fsdp import fully_shard

        for layer in (self.network.layer1, self.network.layer2, self.network.layer3, self.network.layer4):
            for block in layer:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def steps(how: str, world: int) -> dict[str, float]:
    """64x64, batch 16 a process: steps with and without masks by turns, in one fit."""
    torch.manual_seed(0)
    prune = IterativeMagnitudePruner(0.8, 1, verbose=False)
    switch = Switch(prune)
    batches = [(torch.randn(16, 3, 64, 64), torch.randint(1000, (16,))) for _ in range(24)]
    fit = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy(how, world),
        max_epochs=1,
        callbacks=[prune, switch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    fit.fit(Network(how), DataLoader(batches, batch_size=None))
    return {"masked": statistics.median(switch.masked[2:]), "unmasked": statistics.median(switch.dense[2:])}


def main(folder: Path, world: int, what: str, size: int) -> None:
    torch.set_num_threads(1)
    if what == "selection":
        torch.distributed.init_process_group("gloo")
    found = selection(size) if what == "selection" else [steps(what, world) for _ in range(size)]
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))

"""What masks and rewinding cost in checkpoints and in memory."""

import gc
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD

from lightning_prune import IterativeMagnitudePruner, LRRewind, WeightRewind
from tests._helpers.models import ToyModule, loaders, trainer


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 2000), nn.ReLU(), nn.Linear(2000, 3))


def plain_sgd(net: nn.Module) -> SGD:
    return SGD(net.parameters(), 0.1)


def checkpoint_size(folder: Path, callbacks: list[Any]) -> int:
    saver = ModelCheckpoint(folder / "ckpt", save_top_k=-1, every_n_epochs=1)
    run = trainer(folder, [*callbacks, saver], max_epochs=2, enable_checkpointing=True)
    run.fit(ToyModule(wide(), plain_sgd), *loaders())
    return max((folder / "ckpt").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns).stat().st_size


@pytest.mark.filterwarnings("ignore:cut .* removes the last weights")
def test_a_checkpoint_grows_by_one_bit_a_weight_and_one_snapshot(tmp_path: Path) -> None:
    dense = checkpoint_size(tmp_path / "dense", [])
    prune = IterativeMagnitudePruner(0.3, 3, verbose=False)
    masked = checkpoint_size(tmp_path / "masked", [prune])
    rewound = checkpoint_size(
        tmp_path / "rewound", [IterativeMagnitudePruner(0.3, 3, verbose=False), WeightRewind("0st"), LRRewind("0st")]
    )
    weights = 12 * 2000 + 2000 * 3
    snapshot = 4 * (weights + 2003)
    state = 60_000  # generators (5 kB twice), position, record: the same for a network of any size
    assert weights // 8 <= masked - dense < weights // 8 + state
    assert snapshot <= rewound - masked < snapshot + state


@pytest.mark.slow
def test_memory_is_flat_over_twenty_rounds(tmp_path: Path) -> None:
    held: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.is_last_batch:
                gc.collect()
                found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
                held.append(sum({t.data_ptr(): t.untyped_storage().nbytes() for t in found}.values()))

    callbacks = [IterativeMagnitudePruner(0.2, 20, verbose=False), WeightRewind("0st"), LRRewind("0st"), Count()]
    trainer(tmp_path, callbacks, max_epochs=1).fit(ToyModule(wide(), plain_sgd), *loaders())
    assert len(held) == 21
    assert held[1] - held[0] >= 4 * 30_000  # the masks, once there is something to mask
    assert max(held[2:]) - held[1] < 4_000, held

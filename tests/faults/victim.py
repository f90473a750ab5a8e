"""A run that kills itself: ``python -m tests.faults.victim FOLDER KILL_AT [SEED]``; resumes from FOLDER's checkpoint.

KILL_AT is the number of training batches after which this process sends itself SIGKILL (0: never). A finished run
leaves ``end.pt``: weights, optimizer, masks, learning rates.
"""

import os
import random
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset

from lightning_prune import IterativeMagnitudePruner, LRRewind, TicketWriter, WeightRewind
from tests._helpers.models import ToyModule, toy_data, toy_network

EPOCHS, ROUNDS = 3, 2


class Augmented(Dataset):
    """Each item is disturbed by three kinds of random numbers."""

    def __init__(self) -> None:
        self.x, self.y = toy_data().tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn(12) + random.gauss(0, 0.1) + float(np.random.randn()) * 0.1  # noqa: NPY002
        return self.x[i] + noise.float(), self.y[i]


class Killer(pl.Callback):
    def __init__(self, after: int) -> None:
        self.after, self.seen = after, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def configure(net: torch.nn.Module, steps: int) -> Any:
    optimizer = SGD(net.parameters(), 0.1, momentum=0.9)
    scheduler = OneCycleLR(optimizer, 0.2, total_steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(folder: Path, kill_at: int, seed: int = 0) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pl.seed_everything(seed, verbose=False)
    prune = IterativeMagnitudePruner(0.3, ROUNDS, verbose=False, monitor="val_loss", mode="min")
    # one kind of run is EPOCHS epochs long, the other ends inside an epoch and validates every five batches
    whole = seed == 0
    steps = 36 if whole else 31
    module = ToyModule(toy_network(seed=seed, dropout=0.2), lambda net: configure(net, steps))
    inside = {"max_steps": steps, "val_check_interval": 5, "check_val_every_n_epoch": None}
    length: dict[str, Any] = {"max_epochs": EPOCHS} if whole else inside
    to = "40%" if whole else "45%"  # step 14 of both
    home = folder / "run" / "v"
    files = home / "checkpoints"
    saver = ModelCheckpoint(files, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    at_end = ModelCheckpoint(files, filename="{epoch}-end", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        **length,
        logger=CSVLogger(folder, name="run", version="v"),
        callbacks=[prune, WeightRewind(to), LRRewind(to), TicketWriter(), Killer(kill_at), saver, at_end],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    train = DataLoader(Augmented(), 8, shuffle=True, num_workers=2 if whole else 0)
    found = sorted(files.glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    trainer.fit(module, train, DataLoader(toy_data(32, seed=1), 16), ckpt_path=found[-1] if found else None)
    end = {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "masks": prune.masks.state_dict(),
        "step": trainer.global_step,
    }
    torch.save(end, folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:]))

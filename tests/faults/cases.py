"""Small fits with every callback, which can be killed anywhere and resumed from the checkpoints they leave."""

import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset

from lightning_prune import (
    Budget,
    ChannelPruner,
    CostProfiler,
    EarlyBird,
    HRankPruner,
    IterativeMagnitudePruner,
    LearnedSupermask,
    LRRewind,
    RoundConnectivity,
    SlimmingPruner,
    SlimmingRegularizer,
    SupermaskScorer,
    TicketWriter,
    WeightRewind,
)
from tests._helpers.channels import Chain
from tests._helpers.models import ToyModule, toy_data, toy_network

EPOCHS = 3
RUN = Path("run", "v")


class Augmented(Dataset):
    """Each item is disturbed by three kinds of random numbers."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.x, self.y = toy_data(48).tensors
        self.shape = shape

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn(12) + random.gauss(0, 0.1) + float(np.random.randn()) * 0.1  # noqa: NPY002
        return (self.x[i] + noise.float()).reshape(self.shape), self.y[i]


class Images(nn.Module):
    """Two convolutions and a hidden layer: something to remove for every criterion."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.hidden, self.last = nn.Linear(8 * 12, 12), nn.Linear(12, 3)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.last(self.dropout(self.hidden(x.flatten(1)).relu()))


class Classifier(ToyModule):
    """A module that can be called, as connectivity and costs need it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Synchronised(Classifier):
    """Validates over all processes, each of which reads BatchNorm statistics of its own."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True)


class Killer(pl.Callback):
    """Sends a signal to its own process after so many batches."""

    def __init__(self, after: int, number: int = signal.SIGKILL) -> None:
        self.after, self.number, self.seen = after, number, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.after:
            os.kill(os.getpid(), self.number)


class Forgetful(pl.Callback):
    """Draws random numbers that no checkpoint holds, and moves a weight by them: no kill can be hidden."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        with torch.no_grad():
            next(pl_module.parameters())[0] += 0.01 * torch.randn((), generator=self.generator)


class Raises(pl.Callback):
    """Fails in a hook, the nth time it comes."""

    def __init__(self, hook: str, time: int, error: BaseException) -> None:
        self.left = time

        def fail(*_: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise error

        setattr(self, hook, fail)


def one_cycle(net: nn.Module, steps: int) -> Any:
    optimizer = SGD(net.parameters(), 0.1, momentum=0.9)
    scheduler = OneCycleLR(optimizer, 0.2, total_steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def adam(net: nn.Module, steps: int) -> Any:
    return Adam(net.parameters(), 0.01)


def imp(**options: Any) -> IterativeMagnitudePruner:
    return IterativeMagnitudePruner(**({"fraction": 0.3, "rounds": 2, "verbose": False} | options))


Callbacks = Callable[[], list[pl.Callback]]


@dataclass(frozen=True)
class Case:
    """One fit. ``steps`` and ``epochs`` are the length of one training; one of them is the Trainer's limit."""

    callbacks: Callbacks
    images: bool = False
    network: Callable[[], nn.Module] | None = None
    """Instead of the ones for images and for rows."""
    configure: Callable[[nn.Module, int], Any] = one_cycle
    steps: int = 6 * EPOCHS
    trainer: dict[str, Any] = field(default_factory=dict)
    workers: int = 0
    module: type[ToyModule] = Classifier
    every: int = 4
    """Steps between checkpoints."""
    at_epoch_end: bool = True
    """Whether one is written there too."""
    ddp: dict[str, Any] = field(default_factory=dict)


_WHOLE = [0.7, 0.5]
CASES: dict[str, Case] = {
    "lottery": Case(
        lambda: [
            imp(), WeightRewind("40%"), LRRewind("40%"), TicketWriter(), RoundConnectivity(points=3),
            CostProfiler(latency=False, verbose=False),
        ],
    ),
    "lottery, inside epochs": Case(
        lambda: [imp(), WeightRewind("45%"), LRRewind("45%"), TicketWriter()],
        steps=16,
        trainer={"max_steps": 16, "max_epochs": -1, "val_check_interval": 5, "check_val_every_n_epoch": None},
    ),
    "lottery, data workers": Case(lambda: [imp(), WeightRewind("1ep"), LRRewind("1ep"), TicketWriter()], workers=2),
    "supermask": Case(
        lambda: [
            imp(scope="layer"), WeightRewind("0st"), LRRewind("0st"),
            SupermaskScorer(["large_final", "magnitude_increase", "snip", "random"], monitor="val_acc"),
        ],
    ),
    "re-initialisation": Case(lambda: [imp(), WeightRewind("0st", reinit=True), LRRewind("0st"), TicketWriter()]),
    "learning-rate rewinding": Case(
        lambda: [imp(), LRRewind("0st"), TicketWriter(), EarlyBird(0.15, window=3, every="2st")]
    ),
    "fine-tuning, random pruning": Case(lambda: [imp(control="random_pruning"), TicketWriter()], configure=adam),
    "slimming": Case(
        lambda: [
            SlimmingRegularizer(1e-3),
            SlimmingPruner([Budget(channels=x) for x in _WHOLE], at=["50%", "100%"], verbose=False),
            LRRewind("0st"), TicketWriter(),
        ],
        images=True,
    ),
    "slimming, gates": Case(
        lambda: [
            SlimmingRegularizer(1e-3, update="proximal", gates=True),
            SlimmingPruner([Budget(channels=x) for x in _WHOLE], at=["40%", "70%"], verbose=False), TicketWriter(),
        ],
        images=True,
        configure=adam,
    ),
    "hrank": Case(
        lambda: [
            HRankPruner(Budget(channels=0.5), at="60%", images=16, verbose=False), TicketWriter(),
            CostProfiler(latency=False, verbose=False),
        ],
        images=True,
    ),
    "hrank, layer by layer": Case(
        lambda: [
            HRankPruner(rates=[0.5, 0.5], at=["30%", "70%"], layerwise=True, images=16, verbose=False), TicketWriter(),
        ],
        images=True,
        configure=adam,
    ),
    "channels, taylor": Case(
        lambda: [
            ChannelPruner(
                "taylor", [Budget(channels=x) for x in _WHOLE], at=["50%", "100%"], taylor_steps=4, verbose=False
            ),
            LRRewind("0st"), TicketWriter(), CostProfiler(latency=False, verbose=False),
        ],
        images=True,
    ),
    "channels, from first weights": Case(
        lambda: [
            ChannelPruner("l2", Budget(channels=0.5), at="100%", verbose=False), WeightRewind("0st"), LRRewind("0st"),
            TicketWriter(),
        ],
        images=True,
    ),
}  # fmt: skip
CASES["blocks, taylor"] = Case(
    lambda: [
        ChannelPruner(
            "taylor",
            [Budget(channels=x) for x in (0.67, 0.34)],
            at=["50%", "100%"],
            taylor_steps=4,
            granularity="block",
            verbose=False,
        ),
        WeightRewind("1ep"),
        LRRewind("1ep"),
        TicketWriter(),
    ],
    network=Chain,
)
CASES["learned supermask"] = Case(lambda: [LearnedSupermask("edge_popup", 0.5)], configure=adam)
CASES["learned supermask, stochastic"] = Case(lambda: [LearnedSupermask("stochastic", None)], configure=adam)
SYNCHRONISED = "lottery, synchronised validation"
CASES[SYNCHRONISED] = Case(
    lambda: [imp(), LRRewind("1ep"), TicketWriter()],
    module=Synchronised,
    every=6,
    ddp={"broadcast_buffers": False},
    at_epoch_end=False,
)
FORGETFUL = "a callback that forgets"
HIDDEN = {FORGETFUL: Case(lambda: [imp(), TicketWriter(), Forgetful()])}
"""Not for those who count cases: it must be found to differ."""
TOGETHER = (
    "lottery",
    SYNCHRONISED,
    "supermask",
    "slimming",
    "slimming, gates",
    "hrank, layer by layer",
    "channels, taylor",
    "blocks, taylor",
)
"""Cases that are run on two processes too."""


def newest(folder: Path) -> Path | None:
    """The last completed checkpoint of a run, by the step it was written at."""
    found = []
    for path in (folder / RUN / "checkpoints").glob("*.ckpt"):
        step = torch.load(path, weights_only=True, map_location="cpu")["global_step"]
        found.append((step, path.stat().st_mtime_ns, path))
    return max(found)[2] if found else None


def fit(
    case: Case,
    folder: Path,
    checkpoint: Path | None,
    *extra: pl.Callback,
    seed: int = 0,
    world: int = 1,
    module: pl.LightningModule | None = None,
    **options: Any,
) -> pl.Trainer:
    """Train ``case`` to its end, from ``checkpoint`` if there is one; leaves ``end.pt`` in ``folder``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # what is resumed takes nothing from the seed, but DistributedSampler's own is Lightning's
    pl.seed_everything(seed if checkpoint is None or world > 1 else seed + 100, verbose=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Images() if case.images else toy_network(seed=seed, dropout=0.2)
        net = net if case.network is None else case.network()
    module = module or case.module(net, lambda part: case.configure(part, case.steps))
    files = folder / RUN / "checkpoints"
    savers = [
        ModelCheckpoint(files, every_n_train_steps=case.every, save_top_k=-1, filename="{step}"),
    ]
    if case.at_epoch_end:
        savers.append(ModelCheckpoint(files, filename="{epoch}-end", save_top_k=-1, save_on_train_epoch_end=True))
    callbacks = case.callbacks()
    length: dict[str, Any] = {} if "max_steps" in case.trainer else {"max_epochs": EPOCHS}
    spread: dict[str, Any] = {}
    if world > 1:
        spread = {"devices": world, "strategy": pl.strategies.DDPStrategy(process_group_backend="gloo", **case.ddp)}
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": CSVLogger(folder, name=RUN.parts[0], version=RUN.parts[1]),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = pl.Trainer(
        callbacks=[*callbacks, *extra, *savers], **(settings | length | case.trainer | spread | options)
    )
    shape = (1, 3, 4) if case.images else (12,)
    train = DataLoader(Augmented(shape), 8 // world, shuffle=True, num_workers=case.workers)
    x, y = toy_data(32, seed=1).tensors
    val = DataLoader(torch.utils.data.TensorDataset(x.reshape(-1, *shape), y), 16)
    trainer.fit(module, train, val, ckpt_path=checkpoint)
    if trainer.is_global_zero:
        end = {
            "weights": module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "rows": {type(c).__name__: c.rows for c in callbacks if hasattr(c, "rows")},
            "masks": [c.masks.state_dict() for c in callbacks if getattr(c, "masks", None) is not None],
        }
        torch.save(end, folder / "end.tmp")
        os.replace(folder / "end.tmp", folder / "end.pt")
    return trainer


def wait_for(path: Path, seconds: float) -> bool:
    """Whether a file appears in time."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return path.exists()

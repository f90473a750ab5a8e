"""Fits that log everything that happens, write checkpoints wherever Lightning can, and are resumed from them."""

import random
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from lightning_prune.resume import ResumeState

BATCHES = 6  # of 4 samples


class KillAfter(Callback):
    """Save at the end of an epoch, and end the fit there with an error."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("killed")


class Noisy(Dataset):
    """Augments with all three global generators."""

    def __init__(self, size: int = 4 * BATCHES, noise: float = 0.1) -> None:
        self.x = torch.randn(size, 5, generator=torch.Generator().manual_seed(0))
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(5) + random.gauss(0, 1) + float(np.random.standard_normal())  # noqa: NPY002
        return self.x[index] + self.noise * noise, self.x[index].sum()


def noisy_loaders(**options: Any) -> tuple[Any, Any]:
    return DataLoader(Noisy(), **({"shuffle": True, "batch_size": 4} | options)), DataLoader(Noisy(8), 4)


@dataclass(frozen=True)
class Case:
    """One way to train; ``options`` go to the Trainer."""

    name: str
    scheduler: Callable[[SGD], Any] | None = None
    manual: bool = False
    loaders: Callable[[], tuple[Any, Any]] = noisy_loaders
    callbacks: Callable[[], list[pl.Callback]] = list
    options: dict[str, Any] = field(default_factory=dict)
    module: "type[Net] | None" = None


class Owner(pl.Callback):
    """A callback that owns a ResumeState and only delegates."""

    def __init__(self, before_epoch: Callable[[pl.Trainer, ResumeState], None] | None = None) -> None:
        self.resume = ResumeState()
        self.before_epoch = before_epoch

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.resume.attach(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.before_epoch is not None:
            self.before_epoch(trainer, self.resume)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.resume.detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.resume.detach()

    def state_dict(self) -> dict[str, Any]:
        return self.resume.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.resume.load_state_dict(state_dict)


@dataclass
class Saved:
    """A checkpoint: the hook that wrote it, and how many events and which weights came before it."""

    hook: str
    path: Path
    events: int
    weights: Tensor


class SaveEverywhere(Checkpoint):
    """Writes a checkpoint in some hooks; Lightning calls it after the other callbacks, like ModelCheckpoint."""

    HOOKS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")

    def __init__(self, folder: Path, hooks: Iterable[str] = HOOKS) -> None:
        self.folder, self.saved = folder, list[Saved]()
        for hook in hooks:
            setattr(self, hook, lambda trainer, module, *args, hook=hook: self.save(trainer, module, hook))

    def save(self, trainer: pl.Trainer, module: "Net", hook: str) -> None:
        accumulating = hook == "on_train_batch_end" and trainer.fit_loop._should_accumulate()
        if trainer.sanity_checking or accumulating:
            return
        path = self.folder / f"{len(self.saved)}-{hook}.ckpt"
        self.saved.append(Saved(hook, path, len(module.events), module.weights()))
        trainer.save_checkpoint(path, weights_only=False)


class Net(pl.LightningModule):
    """Dropout, BatchNorm, logged values and a torchmetric, and a list of everything that happened."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.mean_loss = MeanMetric()
        self.automatic_optimization = not case.manual
        self.events: list[tuple[Any, ...]] = []

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().flatten().cpu() for parameter in self.network.parameters()])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        x, y = batch
        loss = F.mse_loss(self.network(x).squeeze(1), y)
        self.mean_loss(loss)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(x))
        self.log("worst", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("mean_loss", self.mean_loss, on_step=False, on_epoch=True)
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        seen = (x.double().sum().item(), loss.item(), lr, self.trainer.is_last_batch)
        self.events.append(("train", self.current_epoch, batch_idx, *seen))
        if not self.case.manual:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.mse_loss(self.network(x).squeeze(1), y))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            loss = self.trainer.callback_metrics["val_loss"].item()
            self.events.append(("validation", self.current_epoch, self.global_step, loss))

    def on_train_epoch_end(self) -> None:
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        self.events.append(("epoch end", self.current_epoch, self.global_step, sorted(metrics.items())))

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.02, momentum=0.9)
        if self.case.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.case.scheduler(optimizer)}


@dataclass
class Run:
    """What a fit left behind."""

    events: list[tuple[Any, ...]]
    state: dict[str, Tensor]
    weights: Tensor
    saved: list[Saved]
    trainer: pl.Trainer


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002


def fit(
    case: Case,
    folder: Path,
    *,
    seeded: int = 1,
    checkpoint: Path | None = None,
    owners: Iterable[pl.Callback] | None = None,
    hooks: Iterable[str] = SaveEverywhere.HOOKS,
    after: Callable[[pl.Trainer], None] | None = None,
    **options: Any,
) -> Run:
    """Train a fresh module in a fresh trainer; ``owners=()`` leaves it to Lightning alone."""
    seed(seeded)
    net = (case.module or Net)(case)
    train, val = case.loaders()
    saver = SaveEverywhere(folder, hooks)
    owners = [Owner()] if owners is None else owners
    defaults = {"max_epochs": 2, "num_sanity_val_steps": 1, "accelerator": "cpu"}
    trainer = pl.Trainer(
        callbacks=[saver, *owners, *case.callbacks()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **(defaults | case.options | options),
    )
    trainer.fit(net, train, val, ckpt_path=checkpoint)
    if after is not None:
        after(trainer)
    return Run(net.events, final_state(trainer, net), net.weights(), saver.saved, trainer)


def final_state(trainer: pl.Trainer, net: Net) -> dict[str, Tensor]:
    """Weights, buffers, optimizer state, LR, counters."""
    state = {f"model.{name}": value.clone() for name, value in net.state_dict().items()}
    optimizer = trainer.optimizers[0].state_dict()
    for index, group in enumerate(optimizer["param_groups"]):
        state[f"lr.{index}"] = torch.tensor([group["lr"], group["momentum"]], dtype=torch.float64)
    for key, values in optimizer["state"].items():
        state |= {f"optimizer.{key}.{name}": v.clone() for name, v in values.items() if isinstance(v, Tensor)}
    counters = (trainer.global_step, trainer.current_epoch, trainer.fit_loop.epoch_loop._batches_that_stepped)
    state["counters"] = torch.tensor(counters)
    return state


def check_resumed(full: Run, resumed: Run, saved: Saved) -> None:
    """The resumed fit did exactly what was left to do, and ended in exactly the same state."""
    where = saved.path.name
    left = full.events[saved.events :]
    for index, (expected, event) in enumerate(zip(left, resumed.events, strict=False)):
        assert event == expected, f"{where}: event {index} after resuming is {event}, not {expected}"
    assert len(resumed.events) == len(left), f"{where}: {len(resumed.events)} events after resuming, not {len(left)}"
    assert full.state.keys() == resumed.state.keys()
    unequal = [name for name in full.state if not torch.equal(full.state[name], resumed.state[name])]
    assert not unequal, f"{where}: not equal at the end: {unequal}"


def check_moved(full: Run, saved: Saved) -> bool:
    """Whether training was left to do; if so, the weights moved, so that equality at the end means something."""
    trains = any(event[0] == "train" for event in full.events[saved.events :])
    assert trains == (not torch.equal(full.weights, saved.weights)), (
        f"{saved.path.name}: weights moved without training?"
    )
    return trains


def plain_resume(case: Case, folder: Path, saved: Saved) -> Run:
    """Resume with Lightning alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(case, folder, seeded=99, checkpoint=saved.path, owners=(), hooks=())

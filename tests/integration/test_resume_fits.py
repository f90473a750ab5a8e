"""A fit killed and resumed from any of its checkpoints goes on bit for bit as the one that was not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, lr_scheduler

from tests._helpers.resuming import Case, Net, Saved, check_moved, check_resumed, fit, noisy_loaders, plain_resume


def per_epoch(optimizer: SGD) -> Any:
    return lr_scheduler.StepLR(optimizer, 1, 0.7)


def per_step(optimizer: SGD) -> Any:
    return {"scheduler": lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}


def one_cycle(optimizer: SGD) -> Any:
    return {"scheduler": lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40), "interval": "step"}


def plateau(optimizer: SGD, monitor: str = "val_loss", interval: str = "epoch") -> Any:
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.8, threshold=0.3)
    return {"scheduler": scheduler, "monitor": monitor, "interval": interval}


def plateau_train(optimizer: SGD) -> Any:
    return plateau(optimizer, "train_loss_epoch")


def plateau_step(optimizer: SGD) -> Any:
    return plateau(optimizer, "train_loss_step", "step")


class AsksForSteps(Net):
    """Builds its schedule from the trainer's estimate, which makes Lightning set the data up early."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.02, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": lr_scheduler.OneCycleLR(optimizer, 0.1, steps), "interval": "step"}]


class DrawsFirst(Net):
    """Draws random numbers between the first iterator and the first batch, as initialisation code may."""

    def on_train_start(self) -> None:
        torch.rand(3)


def two_workers() -> tuple[Any, Any]:
    return noisy_loaders(num_workers=2)


CASES = [
    Case("plain"),
    Case("validation within the epoch", per_step, options={"val_check_interval": 2}),
    Case("accumulation", one_cycle, options={"accumulate_grad_batches": 2, "val_check_interval": 2}),
    Case("plateau on validation", plateau, options={"val_check_interval": 0.5}),
    Case("plateau on the epoch's training loss", plateau_train),
    Case("plateau per step", plateau_step, options={"val_check_interval": 4}),
    Case("manual optimisation", manual=True),
    Case("a limit in steps", per_epoch, options={"max_steps": 14, "max_epochs": -1}),
    Case("a limit in steps at an epoch's end", plateau, options={"max_steps": 12, "max_epochs": -1}),
    Case("no validation", per_epoch, options={"limit_val_batches": 0}),
    Case("no validation, a limit in steps", options={"limit_val_batches": 0, "max_steps": 14, "max_epochs": -1}),
    Case("validation every second epoch", plateau_train, options={"check_val_every_n_epoch": 2, "max_epochs": 3}),
    Case("validation by total batches", options={"check_val_every_n_epoch": None, "val_check_interval": 4}),
    Case("reloaded data", options={"reload_dataloaders_every_n_epochs": 1}),
    Case("data set up early", module=AsksForSteps),
    Case("numbers drawn before the first batch", module=DrawsFirst),
    Case("a part of the data", options={"limit_train_batches": 4, "limit_val_batches": 1}),
    Case("workers", plateau, loaders=two_workers, options={"val_check_interval": 3}),
]


def spread(checkpoints: list[Saved]) -> list[Saved]:
    """The first, second and last checkpoint of each hook, which are those around an epoch's beginning and end."""
    chosen = []
    for hook in {saved.hook: None for saved in checkpoints}:
        of_hook = [saved for saved in checkpoints if saved.hook == hook]
        middle = len(of_hook) // 2  # about where the second epoch begins
        chosen += [
            of_hook[index] for index in sorted({0, middle - 1, middle, len(of_hook) - 1} & set(range(len(of_hook))))
        ]
    return chosen


def check_case(case: Case, folder: Path, choose: Callable[[list[Saved]], list[Saved]] = list) -> None:
    """Checkpoints of one fit, and that Lightning alone would have failed."""
    full = fit(case, folder)
    hooks = {saved.hook for saved in full.saved}
    assert hooks >= {"on_train_batch_end", "on_train_epoch_end"}
    plain_differs = set()
    for saved in choose(full.saved):
        check_resumed(full, fit(case, folder / "resumed", seeded=99, checkpoint=saved.path, hooks=()), saved)
        if check_moved(full, saved) and saved.hook not in plain_differs:
            with pytest.raises((AssertionError, MisconfigurationException), match=r"after resuming|not equal|Reduce"):
                check_resumed(full, plain_resume(case, folder / "plain", saved), saved)
            plain_differs.add(saved.hook)
    assert plain_differs == hooks


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_a_resumed_fit_goes_on_bit_for_bit(case: Case, tmp_path: Path) -> None:
    check_case(case, tmp_path, spread)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_every_checkpoint_goes_on_bit_for_bit(case: Case, tmp_path: Path) -> None:
    check_case(replace(case, options={"max_epochs": 3} | case.options), tmp_path)


MATRIX = [
    Case(
        f"{scheduler.__name__ if scheduler else 'constant'}-{workers}w-x{accumulate}-{interval}",
        scheduler,
        loaders=two_workers if workers else noisy_loaders,
        options={"accumulate_grad_batches": accumulate, "val_check_interval": interval},
    )
    for scheduler in (None, per_step, per_epoch, one_cycle, plateau)
    for workers in (0, 2)
    for accumulate in (1, 2)
    for interval in (1.0, 2)
]


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
def test_matrix(case: Case, tmp_path: Path) -> None:
    check_case(case, tmp_path)


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=["main process", "workers"])
def test_a_fit_is_the_same_with_and_without_it(case: Case, tmp_path: Path) -> None:
    with_it = fit(case, tmp_path)
    without = fit(case, tmp_path, owners=())
    other = fit(case, tmp_path, seeded=2)
    assert with_it.events == without.events
    assert all(torch.equal(with_it.state[name], without.state[name]) for name in without.state)
    assert with_it.events != other.events

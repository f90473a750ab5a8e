"""EarlyBird: rounds end when masks have settled, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD, lr_scheduler

from lightning_prune import (
    ConfigError,
    EarlyBird,
    IterativeMagnitudePruner,
    LRRewind,
    ResumeError,
    RunRecord,
    WeightRewind,
)
from tests._helpers.models import ToyModule, loaders, trainer
from tests._helpers.resuming import Case, check_moved, check_resumed, fit
from tests.integration.test_resume_fits import per_epoch, per_step

STEPS = 12  # an epoch


def pruner(**options: Any) -> IterativeMagnitudePruner:
    return IterativeMagnitudePruner(**({"fraction": 0.3, "rounds": 2, "verbose": False} | options))


def constant(rate: float) -> Callable[[nn.Module], Any]:
    return lambda net: SGD(net.parameters(), lr=rate, momentum=0.9)


def cosine(net: nn.Module) -> Any:
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule = {"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, 8 * STEPS), "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": schedule}


class Rates(pl.Callback):
    """The learning rate of every step, and the weights at every check that a NumPy reference is computed from."""

    def __init__(self, every: int) -> None:
        self.every, self.rates, self.weights = every, dict[int, list[float]](), dict[tuple[int, int], np.ndarray]()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        prune = next(c for c in trainer.callbacks if isinstance(c, IterativeMagnitudePruner))
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.rates.setdefault(prune.schedule.round, []).append(rate)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        schedule = next(c for c in trainer.callbacks if isinstance(c, IterativeMagnitudePruner)).schedule
        if (steps := schedule.steps_done(trainer)) % self.every == 0:
            flat = [p.detach().numpy().ravel() for p in pl_module.parameters() if p.ndim == 2]
            self.weights[schedule.round, steps] = np.concatenate(flat)


def rounds_of(folder: Path) -> list[Any]:
    return RunRecord.read(folder / "run" / "version_0").rounds


@pytest.mark.parametrize("first", [True, False], ids=["before the pruner", "after it"])
def test_a_round_ends_when_its_masks_have_settled(tmp_path: Path, first: bool) -> None:
    bird, watch = EarlyBird(0.05, window=3, every="5st"), Rates(5)
    callbacks = [bird, pruner(), WeightRewind("3st"), LRRewind("3st"), watch]
    run = trainer(tmp_path, callbacks if first else [*callbacks[1:], bird], max_epochs=8)
    run.fit(ToyModule(configure=cosine), *loaders())
    rounds = rounds_of(tmp_path)
    assert [row.stopped_early for row in rounds] == [True, True, False]
    assert all(row.steps % 5 == 0 and 15 <= row.steps < 96 for row in rounds[:2])
    assert rounds[2].steps == 8 * STEPS  # the last trains in full
    lengths = [len(rates) for rates in watch.rates.values()]
    assert lengths == [rounds[0].steps, rounds[1].steps - 3, 93]
    full = [0.05 * (1 + np.cos(np.pi * step / 96)) for step in range(96)]
    for number, rates in watch.rates.items():  # the schedule of a full training, from the rewinding point on
        start = 3 if number else 0
        assert rates == pytest.approx(full[start : start + len(rates)], rel=1e-6)
    check_distances(rounds, watch, window=3, threshold=0.05)
    assert all("val_loss" in row.metrics for row in rounds)


def check_distances(rounds: list[Any], watch: Rates, window: int, threshold: float) -> None:
    """Against NumPy: the smallest 30 % of what is left leave."""
    kept = np.ones(240, dtype=bool)
    for row in rounds[:-1]:
        assert row.kept == kept.sum()
        masks: list[np.ndarray] = []
        expected = []
        for (number, steps), weights in watch.weights.items():
            if number != row.round:
                continue
            leave = round(0.3 * int(kept.sum()))
            order = np.argsort(np.where(kept, np.abs(weights), np.inf), kind="stable")
            mask = kept.copy()
            mask[order[:leave]] = False
            masks = [*masks, mask][-window:]
            if len(masks) > 1:
                far = max(np.count_nonzero(mask & ~earlier) for earlier in masks[:-1])
                expected.append((steps, far / mask.sum()))
        settled = [d <= threshold and i >= window - 2 for i, (_, d) in enumerate(expected)]
        assert [steps for steps, _ in row.mask_distances] == [steps for steps, _ in expected]
        assert [d for _, d in row.mask_distances] == pytest.approx([d for _, d in expected], rel=1e-12)
        assert settled == [False] * (len(settled) - 1) + [True]
        kept = masks[-1]


def test_masks_that_do_not_settle_take_the_whole_round(tmp_path: Path) -> None:
    run = trainer(tmp_path / "with", [pruner(), EarlyBird(1e-9, window=3, every="3st")], max_epochs=2)
    module = ToyModule(configure=constant(0.5))
    run.fit(module, *loaders())
    plain = ToyModule(configure=constant(0.5))
    trainer(tmp_path / "without", [pruner()], max_epochs=2).fit(plain, *loaders())
    rounds = rounds_of(tmp_path / "with")
    assert [row.stopped_early for row in rounds] == [False] * 3
    assert [len(row.mask_distances) for row in rounds] == [6, 6, 0]  # the end itself, and the last round, need none
    assert all(distance > 1e-9 for row in rounds for _, distance in row.mask_distances)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, module.state_dict()[name]), f"checks changed {name}"


def test_the_minimum_and_the_rewinding_point_hold(tmp_path: Path) -> None:
    callbacks = [pruner(), WeightRewind("2ep"), LRRewind("2ep"), EarlyBird(0.29, window=2, every="2st")]
    run = trainer(tmp_path / "point", callbacks, max_epochs=4)
    run.fit(ToyModule(), *loaders())
    assert [row.steps for row in rounds_of(tmp_path / "point")] == [28, 28, 48]
    run = trainer(tmp_path / "minimum", [pruner(), EarlyBird(0.29, 2, "2st")], max_epochs=4, min_epochs=3)
    run.fit(ToyModule(), *loaders())
    assert [row.steps for row in rounds_of(tmp_path / "minimum")] == [40, 40, 48]


def test_checks_once_an_epoch(tmp_path: Path) -> None:
    saver = ModelCheckpoint(monitor="val_loss")
    callbacks = [pruner(), EarlyBird(0.29, window=2), saver]
    run = trainer(tmp_path, callbacks, max_epochs=4, enable_checkpointing=True, accumulate_grad_batches=2)
    run.fit(ToyModule(), *loaders())
    rounds = rounds_of(tmp_path)
    assert [row.steps for row in rounds] == [12, 12, 24]  # two epochs of six steps
    assert [row.best["step"] for row in rounds[:2]] <= [12, 12]
    method = RunRecord.read(tmp_path / "run" / "version_0").method
    assert method["EarlyBird"] == {"distance": 0.29, "window": 2, "every": "1ep"}


CASES = [
    ("1ep", Case("a schedule per epoch", per_epoch, options={"max_epochs": 4})),
    ("2st", Case("a schedule per step", per_step, options={"max_steps": 20, "max_epochs": -1})),
    (None, Case("validation inside epochs, no rewinding", options={"val_check_interval": 2, "max_epochs": 3})),
]


@pytest.mark.parametrize(("to", "case"), CASES, ids=lambda value: value.name if isinstance(value, Case) else value)
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path, to: str | None, case: Case) -> None:
    rows: list[Any] = []

    def owners() -> list[Any]:
        prune = pruner(monitor="val_loss", mode="min")
        rows.append(prune)
        rewind = [WeightRewind(to), LRRewind(to)] if to else []
        return [prune, *rewind, EarlyBird(0.12, window=3, every="2st")]

    full = fit(case, tmp_path, owners=owners())
    expected = [row.to_json() for row in rows[0].record.rounds]
    assert any(row["stopped_early"] for row in expected)
    moved = []
    for saved in full.saved[3::12] + full.saved[-1:]:
        resumed = fit(case, tmp_path / "resumed", seeded=99, checkpoint=saved.path, hooks=(), owners=owners())
        check_resumed(full, resumed, saved)
        assert [row.to_json() for row in rows[-1].record.rounds] == expected
        moved.append(check_moved(full, saved))
    assert any(moved)


def test_other_settings_are_not_resumed(tmp_path: Path) -> None:
    case = Case("short", options={"max_epochs": 3})
    full = fit(case, tmp_path, owners=[pruner(), EarlyBird(0.1, 3, "1st")])
    with pytest.raises(ResumeError, match=r"written with distance=0.1, this run has distance=0.2"):
        fit(case, tmp_path, checkpoint=full.saved[0].path, hooks=(), owners=[pruner(), EarlyBird(0.2, 3, "1st")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": 0}, r"distance=0: expected the part of kept weights"),
        ({"distance": 1.0}, r"distance=1.0: expected"),
        ({"distance": True}, r"distance=True: expected"),
        ({"window": 1}, r"window=1: expected how many masks"),
        ({"window": 2.5}, r"window=2.5: expected"),
        ({"every": "0st"}, r"every='0st': expected the time between two checks"),
        ({"every": "often"}, r"every='often' is not a time"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EarlyBird(**options)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([], r"none is among the trainer's callbacks"),
        ([pruner(fraction=0.1)], r"distance=0.1 is met by chance: a cut removes 0.1"),
        ([pruner(masks_from="elsewhere")], r"masks_from='elsewhere' takes them from an earlier run"),
        ([pruner(control="random_pruning")], r"control='random_pruning' draws them"),
        ([pruner(criterion="snip")], r"criterion='snip' does not look at trained weights"),
    ],
)
def test_what_cannot_settle_is_refused(tmp_path: Path, callbacks: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, [*callbacks, EarlyBird(every="1st")], max_epochs=2).fit(ToyModule(), *loaders())


def test_checks_and_schedules_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"could never act: a round of 24 steps has 1 checks before its end"):
        trainer(tmp_path / "a", [pruner(), EarlyBird()], max_epochs=2).fit(ToyModule(), *loaders())
    with pytest.raises(ConfigError, match=r"without LRRewind the learning rates"):
        trainer(tmp_path / "b", [pruner(), EarlyBird(every="1st")], max_epochs=8).fit(
            ToyModule(configure=cosine), *loaders()
        )
    module = ToyModule()
    schedule = {"interval": "epoch", "frequency": 2}
    module.configure = lambda net: (  # type: ignore[assignment]
        lambda o: {"optimizer": o, "lr_scheduler": schedule | {"scheduler": lr_scheduler.StepLR(o, 1)}}
    )(SGD(net.parameters(), 0.1))
    callbacks = [pruner(), LRRewind("2ep"), EarlyBird(every="1st")]
    with pytest.raises(ConfigError, match=r"StepLR steps every 2 epochs of the fit"):
        trainer(tmp_path / "c", callbacks, max_epochs=4).fit(module, *loaders())

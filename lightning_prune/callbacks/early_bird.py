"""Ends a round once the masks that its cut would choose have settled."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_prune.callbacks.company import compare_ranks
from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.folders import tries_out
from lightning_prune.callbacks.logs import log_numbers
from lightning_prune.callbacks.magnitude import IterativeMagnitudePruner
from lightning_prune.callbacks.resuming import require_same_settings, taking_up
from lightning_prune.callbacks.rewind import LRRewind
from lightning_prune.errors import ConfigError
from lightning_prune.scores import CRITERIA
from lightning_prune.settling import MaskWindow
from lightning_prune.times import TrainTime


class EarlyBird(Callback):
    """Bring the next cut forward once the masks that it would choose have settled; the last round trains in full.

    Every ``every`` of training the masks are selected that a cut would choose now. Once the newest of ``window`` such
    masks is no further than ``distance`` from each of the others, the round ends with this step: it is validated, and
    the cut follows at the start of the next epoch. Each round begins with an empty window. No round ends before its
    rewinding point, or the Trainer's ``min_epochs`` and ``min_steps``; the one after the last cut never ends early.
    Learning rates are those of full rounds as far as a round goes, and :class:`LRRewind` sets them back at the cut.

    The distance is the part of the kept weights that two masks exchange (:func:`mask_distance`). By chance it is the
    ``fraction`` that a cut removes, so ``distance`` must lie below that.

    Acts in: ``on_train_batch_end`` (check; logs ``prune/mask_distance``). Changes nothing but the round's end. A check
    costs one selection and ``window - 1`` comparisons (LeNet-300-100 9 ms, ResNet-50 0.35 s; an AMD EPYC core), and
    ``window`` bytes of memory for each prunable weight.

    Paper: You et al. 2020, arXiv:1909.11957, whose code compares the newest mask of five with the four before it, once
    an epoch, and stops when no distance is over 0.1. Deviations: weights instead of BatchNorm channels, and every round
    instead of the only one; distances are over kept entries, not all of them.

    Args:
        distance: The largest distance at which masks count as settled, in (0, 1) and below the pruner's ``fraction``.
            Default 0.1 (the authors' code).
        window: How many masks must agree, at least 2. Default 5 (the authors' code).
        every: Time between checks, counted from the start of one training: ``"1ep"`` (default, the authors' code),
            ``"250st"``, ``"5%"``. Distances grow with it.

    State saved: the masks of the window (1 bit a weight each). The record has the distances of each round
    (``mask_distances``), and ``stopped_early`` with the round's ``steps``.

    Raises:
        ConfigError: An argument out of range; in ``setup``: no :class:`IterativeMagnitudePruner` beside it, or one
            whose masks do not come from trained weights (``masks_from``, ``control``, criteria of initial weights or
            gradients), a ``distance`` that chance would meet; in ``on_train_start``: too few checks in a round, or
            schedulers without :class:`LRRewind`, which would stay where the first round was broken off.
        ResumeError: A checkpoint of other settings.

    Example:
        >>> from lightning_prune import EarlyBird, IterativeMagnitudePruner, LRRewind, WeightRewind
        >>> prune = IterativeMagnitudePruner(fraction=0.2, rounds=10)
        >>> callbacks = [prune, WeightRewind("3%"), LRRewind("3%"), EarlyBird(distance=0.05, every="250st")]
    """

    def __init__(self, distance: float = 0.1, window: int = 5, every: str = "1ep") -> None:
        number = isinstance(distance, int | float) and not isinstance(distance, bool)
        if not number or not 0 < distance < 1:
            raise ConfigError(f"distance={distance!r}: expected the part of kept weights that may differ, in (0, 1).")
        if isinstance(window, bool) or not isinstance(window, int) or window < 2:
            raise ConfigError(f"window={window!r}: expected how many masks are compared, an integer of at least 2.")
        self.distance, self.window = float(distance), window
        self.every = TrainTime.parse(every, "every")
        if self.every.value == 0:
            raise ConfigError(f"every={every!r}: expected the time between two checks, more than nothing.")
        self._masks = MaskWindow(window)
        self._checked = 0  # checks passed since the start of one training
        self._pruner: IterativeMagnitudePruner | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the pruner, or refuse."""
        if stage != "fit":
            return
        self._masks.clear()
        self._checked = 0
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._pruner = next((c for c in callbacks if isinstance(c, IterativeMagnitudePruner)), None)
        if self._pruner is None:
            raise ConfigError(
                "EarlyBird ends rounds of IterativeMagnitudePruner, and none is among the trainer's callbacks. Add "
                "one; rounds of other pruners end early with EarlyStopping."
            )
        _require_learned_masks(self._pruner)
        if self.distance >= self._pruner.fraction:
            raise ConfigError(
                f"distance={self.distance:g} is met by chance: a cut removes {self._pruner.fraction:g} of the weights, "
                "and masks drawn at random differ by that much. Choose a distance well below it."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that checks fit into a round, and schedules are set back after one."""
        if trainer.lr_scheduler_configs and not any(isinstance(c, LRRewind) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError(
                "EarlyBird may break the first round off, and without LRRewind the learning rates of all later rounds "
                "stay where that leaves them. Add LRRewind, or train at a constant rate."
            )
        for config in trainer.lr_scheduler_configs:
            if config.interval == "epoch" and config.frequency > 1:
                raise ConfigError(
                    f"{type(config.scheduler).__name__} steps every {config.frequency} epochs of the fit, and rounds "
                    "that EarlyBird ends may have any number: its places would differ. Step it every epoch."
                )
        if not tries_out(trainer):
            self._check_length(trainer)

    def _check_length(self, trainer: pl.Trainer) -> None:
        schedule, every = self._require_pruner().schedule, self._every()
        total, start = schedule.total_steps, 0
        if not total or not trainer.lightning_module.automatic_optimization:
            return
        if schedule.rounds > 1 and schedule.rewind_to is not None:
            start = schedule.rewind_to.in_steps(total, schedule.steps_per_epoch)
        checks = (total - 1) // every - start // every
        if checks < self.window:
            raise ConfigError(
                f"EarlyBird(window={self.window}, every='{self.every}') could never act: a round of {total - start} "
                f"steps has {checks} checks before its end, one every {every} steps. Check more often, such as "
                f"every='{max(1, (total - start) // (4 * self.window))}st'."
            )

    def _every(self) -> int:
        """Steps between checks."""
        schedule = self._require_pruner().schedule
        if self.every.unit == "%" and not schedule.total_steps:
            raise ConfigError(f"every='{self.every}': the length of this training in steps is not known; give steps.")
        return max(1, self.every.in_steps(schedule.total_steps, schedule.steps_per_epoch))

    def _require_pruner(self) -> IterativeMagnitudePruner:
        assert self._pruner is not None
        return self._pruner

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check, where a check is due, and end the round if its masks have settled."""
        pruner = self._require_pruner()
        schedule = pruner.schedule
        steps = schedule.steps_done(trainer)
        due = steps // self._every()
        if due == self._checked or schedule.round == schedule.rounds or tries_out(trainer):
            return
        self._checked = due
        if not schedule.can_end_early(trainer):
            return
        distance = self._masks.push(pruner.candidate(pl_module))
        if distance is None:
            return
        compare_ranks(repr(distance), "masks in a check of EarlyBird")
        pruner.record_distance(steps, distance)
        log_numbers(trainer, {"prune/mask_distance": distance})
        if self._masks.is_full and distance <= self.distance:
            rank_zero_info(
                f"Round {schedule.round} ends at step {steps}: its last {self.window} masks differ by at most "
                f"{distance:.3g} of the weights that they keep."
            )
            schedule.end_early(trainer)

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        """Begin the next round without masks of the last."""
        self._masks.clear()
        self._checked = self._require_pruner().schedule.steps_done(trainer) // self._every()

    def hyper_parameters(self) -> dict[str, Any]:
        """What the user gave, for the record."""
        return {"distance": self.distance, "window": self.window, "every": str(self.every)}

    def state_dict(self) -> dict[str, Any]:
        """The settings and the masks of the window."""
        if self._pruner is None:
            return {}
        return {"settings": self.hyper_parameters(), "checked": self._checked, "masks": self._masks.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up where a checkpoint stands."""
        if self._pruner is None:  # a test or a prediction needs the weights only
            return
        with taking_up(type(self).__name__):
            require_same_settings(state_dict["settings"], self.hyper_parameters())
            self._checked = int(state_dict["checked"])
            self._masks.load_state_dict(state_dict["masks"])


def _require_learned_masks(pruner: IterativeMagnitudePruner) -> None:
    """Refuse masks that training does not move: they have settled before it begins."""
    reason = None
    if pruner.masks_from is not None:
        reason = f"masks_from={str(pruner.masks_from)!r} takes them from an earlier run"
    elif pruner.control is not None:
        reason = f"control={pruner.control!r} draws them"
    elif "final" not in CRITERIA[pruner.criterion]:
        reason = f"criterion={pruner.criterion!r} does not look at trained weights"
    if reason is not None:
        raise ConfigError(
            f"EarlyBird waits for masks to settle, and these do not come from training: {reason}. Take EarlyBird out; "
            "for shorter rounds set round_length or the Trainer's length."
        )

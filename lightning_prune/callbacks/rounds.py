"""All rounds in one ``fit``: where a round begins, where its rewinding point lies, where it ends.

Every round ends with an epoch of Lightning's, validated like any other. A round that begins inside an epoch (a
rewinding point in the middle of one) takes that epoch's remaining batches as its first epoch; a training whose length
is given in steps ends its last epoch when the steps are done. So a cut always happens at ``on_train_epoch_start``,
schedulers that step once an epoch step where they did in the first round, and checkpoints and validation see the
trained network before the cut.

Cuts may also lie within one training that nothing sets back (``ends`` without a rewinding point): then it simply goes
on, its length is the Trainer's, and a cut between two steps of an epoch happens before the next batch.
"""

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_prune.callbacks.events import Position
from lightning_prune.callbacks.folders import tries_out
from lightning_prune.callbacks.moments import Length, check_ends, check_frequencies, check_same_length, place
from lightning_prune.errors import ConfigError
from lightning_prune.times import TrainTime

_FOREVER = 2**62


class RoundSchedule:
    """Runs ``rounds`` + 1 trainings in one fit and knows the position within the current one.

    Args:
        rounds: Cuts; round 0 is the training before the first.
        length: Length of one training where it should differ from the Trainer's ``max_epochs``/``max_steps``.
        rewind_to: The rewinding point, or ``None`` where every round follows on the last and has the full length.
        ends: For each cut, the place within one training where it comes; ``None``: always at its end. Without a
            rewinding point the cuts lie within a single training.
    """

    def __init__(
        self,
        rounds: int,
        length: TrainTime | None,
        rewind_to: TrainTime | None,
        ends: Sequence[TrainTime] | None = None,
    ) -> None:
        self.rounds = rounds
        self.length = length
        self.rewind_to = rewind_to
        self.ends = ends
        self.round = 0
        self.start_epoch = 0
        self.start_step = 0
        self.rewound: Position | None = None
        self.stopped_early = False
        self._ended_at: int | None = None  # the step of one training at which a callback has ended this round
        self._users: dict[str, Any] | None = None
        self._intervals: tuple[Any, Any] | None = None  # between validations, while one is forced
        self.epochs: int | None = None  # of one training, the last one perhaps cut short
        self._steps: int | None = None  # of one training, where it ends inside an epoch or epochs have no length
        self._places: list[tuple[int | None, int | None]] = []  # where each round ends, as epochs and steps are above
        self.total_steps = 0
        self.steps_per_epoch: int | None = None

    # ------------------------------------------------------------------ limits

    def prepare(self, trainer: pl.Trainer) -> None:
        """In ``setup``: make the Trainer's limit one training's length, so that schedules are built from it."""
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._users = {
            "max_epochs": fit_loop.max_epochs,
            "min_epochs": fit_loop.min_epochs,
            "max_steps": epoch_loop.max_steps,
            "min_steps": epoch_loop.min_steps,
        }
        if self.length is not None and not tries_out(trainer):
            in_epochs = self.length.unit == "ep"
            fit_loop.max_epochs = int(self.length.value) if in_epochs else -1
            epoch_loop.max_steps = -1 if in_epochs else int(self.length.value)

    def start(self, trainer: pl.Trainer) -> None:
        """In ``on_fit_start``: read the length of one training, then raise the limit so that all rounds fit.

        Raises:
            ConfigError: No end to one training, or a rewinding point at or beyond it.
        """
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        total = trainer.estimated_stepping_batches  # reads the loader, so that an epoch's length is known
        batches = trainer.num_training_batches
        check_same_length(batches)
        if fit_loop.max_epochs in (-1, None) and epoch_loop.max_steps == -1:
            raise ConfigError(
                "the Trainer has no end: one training's length must be known to run rounds of it. "
                "Set Trainer(max_epochs=...) or Trainer(max_steps=...), or round_length='10ep'."
            )
        self.steps_per_epoch = None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
        self.total_steps = 0 if math.isinf(total) else max(0, int(total))  # -1 is Lightning's "no limit"
        self.epochs = None if fit_loop.max_epochs in (-1, None) else fit_loop.max_epochs
        self._steps = None if epoch_loop.max_steps == -1 else epoch_loop.max_steps
        if (
            self._steps is not None
            and self.steps_per_epoch is not None
            and trainer.lightning_module.automatic_optimization
        ):
            full, rest = divmod(min(self._steps, self.total_steps), self.steps_per_epoch)
            self.epochs = full + (rest > 0)
            if rest == 0:
                self._steps = None
        if tries_out(trainer):
            self.rewind_to = None if self.rewind_to is None else TrainTime.parse("0st")
            self.ends = None
        self._check_rewinding_point(trainer)
        self._places = [(self.epochs, self._steps)] * (self.rounds + 1)
        if self.ends is not None:
            counted = self.steps_per_epoch if self._automatic(trainer) else None
            self._places[:-1] = [place(end, self.total_steps, counted) for end in self.ends]
            self._check_ends(trainer)
        if not self.goes_on:
            epoch_loop.max_steps = -1
        self.set_limits(trainer)

    @property
    def goes_on(self) -> bool:
        """Whether all rounds lie within one training, each beginning where the last ended."""
        return self.ends is not None and self.rewind_to is None

    def _check_ends(self, trainer: pl.Trainer) -> None:
        assert self.ends is not None
        length = Length(
            self.epochs, self.total_steps, self.steps_per_epoch, self._automatic(trainer), self.describe_length()
        )
        check_ends(self.ends, length, self.rewind_to)

    def _check_rewinding_point(self, trainer: pl.Trainer) -> None:
        if self.rewind_to is None or self.rewind_to.value == 0:
            return
        k = self.rewind_to
        if k.unit == "ep":
            late = self.epochs is not None and k.value >= self.epochs
        elif k.unit == "%":
            if not self.total_steps:
                raise ConfigError(
                    f"rewinding to {k}: the length of this training in steps is not known (the data has no length). "
                    "Give the rewinding point in steps ('500st')."
                )
            late = k.in_steps(self.total_steps) >= self.total_steps
        else:
            late = bool(self.total_steps) and self._automatic(trainer) and k.value >= self.total_steps
        if late:
            raise ConfigError(
                f"rewinding to {k}, but the first cut comes after {self.describe_length()}: a rewinding point must lie "
                "before it. Choose an earlier point, or train longer."
            )

    def check_frequencies(self, trainer: pl.Trainer) -> None:
        """See that schedulers which step every few epochs step at the same places in each round.

        Raises:
            ConfigError: They would not.
        """
        lengths = {epochs - self.rewinding_epoch for epochs, _ in self._places if epochs is not None}
        if not self.goes_on:
            check_frequencies(trainer, lengths)

    def describe_length(self) -> str:
        """One training's length in words."""
        parts = [f"{self.epochs} epochs"] if self.epochs is not None else []
        if self.total_steps:
            parts.append(f"{self.total_steps} steps")
        return ", ".join(parts)

    def set_limits(self, trainer: pl.Trainer) -> None:
        """Raise the Trainer's limit to hold this round and all that follow; place its minimum in this round."""
        assert self._users is not None
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        ends = [epochs for epochs, _ in self._places[self.round :]]
        if not self.goes_on:
            skipped = (len(ends) - (self.round == 0)) * self.rewinding_epoch
            fit_loop.max_epochs = -1 if None in ends else self.start_epoch + sum(ends) - skipped  # type: ignore[arg-type]
        rewound = self.rewound if self.round > 0 else None
        skipped_epochs, skipped_steps = (rewound.epoch, rewound.step) if rewound else (0, 0)
        if self._users["min_epochs"]:
            fit_loop.min_epochs = self.start_epoch + max(0, self._users["min_epochs"] - skipped_epochs)
        if self._users["min_steps"]:
            epoch_loop.min_steps = self.start_step + max(0, self._users["min_steps"] - skipped_steps)

    @property
    def rewinding_epoch(self) -> int:
        """The epoch in which a later round begins; 0 without a rewinding point."""
        if self.rewind_to is None:
            return 0
        if self.rewound is not None:
            return self.rewound.epoch
        if self.rewind_to.unit == "ep":
            return int(self.rewind_to.value)
        return self.rewind_to.in_steps(self.total_steps) // self.steps_per_epoch if self.steps_per_epoch else 0

    def restore(self, trainer: pl.Trainer) -> None:
        """In ``teardown``: give the Trainer its own limits back."""
        if self._users is not None:
            trainer.fit_loop.max_epochs = self._users["max_epochs"]
            trainer.fit_loop.min_epochs = self._users["min_epochs"]
            trainer.fit_loop.epoch_loop.max_steps = self._users["max_steps"]
            trainer.fit_loop.epoch_loop.min_steps = self._users["min_steps"]
            self._users = None

    # ---------------------------------------------------------------- position

    @staticmethod
    def _automatic(trainer: pl.Trainer) -> bool:
        return trainer.lightning_module.automatic_optimization

    def steps_done(self, trainer: pl.Trainer) -> int:
        """Position within one training in steps: those of this round and those before its rewinding point."""
        before = self.rewound.step if self.round > 0 and self.rewound is not None else 0
        return trainer.global_step - self.start_step + before

    def epochs_done(self, trainer: pl.Trainer) -> int:
        """Position within one training in completed epochs."""
        before = self.rewound.epoch if self.round > 0 and self.rewound is not None else 0
        return trainer.current_epoch - self.start_epoch + before

    def at_rewinding_point(self, trainer: pl.Trainer, batch_idx: int) -> Position | None:
        """In ``on_train_batch_start`` of round 0: the position, if the rewinding point has just been reached."""
        if self.rewind_to is None or self.rewound is not None or self.round > 0:
            return None
        k, step = self.rewind_to, trainer.global_step
        if k.unit == "ep":
            reached = trainer.current_epoch >= k.value
        elif k.unit == "%" and not self._automatic(trainer):
            # steps per batch are the module's own affair here; batches are what can be counted beforehand
            reached = trainer.fit_loop.total_batch_idx >= k.in_steps(self.total_steps)
        else:
            reached = step >= k.in_steps(self.total_steps, self.steps_per_epoch)
        return Position(trainer.current_epoch, batch_idx, step) if reached else None

    def _is_steps_end(self, trainer: pl.Trainer) -> bool:
        steps = self._places[self.round][1] if self._ended_at is None else self._ended_at
        return steps is not None and self.steps_done(trainer) >= steps

    def steps_left(self, trainer: pl.Trainer) -> int | None:
        """Optimizer steps until the current round has had its length; ``None`` where that is not known."""
        epochs, steps = self._places[self.round]
        if steps is None and epochs is not None and self.steps_per_epoch is not None and self._automatic(trainer):
            steps = epochs * self.steps_per_epoch
        return None if steps is None else steps - self.steps_done(trainer)

    def _had_its_length(self, trainer: pl.Trainer) -> bool:
        epochs = self._places[self.round][0]
        return self._is_steps_end(trainer) or (epochs is not None and self.epochs_done(trainer) >= epochs)

    def is_due(self, trainer: pl.Trainer) -> bool:
        """In ``on_train_batch_start``: does a cut come here, before this batch?"""
        return self.goes_on and self.round < self.rounds and self._had_its_length(trainer)

    def is_over(self, trainer: pl.Trainer) -> bool:
        """In ``on_train_epoch_start``: has the current round had its length, or been stopped early?"""
        if self._ended_at is not None:
            self.stopped_early = True
            return True
        by_length = self._had_its_length(trainer)
        self.stopped_early = not by_length and self._minimum_met(trainer) and self._round_may_end(trainer)
        return self.round < self.rounds and (by_length or self.stopped_early)

    def can_end_early(self, trainer: pl.Trainer) -> bool:
        """In ``on_train_batch_end``: may a callback end the round here, before its length and with a cut to follow?"""
        if self.round == self.rounds or self.goes_on or self._ended_at is not None or not self._minimum_met(trainer):
            return False
        epochs = self._places[self.round][0]
        last = trainer.is_last_batch and epochs is not None and self.epochs_done(trainer) + 1 >= epochs
        return not last and not self._is_steps_end(trainer) and (self.rewind_to is None or self.rewound is not None)

    def end_early(self, trainer: pl.Trainer) -> None:
        """End the round with this batch: it is validated, and the cut comes at the start of the next epoch."""
        self._ended_at = self.steps_done(trainer)
        self.on_train_batch_end(trainer)

    def _minimum_met(self, trainer: pl.Trainer) -> bool:
        assert self._users is not None
        epochs, steps = self._users["min_epochs"] or 0, self._users["min_steps"] or 0
        return self.epochs_done(trainer) >= epochs and self.steps_done(trainer) >= steps

    def _round_may_end(self, trainer: pl.Trainer) -> bool:
        """EarlyStopping ends the round; a Timer, a signal or the user's own code ends the fit."""
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        expired = any((remaining := timer.time_remaining()) is not None and remaining <= 0 for timer in timers)
        stoppers = any(isinstance(callback, EarlyStopping) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        return trainer.should_stop and stoppers and not expired and not trainer.received_sigterm

    # ------------------------------------------------------------------- hooks

    def on_train_start(self, trainer: pl.Trainer) -> None:
        """After a resume: a checkpoint of a round's last batch goes on with the validation that ends the round."""
        epoch, batch = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress
        inside = epoch.ready > epoch.processed  # type: ignore[attr-defined]
        if inside and batch.is_last_batch and batch.current.ready > 0:
            self._end_with_validation(trainer)
        if self.round == self.rounds and self._is_steps_end(trainer) and not self.goes_on:
            trainer.fit_loop.max_epochs = trainer.current_epoch + inside

    def on_train_batch_end(self, trainer: pl.Trainer) -> None:
        """End the epoch with the round, and see that a round's last epoch is validated."""
        if self._is_steps_end(trainer) and not self.goes_on:
            trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True
            if self.round == self.rounds:
                trainer.fit_loop.max_epochs = trainer.current_epoch + 1
        if trainer.is_last_batch:
            self._end_with_validation(trainer)

    def _end_with_validation(self, trainer: pl.Trainer) -> None:
        """At a round's last batch, validate now, whatever the interval between validations."""
        epochs = self._places[self.round][0]
        last_epoch = epochs is not None and self.epochs_done(trainer) + 1 >= epochs
        if trainer.enable_validation and (last_epoch or self._is_steps_end(trainer)):
            self._intervals = (trainer.check_val_every_n_epoch, trainer.val_check_batch)
            trainer.check_val_every_n_epoch = 1
            trainer.val_check_batch = trainer.fit_loop.batch_idx + 1

    def on_train_epoch_end(self, trainer: pl.Trainer) -> None:
        """Undo a forced validation; keep EarlyStopping, which may speak after this hook, from ending the fit."""
        if self._intervals is not None:
            trainer.check_val_every_n_epoch, trainer.val_check_batch = self._intervals
            self._intervals = None
        stoppers = any(isinstance(callback, EarlyStopping) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        round_ends = not trainer.should_stop or self._round_may_end(trainer)
        if self.round < self.rounds and stoppers and round_ends:
            trainer.fit_loop.min_epochs = _FOREVER

    def on_train_epoch_start(self, trainer: pl.Trainer) -> None:
        """Put the minimum back that :meth:`on_train_epoch_end` moved out of the way."""
        assert self._users is not None
        trainer.fit_loop.min_epochs = self._users["min_epochs"]
        self.set_limits(trainer)

    def next_round(self, trainer: pl.Trainer) -> None:
        """Open the next round at this epoch; the fit shrinks by what an early stop has saved."""
        self.round += 1
        self._ended_at = None
        if not self.goes_on:
            self.start_epoch = trainer.current_epoch
            self.start_step = trainer.global_step
        if trainer.should_stop:
            rank_zero_info(f"Round {self.round - 1} was stopped early; the next round begins.")
            trainer.should_stop = False
        self.set_limits(trainer)

    # ------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The position, as integers."""
        rewound = None if self.rewound is None else [self.rewound.epoch, self.rewound.batch, self.rewound.step]
        return {
            "round": self.round,
            "start_epoch": self.start_epoch,
            "start_step": self.start_step,
            "rewound": rewound,
            "ended_at": self._ended_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the position of a checkpoint."""
        self.round = state["round"]
        self.start_epoch = state["start_epoch"]
        self.start_step = state["start_step"]
        self.rewound = None if state["rewound"] is None else Position(*state["rewound"])
        self._ended_at = state.get("ended_at")  # checkpoints of earlier versions have none

"""What every pruner shares: rounds in one ``fit``, the record, checkpoints, and handing an event round."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_prune.callbacks import monitors
from lightning_prune.callbacks.claims import give_up
from lightning_prune.callbacks.company import describe_company
from lightning_prune.callbacks.events import (
    PruneEvent,
    scores_wanted,
    send_prune_event,
    send_rewinding_point,
    send_round_end,
)
from lightning_prune.callbacks.folders import tries_out
from lightning_prune.callbacks.logs import add_companions
from lightning_prune.callbacks.moments import check_schedule_length
from lightning_prune.callbacks.recorder import RoundRecorder
from lightning_prune.callbacks.resuming import check_checkpoint, require_same_settings, taking_up
from lightning_prune.callbacks.rewind import LRRewind, WeightRewind
from lightning_prune.callbacks.rounds import RoundSchedule
from lightning_prune.callbacks.task import describe_task
from lightning_prune.callbacks.tickets import TicketWriter
from lightning_prune.errors import ConfigError, ResumeError
from lightning_prune.record import RunRecord
from lightning_prune.resume import ResumeState, save_atomically
from lightning_prune.times import TrainTime

_NEVER_STEPPED = 2**62


class RoundPruner(Callback):
    """A callback that cuts between rounds of training: base of every pruner.

    A subclass says what is cut: :meth:`make_schedule`, :meth:`begin`, :meth:`decide`, :meth:`cut`, :meth:`counts`,
    :meth:`hyper_parameters`, and :meth:`own_state` with :meth:`load_own_state`.

    Args:
        rounds: Number of cuts.
        round_length: Length of one training where it should differ from the Trainer's.
        monitor: Metric shown and recorded per round.
        mode: ``"max"`` or ``"min"``.
        dirpath: Folder of the record.
        verbose: Print one line after each round.
    """

    sends_prune_events = True

    def __init__(
        self,
        rounds: int,
        round_length: str | None,
        monitor: str | None,
        mode: str | None,
        dirpath: str | Path | None,
        verbose: bool,
    ) -> None:
        self.rounds = rounds
        self.round_length = None if round_length is None else TrainTime.parse(round_length, "round_length")
        if self.round_length is not None and self.round_length.unit == "%":
            raise ConfigError(
                f"round_length='{self.round_length}': a length is in epochs ('10ep') or steps ('5000st')."
            )
        self._recorder = RoundRecorder(monitor, mode, dirpath, verbose)
        self._resume = ResumeState()
        self._schedule: RoundSchedule | None = None
        self._names: dict[int, str | None] = {}
        self._frequencies: list[int] | None = None
        self._loaded: dict[str, Any] | None = None
        self.recipe: str | None = None
        """The file that the run was configured with, for the record; the command line sets it."""
        self._save_as_before: Callable[[], None] | None = None

    # -------------------------------------------------------- what subclasses say

    @abstractmethod
    def make_schedule(self, trainer: pl.Trainer) -> RoundSchedule:
        """In ``setup`` of a fit: check what stands beside this callback, and say where the rounds end."""

    @abstractmethod
    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In ``on_fit_start``, when the length of one training is known: find what to prune, or refuse."""

    @abstractmethod
    def decide(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """At a cut: decide what leaves, the same on every process. Nothing changes yet, so that it may raise."""

    @abstractmethod
    def cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, decision: Any) -> PruneEvent:
        """Take the decision up; the schedule is in the new round, the old one's row is closed."""

    def quantiles(self) -> dict[str, tuple[float, ...]]:
        """Between decision and cut: quantiles of the scores behind it, as in :class:`PruneEvent`."""
        return {}

    def after_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        """When every listener has had the event: hold what they changed to it."""

    def measure_start(self, trainer: pl.Trainer) -> dict[str, float]:
        """What is measured of the new round's network before it is trained, for the record."""
        return {}

    @abstractmethod
    def counts(self) -> dict[str, Any]:
        """What the round that is under way is trained with, as fields of :class:`Round`."""

    def frozen(self) -> list[dict[str, Any]]:
        """What may not leave and why, for the record; see :attr:`RunRecord.frozen`. Empty: as said before."""
        return []

    @abstractmethod
    def hyper_parameters(self) -> dict[str, Any]:
        """What the user gave, as JSON content, for the record and to compare on resuming."""

    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """What the subclass must remember in a checkpoint."""

    @abstractmethod
    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take up :meth:`own_state`."""

    # ------------------------------------------------------------------- set up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check what stands beside this callback, and let one training's length be the Trainer's limit."""
        if stage != "fit":
            return
        add_companions(trainer)
        self._loaded = None
        self._schedule = self.make_schedule(trainer)
        self._schedule.prepare(trainer)
        self._resume.attach(trainer)
        self._save_as_before = save_atomically(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a file with changed bytes."""
        check_checkpoint(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what to prune, read the length of one training, raise the limit to hold all rounds."""
        schedule = self._running
        schedule.start(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LRRewind) and callback.check_length and not tries_out(trainer):
                check_schedule_length(trainer, schedule.total_steps, schedule.epochs)
        schedule.check_frequencies(trainer)
        self.begin(trainer, pl_module)
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._start_record(trainer)

    def _start_record(self, trainer: pl.Trainer) -> None:
        """When it is known whether this run was resumed: some strategies load a checkpoint after ``on_fit_start``."""
        own = {"rounds": self.rounds} | self.hyper_parameters()
        method = {type(self).__name__: own} | describe_company(trainer)
        task = describe_task(trainer, trainer.lightning_module, self.recipe)
        self._recorder.start(trainer, method, task, resumed=self._loaded is not None)
        monitors.name_checkpoints(trainer, self._running.round, self._names)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a resume, put schedules back."""
        if trainer.global_step > 0 and self._loaded is None and self._running.round == 0:
            raise ResumeError(
                f"the checkpoint was written without {type(self).__name__}: it holds nothing of what was cut and no "
                "position. Load its weights into the module before fit() instead of passing it as ckpt_path."
            )
        if trainer.strategy.restore_checkpoint_after_setup:
            self._start_record(trainer)
            self._running.set_limits(trainer)
        if self._loaded is not None:
            self._hold_schedules(trainer)
        self._running.on_train_start(trainer)

    @property
    def folder(self) -> Path | None:
        """The folder with this run's record, once a fit has begun; ``None`` where nothing is written."""
        return self._recorder.folder

    @property
    def one_training(self) -> bool:
        """Whether, in a fit, all rounds lie within one training of the Trainer's length, and none is set back."""
        return self._running.goes_on

    @property
    def record(self) -> RunRecord | None:
        """This run's record so far, once a fit has begun."""
        return self._recorder.record

    @property
    def schedule(self) -> RoundSchedule:
        """The rounds of the fit under way, and the position in them."""
        return self._running

    def record_distance(self, steps: int, distance: float) -> None:
        """Add a check of :class:`EarlyBird` to the row of the round under way."""
        self._recorder.distances.append((steps, distance))

    def record_costs(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        """Add a measurement of :class:`CostProfiler` to this run's record."""
        self._recorder.add_costs(trainer, row)

    @property
    def _running(self) -> RoundSchedule:
        assert self._schedule is not None
        return self._schedule

    # ---------------------------------------------------------------- in rounds

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut, if a round has ended."""
        self._running.on_train_epoch_start(trainer)
        if self._running.is_over(trainer):
            self._next_round(trainer, pl_module)

    def _next_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        schedule = self._running
        if schedule.rewind_to is not None and schedule.rewound is None:
            raise ConfigError(f"round 0 ended before its rewinding point, {schedule.rewind_to}; choose an earlier one.")
        decision = self.decide(trainer, pl_module)
        scores = self.quantiles() if scores_wanted(trainer) else {}
        self._end_round(trainer, pl_module)
        schedule.next_round(trainer)
        event = replace(self.cut(trainer, pl_module, decision), scores=scores)
        self._hold_schedules(trainer)
        send_prune_event(trainer, pl_module, event)
        self.after_event(trainer, pl_module, event)
        rewound = any(isinstance(callback, WeightRewind) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        monitors.cut_averages(trainer, pl_module, event.masks, rewound)
        monitors.start_anew(trainer)
        monitors.name_checkpoints(trainer, schedule.round, self._names)
        start = self.measure_start(trainer)
        self._recorder.begin_round(trainer, event, self._ticket_path(trainer, event.round), start)
        if schedule.rewound is not None and schedule.rewound.batch:
            self._resume.fast_forward_next_epoch(schedule.rewound.batch)

    def _end_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._recorder.end_round(trainer, self._running, self.counts(), self.frozen()):
            assert self.record is not None
            send_round_end(trainer, pl_module, self.record)

    def _ticket_path(self, trainer: pl.Trainer, round: int) -> Path | None:  # noqa: A002
        writers = [c for c in trainer.callbacks if isinstance(c, TicketWriter)]  # type: ignore[attr-defined]
        return writers[0].ticket_path(trainer, round) if writers else None

    def _hold_schedules(self, trainer: pl.Trainer) -> None:
        """Without :class:`LRRewind` schedules of later trainings stay where round 0 left them (fine-tuning)."""
        if self._running.goes_on or self._running.round == 0:
            return
        if not any(isinstance(c, LRRewind) for c in trainer.callbacks):  # type: ignore[attr-defined]
            if self._frequencies is None:
                self._frequencies = [config.frequency for config in trainer.lr_scheduler_configs]
            for config in trainer.lr_scheduler_configs:
                config.frequency = _NEVER_STEPPED

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the rewinders when round 0 reaches their point."""
        position = self._running.at_rewinding_point(trainer, batch_idx)
        if position is not None:
            self._running.rewound = position
            send_rewinding_point(trainer, pl_module, position)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the epoch where a training given in steps ends."""
        self._running.on_train_batch_end(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get ready to take the metrics."""
        self._recorder.before_validation(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the metrics."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._recorder.take_metrics(trainer, self._running)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep an early stop from ending the fit."""
        if not trainer.enable_validation:
            self._recorder.take_metrics(trainer, self._running)
        self._running.on_train_epoch_end(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the last round."""
        self._end_round(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the last round where nothing was left to train: resumed from the last checkpoint of all."""
        self._end_round(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was."""
        self.release(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if stage == "fit":
            self.release(trainer)

    def release(self, trainer: pl.Trainer) -> None:
        """Undo everything that was set on the trainer and its callbacks."""
        self._resume.detach()
        give_up(trainer)
        if self._save_as_before is not None:
            self._save_as_before()
            self._save_as_before = None
        monitors.restore_names(trainer, self._names)
        self._names = {}
        if self._frequencies is not None:
            for config, frequency in zip(trainer.lr_scheduler_configs, self._frequencies, strict=False):
                config.frequency = frequency
            self._frequencies = None
        if self._schedule is not None:
            self._schedule.restore(trainer)

    # -------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What was cut, position, record, generators and data position; nothing before a fit."""
        if self._schedule is None:
            return {}
        return {
            "hyper_parameters": self.hyper_parameters(),
            "rounds": self.rounds,
            "schedule": self._schedule.state_dict(),
            "recorder": self._recorder.state_dict(),
            "resume": self._resume.state_dict(),
        } | self.own_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint stands; more rounds than it was written for are allowed."""
        if self._schedule is None:  # a test or a prediction needs the weights only
            return
        with taking_up(type(self).__name__):
            self._take_up(state_dict)

    def _take_up(self, state_dict: dict[str, Any]) -> None:
        assert self._schedule is not None
        require_same_settings(state_dict["hyper_parameters"], self.hyper_parameters())
        if state_dict["schedule"]["round"] > self.rounds:
            raise ResumeError(
                f"the checkpoint is in round {state_dict['schedule']['round']}, this run has rounds={self.rounds}."
            )
        self._loaded = state_dict
        self._schedule.load_state_dict(state_dict["schedule"])
        self._recorder.load_state_dict(state_dict["recorder"])
        self._resume.load_state_dict(state_dict["resume"])
        self.load_own_state(state_dict)

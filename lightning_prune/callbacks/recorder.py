"""Fills a run's record from a fit, round by round."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_prune.callbacks import monitors
from lightning_prune.callbacks.claims import claim
from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.folders import run_folder
from lightning_prune.callbacks.logs import end_numbers, log_numbers
from lightning_prune.callbacks.rounds import RoundSchedule
from lightning_prune.callbacks.screen import LiveTable
from lightning_prune.environment import describe_environment
from lightning_prune.errors import ConfigError
from lightning_prune.record import Round, RunRecord, check_free
from lightning_prune.record.table import header_text, row_text


class RoundRecorder:
    """Takes metrics as they come, closes a row when a round ends, rewrites the files, prints the row.

    Args:
        monitor: The metric shown, and by which a round's best step is chosen; ``None``: what a callback watches.
        mode: ``"max"`` or ``"min"``; ``None``: as the callback has it, else ``"max"``.
        dirpath: The folder; ``None``: the run folder.
        verbose: Print rows.

    Raises:
        ConfigError: Another ``mode``.
    """

    def __init__(self, monitor: str | None, mode: str | None, dirpath: str | Path | None, verbose: bool) -> None:
        if mode not in (None, "min", "max"):
            raise ConfigError(f"mode={mode!r} is unknown; choose 'min' or 'max'.")
        self.record: RunRecord | None = None
        self.folder: Path | None = None
        self._wanted = (monitor, mode, dirpath)
        self._monitor: str | None = monitor
        self._mode = mode or "max"
        self._metrics: dict[str, float] = {}
        self._best: dict[str, Any] | None = None
        self._removed = 0
        self._ticket: str | None = None
        self._start: dict[str, float] = {}
        self.distances: list[tuple[int, float]] = []
        """Of candidate masks in the round under way; see :class:`Round`."""
        self._earlier: dict[str, Any] = {}
        self._since = time.monotonic()
        self._table = LiveTable(verbose)

    def start(self, trainer: pl.Trainer, method: dict[str, Any], task: dict[str, Any], *, resumed: bool) -> None:
        """Begin the record, or take up a resumed one and cut its files back to it.

        Raises:
            ConfigError: Another run holds the folder, or has left its record there.
        """
        monitor, mode, dirpath = self._wanted
        watched = monitors.watched_metric(trainer)
        self._monitor = monitor or (watched[0] if watched else None)
        self._mode = mode or (watched[1] if watched and watched[0] == self._monitor else "max")
        self.folder = Path(dirpath) if dirpath is not None else run_folder(trainer)
        self._table.restart()
        self._since = time.monotonic()
        if self.folder is not None:
            claim(trainer, self.folder)
        if resumed:
            assert self.record is not None
            self.record.method = method  # more rounds than before are allowed
            self.record.task = self.record.task or task
            self._write(trainer)
            return
        self._metrics, self._best, self._removed, self._ticket, self._start = {}, None, 0, None, {}
        self.distances = []
        if self.folder is not None and trainer.is_global_zero:
            check_free(self.folder)
        seed = os.environ.get("PL_GLOBAL_SEED")
        environment = describe_environment(trainer.strategy.root_device)
        self.record = RunRecord(method, None if seed is None else int(seed), environment, task)
        self._write(trainer)  # from now on the folder is this run's

    def before_validation(self, trainer: pl.Trainer) -> None:
        """Remember the values that are there already: what this validation logs are the others."""
        self._earlier = dict(trainer.callback_metrics)

    def take_metrics(self, trainer: pl.Trainer, schedule: RoundSchedule) -> None:
        """Keep what this validation measured (not what else was logged), and the round's best point so far."""
        logged = trainer.callback_metrics.items()
        fresh = {name: value for name, value in logged if self._earlier.get(name) is not value}
        self._metrics = {name: float(value) for name, value in fresh.items() if _is_number(value)}
        self._earlier = {}
        if self._monitor is None:
            return
        value = self._metrics.get(self._monitor)
        if value is None:
            rank_zero_warn(
                f"the monitored metric {self._monitor!r} was not logged in validation; logged were: "
                f"{', '.join(self._metrics) or 'none'}. The table and the record go without it."
            )
            self._monitor = None
        elif self._best is None or (
            value > self._best["value"] if self._mode == "max" else value < self._best["value"]
        ):
            self._best = {
                "step": schedule.steps_done(trainer),
                "epoch": schedule.epochs_done(trainer),
                "monitor": self._monitor,
                "value": value,
                "metrics": dict(self._metrics),
            }

    def begin_round(
        self, trainer: pl.Trainer, event: PruneEvent, ticket: Path | None, start: Mapping[str, float]
    ) -> None:
        """Remember what opened the round, and what was measured right after it."""
        self._removed = event.removed
        self._start = dict(start)
        self._ticket = None if ticket is None else self._relative(ticket)
        self._best = None
        self.distances = []
        self._since = time.monotonic()
        numbers: dict[str, float] = {
            "prune/round": event.round,
            "prune/kept": event.kept,
            "prune/removed": event.removed,
        }
        numbers |= {"prune/density": event.density, "prune/sparsity": event.sparsity}
        numbers |= {f"prune/start/{name}": value for name, value in start.items()}
        numbers |= {f"prune/{name}": now / dense for name, (now, dense) in event.costs.items() if dense}
        log_numbers(trainer, numbers)

    def end_round(
        self,
        trainer: pl.Trainer,
        schedule: RoundSchedule,
        counts: Mapping[str, Any],
        frozen: list[dict[str, Any]],
        ticket: Path | None = None,
    ) -> bool:
        """Close the round's row, with the network as it was trained, before the next cut.

        Args:
            trainer: The trainer.
            schedule: The schedule, still in the round that ends.
            counts: What the round was trained with: ``kept``, ``total``, ``digest``, ``per_layer`` of :class:`Round`,
                and where channels leave ``unit`` and ``costs``.
            frozen: What may not leave and why; empty: as said before.
            ticket: The ticket of this row, where no event has told it.

        Returns:
            Whether a row was added; a finished run that was resumed has nothing to add.
        """
        assert self.record is not None
        if schedule.round < len(self.record.rounds):
            return False
        self.record.frozen = frozen or self.record.frozen
        best = monitors.best_checkpoint(trainer)
        row = Round(
            round=schedule.round,
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            steps=schedule.steps_done(trainer),
            removed=self._removed,
            metrics=self._metrics,
            learning_rates=tuple(float(g["lr"]) for o in trainer.optimizers for g in o.param_groups if "lr" in g),
            best=self._best,
            best_checkpoint=None if best is None else self._relative(Path(best)),
            ticket=self._ticket if ticket is None else self._relative(ticket),
            start_metrics=self._start,
            stopped_early=schedule.stopped_early,
            mask_distances=tuple(self.distances),
            **counts,
        )
        self.record.add_round(row, seconds=time.monotonic() - self._since)
        self._write(trainer)
        text = row_text(row, self._monitor, self.record.rounds[0])
        self._table.print(trainer, lambda: header_text(self._monitor, row.unit), text)
        log_numbers(trainer, {f"prune/end/{name}": value for name, value in end_numbers(self.record).items()})
        return True

    def add_costs(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        """Take up a measurement of :class:`CostProfiler`."""
        if self.record is not None:
            self.record.costs.append(row)
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if self.folder is not None and self.record is not None and trainer.is_global_zero:
            self.record.write(self.folder)

    def _relative(self, path: Path) -> str:
        if self.folder is not None and path.resolve().is_relative_to(self.folder.resolve()):
            return path.resolve().relative_to(self.folder.resolve()).as_posix()
        return str(path)

    def state_dict(self) -> dict[str, Any]:
        """The record and what the round under way has seen so far."""
        return {
            "record": None if self.record is None else self.record.state_dict(),
            "metrics": dict(self._metrics),
            "best": self._best,
            "removed": self._removed,
            "ticket": self._ticket,
            "start": dict(self._start),
            "distances": [list(pair) for pair in self.distances],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's record; rows that were written after it are forgotten."""
        self.record = RunRecord.from_state_dict(state["record"])
        self._metrics = dict(state["metrics"])
        self._best = state["best"]
        self._removed = state["removed"]
        self._ticket = state["ticket"]
        self._start = dict(state.get("start", {}))
        self.distances = [(int(steps), float(distance)) for steps, distance in state.get("distances", [])]


def _is_number(value: Any) -> bool:
    return not hasattr(value, "numel") or value.numel() == 1

"""The callback that shows a pruning run in W&B; it comes along by itself where the trainer has a WandbLogger."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.folders import run_folder, tries_out
from lightning_prune.callbacks.learned import LearnedSupermask
from lightning_prune.callbacks.logs import COMPANIONS, end_numbers
from lightning_prune.callbacks.pruner import RoundPruner
from lightning_prune.callbacks.remover import COMPACT_NAME
from lightning_prune.callbacks.tickets import TicketWriter
from lightning_prune.errors import ConfigError
from lightning_prune.record import RunRecord
from lightning_prune.reports.wandb_content import (
    LAYER_COLUMNS,
    alias_of,
    cost_table,
    latencies,
    layer_rows,
    lineage,
    metric_of,
    page_of_run,
    summary_of,
)
from lightning_prune.reports.wandb_run import GuardedRun


class WandbReporter(Callback):
    """Show a pruning run in W&B, through Lightning's ``WandbLogger``.

    Every trainer with a ``WandbLogger`` and a pruner (or :class:`CostProfiler`) gets one by itself; add it only to
    switch parts off. Scalars under ``prune/`` go to every logger and need no callback. To W&B go beside them:

    - ``prune/layers``: at every cut a table (round, layer, kept, total, density, and quantiles of the scores that the
      cut was decided by, over what was left before it); the dense network's when round 0 ends;
    - ``prune/costs``, ``prune/latency``, ``prune/latency_dense``: :class:`CostProfiler`'s measurements as a table, and
      the samples of the last one as histograms, in milliseconds;
    - artifacts: each ticket of :class:`TicketWriter` (``ticket-ID:round-01``; ``compact-ID:round-01`` where channels
      leave) and the compact network at the end (``compact-ID:final``), with their run, round and parent as metadata;
    - ``prune/report``: the HTML report of this run, at the end;
    - config ``prune``: the method with its hyper-parameters; summary fields to sort by, after every round:
      ``prune/method``, ``seed``, ``rounds``, ``sparsity``, ``metric``, ``dense``, ``change``, ``matching_sparsity``
      (:func:`lightning_prune.reports.wandb_content.summary_of`).

    Acts in: the prune event, the end of a round, a measurement, and the ends of the fit; nothing in between, but that
    the logger's own errors become a warning for as long as the fit lasts. Only process 0 acts. A run that is switched
    off (``mode="disabled"``) costs nothing.

    Args:
        artifacts: Log tickets and compact models. Files are not copied: keep them until they are uploaded.
        report: Log the HTML report at the end.

    State saved: none; what was sent is written down in ``wandb.json`` in the run folder, and a resumed run with the
        same id (``WandbLogger(version=ID)``) does not send it again.

    Raises:
        ConfigError: In ``setup`` of a fit: no ``WandbLogger`` in the trainer.

    Limits:
        A run that is resumed from an earlier step logs Lightning's own values between that step and its end once more,
        as Lightning does without this callback.
    """

    prune_order = 11

    def __init__(self, artifacts: bool = True, report: bool = True) -> None:
        self.artifacts, self.report = artifacts, report
        self.wants_scores = False
        self._alone = True  # added by the user, not come along
        self._runs: list[GuardedRun] = []
        self._costs: list[dict[str, Any]] = []

    # ------------------------------------------------------------------- set up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stand between the loggers and W&B, and read what an earlier process of the run has sent."""
        if stage != "fit":
            return
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not loggers and not tries_out(trainer):
            raise ConfigError(
                "WandbReporter shows a run in W&B, and the trainer has no WandbLogger: give it logger=WandbLogger(), "
                "or leave WandbReporter out."
            )
        self._release()
        self._costs = []
        folder = run_folder(trainer)  # the same on every process, which all ask
        if trainer.is_global_zero:
            self._runs = [run for run in map(GuardedRun, loggers) if not run.disabled]
        self.wants_scores = bool(self._runs)
        for run in self._runs:
            run.open(folder)
            run.attach()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell W&B what the run is."""
        pruner = _pruner(trainer)
        record = None if pruner is None else pruner.record
        if record is not None:
            for run in self._runs:
                method = " + ".join(record.method)
                run.describe({"method": method, "seed": record.seed, "settings": record.method})

    # ---------------------------------------------------------------- in rounds

    def on_round_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: RunRecord) -> None:
        """The fields to sort by; for the dense network its table."""
        row = record.rounds[-1]
        for run in self._runs:
            run.define(
                [f"prune/end/{name}" for name in end_numbers(record) if name != "sparsity"], "prune/end/sparsity"
            )
            if row.round == 0:
                run.table("prune/layers", LAYER_COLUMNS, layer_rows(0, row.per_layer, {}), row.step)
            run.summarise(partial(summary_of, record))

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        """The round's table, and its ticket."""
        ticket = _ticket(trainer, event.round)
        pruner = _pruner(trainer)
        if not isinstance(pruner, RoundPruner):
            return
        kind = "compact" if event.masks is None else "ticket"
        per_layer, facts = pruner.counts()["per_layer"], _facts(event)  # of sharded masks every process counts its part
        for run in self._runs:
            rows = layer_rows(event.round, per_layer, event.scores)
            run.table("prune/layers", LAYER_COLUMNS, rows, event.step)
            if self.artifacts and ticket is not None and ticket.exists():
                name = f"{kind}-{run.identity}"
                parent = f"{name}:{alias_of(event.round - 1)}" if event.round > 1 else None
                metadata = lineage(run.identity, event.round, parent, facts)
                self._send(run, name, ticket, alias_of(event.round), metadata)

    def record_costs(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        """The table of measurements, and the last one's histograms."""
        self._costs.append(row)
        pruner = _pruner(trainer)
        rows = self._costs if pruner is None or pruner.record is None else pruner.record.costs
        for run in self._runs:
            run.table("prune/costs", *cost_table(rows), row["step"])
            for name, histogram in latencies(row).items():
                run.histogram(f"prune/{name}", histogram["counts"], histogram["edges_ms"], row["step"])

    # ---------------------------------------------------------------------- end

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """When every other callback has ended the fit: the compact network, the summary and the report."""
        if stage != "fit":
            return
        pruner = _pruner(trainer)
        record = None if pruner is None else pruner.record
        if pruner is not None and record is not None and record.rounds:
            tickets = any(isinstance(c, TicketWriter) for c in trainer.callbacks)  # type: ignore[attr-defined]
            for run in self._runs:
                self._finish(run, record, pruner.folder, tickets)
        self._leave(trainer)

    def _finish(self, run: GuardedRun, record: RunRecord, folder: Path | None, tickets: bool) -> None:
        last = record.rounds[-1]
        run.summarise(partial(summary_of, record))
        if self.artifacts and folder is not None and (folder / COMPACT_NAME).exists():
            name = f"compact-{run.identity}"
            parent = f"{name}:{alias_of(last.round)}" if tickets else None
            facts = {"density": last.density, "sparsity": last.sparsity, "step": last.step, "digest": last.digest}
            self._send(run, name, folder / COMPACT_NAME, "final", lineage(run.identity, last.round, parent, facts))
        metric = metric_of(record)
        if self.report and metric is not None:
            run.page("prune/report", partial(page_of_run, record, metric), last.step)

    @staticmethod
    def _send(run: GuardedRun, name: str, path: Path, alias: str, metadata: dict[str, Any]) -> None:
        run.artifact(name, "ticket" if name.startswith("ticket-") else "model", path, alias, metadata)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._leave(trainer)

    def _leave(self, trainer: pl.Trainer) -> None:
        self._release()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not self._alone and self in callbacks:
            callbacks.remove(self)

    def _release(self) -> None:
        for run in self._runs:
            run.detach()
        self._runs = []


def companion(trainer: pl.Trainer) -> WandbReporter | None:
    """The reporter for a trainer with a ``WandbLogger`` and none yet."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, WandbReporter) for callback in callbacks):
        return None
    if not any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
        return None
    reporter = WandbReporter()
    reporter._alone = False
    return reporter


COMPANIONS.append(companion)


def _pruner(trainer: pl.Trainer) -> RoundPruner | LearnedSupermask | None:
    """What writes the record."""
    return next((c for c in trainer.callbacks if isinstance(c, RoundPruner | LearnedSupermask)), None)  # type: ignore[attr-defined]


def _ticket(trainer: pl.Trainer, number: int) -> Path | None:
    """Where the round's ticket is; asked on every process, which agree on the folder."""
    writers = [c for c in trainer.callbacks if isinstance(c, TicketWriter)]  # type: ignore[attr-defined]
    return writers[0].ticket_path(trainer, number) if writers else None


def _facts(event: PruneEvent) -> dict[str, Any]:
    facts: dict[str, Any] = {"density": event.density, "sparsity": event.sparsity, "step": event.step}
    facts["rewound_to_step"] = None if event.rewound_to is None else event.rewound_to.step
    what = event.masks if event.masks is not None else event.plan
    return facts | ({} if what is None else {"digest": what.digest()})

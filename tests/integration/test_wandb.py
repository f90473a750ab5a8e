"""A pruning run in W&B, read back from disk: every key, table and artifact; resumed, switched off, and broken."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_prune import (
    Budget,
    ChannelPruner,
    ConfigError,
    CostProfiler,
    IterativeMagnitudePruner,
    LRRewind,
    PruneEvent,
    RunRecord,
    TicketWriter,
    WandbReporter,
    WeightRewind,
)
from lightning_prune.reports.wandb_run import LEDGER
from tests._helpers.models import ToyModule, loaders, trainer
from tests._helpers.wandb_runs import StoredRun, read_runs

pytestmark = pytest.mark.filterwarnings("ignore:There is a wandb run already in progress")


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "offline")
        yield
    wandb.teardown()


def logger(folder: Path, version: str, **options: Any) -> WandbLogger:
    settings = wandb.Settings(console="off", x_disable_meta=True, x_disable_stats=True)
    return WandbLogger(save_dir=folder, project="pruning", version=version, settings=settings, **options)


def magnitude(rounds: int = 2) -> IterativeMagnitudePruner:
    return IterativeMagnitudePruner(fraction=0.5, rounds=rounds, scope="layer", verbose=False)


class Weights(Callback):
    """The weights as they are when a cut arrives: trained, not yet rewound."""

    prune_order = -1

    def __init__(self) -> None:
        self.found: dict[int, dict[str, Tensor]] = {}
        self.events: list[PruneEvent] = []

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        self.events.append(event)
        self.found[event.round] = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


def fit(folder: Path, callbacks: list[Callback], log: Any, **options: Any) -> pl.Trainer:
    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    path = options.pop("ckpt_path", None)
    fitted = trainer(folder, callbacks, logger=log, **({"max_epochs": 1} | options))
    try:
        fitted.fit(ToyModule(), *loaders(), ckpt_path=path)
    finally:
        wandb.finish()
    return fitted


class Masked:
    """One run of magnitude pruning with everything that can be shown."""

    def __init__(self, folder: Path) -> None:
        self.weights = Weights()
        rewinders = [WeightRewind("0st"), LRRewind("0st")]
        callbacks = [magnitude(), *rewinders, TicketWriter(), CostProfiler(seconds=0.01, verbose=False), self.weights]
        self.trainer = fit(folder, callbacks, logger(folder, "masked"))
        self.folder = folder / "pruning" / "masked"
        self.record = RunRecord.read(self.folder)
        (self.stored,) = read_runs(folder)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Masked:
    return Masked(tmp_path_factory.mktemp("masked"))


def test_every_round_is_a_row_at_its_step(masked: Masked) -> None:
    stored, rounds = masked.stored, masked.record.rounds
    assert [row["trainer/global_step"] for row in stored.rows("prune/round")] == [12, 24]
    for name, values in (("round", [1, 2]), ("kept", [120, 60]), ("removed", [120, 60]), ("sparsity", [0.5, 0.75])):
        assert [row[f"prune/{name}"] for row in stored.rows("prune/round")] == values
    ends = stored.rows("prune/end/round")
    assert [row["trainer/global_step"] for row in ends] == [row.step for row in rounds] == [12, 24, 36]
    assert [row["prune/end/sparsity"] for row in ends] == [0, 0.5, 0.75]
    assert [row["prune/end/val_acc"] for row in ends] == pytest.approx([row.metrics["val_acc"] for row in rounds])
    assert [row["prune/end/theoretical_speedup"] for row in ends] == [1, 2, 4]
    assert all(row["prune/end/measured_speedup"] > 0 for row in ends)
    assert stored.axes["prune/end/val_acc"] == "prune/end/sparsity"
    assert stored.axes["trainer/global_step"] == ""


def test_every_round_has_a_table_of_its_layers(masked: Masked) -> None:
    tables = masked.stored.tables("prune/layers")
    assert [table[0]["round"] for table in tables] == [0, 1, 2]
    for row, table in zip(masked.record.rounds, tables, strict=True):
        assert {line["layer"]: (line["kept"], line["total"]) for line in table} == row.per_layer
        assert [line["density"] for line in table] == [0.5**row.round] * 2
    assert all(line["score_median"] is None for line in tables[0])
    for number in (1, 2):
        for line in tables[number]:
            scores = masked.weights.found[number][line["layer"]].abs().flatten().numpy()
            left = scores[scores > 0]  # what the cut before took holds exactly 0
            assert len(left) == line["kept"] * 2
            expected = np.quantile(left, [0, 0.25, 0.5, 0.75, 1], method="lower")
            found = [line[f"score_{name}"] for name in ("min", "q1", "median", "q3", "max")]
            assert found == pytest.approx(expected.tolist(), rel=1e-6)


def test_measurements_are_a_table_and_histograms(masked: Masked) -> None:
    stored, costs = masked.stored, masked.record.costs
    table = stored.tables("prune/costs")[-1]
    assert [line["label"] for line in table] == ["dense", "round 1", "round 2", "end"]
    assert [line["num_macs_nonzero"] for line in table] == [row["numbers"]["num_macs_nonzero"] for row in costs]
    histograms = [row["prune/latency"] for row in stored.rows("prune/latency")]
    assert len(histograms) == 4
    for histogram, row in zip(histograms, costs, strict=True):
        assert sum(histogram["values"]) == row["latency"]["samples"]
        assert histogram["bins"][0] <= row["latency"]["q1_ms"] <= row["latency"]["q3_ms"] <= histogram["bins"][-1]
    assert len(stored.rows("prune/latency_dense")) == 3


def test_tickets_are_artifacts_with_their_lineage(masked: Masked) -> None:
    artifacts = masked.stored.logged_artifacts()
    assert list(artifacts) == ["ticket-masked:round-01", "ticket-masked:round-02"]
    for number, (artifact, event) in enumerate(zip(artifacts.values(), masked.weights.events, strict=True), 1):
        (content,) = artifact.manifest.contents
        ticket = masked.folder / "tickets" / f"round-{number:02d}.safetensors"
        assert content.path == ticket.name
        assert (content.size, Path(content.local_path)) == (ticket.stat().st_size, ticket)
        assert (artifact.type, artifact.run_id, artifact.project) == ("ticket", "masked", "pruning")
        assert json.loads(artifact.metadata) == {
            "run": "masked",
            "round": number,
            "parent": [None, "ticket-masked:round-01"][number - 1],
            "density": 0.5**number,
            "sparsity": 1 - 0.5**number,
            "step": 12 * number,
            "rewound_to_step": 0,
            "digest": event.masks.digest() if event.masks else "",
        }


def test_the_report_comes_last(masked: Masked) -> None:
    (row,) = masked.stored.rows("prune/report")
    assert row["trainer/global_step"] == 36
    page = masked.stored.file(row, "prune/report").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "IterativeMagnitudePruner" in page
    assert "val_acc" in page


def test_runs_can_be_sorted_and_grouped(masked: Masked) -> None:
    rounds = masked.record.rounds
    values = [row.metrics["val_acc"] for row in rounds]
    summary = {name.removeprefix("prune/"): value for name, value in masked.stored.summary.items()}
    method = "IterativeMagnitudePruner + WeightRewind + LRRewind"
    assert {name: summary[name] for name in ("method", "rounds", "sparsity", "metric", "seed")} == {
        "method": method, "rounds": 2, "sparsity": 0.75, "metric": "val_acc", "seed": masked.record.seed,
    }  # fmt: skip
    assert summary["dense"] == pytest.approx(values[0])
    assert summary["change"] == pytest.approx(values[-1] - values[0])
    assert summary["matching_sparsity"] == max(
        r.sparsity for r, v in zip(rounds, values, strict=True) if v >= values[0]
    )
    assert masked.stored.config["prune"]["method"] == method
    assert masked.stored.config["prune"]["settings"] == masked.record.method


def test_the_trainer_is_left_as_it_was(masked: Masked) -> None:
    assert not any(isinstance(callback, WandbReporter) for callback in masked.trainer.callbacks)  # type: ignore[attr-defined]
    assert "log_metrics" not in vars(masked.trainer.logger)


def test_channels_and_compact_networks(tmp_path: Path) -> None:
    prune = ChannelPruner("l2", Budget(channels=0.5), at="1ep", verbose=False)
    fit(tmp_path, [prune, TicketWriter()], logger(tmp_path, "narrow"), max_epochs=2)
    (stored,) = read_runs(tmp_path)
    record = RunRecord.read(tmp_path / "pruning" / "narrow")
    dense, cut = stored.tables("prune/layers")
    for row, table in zip(record.rounds, (dense, cut), strict=True):
        assert {line["layer"]: (line["kept"], line["total"]) for line in table} == row.per_layer
    assert all(0 <= line["score_min"] <= line["score_q1"] <= line["score_max"] for line in cut)
    artifacts = stored.logged_artifacts()
    assert {name: (a.type, json.loads(a.metadata)["parent"]) for name, a in artifacts.items()} == {
        "compact-narrow:round-01": ("model", None),
        "compact-narrow:final": ("model", "compact-narrow:round-01"),
    }
    assert artifacts["compact-narrow:final"].manifest.contents[0].path == "compact.safetensors"
    assert stored.rows("prune/end/macs")[-1]["prune/end/macs"] == 0.5


class Crash(Callback):
    """The process dies in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise SystemError("killed")


def ours(runs: list[StoredRun]) -> Counter[tuple[int, tuple[str, ...]]]:
    """How often each set of keys under ``prune/`` was logged at each step."""
    rows = [
        (row["trainer/global_step"], tuple(sorted(k for k in row if "prune/" in k))) for r in runs for row in r.history
    ]
    return Counter(row for row in rows if row[1])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_goes_on_under_its_id_and_doubles_nothing(tmp_path: Path) -> None:
    def callbacks(*more: Callback) -> list[Callback]:
        saver = ModelCheckpoint(every_n_epochs=1, save_last=True)
        return [magnitude(), LRRewind("0st"), TicketWriter(), CostProfiler(latency=False, verbose=False), saver, *more]

    options = {"enable_checkpointing": True}
    fit(tmp_path / "whole", callbacks(), logger(tmp_path / "whole", "one"), **options)
    folder = tmp_path / "killed"
    with pytest.raises(SystemError, match="killed"):
        fit(folder, callbacks(Crash(29)), logger(folder, "one"), **options)  # the second cut was at step 24
    last = folder / "pruning" / "one" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 24  # from before it
    fit(folder, callbacks(), logger(folder, "one"), ckpt_path=last, **options)
    whole, killed = read_runs(tmp_path / "whole"), read_runs(folder)
    assert [len(whole), len(killed)] == [1, 2]
    assert {run.run_id for run in killed} == {"one"}
    assert len(killed[0].rows("prune/round")) == 2
    assert len(killed[1].rows("prune/round")) == 0
    assert ours(killed) == ours(whole)
    assert len(ours(whole)) > 10
    names = [name for run in killed for name in run.logged_artifacts()]
    assert names == ["ticket-one:round-01", "ticket-one:round-02"]
    assert killed[1].summary["prune/sparsity"] == 0.75


def test_another_run_in_the_ledger_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "pruning" / "new").mkdir(parents=True)
    content = {"format": "lightning_prune.wandb", "version": 1, "run": "old", "sent": ["12: prune/layers"]}
    (tmp_path / "pruning" / "new" / LEDGER).write_text(json.dumps(content))
    fit(tmp_path, [magnitude(1)], logger(tmp_path, "new"))
    assert len(read_runs(tmp_path)[0].rows("prune/layers")) == 2


def test_a_damaged_ledger_is_named_and_all_is_sent(tmp_path: Path) -> None:
    (tmp_path / "pruning" / "new").mkdir(parents=True)
    (tmp_path / "pruning" / "new" / LEDGER).write_text('{"format": ')
    with pytest.warns(UserWarning, match=r"reading what was sent before failed .*wandb.json is not a list of what"):
        fit(tmp_path, [magnitude(1)], logger(tmp_path, "new"))
    assert len(read_runs(tmp_path)[0].rows("prune/layers")) == 2


def test_switched_off_nothing_is_written(tmp_path: Path) -> None:
    weights = Weights()
    off = WandbLogger(save_dir=tmp_path, project="pruning", mode="disabled")
    fitted = fit(tmp_path, [magnitude(1), TicketWriter(), weights], off)
    assert list(tmp_path.rglob("*.wandb")) == list(tmp_path.rglob(LEDGER)) == []
    assert weights.events[0].scores == {}
    assert len(RunRecord.read(fitted.callbacks[0].folder).rounds) == 2  # type: ignore[attr-defined]


class Broken:
    """A run whose connection is gone: everything raises but its identity."""

    id, name, disabled, offline = "broken", "broken", False, False

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.keys: set[str] = set()

    def log(self, metrics: dict[str, Any]) -> None:
        self.keys |= metrics.keys()
        raise ConnectionError("log: the service has gone\nwith a long story")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self.calls[name] += 1
        raise ConnectionError(f"{name}: the service has gone")


def test_a_broken_connection_stops_nothing_and_is_told_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def weights(folder: Path, log: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module, callbacks = ToyModule(), [magnitude(), TicketWriter(), CostProfiler(seconds=0.01, verbose=False)]
        trainer(folder, callbacks, max_epochs=1, logger=log).fit(module, *loaders())
        return module.state_dict()

    broken = Broken()
    plain = weights(tmp_path / "plain", CSVLogger(tmp_path / "plain"))
    recwarn.clear()
    without = weights(tmp_path / "broken", WandbLogger(save_dir=tmp_path / "broken", project="p", experiment=broken))  # type: ignore[arg-type]
    told = [str(warning.message) for warning in recwarn if "W&B" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith("W&B: logging failed (ConnectionError: log: the service has gone). Training goes on")
    assert {"val_acc", "prune/round", "prune/end/val_acc", "prune/layers", "prune/costs", "prune/report"} <= broken.keys
    assert broken.calls["log_artifact"] == 2
    assert broken.calls["summary"] > 2
    assert all(torch.equal(value, without[name]) for name, value in plain.items())
    assert len(RunRecord.read(tmp_path / "broken" / "p" / "broken").rounds) == 3


def test_parts_can_be_switched_off(tmp_path: Path) -> None:
    callbacks = [WandbReporter(artifacts=False, report=False), magnitude(1), TicketWriter()]
    fitted = fit(tmp_path, callbacks, logger(tmp_path, "less"))
    (stored,) = read_runs(tmp_path)
    assert stored.logged_artifacts() == {}
    assert stored.rows("prune/report") == []
    assert len(stored.rows("prune/layers")) == 2
    assert callbacks[0] in fitted.callbacks  # type: ignore[attr-defined]


def test_without_its_logger_the_callback_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the trainer has no WandbLogger: give it logger=WandbLogger\(\)"):
        trainer(tmp_path, [WandbReporter(), magnitude(1)], max_epochs=1).fit(ToyModule(), *loaders())


def test_other_loggers_need_no_callback(tmp_path: Path) -> None:
    weights = Weights()
    fitted = trainer(tmp_path, [magnitude(1), weights], max_epochs=1)
    fitted.fit(ToyModule(), *loaders())
    assert weights.events[0].scores == {}
    assert list(tmp_path.rglob(LEDGER)) == []


def test_there_is_no_hook_between_events() -> None:
    hooks = ["on_train_batch_start", "on_train_batch_end", "on_after_backward", "on_before_optimizer_step"]
    hooks += ["on_train_epoch_start", "on_train_epoch_end", "on_validation_end", "on_before_zero_grad"]
    assert not any(is_overridden(hook, WandbReporter(), parent=Callback) for hook in hooks)
    assert is_overridden("on_train_start", WandbReporter(), parent=Callback)

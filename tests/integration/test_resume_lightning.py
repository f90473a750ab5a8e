"""What resuming relies on inside Lightning, a name each, so that a release that changes it is noticed here first.

Where one of these fails, the message says which behaviour changed and which part of ``lightning_prune.resume`` uses it.
"""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from lightning_prune.resume.generators import get_generators
from tests._helpers.resuming import Case, Noisy, fit, plain_resume


class Calls(pl.Callback):
    """Wraps loop methods on the instance, as ResumeState does, and lists the calls in order."""

    METHODS = (
        ("fit_loop", "run"),
        ("fit_loop", "setup_data"),
        ("fit_loop", "_load_combined_loader_states"),
        ("fit_loop", "reset"),
        ("fit_loop", "on_advance_start"),
        ("epoch_loop", "reset"),
        ("epoch_loop", "on_run_start"),
        ("epoch_loop", "advance"),
        ("epoch_loop", "on_advance_end"),
        ("fit_loop", "on_advance_end"),
    )

    def __init__(self) -> None:
        self.calls: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for owner, name in self.METHODS:
            loop = trainer.fit_loop if owner == "fit_loop" else trainer.fit_loop.epoch_loop
            original = getattr(loop, name)
            setattr(loop, name, partial(self._call, original, f"{owner}.{name}"))

    def _call(self, original: Any, call: str, *args: Any) -> None:
        self.calls.append(call)
        original(*args)

    def on_train_start(self, *_: Any) -> None:
        self.calls.append("on_train_start")

    def on_train_epoch_start(self, *_: Any) -> None:
        self.calls.append("on_train_epoch_start")


def test_loops_call_their_methods_on_the_instance_in_this_order(tmp_path: Path) -> None:
    calls = Calls()
    fit(Case("calls"), tmp_path, owners=[calls], hooks=(), limit_train_batches=1, max_epochs=2)
    start = ["fit_loop.on_advance_start", "fit_loop.setup_data", "on_train_epoch_start"]
    epoch = ["epoch_loop.reset", "epoch_loop.on_run_start", "epoch_loop.advance", "epoch_loop.on_advance_end"]
    assert calls.calls == [
        "fit_loop.run",
        "fit_loop.setup_data",
        "fit_loop._load_combined_loader_states",
        "fit_loop.reset",
        "on_train_start",
        *[*start, *epoch, "fit_loop.on_advance_end"] * 2,
    ], "Lightning's order of loop methods changed: ResumeState.attach wraps some of them and counts on all"


class Probe(pl.Callback):
    """Reads what ResumeState reads, in every hook that writes checkpoints."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def _look(self, trainer: pl.Trainer, hook: str) -> None:
        epoch: Any = trainer.fit_loop.epoch_progress
        batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        assert trainer.lightning_module._current_fx_name == hook, "the running hook's name is no longer on the module"
        counts = epoch.current
        self.seen.append(
            (
                hook,
                (counts.ready, counts.started, counts.processed, counts.completed),
                (batch.ready, batch.started, batch.processed, batch.completed),
            )
        )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._look(trainer, "on_train_batch_end")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._look(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._look(trainer, "on_train_epoch_end")


def test_progress_counters_tell_where_a_checkpoint_is_written(tmp_path: Path) -> None:
    probe = Probe()
    fit(Case("probe"), tmp_path, owners=[probe], hooks=(), limit_train_batches=2)
    expected = []
    for epoch in range(2):
        inside, after = (epoch + 1, epoch + 1, epoch, epoch), (epoch + 1, epoch + 1, epoch + 1, epoch)
        expected += [
            ("on_train_batch_end", inside, (1, 1, 1, 0)),
            ("on_train_batch_end", inside, (2, 2, 2, 1)),
            ("on_validation_end", inside, (2, 2, 2, 2)),
            ("on_train_epoch_end", after, (2, 2, 2, 2)),
        ]
    assert probe.seen == expected, "Lightning counts progress otherwise: limits.find_position, ResumeState._begin"


class Iterators(pl.Callback):
    """The identity of the data iterator, and the generators, at each epoch's start and first batch."""

    def __init__(self) -> None:
        self.before: list[Any] = []
        self.after: list[Any] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self.before.append(fetcher.combined_loader._iterator)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if batch_idx == 0:
            self.after.append(fetcher.combined_loader._iterator)
        assert fetcher.fetched == batch_idx + 1, "fetcher.fetched no longer counts the epoch's batches"
        assert fetcher.done == (batch_idx == 5), "fetcher.done no longer marks the last batch"


def test_the_iterator_is_drawn_in_setup_data_for_the_first_epoch_and_anew_for_later_ones(tmp_path: Path) -> None:
    probe = Iterators()
    fit(Case("iterators"), tmp_path, owners=[probe], hooks=(), max_epochs=3)
    drawn = [before is not after for before, after in zip(probe.before, probe.after, strict=True)]
    assert drawn == [False, True, True], "Lightning draws its iterators elsewhere: ResumeState._on_epoch_run_start"


def test_an_iterator_drawn_again_is_a_new_object_and_a_reset_ends_persistent_workers() -> None:
    loader = DataLoader(Noisy(), 4, num_workers=1, persistent_workers=True)
    combined = CombinedLoader([loader], "max_size_cycle")
    fetcher = _DataFetcher()
    fetcher.setup(combined)
    iter(fetcher)
    first, workers = combined._iterator, loader._iterator
    iter(fetcher)
    assert combined._iterator is not first, "CombinedLoader keeps its iterator: ResumeState._on_epoch_run_start"
    assert loader._iterator is workers
    combined.reset()
    assert loader._iterator is None, "CombinedLoader.reset leaves workers alive: ResumeState._draw_iterator"


def test_a_fetcher_without_a_length_reads_one_batch_ahead() -> None:
    class Stream(IterableDataset):
        def __init__(self) -> None:
            self.given = 0

        def __iter__(self) -> Any:
            for index in range(3):
                self.given += 1
                yield index

    data = Stream()
    fetcher = _PrefetchDataFetcher()
    fetcher.setup(CombinedLoader([DataLoader(data, batch_size=None)], "max_size_cycle"))
    iter(fetcher)
    next(fetcher)
    assert (data.given, fetcher.fetched, fetcher.done) == (2, 2, False), "prefetching changed: limits.warn_of_limits"


class AtRun(pl.Callback):
    """The state of the loops when ``fit_loop.run`` is called."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fit_loop = trainer.fit_loop
        original = fit_loop.run

        def run() -> None:
            loops = (fit_loop, fit_loop.epoch_loop)
            self.flags = [(loop.restarting, loop.is_resuming, loop._loaded_from_state_dict) for loop in loops]
            self.processed = fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
            for loop in loops:
                loop.on_iteration_done()
            self.cleared = [(loop.restarting, loop.is_resuming, loop._loaded_from_state_dict) for loop in loops]
            trainer.should_stop = True  # enough was seen
            original()

        fit_loop.run = run  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.parametrize(
    ("index", "restarting", "processed"), [(1, True, 0), (-1, False, 2)], ids=["inside", "between"]
)
def test_loops_are_restored_before_they_run(tmp_path: Path, index: int, restarting: bool, processed: int) -> None:
    full = fit(Case("plain"), tmp_path)
    probe = AtRun()
    fit(Case("plain"), tmp_path, owners=[probe], hooks=(), checkpoint=full.saved[index].path, max_epochs=9)
    assert probe.processed == processed, "loop counters are restored after fit_loop.run: ResumeState._begin"
    assert probe.flags == [(restarting, True, True)] * 2, "flags of a resumed loop changed: ResumeState._run, _begin"
    assert probe.cleared == [(False, False, False)] * 2, "on_iteration_done clears other flags: state._clear_restart"


def test_callback_metrics_is_a_live_dictionary(tmp_path: Path) -> None:
    def after(trainer: pl.Trainer) -> None:
        trainer.callback_metrics.update({"ours": torch.tensor(1.0)})
        assert "ours" in trainer.callback_metrics, "callback_metrics is a copy now: ResumeState._begin puts them back"

    fit(Case("metrics"), tmp_path, owners=(), hooks=(), after=after, max_epochs=1)


def plateau(optimizer: SGD) -> Any:
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=9)
    return {"scheduler": scheduler, "monitor": "val_loss"}


def test_lightning_loses_the_plateau_step_of_the_epoch_it_resumes_after(tmp_path: Path) -> None:
    case = Case("plateau", plateau)
    full = fit(case, tmp_path, owners=())
    end = next(saved for saved in full.saved if saved.hook == "on_train_epoch_end")
    resumed = plain_resume(case, tmp_path / "plain", end)
    steps = [run.trainer.lr_scheduler_configs[0].scheduler.last_epoch for run in (full, resumed)]
    assert steps == [2, 1], "Lightning makes up for the lost step itself now: do not replay it in ResumeState._begin"


def test_lightning_skips_the_validation_that_a_checkpoint_of_the_last_batch_is_followed_by(tmp_path: Path) -> None:
    case = Case("skipped")
    full = fit(case, tmp_path, owners=())
    last_batch = full.saved[5]
    assert (last_batch.hook, full.events[last_batch.events][0]) == ("on_train_batch_end", "validation")
    left = [event[:2] for event in full.events[last_batch.events :]]
    resumed = [event[:2] for event in plain_resume(case, tmp_path / "plain", last_batch).events]
    assert left[:2] == [("validation", 0), ("epoch end", 0)]
    assert resumed != left, "Lightning finishes the interrupted epoch itself now: compare ResumeState._continue_epoch"


def test_lightning_warns_of_loaders_that_cannot_be_resumed(tmp_path: Path) -> None:
    case = Case("plain")
    full = fit(case, tmp_path, owners=())
    with pytest.warns(UserWarning, match="^You're resuming from a checkpoint that ended before the epoch ended"):
        fit(case, tmp_path / "plain", owners=(), hooks=(), checkpoint=full.saved[1].path)


def test_names_that_are_read_or_set(tmp_path: Path) -> None:
    """Attributes that would be created silently if Lightning had renamed them."""

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            fit_loop = trainer.fit_loop
            assert fit_loop._last_train_dl_reload_epoch == 0
            assert fit_loop._combined_loader_states_to_load == []
            assert fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch == 0
            assert fit_loop.epoch_loop._skip_next_val is False
            assert fit_loop.epoch_loop.max_steps == -1
            assert trainer._logger_connector._first_loop_iter is (trainer.fit_loop.batch_idx == 0)
            assert trainer.should_stop is False
            assert isinstance(fit_loop._combined_loader, CombinedLoader)

    fit(Case("names"), tmp_path, owners=[Look()], hooks=(), max_epochs=1)
    assert not isinstance(DataLoader(Noisy(), 4), _Stateful)


def test_logged_results_keep_these_sums(tmp_path: Path) -> None:
    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            results = trainer.fit_loop.epoch_loop._results
            mean, metric = results["training_step.train_loss"], results["training_step.mean_loss"]
            assert isinstance(mean, _ResultMetric)
            losses = [event[4] for event in trainer.lightning_module.events if event[0] == "train"]
            assert float(mean.value) == pytest.approx(4 * sum(losses))
            assert int(mean.cumulated_batch_size) == 4 * len(losses) == 24
            assert mean._update_count == len(losses)
            assert metric.value is trainer.lightning_module.mean_loss
            assert metric.meta.metric_attribute == "mean_loss"
            assert not mean.has_reset
            # what is rebuilt on resuming must equal what the next self.log() describes, or Lightning refuses the log
            for result in (mean, metric):
                old = result.meta
                names = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "enable_graph",
                         "add_dataloader_idx", "dataloader_idx", "metric_attribute")  # fmt: skip
                new = _Metadata(**{name: getattr(old, name) for name in names})
                new.sync = _Sync(fn=trainer.strategy.reduce, _should=old.sync.should, _group=old.sync._group)
                assert new == old, "self.log describes results by more than resume/metrics.py saves"

    fit(Case("results"), tmp_path, owners=[Look()], hooks=(), max_epochs=1)


def test_torchmetrics_keep_their_states_by_name() -> None:
    metric = MeanMetric()
    metric.update(3.0)
    metric.compute()
    assert set(metric._defaults) == {"mean_value", "weight"}, "torchmetrics keeps states elsewhere: resume/metrics.py"
    assert metric._update_count == 1
    assert metric._computed is not None
    other = MeanMetric()
    for name in metric._defaults:
        setattr(other, name, getattr(metric, name).clone())
    other._update_count = 1
    assert other.compute() == 3.0


def test_a_loader_draws_its_order_at_the_iterator_or_at_the_first_batch() -> None:
    """Replay sets generators at these two points and nowhere in between."""
    for workers in (0, 1):
        loader = DataLoader(Noisy(noise=0), 4, shuffle=True, num_workers=workers)
        state = get_generators()
        expected = [batch[0] for batch in loader]
        torch.set_rng_state(state["torch"])
        iterator = iter(loader)
        got = [next(iterator)[0]]
        for _ in range(5):
            torch.rand(7)  # what a training step draws
            got.append(next(iterator)[0])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), "torch's loaders draw in between"

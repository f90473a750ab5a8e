"""What is measured in a fit, where it goes, and that the fit does not notice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import (
    Budget,
    ChannelPruner,
    ConfigError,
    CostProfiler,
    IterativeMagnitudePruner,
    LRRewind,
    MeasurementError,
    PruneEvent,
    RunRecord,
    count_costs,
)
from tests._helpers.models import ToyModule, loaders, toy_data, toy_network, trainer

DENSE_MACS = 12 * 16 + 16 * 3


class Logger(CSVLogger):
    """A logger that remembers what it was given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="run")
        self.metrics: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(dict(metrics))
        super().log_metrics(metrics, step)


class Listener(Callback):
    """Takes measurements, as a report does."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def record_costs(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        self.rows.append(row)


def profiler(**options: Any) -> CostProfiler:
    return CostProfiler(**({"seconds": 0.01, "verbose": False} | options))


def channels() -> ChannelPruner:
    return ChannelPruner("l2", Budget(channels=0.5), at="1ep", verbose=False)


def magnitude(**options: Any) -> IterativeMagnitudePruner:
    return IterativeMagnitudePruner(**({"fraction": 0.5, "rounds": 2, "verbose": False} | options))


def numbers(profile: CostProfiler, name: str) -> list[float]:
    return [row["numbers"][name] for row in profile.rows]


def test_channels_that_leave(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    profile, logger, listener = profiler(verbose=True), Logger(tmp_path), Listener()
    module = ToyModule()
    fit = trainer(tmp_path, [channels(), profile, listener], max_epochs=2, logger=logger)
    fit.fit(module, *loaders())
    assert [(row["label"], row["round"], row["step"]) for row in profile.rows] == [
        ("dense", 0, 0),
        ("round 1", 1, 12),
        ("end", 1, 24),
    ]
    assert numbers(profile, "num_macs") == [DENSE_MACS, DENSE_MACS / 2, DENSE_MACS / 2]
    assert numbers(profile, "theoretical_speedup") == [1, 2, 2]
    assert numbers(profile, "num_params")[-1] == sum(p.numel() for p in module.parameters())
    assert numbers(profile, "measured_speedup")[0] == 1
    names = ("measured_speedup_low", "measured_speedup", "measured_speedup_high")
    low, ratio, high = (profile.rows[-1]["numbers"][name] for name in names)
    assert 0 < low <= ratio <= high
    record = RunRecord.read(logger.log_dir)
    assert record.costs == profile.rows
    assert record.costs[0]["latency"]["environment"]["torch"] == str(torch.__version__)
    logged = [m for m in logger.metrics if "prune/num_macs" in m]
    assert [m["prune/num_macs"] for m in logged] == numbers(profile, "num_macs")
    assert listener.rows == profile.rows
    ends = [m for m in logger.metrics if "prune/end/round" in m]
    assert [m["prune/end/macs"] for m in ends] == [1, 0.5]
    assert [m["prune/end/theoretical_speedup"] for m in ends] == [1, 2]
    assert [m["prune/end/val_acc"] for m in ends] == [row.metrics["val_acc"] for row in record.rounds]
    assert [m["prune/end/sparsity"] for m in ends] == [row.sparsity for row in record.rounds]
    shown = capsys.readouterr().out.splitlines()
    assert sum("theoretical" in line for line in shown) == 1
    assert any("round 1" in line and "50.0 %" in line and "2.00 x" in line for line in shown)


def test_masked_weights_are_counted_at_the_event_and_never_taken_for_speed(tmp_path: Path) -> None:
    profile = profiler()
    module = ToyModule(toy_network(norm=False))
    before: dict[int, dict[str, Tensor]] = {}

    class Watch(Callback):
        def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
            before[event.round] = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    callbacks = [profile, magnitude(), LRRewind("0st"), Watch()]
    trainer(tmp_path, callbacks, max_epochs=1).fit(module, *loaders())
    assert [row["label"] for row in profile.rows] == ["dense", "round 1", "round 2", "end"]
    assert numbers(profile, "num_macs") == [DENSE_MACS] * 4
    assert numbers(profile, "num_macs_nonzero") == [240, 120, 60, 60]
    assert numbers(profile, "theoretical_speedup") == [1, 2, 4, 4]
    assert numbers(profile, "num_params_nonzero")[1:] == [120 + 19, 60 + 19, 60 + 19]
    left = sum(int((p != 0).sum()) for p in before[2].values() if p.ndim == 2)
    assert left == 120  # the second cut is decided, its weights still hold their values: counting left them alone


@pytest.mark.parametrize("prune", [channels, magnitude])
def test_the_fit_does_not_notice(tmp_path: Path, prune: Any) -> None:
    def weights(name: str, extra: list[Callback]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = ToyModule(toy_network(dropout=0.3))
        trainer(tmp_path / name, [prune(), *extra], max_epochs=2).fit(module, *loaders(shuffle=True))
        return module.state_dict()

    plain, profiled = weights("plain", []), weights("profiled", [profiler()])
    assert all(torch.equal(value, profiled[name]) for name, value in plain.items())


def test_there_is_no_hook_between_events() -> None:
    hooks = ["on_train_batch_start", "on_train_batch_end", "on_after_backward", "on_before_optimizer_step"]
    hooks += ["on_train_epoch_start", "on_train_epoch_end", "on_validation_end", "on_before_zero_grad"]
    assert not any(is_overridden(hook, CostProfiler(), parent=Callback) for hook in hooks)
    assert is_overridden("on_train_start", CostProfiler(), parent=Callback)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_goes_on_with_its_measurements(tmp_path: Path) -> None:
    whole = profiler()
    saved = ModelCheckpoint(tmp_path / "saved", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    callbacks = [channels(), whole, saved]
    trainer(tmp_path / "a", callbacks, max_epochs=3, enable_checkpointing=True).fit(ToyModule(), *loaders())
    paths = {epoch: next((tmp_path / "saved").glob(f"epoch={epoch}*.ckpt")) for epoch in (0, 1)}
    for epoch, left in ((0, 1), (1, 2)):
        resumed = profiler()
        module = ToyModule()
        again = ModelCheckpoint(tmp_path / "saved", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        options = {"max_epochs": 3, "enable_checkpointing": True}
        fit = trainer(tmp_path / f"b{epoch}", [channels(), resumed, again], **options)
        fit.fit(module, *loaders(), ckpt_path=paths[epoch])
        assert [row["label"] for row in resumed.rows] == ["dense", "round 1", "end"]
        assert resumed.rows[:left] == whole.rows[:left]
        assert numbers(resumed, "num_macs") == numbers(whole, "num_macs")
        assert numbers(resumed, "theoretical_speedup") == [1, 2, 2]
        assert RunRecord.read(fit.logger.log_dir).costs == resumed.rows


def test_counts_alone(tmp_path: Path) -> None:
    profile = profiler(latency=False)
    trainer(tmp_path, [profile], max_epochs=1).fit(ToyModule(), *loaders())
    assert [row["label"] for row in profile.rows] == ["dense", "end"]
    assert all(row["latency"] is None and "measured_speedup" not in row["numbers"] for row in profile.rows)


class Stream(IterableDataset):
    """Data that cannot be indexed."""

    def __iter__(self) -> Iterator[Any]:
        return iter(toy_data())


def test_inputs_that_only_the_first_pass_shows(tmp_path: Path) -> None:
    profile = profiler()
    module = ToyModule()
    fit = trainer(tmp_path, [magnitude(rounds=1), profile], max_epochs=1)
    fit.fit(module, DataLoader(Stream(), 8), loaders()[1])
    assert [row["label"] for row in profile.rows] == ["round 1", "end"]
    assert numbers(profile, "num_macs_nonzero")[-1] == 120
    assert numbers(profile, "theoretical_speedup") == [2, 2]
    assert not module.network._forward_pre_hooks


def test_a_measurement_that_fails_later_is_a_warning(tmp_path: Path) -> None:
    class Picky(nn.Sequential):
        refuses = False

        def forward(self, x: Tensor) -> Tensor:
            if self.refuses and len(x) == 1:
                raise ValueError("not this")
            return super().forward(x)

    class Refuse(Callback):
        def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
            Picky.refuses = False

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            Picky.refuses = trainer.current_epoch == 0

    profile = profiler()
    module = ToyModule(Picky(*toy_network()))
    with pytest.warns(UserWarning, match="'round 1' is not measured: .*not this"):
        trainer(tmp_path, [magnitude(rounds=1), profile, Refuse()], max_epochs=1).fit(module, *loaders())
    assert [row["label"] for row in profile.rows] == ["dense", "end"]


def test_at_the_start_it_is_an_error(tmp_path: Path) -> None:
    profile = profiler(example_inputs=torch.rand(2, 5))
    with pytest.raises(MeasurementError, match="cannot be run with these example inputs"):
        trainer(tmp_path, [profile], max_epochs=1).fit(ToyModule(), *loaders())


def test_a_network_that_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    class Alone(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is one of me")

    with pytest.raises(ConfigError, match=r"Alone cannot be copied \(TypeError: there is one of me\)"):
        trainer(tmp_path, [profiler()], max_epochs=1).fit(ToyModule(Alone(*toy_network())), *loaders())


@pytest.mark.parametrize(
    ("options", "match"),
    [({"seconds": 0}, "seconds=0"), ({"timeout": -1}, "timeout=-1"), ({"batch_size": 0}, "batch_size=0")],
)
def test_arguments_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        CostProfiler(**options)


def test_precision_of_the_trainer(tmp_path: Path) -> None:
    profile = profiler()
    module = ToyModule()
    trainer(tmp_path, [profile], max_epochs=1, precision="bf16-true").fit(module, *loaders())
    assert profile.rows[-1]["latency"]["environment"]["dtype"] == "bfloat16"
    assert profile.rows[-1]["comparison"]["first"]["environment"]["dtype"] == "bfloat16"
    assert numbers(profile, "num_macs") == [count_costs(toy_network(), torch.rand(1, 12)).macs.total] * 2

"""The same scalars reach every logger."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

from lightning_prune import Budget, ChannelPruner, CostProfiler, RunRecord
from tests._helpers.models import ToyModule, loaders, trainer

Values = dict[str, list[tuple[int, float]]]


def csv_logger(folder: Path) -> tuple[Any, Callable[[], Values]]:
    logger = CSVLogger(folder, name="run")

    def read() -> Values:
        found: Values = {}
        with open(Path(logger.log_dir) / "metrics.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name != "step":
                        found.setdefault(name, []).append((int(row["step"]), float(value)))
        return found

    return logger, read


def tensorboard_logger(folder: Path) -> tuple[Any, Callable[[], Values]]:
    pytest.importorskip("tensorboard", reason="needs tensorboard (extra loggers)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(folder, name="run")

    def read() -> Values:
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        return {n: [(e.step, e.value) for e in events.Scalars(n)] for n in events.Tags()["scalars"]}

    return logger, read


def mlflow_logger(folder: Path) -> tuple[Any, Callable[[], Values]]:
    pytest.importorskip("mlflow", reason="needs mlflow (extra loggers)")
    try:
        logger = MLFlowLogger("run", tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
        client, run_id = logger.experiment, logger.run_id
    except Exception as error:  # mlflow without its database's packages
        pytest.skip(f"mlflow cannot keep runs here: {type(error).__name__}: {error}")

    def read() -> Values:
        names = client.get_run(run_id).data.metrics
        return {n: [(m.step, m.value) for m in client.get_metric_history(run_id, n)] for n in names}

    return logger, read


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [csv_logger, tensorboard_logger, mlflow_logger])
def test_scalars_of_a_run(tmp_path: Path, make: Callable[[Path], tuple[Any, Callable[[], Values]]]) -> None:
    logger, read = make(tmp_path)
    prune = ChannelPruner("l2", Budget(channels=0.5), at="1ep", dirpath=tmp_path / "record", verbose=False)
    callbacks = [prune, CostProfiler(seconds=0.01, verbose=False)]
    trainer(tmp_path, callbacks, max_epochs=2, logger=logger).fit(ToyModule(), *loaders())
    found, record = read(), RunRecord.read(tmp_path / "record")
    assert found["prune/round"] == [(12, 1)]
    assert found["prune/sparsity"] == [(12, 0.5)]
    assert found["prune/kept"] == [(12, 8)]
    assert found["prune/num_macs"] == [(row["step"], row["numbers"]["num_macs"]) for row in record.costs]
    assert [step for step, _ in found["prune/latency_ms"]] == [0, 12, 24]
    assert found["prune/end/sparsity"] == [(row.step, row.sparsity) for row in record.rounds]
    assert found["prune/end/macs"] == [(12, 1), (24, 0.5)]
    steps, values = zip(*found["prune/end/val_acc"], strict=True)
    assert list(steps) == [row.step for row in record.rounds]
    assert list(values) == pytest.approx([row.metrics["val_acc"] for row in record.rounds])

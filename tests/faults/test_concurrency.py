"""Two runs in one folder do not write over each other, and a run folder is never silently reused."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from lightning_prune import (
    ConfigError,
    IterativeMagnitudePruner,
    RoundConnectivity,
    SupermaskScorer,
    TicketWriter,
    WeightRewind,
)
from lightning_prune.callbacks.claims import LOCK_NAME
from lightning_prune.cli import main
from tests._helpers.models import loaders, trainer
from tests.faults.cases import Classifier, Raises

ROOT = Path(__file__).parents[2]
HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(f"{os.getpid()}\\n")
file.flush()
print("held", flush=True)
time.sleep(100)
"""

pytestmark = [
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def prune() -> IterativeMagnitudePruner:
    return IterativeMagnitudePruner(0.3, rounds=1, verbose=False)


def fit(folder: Path, *extra: Any, version: str = "v", checkpoint: Path | None = None, **options: Any) -> pl.Trainer:
    logger = CSVLogger(folder, name="run", version=version)
    run = trainer(folder, [prune(), WeightRewind("0st"), *extra], max_epochs=1, logger=logger, **options)
    run.fit(Classifier(), *loaders(), ckpt_path=checkpoint)
    return run


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (LOCK_NAME, "metrics.csv")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that holds the run folder."""
    if os.name == "nt":
        pytest.skip("locks of POSIX")
    folder = tmp_path / "run" / "v"
    folder.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / LOCK_NAME)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_that_another_process_holds(tmp_path: Path, holder: Any) -> None:
    with pytest.raises(ConfigError, match=rf"run/v is in use by process {holder.pid}, and a run folder holds one run"):
        fit(tmp_path)
    assert contents(tmp_path / "run" / "v") == {}
    holder.kill()
    holder.wait()
    fit(tmp_path)  # at once: the system has freed it
    assert (tmp_path / "run" / "v" / "record.json").exists()


class Within(pl.Callback):
    """Starts another fit in the same folder, in the middle of one."""

    message = ""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self.message:
            with pytest.raises(ConfigError) as caught:
                fit(Path(trainer.default_root_dir))
            self.message = str(caught.value)


def test_a_folder_that_another_fit_of_this_process_holds(tmp_path: Path) -> None:
    within = Within()
    fit(tmp_path, within)
    assert "is in use by another fit of this process" in within.message
    fit(tmp_path, version="w")  # and afterwards nothing is held
    with pytest.raises(ConfigError, match="is the record of an earlier run"):
        fit(tmp_path)


def test_a_run_that_died_before_its_first_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Raises("on_train_batch_end", 2, ZeroDivisionError()))
    before = contents(tmp_path)
    assert "run/v/record.json" in before
    with pytest.raises(ConfigError, match=r"is the record of an earlier run.*ended before its first checkpoint"):
        fit(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda folder: TicketWriter(folder), "round-01.safetensors"),
        (lambda folder: RoundConnectivity(points=2, dirpath=folder), "connectivity.json"),
        (lambda folder: SupermaskScorer(monitor="val_acc", dirpath=folder), "supermasks.json"),
    ],
)
def test_a_folder_of_their_own_is_not_written_over(make: Any, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    fit(tmp_path, make(folder))
    before = contents(folder)
    assert name in before
    with pytest.raises(ConfigError, match=rf"shared holds {name} .*of an earlier run"):
        fit(tmp_path, make(folder), version="w")
    assert contents(folder) == before


def test_trying_out_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, TicketWriter(tmp_path / "tickets"), fast_dev_run=1)
    assert contents(tmp_path) == {}


def test_two_commands_that_chose_the_same_folder(
    tmp_path: Path, holder: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    recipe["trainer"]["logger"]["init_args"] = {"save_dir": str(tmp_path), "name": "run", "version": "v"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("sys.argv", ["lightning-prune", "fit", "--config", str(tmp_path / "recipe.yaml")])
    (tmp_path / "run" / "v" / "config.yaml").write_text("of the other run")
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert f"is in use by process {holder.pid}" in capsys.readouterr().err
    assert (tmp_path / "run" / "v" / "config.yaml").read_text() == "of the other run"

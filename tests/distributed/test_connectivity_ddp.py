"""Barriers between rounds and instability analysis on two processes, started by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_prune import ErrorRate, linear_mode_connectivity
from tests._helpers.models import loaders, toy_network
from tests.conftest import ROOT
from tests.distributed.connectivity_worker import Answering, statistic
from tests.integration.test_instability import RECIPE

pytestmark = pytest.mark.distributed


def start(arguments: list[str], folder: Path, torchrun: bool = True, timeout: float = 280) -> str:
    """What the processes printed; a failure is an error."""
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    command = [sys.executable, "-W", "ignore", *two, "-m", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The worker's folder, and what each process saw."""
    folder = tmp_path_factory.mktemp("two")
    start(["tests.distributed.connectivity_worker", str(folder)], folder)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("job", ["validated", "own error"])
def test_rounds_are_measured_as_one_process_would(found: tuple[Path, list[dict[str, Any]]], job: str) -> None:
    first, second = (rank[job] for rank in found[1])
    # validation gives all processes the running statistics of rank 0; without it each has its own
    assert (first["means"] == second["means"]) == (job == "validated")
    folder = found[0] / job
    assert first["rows"] == second["rows"] == json.loads((folder / "connectivity.json").read_text())["lines"]
    assert [row["rounds"] for row in first["rows"]] == [[0, 1], [1, 2]]
    kept = torch.load(folder / "networks.pt", weights_only=True)
    error, split = (ErrorRate({"val": list(loaders()[1])}), "val") if job == "validated" else (statistic, "error")
    for row, earlier, later in zip(first["rows"], kept, kept[1:], strict=False):
        by_hand = linear_mode_connectivity(Answering(toy_network()), earlier, later, error, points=3)
        assert row["errors"][split] == pytest.approx(by_hand.errors[split])
    assert len(set(first["rows"][0]["errors"][split])) > 1


@pytest.mark.parametrize("point", ["0st", "2st"])
def test_noise_of_two_processes_follows_from_the_seed(found: tuple[Path, list[dict[str, Any]]], point: str) -> None:
    ranks = [rank["branches"] for rank in found[1]]
    epoch = 48 - (16 if point == "2st" else 0)  # images of this process that the first epoch has left
    for rank in ranks:
        one, again, two = (rank[f"{point} {name}"] for name in ("one", "again", "two"))
        assert one == again
        assert len(one["seen"]) == len(two["seen"]) == epoch + 48
        assert one["seen"][:epoch] != two["seen"][:epoch]
        assert one["weights"] != two["weights"]
    for name in ("one", "two"):
        first, second = (rank[f"{point} {name}"] for rank in ranks)
        assert first["weights"] == second["weights"]
        assert not set(first["seen"][:epoch]) & set(second["seen"][:epoch])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def analysis(recipe: Path, out: str, *arguments: str, torchrun: bool = True) -> tuple[str, list[dict[str, Any]]]:
    command = ["lightning_prune.cli", "connectivity", "--config", str(recipe), "--at", "0st,3st", "--seeds", "1"]
    command += ["--points", "3", "--no-pictures", "--out", out, *arguments]
    printed = start(command, recipe.parent, torchrun)
    return printed, json.loads((recipe.parent / out / "connectivity.json").read_text())["lines"]


@pytest.mark.slow
def test_torchrun_divides_runs_on_one_device(recipe: Path) -> None:
    _, alone = analysis(recipe, "alone", torchrun=False)
    printed, divided = analysis(recipe, "divided")
    assert divided == alone
    assert printed.count(": training") == 5  # each of trunk and branches once


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_processes_of_one_run_train_together(recipe: Path, torchrun: bool) -> None:
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    _, lines = analysis(recipe, "out", *two, torchrun=torchrun)
    assert len(lines) == 4
    assert {line["end"] for line in lines} == {10}  # 20 steps of one process
    control = analysis(recipe, "control", *two, "--same_noise", torchrun=torchrun)[1]
    assert {line["barriers"]["test"] for line in control} == {0.0}
    assert any(len(set(line["errors"]["train"])) > 1 for line in lines)

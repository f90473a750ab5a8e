"""Runs that are killed anywhere and resumed end as ones that were not: every callback, one process and two."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cases import CASES, FORGETFUL, SYNCHRONISED, TOGETHER

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def stress(folder: Path, *words: str) -> list[dict[str, Any]]:
    """What the harness found; it forks a process for every run."""
    command = [sys.executable, "-m", "tests.faults.stress", "--json", str(folder / "found.json"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENV)
    assert (folder / "found.json").exists(), done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def check_survived(found: list[dict[str, Any]]) -> None:
    for result in found:
        assert result["problem"] is None, result
        assert result["killed"], result
        assert result["files"] > 0, result


def test_every_callback_goes_on_after_a_kill(tmp_path: Path) -> None:
    words = [word for name in (*CASES, FORGETFUL) for word in ("--only", name)]
    found = stress(tmp_path, "--kills", "1", "--moments", "batches", "--processes", "1", *words)
    *real, forgetful = found
    assert [result["case"] for result in real] == list(CASES)
    check_survived(real)
    assert sum(result["resumed"] != [None] for result in real) > len(CASES) / 2  # most have not begun anew
    assert "weights" in forgetful["problem"]  # a callback that forgets its random numbers is found out


@pytest.mark.distributed
def test_a_killed_process_of_two(tmp_path: Path) -> None:
    words = ["--kills", "1", "--moments", "batches", "--processes", "2", "--only", "lottery", "--only", "slimming"]
    check_survived(stress(tmp_path, *words))


@pytest.mark.distributed
def test_what_each_process_has_of_its_own_comes_back(tmp_path: Path) -> None:
    """From a checkpoint after an epoch's last batch, validation is next: on statistics that only one process has."""
    found = stress(tmp_path, "--kills", "1", "--processes", "2", "--only", SYNCHRONISED, "--kill-at", "19")
    check_survived(found)
    assert found[0]["resumed"] == ["step=18-round00.ckpt"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_many_kills_at_random_moments(tmp_path: Path) -> None:
    found = stress(tmp_path, "--kills", "5", "--seed", "7")
    assert [result["case"] for result in found] == [*CASES, *TOGETHER]
    assert all(result["problem"] is None for result in found), [r for r in found if r["problem"]]
    assert sum(result["killed"] for result in found) >= 50


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_checkpoint_leads_to_the_same_checkpoints(tmp_path: Path) -> None:
    """Whatever a kill leaves behind: so no number of kills in a row can end elsewhere."""
    found = stress(tmp_path, "--every-checkpoint")
    assert [result["case"] for result in found] == list(CASES)
    for result in found:
        assert result["problem"] is None, result
        assert result["checkpoints"] >= 7, result

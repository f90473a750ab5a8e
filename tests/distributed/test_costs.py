"""CostProfiler on two processes: rank 0 measures, the other waits, and for so long only."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def run(task: str, folder: Path) -> list[dict[str, Any]]:
    """What each process holds in the end."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.two_processes", task, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    files = [folder / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.slow
def test_both_processes_hold_what_rank_0_measured(tmp_path: Path) -> None:
    first, second = run("fit", tmp_path)
    assert first["failure"] == second["failure"] == ""
    assert [row["label"] for row in first["rows"]] == ["dense", "round 1", "end"]
    assert first["rows"] == second["rows"]
    assert first["rows"][-1]["numbers"]["num_macs"] < first["rows"][0]["numbers"]["num_macs"]


@pytest.mark.slow
def test_a_process_waits_no_longer_than_it_was_told(tmp_path: Path) -> None:
    _, second = run("late", tmp_path)
    assert "rank 0 did not measure within timeout=2" in second["failure"]

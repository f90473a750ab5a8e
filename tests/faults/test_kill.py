"""A run killed at any point and resumed ends as one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune import RunRecord

ROOT = Path(__file__).parents[2]


def run(folder: Path, kill_at: int, seed: int) -> int:
    command = [sys.executable, "-m", "tests.faults.victim", str(folder), str(kill_at), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def same(a: Any, b: Any, where: str = "end") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            same(left, right, f"{where}[{i}]")
    else:
        assert a == b, where


# 36 (or 31) batches in round 0, then twice 22 (17) that begin at batch 2 of the second epoch; checkpoints every 5 steps
# and at the end of epochs, so before every cut too.
@pytest.mark.parametrize(("seed", "kills"), [(0, [8, 30, 23]), (1, [13, 22, 16])])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, seed: int, kills: list[int]) -> None:
    assert run(tmp_path / "whole", 0, seed) == 0
    checkpoints = []
    for kill_at in kills:
        assert run(tmp_path / "killed", kill_at, seed) == -signal.SIGKILL
        files = list((tmp_path / "killed").rglob("*.ckpt"))
        checkpoints.append(max(files, key=lambda p: p.stat().st_mtime_ns))
    assert run(tmp_path / "killed", 0, seed) == 0
    whole = torch.load(tmp_path / "whole" / "end.pt", weights_only=True)
    killed = torch.load(tmp_path / "killed" / "end.pt", weights_only=True)
    same(whole, killed)
    records = [RunRecord.read(tmp_path / name / "run" / "v") for name in ("whole", "killed")]
    assert records[0].comparable() == records[1].comparable()
    assert len(records[0].rounds) == 3
    for file in checkpoints:  # otherwise the test would pass on a run that stands still
        weights = torch.load(file, weights_only=True)["state_dict"]
        assert any(not torch.equal(weights[name], whole["weights"][name]) for name in weights)
    tickets = [sorted((tmp_path / name).rglob("*.safetensors")) for name in ("whole", "killed")]
    assert len(tickets[0]) == 2
    assert [a.read_bytes() for a in tickets[0]] == [b.read_bytes() for b in tickets[1]]

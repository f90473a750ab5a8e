"""What several processes cost: selection over sharded weights, and masked steps under DDP and FSDP2."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.scores import MagnitudeScores
from lightning_prune.selection import select
from tests.benchmarks.sharded_worker import ROUNDS, weights
from tests.conftest import ROOT

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]


HOW = ("alone", "together")


def run(folder: Path, world: int, *arguments: Any) -> list[Any]:
    """What each process found, one thread each."""
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    module = ["-m", "tests.benchmarks.sharded_worker", folder, world, *arguments]
    command = [sys.executable, *launcher, *map(str, module)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def test_selection_of_100_million_sharded_weights(tmp_path: Path) -> None:
    """The mask is that of one process; what travels does not grow with the weights."""
    whole = select(MagnitudeScores(weights(1000)), density=0.2)
    print(f"\n{whole.total} weights in 100 tensors, one thread a process, torch {torch.__version__}")
    for world in (2, 4):
        found = run(tmp_path / f"{world}", world, "selection", 1000)
        small = run(tmp_path / f"{world}-small", world, "selection", 100)
        assert {process["digest"] for process in found} == {whole.digest()}
        assert found[0]["kept"] == whole.kept
        ratio = 0.0
        for clock, what in (("cpu ", "CPU time"), ("", "time")):
            # Each repeat by itself: the slowest process alone, and together
            alone, together = ([max(p[clock + how][i] for p in found) for i in range(1, ROUNDS)] for how in HOW)
            ratios = sorted(second / first for first, second in zip(alone, together, strict=True))
            ratio = statistics.median(ratios)
            print(
                f"{world} processes, {what}: slowest shard alone {statistics.median(alone):.3f} s, all together "
                f"{statistics.median(together):.3f} s, ratio {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )
        sent = [processes[0]["sent"] for processes in (found, small)]
        print(f"each process gives {sent[0]} bytes to collectives, {sent[1]} for a hundredth of the weights")
        assert sent[0] == sent[1] < 3e6
        if os.getloadavg()[0] < world + 0.5:  # else waiting for others is measured
            assert ratio < 1.2
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def test_masked_steps_on_two_processes(tmp_path: Path) -> None:
    """Masks taken away every other step, so that what is compared shares the machine."""
    print(f"\nResNet-18, 64x64, batch 16 a process, 20 % of the weights, one thread each, torch {torch.__version__}")
    costs = {}
    for how, world in (("one", 1), ("ddp", 2), ("data", 2)):
        processes = run(tmp_path / how, world, how, 3)
        ratios = sorted(fit["masked"] / fit["unmasked"] for process in processes for fit in process)
        costs[how] = statistics.median(ratios)
        step = statistics.median(fit["unmasked"] for process in processes for fit in process)
        name = {"one": "one process", "ddp": "DDP", "data": "FSDP2"}[how]
        print(f"{name}: step {step:.3f} s, masked x{costs[how]:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    assert costs["ddp"] < costs["one"] + 0.1
    assert costs["data"] < costs["one"] + 0.1

"""Masks that are learned on two processes: every sampled mask is the same on both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.distributed


def run(folder: Path, *jobs: str) -> dict[str, list[dict[str, Any]]]:
    """Fits of ``learned_worker`` on two processes: what each of them saw."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    workers = []
    for rank in range(2):
        env = os.environ | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0",
            "GROUP_RANK": "0", "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
            "TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.distributed.learned_worker", str(folder), *jobs]
        workers.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [worker.communicate(timeout=200)[0].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output[-3000:]
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {job: [result[job] for result in results] for job in jobs}


def test_two_processes_agree_on_every_mask(tmp_path: Path) -> None:
    found = run(tmp_path, "stochastic", "edge_popup", "drifts")
    for job in ("stochastic", "edge_popup"):
        first, second = found[job]
        assert first == second
        assert len(first["seen"]) == 12  # six batches of each process, twice
    assert len(set(found["stochastic"][0]["seen"])) == 12
    assert found["edge_popup"][0]["density"] == pytest.approx(0.4, abs=0.01)
    assert all("processes chose different masks" in result["error"] for result in found["drifts"])

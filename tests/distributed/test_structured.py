"""Slimming and HRank on two processes: what one process does on the same batches, cut by cut and weight by weight."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.distributed.structured_worker import run

JOBS = ("slimming", "proximal", "hrank", "layerwise")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:the scales have not separated"),
    pytest.mark.filterwarnings("ignore:feature ranks carry no order"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every fit on two processes: what each of them holds in the end."""
    folder = tmp_path_factory.mktemp("structured")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    workers = []
    for rank in ("0", "1"):
        env = os.environ | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": rank, "NODE_RANK": "0",
            "GROUP_RANK": "0", "WORLD_SIZE": "2", "RANK": rank, "LOCAL_WORLD_SIZE": "2",
            "TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.distributed.structured_worker", str(folder), *JOBS]
        workers.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [worker.communicate(timeout=250)[0].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output[-3000:]
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {job: [result[job] for result in results] for job in JOBS}


@pytest.mark.parametrize(
    ("job", "steps"), [("slimming", [4, 10]), ("proximal", [4, 10]), ("hrank", [7]), ("layerwise", [3, 7])]
)
def test_two_processes_equal_one(
    found: dict[str, list[dict[str, Any]]], tmp_path: Path, job: str, steps: list[int]
) -> None:
    first, second = found[job]
    assert first == second
    alone = run(tmp_path, job)
    assert first["steps"] == alone["steps"] == steps
    assert first["digests"] == alone["digests"]
    for ours, theirs in zip(first["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-6)

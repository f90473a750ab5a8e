"""Starts workers on several processes: by hand, by torchrun or by Lightning's own launcher."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

WAIT = 280  # s; a test has 300


def run(folder: Path, world: int, jobs: list[str], how: str = "torchrun") -> dict[str, list[Any]]:
    """What each process saw in each job: ``{job: [of rank 0, of rank 1, ...]}``.

    Args:
        folder: For the files of the jobs.
        world: Number of processes.
        jobs: Names in ``worker.JOBS``.
        how: ``"torchrun"``, or ``"lightning"``: the first Trainer starts the other processes.
    """
    module = ["-m", "tests.distributed.worker", str(folder), str(world), *jobs]
    command = [sys.executable, "-W", "ignore", *module]
    if how == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *module]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = folder / "log.txt"
    with log.open("w") as output:
        leader = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    files = [folder / f"{rank}.json" for rank in range(world)]
    try:
        end = time.monotonic() + WAIT
        while not all(file.exists() for file in files) and leader.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        found = [json.loads(file.read_text()) for file in files if file.exists()]
    finally:
        _stop(leader)
    failures = [process["failure"] for process in found if "failure" in process]
    assert failures == [], "\n".join(failures)
    assert len(found) == world, log.read_text()[-3000:]
    return {job: [process[job] for process in found] for job in jobs}


def run_pair(module: str, folder: Path, *jobs: str, seconds: float = 250) -> dict[str, list[Any]]:
    """What each of two processes that are started by hand saw in each job: ``{job: [of rank 0, of rank 1]}``.

    Args:
        module: Run with the folder and the jobs as its arguments; each process writes ``{job: seen}`` to ``RANK.json``.
        folder: For the files of the jobs.
        jobs: Names that the module knows.
        seconds: How long to wait for them.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    both = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", module, str(folder), *jobs]
    workers = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | both | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [worker.communicate(timeout=seconds)[0].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output[-3000:]
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {job: [result[job] for result in results] for job in jobs}


def _stop(leader: "subprocess.Popen[bytes]") -> None:
    """End the leader and what it has started, which are a session of their own."""
    try:
        leader.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()

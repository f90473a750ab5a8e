"""What holds for every test: seeds, one thread, no network, the data folder, which tiers run."""

import ipaddress
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("slow", "bench", "zoo", "gpu")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of LightningCLI's own calls


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers for the whole suite; this process alone where a part of it was asked for, or its output."""
    option = config.option
    chosen = option.markexpr or option.keyword or option.capture == "no" or option.usepdb or option.collectonly
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    return min(2, os.cpu_count() or 1) if whole and not chosen else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tiers out, unless ``-m`` asks for markers or the command line names the test file."""
    if config.option.markexpr:
        return
    named = {Path(config.invocation_params.dir, str(argument).split("::")[0]).resolve() for argument in config.args}
    left_out = [
        item
        for item in items
        if any(item.get_closest_marker(name) for name in LEFT_OUT) and item.path.resolve() not in named
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch finds none")


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (the global generator is what a user's code may draw from)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    # what one test seeds is not the next one's seed, nor that of processes that a module's fixture starts before it
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails, on every machine, instead of depending on it."""
    connect = socket.socket.connect

    def connect_nearby(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise RuntimeError(f"a test tried to reach {address[0]}; tests use no network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_nearby)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with data sets: ``LIGHTNING_PRUNE_DATA``, else ``../shared/data`` beside the repository."""
    given = os.environ.get("LIGHTNING_PRUNE_DATA")
    root = Path(given) if given else ROOT.parent / "shared" / "data"
    if given and not root.is_dir():
        pytest.fail(f"LIGHTNING_PRUNE_DATA={given} is no folder")
    if not root.is_dir():
        pytest.skip("needs data sets: set LIGHTNING_PRUNE_DATA to their folder")
    return root

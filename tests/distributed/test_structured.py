"""Slimming and HRank on two processes: what one process does on the same batches, cut by cut and weight by weight."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import run_pair
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
    return run_pair("tests.distributed.structured_worker", tmp_path_factory.mktemp("structured"), *JOBS)


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

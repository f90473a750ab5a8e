"""Masks that are learned on two processes: every sampled mask is the same on both."""

from pathlib import Path

import pytest

from tests.distributed.launch import run_pair

pytestmark = pytest.mark.distributed


def test_two_processes_agree_on_every_mask(tmp_path: Path) -> None:
    found = run_pair("tests.distributed.learned_worker", tmp_path, "stochastic", "edge_popup", "drifts")
    for job in ("stochastic", "edge_popup"):
        first, second = found[job]
        assert first == second
        assert len(first["seen"]) == 12  # six batches of each process, twice
    assert len(set(found["stochastic"][0]["seen"])) == 12
    assert found["edge_popup"][0]["density"] == pytest.approx(0.4, abs=0.01)
    assert all("processes chose different masks" in result["error"] for result in found["drifts"])

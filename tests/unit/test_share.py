"""How processes that were started together divide an analysis."""

import os

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_prune import ConfigError
from lightning_prune.instability.share import Share, share_of


@pytest.fixture(autouse=True)
def second_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "3"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 1)


def test_runs_on_one_device_are_divided() -> None:
    share = share_of(1)
    assert (share.index, share.count, share.leads) == (1, 3, False)
    assert "WORLD_SIZE" not in os.environ  # each run is then one of its own
    assert rank_zero_only.rank == 0
    parts = [Share(index, 3).of(range(8)) for index in range(3)]
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_a_run_on_all_devices_takes_every_process() -> None:
    assert share_of(3) == Share(0, 1, leads=False)
    assert os.environ["WORLD_SIZE"] == "3"
    with pytest.raises(ConfigError, match=r"takes 2 processes, and torchrun started 3\. Start 2"):
        share_of(2)


def test_one_waits_for_the_others_until_they_are_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr("lightning_prune.instability.share._SECONDS", 0)
    Share(0, 2).wait(lambda: next(answers), "seed0/trunk")
    assert next(answers, None) is None
    assert capsys.readouterr().out == "waiting for seed0/trunk\n"
    Share().wait(lambda: False, "nobody")  # alone: what is not done here is done by nobody

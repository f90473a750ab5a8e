"""Channels that leave under DDP, on two processes: the same cut everywhere, and training goes on in step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune import LRRewind, RunRecord, WeightRewind, load_compact, load_compact_checkpoint
from tests._helpers.channels import Watch, pruner, wide_network, widths
from tests._helpers.models import ToyModule, loaders, trainer
from tests._helpers.wandb_runs import read_runs
from tests.distributed.ddp_worker import chain
from tests.distributed.launch import run_pair

pytestmark = pytest.mark.distributed


Found = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Every fit of ``ddp_worker`` on two processes: what each of them saw."""
    jobs = ("equal", "rewound", "resumed", "wandb", "failing", "blocks")
    return run_pair("tests.distributed.ddp_worker", tmp_path_factory.mktemp("ddp"), *jobs)


def test_two_processes_equal_one(found: Found, tmp_path: Path) -> None:
    """Half of each batch on each, two cuts: the same cuts and, but for the order of sums, the same weights."""
    first, second = found["equal"]
    assert first["weights"] == second["weights"]
    assert first["digests"] == second["digests"]
    assert first["widths"] == [8, 8, 3]
    assert first["steps"] == [7, 12]
    assert first["wrappers"] == 3
    net = wide_network()
    net[1] = net[5] = torch.nn.Identity()
    module, watch = ToyModule(net), Watch(moving=False)
    trainer(tmp_path, [pruner(at=["7st", "1ep"]), watch], max_epochs=2).fit(module, *loaders())
    assert [event.plan.digest() for event in watch.events] == first["digests"]
    for one, other in zip(module.parameters(), first["weights"], strict=True):
        torch.testing.assert_close(one.detach().flatten(), torch.tensor(other), rtol=1e-4, atol=1e-6)


def test_two_processes_lose_the_blocks_of_one(found: Found, tmp_path: Path) -> None:
    """By Taylor scores of gradients that are means over both, and weights rewound."""
    first, second = found["blocks"]
    assert first["weights"] == second["weights"]
    assert [len(names) for names in first["left"]] == [1, 1]  # of three, down to half in two steps
    assert first["wrappers"] == 3
    module, watch = chain(), Watch(moving=False)
    prune = pruner("taylor", at=["3st", "100%"], granularity="block")
    trainer(tmp_path, [prune, watch, WeightRewind("2st"), LRRewind("2st")], max_epochs=2).fit(module, *loaders())
    assert [[entry["block"] for entry in event.plan.left] for event in watch.events] == first["left"]
    for one, other in zip(module.parameters(), first["weights"], strict=True):
        torch.testing.assert_close(one.detach().flatten(), torch.tensor(other), rtol=1e-4, atol=1e-6)


def test_a_resumed_run_equals_one_that_was_not_interrupted(found: Found) -> None:
    """Taylor scores, the schedule begun again, resumed after the first cut."""
    full, resumed = found["rewound"], found["resumed"]
    assert full[0]["weights"] == full[1]["weights"]
    assert full[0]["widths"] == [8, 8, 3]
    assert full[0]["steps"] == [3, 3 + 24]
    assert all(total > 0 for total in full[0]["gradients"])
    assert resumed[0]["steps"] == full[0]["steps"][1:]
    assert resumed[0]["weights"] == resumed[1]["weights"] == full[0]["weights"]


def test_files_of_a_run_on_two_processes(found: Found) -> None:
    folder = Path(found["rewound"][0]["folder"])
    assert widths(load_compact(wide_network(), folder / "compact.safetensors")) == [8, 8, 3]
    last = max((folder.parents[1] / "ckpt").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    loaded = load_compact_checkpoint(ToyModule(wide_network()), last)
    assert widths(loaded) == [8, 8, 3]
    for one, other in zip(loaded.parameters(), found["rewound"][0]["weights"], strict=True):
        assert one.numel() == len(other)


def test_only_the_first_process_logs_to_wandb(found: Found) -> None:
    first, second = found["wandb"]
    assert first["weights"] == second["weights"] == found["rewound"][0]["weights"]  # to train, it makes no difference
    folder = Path(first["folder"])
    assert first["folder"] == second["folder"]
    (stored,) = read_runs(folder.parents[1])
    assert stored.run_id == folder.name == "two"
    record = RunRecord.read(folder)
    assert [row["trainer/global_step"] for row in stored.rows("prune/round")] == first["steps"]
    assert len(stored.rows("prune/end/round")) == len(stored.tables("prune/layers")) == len(record.rounds) == 3
    assert list(stored.logged_artifacts()) == ["compact-two:round-01", "compact-two:round-02", "compact-two:final"]
    assert len(stored.rows("prune/report")) == 1


def test_where_one_process_fails_all_stop(found: Found) -> None:
    first, second = found["failing"]
    assert second["error"] == "ValueError: this process cannot score"
    assert first["error"] == "PruneError: process 1 failed: this process cannot score"

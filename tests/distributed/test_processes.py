"""What works on one process works on two and four, with the same outcome: DDP, FSDP2 and tensor parallelism."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune import load_ticket
from tests.distributed import launch
from tests.distributed.fits import Task, adam, prune, record, remove_channels

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:.*seed.*")]

DEFAULT = ["ddp", "drift", "uneven", "data", "data resumed", "refused", "ticket", "selection"]
ALL = [*DEFAULT, "slimming", "hrank", "tensor", "both", "both resumed", "whole", "whole resumed"]
Found = dict[str, list[Any]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The fit on one process."""
    folder = tmp_path_factory.mktemp("one")
    return folder, prune(folder, "one", 1)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, "torchrun", DEFAULT), id="two by torchrun"),
        pytest.param((2, "lightning", ALL), id="two by Lightning", marks=pytest.mark.slow),
        pytest.param((4, "torchrun", ALL), id="four by torchrun", marks=pytest.mark.slow),
        pytest.param((4, "lightning", ["ddp", "data", "both"]), id="four by Lightning", marks=pytest.mark.slow),
    ],
)
def found(request: Any, tmp_path_factory: pytest.TempPathFactory, one: tuple[Path, dict[str, Any]]) -> Found:
    """All jobs, on several processes: what each of them saw."""
    world, how, jobs = request.param
    folder = tmp_path_factory.mktemp("several")
    shutil.copy(ticket_of(one[1], 2), folder / "one.safetensors")
    return launch.run(folder, world, jobs, how)


def ticket_of(seen: dict[str, Any], number: int) -> Path:
    return Path(seen["folder"]) / "tickets" / f"round-{number:02d}.safetensors"


def of(found: Found, job: str) -> list[Any]:
    if job not in found:
        pytest.skip("this launch runs other jobs")
    return found[job]


def assert_close(left: Any, right: Any, where: str = "") -> None:
    """Equal content, but for the last digits of floating numbers."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_close(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert_close(*pair, f"{where}[{number}]")
    elif isinstance(left, float):
        assert right == pytest.approx(left, rel=1e-6, abs=1e-9), where
    else:
        assert left == right, where


@pytest.mark.parametrize("job", ["ddp", "data", "whole"])
def test_several_processes_equal_one(found: Found, one: tuple[Path, dict[str, Any]], job: str) -> None:
    """Masks, rewinding, record, tickets, supermasks and weights are those of one process on the same batches."""
    several, alone = of(found, job), one[1]
    assert several[0]["digests"] == alone["digests"]
    assert len(set(alone["digests"])) == 2
    assert_close(several[0]["densities"], alone["densities"])
    assert_close(record(several[0]["folder"]), record(alone["folder"]))
    assert [row["stopped_early"] for row in record(alone["folder"])["rounds"]] == [True, True, False]
    for number in (1, 2):
        ours, theirs = (load_ticket(ticket_of(seen, number)) for seen in (several[0], alone))
        assert ours.masks == theirs.masks
        assert_close(
            {n: t.tolist() for n, t in ours.weights.items()}, {n: t.tolist() for n, t in theirs.weights.items()}
        )
    for seen in several:
        assert seen["steps"] == alone["steps"] > 0
        assert_close(seen["weights"], alone["weights"])
        assert seen["weights"] == several[0]["weights"]
        if job == "ddp":
            assert_close(seen["supermasks"], alone["supermasks"])
    held = [seen["parts"]["network.0.weight"] for seen in several]
    assert held == ([192] * len(several) if job == "ddp" else [192 // len(several)] * len(several))


@pytest.mark.parametrize(("job", "options"), [("tensor", {"control": "random_pruning"}), ("both", {"configure": adam})])
def test_tensor_parallelism_equals_one_process(found: Found, job: str, options: dict[str, Any], tmp_path: Path) -> None:
    several, alone = of(found, job), prune(tmp_path, "one", 1, **options)
    assert several[0]["digests"] == alone["digests"]
    assert len(set(alone["digests"])) == 2
    assert_close(record(several[0]["folder"])["rounds"], record(alone["folder"])["rounds"])
    for seen in several:
        assert_close(seen["weights"], alone["weights"])
        assert seen["parts"]["network.0.weight"] < 192


@pytest.mark.parametrize("job", ["data", "both", "whole"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(found: Found, job: str) -> None:
    """From a checkpoint of round 1; parameters, optimizer and rewinding point are read back part by part."""
    resumed, full = of(found, f"{job} resumed"), of(found, job)
    for ours, theirs in zip(resumed, full, strict=True):
        assert ours["weights"] == theirs["weights"]
        assert ours["steps"] < theirs["steps"]
    assert resumed[0]["digests"] == full[0]["digests"][1:]
    assert record(resumed[0]["folder"])["rounds"] == record(full[0]["folder"])["rounds"]


def test_a_difference_between_processes_stops_the_run(found: Found) -> None:
    errors = of(found, "drift")
    assert all(error.startswith("PruneError: processes chose different masks (digests ") for error in errors)
    assert all(error.endswith("draws no process's own random numbers into its weights.") for error in errors)
    for seen in of(found, "selection"):
        assert "processes that hold the same part of 'w' chose different masks" in seen["errors"]


@pytest.mark.filterwarnings("ignore:the scales have not separated")
@pytest.mark.parametrize("method", ["slimming", "hrank"])
def test_channels_leave_as_on_one_process(found: Found, method: str, tmp_path: Path) -> None:
    several, alone = of(found, method), remove_channels(tmp_path, method, "one", 1)
    assert len(alone["plans"]) == 1
    for seen in several:
        assert seen["plans"] == alone["plans"]
        assert seen["wrappers"] == 2
        assert seen["weights"] == several[0]["weights"]
        assert_close(seen["weights"], alone["weights"])
        assert_close(seen["ranks"], alone["ranks"])
    assert bool(alone["ranks"]) == (method == "hrank")
    assert_close(record(several[0]["folder"]), record(alone["folder"]))


def test_processes_with_different_numbers_of_batches_are_refused(found: Found) -> None:
    """Lightning would wait for ever."""
    several = of(found, "uneven")
    numbers = ", ".join(["7"] * (len(several) - 1) + ["2"])
    for error, none in several:
        assert f"ConfigError: the processes have different numbers of batches in an epoch ({numbers})" in error
        assert none == ""


def test_what_does_not_work_sharded_says_so(found: Found) -> None:
    for seen in of(found, "refused"):
        for name in ("ChannelPruner", "SlimmingRegularizer", "SupermaskScorer", "CostProfiler"):
            assert seen[name].startswith(
                "ConfigError: ModelParallelStrategy holds parameters in a form of its own, so"
            ), name
        assert seen["WeightRewind"].startswith("ConfigError: WeightRewind(reinit=True) draws whole tensors")
        assert seen["counting"].startswith("ConfigError: this counting rule needs all scores in one place")


def test_a_ticket_of_one_process_loads_into_a_sharded_network(found: Found, one: tuple[Path, dict[str, Any]]) -> None:
    module = Task()
    load_ticket(ticket_of(one[1], 2)).apply_(module)
    for seen in of(found, "ticket"):
        assert seen["weights"] == {name: p.tolist() for name, p in module.named_parameters()}
        assert "rewinding point is of whole parameters, and this run's parameters are sharded" in seen["resumed"]
    assert float(torch.count_nonzero(module.network[0].weight) / 192) < 0.6


def test_selection_over_sharded_scores(found: Found) -> None:
    """The comparisons are made in the processes; this sees that they were."""
    assert all(seen["sharded tensors"] > 50 for seen in of(found, "selection"))

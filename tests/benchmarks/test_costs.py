"""What sparsity and removed channels gain in time, always by turns with the dense network in one process."""

import itertools
import os
import time
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_prune import (
    Budget,
    CostProfiler,
    accelerate,
    compact,
    compare_latency,
    count_costs,
    plan_removal,
    prunable_parameters,
    score_weights,
    select,
    trace_channels,
)
from lightning_prune.costs import LatencyComparison
from tests._helpers.models import ToyModule, loaders, trainer

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]


def say(what: str, found: LatencyComparison, aim: str) -> None:
    environment = found.second.environment
    print(
        f"\n{what}: {found}; aim {aim}. {found.first.median_ms:.2f} ms -> {found.second.median_ms:.2f} ms, "
        f"{environment['device']}, {environment['threads']} threads, load {environment['load']}, "
        f"torch {environment['torch']}"
    )


def smallest(model: nn.Module, density: float, only: str = "") -> Any:
    """Masks that keep the largest weights of each layer."""
    scores = {n: score_weights("large_final", None, p) for n, p in prunable_parameters(model).items() if only in n}
    return select(scores, density=density, scope="layer")


def lenet() -> nn.Module:
    widths = (784, 300, 100)
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise(widths):
        layers += [nn.Linear(before, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 10)).eval()


def test_a_lenet_ticket_at_ten_per_cent() -> None:
    """Weights at random places, as many in each layer: the worst case, since nothing is empty."""
    net = lenet()
    fast = accelerate(net, smallest(net, 0.1), torch.rand(128, 784), seconds=1.0)
    say("LeNet-300-100, 10 % of the weights, batch 128", fast.comparison, "2.5 x")
    print(fast.table())
    assert fast.comparison.low < 1.0


def test_a_transformer_with_sparse_mlps() -> None:
    net = torchvision.models.vit_b_16(weights=None).eval()
    fast = accelerate(net, smallest(net, 0.1, only=".mlp."), torch.rand(1, 3, 224, 224), seconds=0.5)
    say("ViT-B/16, MLPs at 10 %, batch 1", fast.comparison, "1.5 x")
    assert fast.comparison.low < 1.0


@pytest.mark.parametrize("name", ["lenet", "resnet18"])
def test_half_of_the_weights_is_not_slower(name: str) -> None:
    net = lenet() if name == "lenet" else torchvision.models.resnet18(weights=None).eval()
    x = torch.rand(128, 784) if name == "lenet" else torch.rand(1, 3, 224, 224)
    fast = accelerate(net, smallest(net, 0.5), x, seconds=0.5)
    say(f"{name}, half of the weights", fast.comparison, "not slower")
    assert fast.comparison.low < 1.1


def compacted(name: str, x: Tensor) -> tuple[nn.Module, nn.Module, float]:
    dense, small = (torchvision.models.get_model(name, weights=None).eval() for _ in range(2))
    plan = plan_removal(trace_channels(small, x), Budget(macs=0.5), round_to="auto")
    compact(small, plan, x, precision=torch.float32)
    return dense, small, count_costs(small, x).macs.total / count_costs(dense, x).macs.total


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("name", "aim"), [("resnet50", "1.6 x"), ("mobilenet_v2", "1.3 x")])
def test_half_of_the_macs(name: str, aim: str, batch: int) -> None:
    dense, small, macs = compacted(name, torch.rand(1, 3, 224, 224))
    found = compare_latency(dense, small, torch.rand(batch, 3, 224, 224), seconds=20.0, within=0.03)
    say(f"{name}, {macs:.3f} of the MACs (theoretical {1 / macs:.2f} x), batch {batch}", found, aim)
    assert found.low < 1.0


@pytest.mark.parametrize("target", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("name", os.environ.get("LATENCY_NETWORKS", "resnet18").split(","))
def test_latency_budgets(name: str, target: float) -> None:
    model = torchvision.models.get_model(name, weights=None).eval()
    found = plan_removal(trace_channels(model, torch.rand(1, 3, 224, 224)), Budget(latency=target)).latency
    print(
        f"\n{name}, Budget(latency={target}): {found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f}) at "
        f"{found['macs']:.3f} of the MACs, {len(found['trials'])} candidates, {found['search_seconds']:.0f} s, load "
        f"{found['environment']['load']}"
    )
    assert found["ratio"] < 1.5 * target


def test_what_profiling_costs_a_fit(tmp_path: Any) -> None:
    """Whole fits: nothing between events, so the cost is that of its measurements."""
    taken: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(3):
        for arm, callbacks in (("without", []), ("with", [CostProfiler(seconds=0.1, verbose=False)])):
            fit = trainer(tmp_path / f"{arm}{turn}", callbacks, max_epochs=20)
            start = time.perf_counter()
            fit.fit(ToyModule(), *loaders())
            taken[arm].append(time.perf_counter() - start)
    extra = min(taken["with"]) - min(taken["without"])
    print(f"\na fit of 240 steps {min(taken['without']):.2f} s; two measurements of 0.1 s add {extra:.2f} s")
    assert extra < 10

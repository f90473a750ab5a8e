"""What sparsity and removed channels gain in time, always by turns with the dense network in one process."""

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_prune import (
    Budget,
    BudgetError,
    CostProfiler,
    accelerate,
    compact,
    compare_latency,
    count_costs,
    export_onnx,
    plan_removal,
    prunable_parameters,
    score_weights,
    select,
    trace_channels,
)
from lightning_prune.costs import LatencyComparison
from lightning_prune.reports.pictures import draw_macs_against_latency
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
    fast = accelerate(net, smallest(net, 0.1), torch.rand(128, 784), seconds=2.0)
    say("LeNet-300-100, 10 % of the weights, batch 128", fast.comparison, "2.5 x")
    print(fast.table())
    assert fast.comparison.low < 1.0


def test_a_transformer_with_sparse_mlps() -> None:
    net = torchvision.models.vit_b_16(weights=None).eval()
    fast = accelerate(net, smallest(net, 0.1, only=".mlp."), torch.rand(1, 3, 224, 224), seconds=0.5)
    say("ViT-B/16, MLPs at 10 %, batch 1", fast.comparison, "1.5 x")
    print(fast.table())
    assert fast.comparison.low < 1.0


@pytest.mark.parametrize("name", ["lenet", "resnet18"])
def test_half_of_the_weights_is_not_slower(name: str) -> None:
    net = lenet() if name == "lenet" else torchvision.models.resnet18(weights=None).eval()
    x = torch.rand(128, 784) if name == "lenet" else torch.rand(1, 3, 224, 224)
    fast = accelerate(net, smallest(net, 0.5), x, seconds=0.5)
    say(f"{name}, half of the weights", fast.comparison, "not slower")
    print(fast.table())
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


class Session(nn.Module):
    """An ONNX file in onnxruntime, with as many threads as torch has, to be timed like a module."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("name", "aim"), [("resnet50", "1.6 x"), ("mobilenet_v2", "1.3 x")])
def test_half_of_the_macs_in_onnxruntime(name: str, aim: str, batch: int, tmp_path: Path) -> None:
    x = torch.rand(batch, 3, 224, 224)
    dense, small, macs = compacted(name, x[:1])
    sessions = []
    for net, file in ((dense, tmp_path / "dense.onnx"), (small, tmp_path / "small.onnx")):
        export_onnx(net, file, x)
        sessions.append(Session(file))
    found = compare_latency(*sessions, x, seconds=20.0, within=0.03)
    say(f"{name} in onnxruntime, {macs:.3f} of the MACs, batch {batch}", found, aim)
    assert found.low < 1.0


LATENCY_NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "convnext_tiny")


@pytest.mark.parametrize("target", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("name", LATENCY_NETWORKS)
def test_latency_budgets(name: str, target: float) -> None:
    model = torchvision.models.get_model(name, weights=None).eval()
    graph = trace_channels(model, torch.rand(1, 3, 224, 224))
    try:
        found = plan_removal(graph, Budget(latency=target)).latency
    except BudgetError as floor:
        print(f"\n{name}: {floor}")
        return
    print(
        f"\n{name}, Budget(latency={target}): {found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f}) at "
        f"{found['macs']:.3f} of the MACs, {len(found['trials'])} candidates, {found['search_seconds']:.0f} s, load "
        f"{found['environment']['load']}"
    )
    assert found["ratio"] < 1.5 * target


MACS_NETWORKS = (
    "resnet18", "resnet50", "regnet_y_400mf", "densenet121", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0",
    "shufflenet_v2_x1_0", "convnext_tiny", "vit_b_16",
)  # fmt: skip


@pytest.mark.parametrize("name", MACS_NETWORKS)
def test_macs_against_latency(name: str) -> None:
    """One line of JSON for each compact network; ``MACS_LATENCY`` names a file to add them to and to draw beside."""
    dense = torchvision.models.get_model(name, weights=None).eval()
    x = torch.rand(1, 3, 224, 224)
    graph, whole = trace_channels(dense, x), count_costs(dense, x).macs.total
    for asked, round_to in ((0.75, "auto"), (0.5, "auto"), (0.5, 1), (0.25, "auto")):
        try:
            plan = plan_removal(graph, Budget(macs=asked), round_to=round_to)
        except BudgetError as error:
            print(f"\n{name}: {error}")
            continue
        small = torchvision.models.get_model(name, weights=None).eval()
        compact(small, plan, x, precision=torch.float32)
        found = compare_latency(dense, small, x, seconds=4.0, within=0.02)
        row = {
            "network": name,
            "round_to": round_to,
            "macs": round(count_costs(small, x).macs.total / whole, 4),
            "latency": [round(value, 4) for value in (found.ratio, found.low, found.high)],
            "milliseconds": round(found.first.median_ms, 3),
            "environment": found.first.environment,
        }
        print("\n" + json.dumps(row))
        if "MACS_LATENCY" in os.environ:
            with open(os.environ["MACS_LATENCY"], "a") as file:
                file.write(json.dumps(row) + "\n")
        assert found.low < 1.5
    if "MACS_LATENCY" in os.environ:
        path = Path(os.environ["MACS_LATENCY"])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        draw_macs_against_latency([row for row in rows if row["round_to"] == "auto"], path.with_suffix(".svg"))


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

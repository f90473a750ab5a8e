"""Budgets on latency: the search, on machines whose speed is known, and a real one whose speed is not asserted."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import (
    Budget,
    BudgetError,
    ChannelPruner,
    NoEffectWarning,
    RemovalPlan,
    count_costs,
    plan_removal,
    trace_channels,
)
from lightning_prune.channels import latency_search
from lightning_prune.costs import Latency, LatencyComparison
from tests._helpers.models import ToyModule, loaders, trainer

X = torch.rand(1, 3, 12, 12)
Curve = Callable[[float], float]


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, width in ((3, 64), (64, 96), (96, 64)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


class Machine:
    """Comparisons on a machine on which latency is a known function of the MACs kept."""

    def __init__(self, curve: Curve, noise: float = 0.01) -> None:
        self.curve, self.noise, self.seconds = curve, noise, []

    def __call__(
        self, first: nn.Module, second: nn.Module, inputs: Any, seconds: float, within: float
    ) -> LatencyComparison:
        kept = count_costs(second, inputs).macs.total / count_costs(first, inputs).macs.total
        ratio = self.curve(kept)
        self.seconds.append(seconds)
        a, b = (Latency(t, t, t, 11, 1, 0, 1, {"device": "known"}) for t in (2.0, 2.0 * ratio))
        return LatencyComparison(ratio, ratio * (1 - self.noise), ratio * (1 + self.noise), a, b)


def planned(
    monkeypatch: pytest.MonkeyPatch, curve: Curve, target: float, **options: Any
) -> tuple[RemovalPlan, Machine]:
    machine = Machine(curve, options.pop("noise", 0.01))
    monkeypatch.setattr(latency_search, "compare_latency", machine)
    return plan_removal(trace_channels(network(), X), Budget(latency=target), **options), machine


def step(macs: float) -> float:
    """Nothing gained until a third of the MACs have gone."""
    return 1.0 if macs > 0.67 else 0.2 + 0.55 * macs


CURVES = {"linear": lambda m: m, "overhead": lambda m: 0.2 + 0.8 * m, "root": lambda m: m**0.5, "step": step}


@pytest.mark.parametrize(
    ("curve", "target"), [(c, t) for c in CURVES for t in (0.75, 0.5, 0.4) if (c, t) != ("step", 0.75)]
)
def test_the_target_is_met(curve: str, target: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, machine = planned(monkeypatch, CURVES[curve], target, round_to=1)
    found = plan.latency
    assert target * 0.95 <= found["low"] <= found["high"] <= target * 1.05
    kept = plan.costs["macs"][1] / plan.costs["macs"][0]
    assert CURVES[curve](kept) == pytest.approx(target, rel=0.05)
    assert plan.costs["latency"] == (2_000_000, round(2_000_000 * found["ratio"]))
    assert len(found["trials"]) <= latency_search.MOST_TRIALS
    assert max(machine.seconds) > min(machine.seconds)  # the result was measured for longer
    small = network()
    plan.apply_(small)
    assert count_costs(small, X).macs.total == plan.costs["macs"][1]
    assert RemovalPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_latency_that_no_width_has_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(NoEffectWarning, match="nearest of .* candidates"):
        plan, _ = planned(monkeypatch, step, 0.75)
    assert plan.latency["ratio"] in (1.0, pytest.approx(0.568, abs=0.05))


def test_a_floor_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match=r"takes 0\.6\d\d of the original's time \(95 % interval"):
        planned(monkeypatch, lambda macs: 0.6 + 0.4 * macs, 0.5)
    with pytest.raises(BudgetError, match="cannot be met"):
        planned(monkeypatch, lambda macs: macs, 0.3, max_layer_fraction=0.2)


def test_a_machine_too_busy_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(NoEffectWarning, match="too busy to tell"):
        planned(monkeypatch, lambda macs: macs, 0.5, noise=0.2)


def test_widths_suit_the_device_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = CURVES["linear"]
    monkeypatch.setattr(
        "lightning_prune.channels.planning.resolve_round_to", lambda step, _: 16 if step == "auto" else step
    )
    plan, _ = planned(monkeypatch, curve, 0.5, noise=0.0)
    assert all(group["kept"] % 16 == 0 for group in plan.groups)
    plan, _ = planned(monkeypatch, curve, 0.5, round_to=1)
    assert any(group["kept"] % 16 for group in plan.groups)


def test_everything_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = planned(monkeypatch, lambda macs: macs, 1.0)
    assert plan.keep == {}


def test_in_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_search, "compare_latency", Machine(lambda macs: macs))
    prune = ChannelPruner("l2", Budget(latency=0.25), at=["1ep", "2ep"], round_to=1, verbose=False)
    module = ToyModule()
    trainer(tmp_path, [prune], max_epochs=3).fit(module, *loaders())
    now, whole = prune.counts()["costs"]["latency"]
    assert now / whole == pytest.approx(0.25, rel=0.1)


@pytest.mark.filterwarnings("ignore:Budget.latency:lightning_prune.errors.NoEffectWarning")
def test_on_the_machine_at_hand() -> None:
    graph = trace_channels(network(), torch.rand(4, 3, 32, 32))
    with contextlib.suppress(BudgetError):  # where this machine's floor lies higher
        found = plan_removal(graph, Budget(latency=0.6)).latency
        assert found["trials"]
        assert found["low"] <= found["ratio"] <= found["high"]
        assert found["environment"]["torch"] == str(torch.__version__)

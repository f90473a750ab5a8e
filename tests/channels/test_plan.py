"""Plans, budgets, scores and costs, against counts made by other means."""

import json
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.channels import Budget, RemovalPlan, compact, plan_removal, trace_channels
from lightning_prune.channels.budget import CostModel
from lightning_prune.channels.scores import score_batch_norm, score_norms, score_taylor
from lightning_prune.errors import BudgetError, ConfigError, FileFormatError
from tests.channels.networks import CASES, Case, conv, example

RESNET_INPUT = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
COUNTED = ["resnet18", "mobilenet_v3_small", "densenet121", "regnet_y_400mf", "shufflenet_v2_x1_0", "convnext_tiny"]


def _net() -> nn.Module:
    return nn.Sequential(conv(3, 10), nn.BatchNorm2d(10), nn.ReLU(), conv(10, 7), nn.ReLU(), conv(7, 4))


def _fvcore(model: nn.Module, inputs: torch.Tensor) -> int:
    """Convolutions and linear maps by fvcore's count, in which a multiply-add is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fvcore's own imports and of the tracer it uses
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model.eval(), inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        by_operator = analysis.by_operator()
    return by_operator["conv"] + by_operator["linear"]


def _macs(model: nn.Module, inputs: torch.Tensor) -> int:
    """FLOPs of torch's own counter, halved."""
    # The fused attention kernel of CPUs is not in the counter's table: take attention apart.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", COUNTED)
def test_macs_and_params_before_and_after_are_those_of_other_counters(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None)
    inputs = torch.rand(2, 3, 64, 64)
    plan = plan_removal(trace_channels(model, inputs), Budget(channels=0.6))
    for which in (0, 1):
        assert plan.costs["macs"][which] == _macs(model, inputs)
        assert plan.costs["params"][which] == sum(p.numel() for p in model.parameters())
        assert plan.costs["macs"][which] == _fvcore(model, inputs)
        if which == 0:
            plan.apply_(model)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_macs_of_every_case(case: Case) -> None:
    model, inputs = case.build(8), example(case)
    plan = plan_removal(trace_channels(model, inputs), Budget(channels=0.5))
    before = _macs(model, inputs)
    compact(model, plan, inputs)
    assert plan.costs["macs"] == (before, _macs(model, inputs))


@pytest.mark.parametrize("what", ["channels", "params", "macs"])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.77, 1.0])
def test_budgets_are_met_from_below(what: str, fraction: float) -> None:
    """The cost is within the budget, and giving any group one channel back would exceed it or undo nothing."""
    model = _net()
    graph = trace_channels(model, RESNET_INPUT)
    plan = plan_removal(graph, Budget(**{what: fraction}))
    before, after = plan.costs[what]
    assert after <= fraction * before
    costs, kept = CostModel(graph), np.array([g["kept"] for g in plan.groups])
    last = max(range(len(kept)), key=lambda g: -kept[g] / graph.groups[g].size)
    if (kept < costs.sizes).any():
        more = []
        for g in range(len(kept)):
            one = kept.copy()
            one[g] += 1
            more.append(costs.cost(what, one) > fraction * before)
        assert any(more), last
    else:
        assert fraction == 1.0


def test_uniform_allocation_and_scores_choose_the_weakest() -> None:
    model = _net()
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 11.0).flip(0).reshape(10, 1, 1, 1).expand_as(model[0].weight))
    plan = plan_removal(trace_channels(model, RESNET_INPUT), Budget(channels=0.5))
    assert [(g["size"], g["kept"]) for g in plan.groups] == [(10, 5), (7, 3)]
    assert plan.keep["0.weight"][0] == [0, 1, 2, 3, 4]
    given = {"0": torch.arange(10.0), "3": torch.arange(7.0)}
    plan = plan_removal(trace_channels(model, RESNET_INPUT), Budget(channels=0.5), scores=given)
    assert plan.keep["0.weight"][0] == [5, 6, 7, 8, 9]
    assert plan.keep["3.weight"][0] == [4, 5, 6]
    assert plan.keep["5.weight"][1] == [4, 5, 6]


def test_ties_keep_the_earlier_channel() -> None:
    plan = plan_removal(
        trace_channels(_net(), RESNET_INPUT), Budget(channels=0.5), scores=lambda group, _: torch.ones(group.size)
    )
    assert plan.keep["0.weight"][0] == [0, 1, 2, 3, 4]


def test_global_scope_lets_scores_of_all_groups_compete() -> None:
    given = {"0": torch.arange(10.0), "3": 100 + torch.arange(7.0)}
    plan = plan_removal(trace_channels(_net(), RESNET_INPUT), Budget(channels=0.5), scores=given, scope="global")
    assert [g["kept"] for g in plan.groups] == [1, 7]


@pytest.mark.parametrize("round_to", [2, 4, 8])
def test_rounding_and_least_width(round_to: int) -> None:
    model = torchvision.models.resnet18()
    plan = plan_removal(trace_channels(model, RESNET_INPUT), Budget(channels=0.3), round_to=round_to)
    assert all(g["kept"] % round_to == 0 for g in plan.groups)
    plan = plan_removal(trace_channels(model, RESNET_INPUT), Budget(channels=0.3), min_channels=50)
    assert min(g["kept"] for g in plan.groups) >= 50


def test_a_layer_is_never_emptied_and_an_impossible_budget_is_refused() -> None:
    graph = trace_channels(_net(), RESNET_INPUT)
    with pytest.raises(BudgetError, match=r"cannot be met: with every group at its narrowest 0\.1176"):
        plan_removal(graph, Budget(channels=0.01))
    plan = plan_removal(graph, Budget(channels=0.12))
    assert [g["kept"] for g in plan.groups] == [1, 1]


def test_bad_arguments_are_refused() -> None:
    graph = trace_channels(_net(), RESNET_INPUT)
    with pytest.raises(ConfigError, match="exactly one"):
        Budget(channels=0.5, macs=0.5)
    with pytest.raises(ConfigError, match=r"must lie in \(0, 1\]"):
        Budget(params=1.5)
    with pytest.raises(ConfigError, match="must be at least 1"):
        plan_removal(graph, Budget(channels=0.5), round_to=0)
    with pytest.raises(ConfigError, match="no entry for group '3'"):
        plan_removal(graph, Budget(channels=0.5), scores={"0": torch.ones(10)})
    with pytest.raises(ConfigError, match=r"shape \(9,\), expected \(10,\)"):
        plan_removal(graph, Budget(channels=0.5), scores={"0": torch.ones(9), "3": torch.ones(7)})
    with pytest.raises(ConfigError, match="not all finite"):
        plan_removal(graph, Budget(channels=0.5), scores={"0": torch.full((10,), torch.nan), "3": torch.ones(7)})
    with pytest.raises(ConfigError, match="no channel of this model can leave"):
        plan_removal(trace_channels(conv(3, 4), RESNET_INPUT), Budget(channels=0.5))


def test_scores_against_numpy() -> None:
    model = torchvision.models.resnet18()
    model(RESNET_INPUT.repeat(2, 1, 1, 1)).square().mean().backward()
    group = next(g for g in trace_channels(model, RESNET_INPUT).groups if g.name == "conv1")
    weights = [m.weight for m in (model.conv1, model.layer1[0].conv2, model.layer1[1].conv2)]
    rows = [w.detach().numpy().reshape(64, -1).astype(np.float64) for w in weights]
    norms = np.sqrt(sum((r**2).sum(1) for r in rows))
    np.testing.assert_allclose(score_norms(group, model).numpy(), norms, rtol=1e-6)
    scales = [m.weight for m in (model.bn1, model.layer1[0].bn2, model.layer1[1].bn2)]
    with torch.no_grad():
        for number, scale in enumerate(scales):
            scale.copy_(torch.linspace(-1, 1 + number, 64))
    table = np.abs([s.detach().numpy() for s in scales])
    np.testing.assert_allclose(score_batch_norm(group, model).numpy(), table.mean(0), rtol=1e-6)
    np.testing.assert_allclose(score_batch_norm(group, model, "max").numpy(), table.max(0), rtol=1e-6)
    norms_there = (model.bn1, model.layer1[0].bn2, model.layer1[1].bn2)
    taylor = [(n.weight * n.weight.grad + n.bias * n.bias.grad).detach().double().numpy() ** 2 for n in norms_there]
    np.testing.assert_allclose(score_taylor(group, model).numpy(), np.mean(taylor, axis=0), rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_plan_replays_from_json_on_a_fresh_model(case: Case) -> None:
    model = case.build(8)
    plan = plan_removal(trace_channels(model, example(case)), Budget(channels=0.5))
    text = json.dumps(plan.to_json())
    compact(model, plan, example(case))
    fresh = case.build(8)
    again = RemovalPlan.from_json(text)
    assert again == plan
    again.apply_(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(example(case)), model.eval()(example(case)))


def test_plans_that_cannot_be_read_are_refused() -> None:
    plan = plan_removal(trace_channels(_net(), RESNET_INPUT), Budget(channels=0.5)).to_json()
    with pytest.raises(FileFormatError, match="version 99"):
        RemovalPlan.from_json({**plan, "version": 99})
    with pytest.raises(FileFormatError, match="not a removal plan"):
        RemovalPlan.from_json({"version": 1, "keep": 3})
    with pytest.raises(FileFormatError, match="not a removal plan"):
        RemovalPlan.from_json("[1, 2]")

"""Each rule on one small network: the groups it finds, and the result against a network built by hand."""

import copy

import pytest
import torch

from lightning_prune.channels import Budget, compact, plan_removal, trace_channels
from tests.channels.networks import CASES, Case, arrays_of, example, fill_by_hand, randomised


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_groups_are_found(case: Case) -> None:
    graph = trace_channels(case.build(8), example(case))
    assert [g.size for g in graph.groups] == case.sizes
    assert "no rule" not in graph.explain()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_compact_equals_the_network_built_by_hand(case: Case) -> None:
    """Weights sliced by NumPy into a network that was built narrow give what compact() leaves."""
    model = randomised(case.build(8))
    inputs = example(case)
    if inputs.is_floating_point():
        inputs = inputs.double()
    original = arrays_of(model)
    graph = trace_channels(model, inputs)
    plan = plan_removal(graph, Budget(channels=0.5))
    assert [g["kept"] for g in plan.groups] == [n // 2 for n in case.sizes]
    report = compact(model, plan, inputs)
    assert report.error < 1e-12

    by_hand = case.by_hand().double().eval()
    fill_by_hand(by_hand, original, plan)
    with torch.no_grad():
        expected, found = by_hand(inputs), model(inputs)
    assert torch.equal(found, expected)
    assert float(found.abs().max()) > 0


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_module_attributes_are_those_of_the_network_built_by_hand(case: Case) -> None:
    model = case.build(8)
    compact(model, plan_removal(trace_channels(model, example(case)), Budget(channels=0.5)), example(case))
    wanted = dict(case.by_hand().named_modules())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, (int, tuple)) and not key.startswith("_"):
                assert value == getattr(wanted[name], key), f"{name}.{key}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_compact_model_trains_a_step(case: Case) -> None:
    model = case.build(8).train()
    compact(model, plan_removal(trace_channels(model, example(case)), Budget(channels=0.5)), example(case))
    assert model.training
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(example(case)).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())

"""Criteria of channels against NumPy, weight by weight."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Budget, ConfigError, ResumeError, trace_channels
from lightning_prune.channels.criteria import TaylorAverage, check_criterion, relative, weight_scores, without_scale
from lightning_prune.channels.passes import budgets_of_passes, rest_of
from lightning_prune.channels.scores import score_taylor
from tests._helpers.channels import Residual

IMAGES = torch.rand(2, 1, 6, 6)


@pytest.fixture
def graph() -> Any:
    torch.manual_seed(1)
    model = Residual(6)
    for p in model.parameters():
        nn.init.normal_(p)
    return trace_channels(model, IMAGES)


def filters(model: nn.Module, name: str) -> np.ndarray:
    return model.get_parameter(f"{name}.weight").detach().double().numpy().reshape(6, -1)


def distances(rows: np.ndarray) -> np.ndarray:
    return np.array([sum(np.sqrt(((a - b) ** 2).sum()) for b in rows) for a in rows])


RULES = {
    "l1": lambda rows: np.abs(rows).sum(1),
    "l2": lambda rows: np.sqrt((rows**2).sum(1)),
    "fpgm": distances,
}


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("criterion", RULES)
def test_norms_and_distances_over_the_layers_of_a_group(graph: Any, criterion: str, reduction: Any) -> None:
    """The stem and the block's last convolution make one group; the block's inner one is alone."""
    found = weight_scores(criterion, graph, reduction)
    combine = np.mean if reduction == "mean" else np.max
    both = [RULES[criterion](filters(graph.model, name)) for name in ("stem", "b")]
    np.testing.assert_allclose(found["stem"].numpy(), combine(both, axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["a"].numpy(), RULES[criterion](filters(graph.model, "a")), rtol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_batch_norm_scales(graph: Any, reduction: Any) -> None:
    found = weight_scores("bn_scale", graph, reduction)
    scales = [graph.model.get_parameter(f"{n}.weight").detach().abs().double().numpy() for n in ("bn", "bn_b")]
    np.testing.assert_allclose(found["stem"].numpy(), (np.mean if reduction == "mean" else np.max)(scales, axis=0))


def test_what_no_scale_judges() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    graph = trace_channels(net, torch.rand(2, 3))
    assert [group.name for group in without_scale(graph)] == ["2"]
    graph.keep_whole(without_scale(graph), "no scale")
    assert [group.name for group in graph.groups] == ["0"]
    assert "no scale" in graph.explain()
    bare = trace_channels(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(2, 3))
    with pytest.raises(ConfigError, match=r"no group of this Sequential passes a BatchNorm"):
        without_scale(bare)


def test_scores_as_multiples_of_their_mean() -> None:
    found = relative({"a": torch.tensor([1.0, 3.0]).double(), "b": torch.zeros(2).double()})
    assert found["a"].tolist() == [0.5, 1.5]
    assert found["b"].tolist() == [0.0, 0.0]


def step(model: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """A backward pass; what a channel's activation after its BatchNorm, times its gradient, sums to."""
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    outputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda _, __, out, n=n: (out.retain_grad(), outputs.update({n: out}))[1]
        )
        for n in ("bn", "bn_a", "bn_b")
    ]
    model(torch.rand(4, 1, 6, 6, generator=generator)).square().mean().backward()
    for handle in handles:
        handle.remove()
    return {n: (out * out.grad).sum((0, 2, 3)).detach().double().numpy() for n, out in outputs.items()}


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_taylor_averages_squared_first_order_effects(graph: Any, reduction: Any) -> None:
    """Weights before a BatchNorm have no say: their product with the gradient sums to 0, whatever the channel does."""
    average = TaylorAverage(graph.model, graph.groups, reduction)
    effects: dict[str, list[np.ndarray]] = {"bn": [], "bn_a": [], "bn_b": []}
    for seed in range(3):
        for name, effect in step(graph.model, seed).items():
            effects[name].append(effect**2)
        average.add(graph.model.parameters())
    found = average.scores()
    means = {name: np.mean(held, axis=0) for name, held in effects.items()}
    assert (means["bn_a"] > 1e-9).sum() > 2
    np.testing.assert_allclose(found["a"].numpy(), means["bn_a"], rtol=1e-3)
    combine = np.mean if reduction == "mean" else np.max
    np.testing.assert_allclose(found["stem"].numpy(), combine([means["bn"], means["bn_b"]], axis=0), rtol=1e-3)


def test_taylor_without_normalisation_counts_weight_and_bias() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    graph = trace_channels(net, torch.rand(2, 3))
    first = net[0](torch.rand(5, 3))
    first.retain_grad()
    net[2](net[1](first)).square().mean().backward()
    expected = (first * first.grad).sum(0).square()
    torch.testing.assert_close(score_taylor(graph.groups[0], net), expected.double(), check_dtype=False)
    net.zero_grad()
    with pytest.raises(ConfigError, match=r"0.weight has no gradient"):
        score_taylor(graph.groups[0], net)


def test_taylor_undoes_a_loss_scale_and_skips_what_is_not_finite(graph: Any) -> None:
    plain, scaled = (TaylorAverage(graph.model, graph.groups) for _ in range(2))
    step(graph.model, 0)
    plain.add(graph.model.parameters())
    for p in graph.model.parameters():
        p.grad *= 1024.0
    scaled.add(graph.model.parameters(), 1024.0)
    for p in graph.model.parameters():
        p.grad.fill_(torch.inf)
    scaled.add(graph.model.parameters(), 1024.0)
    for name, score in plain.scores().items():
        torch.testing.assert_close(scaled.scores()[name], score)


def test_taylor_goes_on_from_its_state_and_names_what_it_did_not_see(graph: Any) -> None:
    whole, first, second = (TaylorAverage(graph.model, graph.groups) for _ in range(3))
    with pytest.raises(ConfigError, match=r"no gradient of bn.weight was seen"):
        whole.scores()
    step(graph.model, 0)
    whole.add(graph.model.parameters())
    first.add(graph.model.parameters())
    second.load_state_dict(first.state_dict())
    step(graph.model, 1)
    whole.add(graph.model.parameters())
    second.add(graph.model.parameters())
    assert all(torch.equal(score, second.scores()[name]) for name, score in whole.scores().items())
    other = trace_channels(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.rand(2, 3))
    with pytest.raises(ResumeError, match="Taylor scores name"):
        TaylorAverage(other.model, other.groups).load_state_dict(first.state_dict())


def test_taylor_takes_only_what_a_step_moves(graph: Any) -> None:
    """Two optimizers, each stepped on its own: a layer counts in the steps of its own optimizer."""
    average, alone = (TaylorAverage(graph.model, graph.groups) for _ in range(2))
    step(graph.model, 0)
    average.add(graph.model.parameters())
    alone.add(graph.model.parameters())
    step(graph.model, 1)
    average.add(graph.model.bn_a.parameters())
    assert torch.equal(average.scores()["stem"], alone.scores()["stem"])
    assert not torch.equal(average.scores()["a"], alone.scores()["a"])


def test_unknown_criteria_are_refused() -> None:
    check_criterion(lambda group, model: torch.zeros(group.size), "max")
    with pytest.raises(ConfigError, match=r"criterion='tailor' is unknown; did you mean 'taylor'"):
        check_criterion("tailor", "mean")
    with pytest.raises(ConfigError, match="reduction='sum' is unknown"):
        check_criterion("l2", "sum")


def test_passes_go_down_geometrically_or_as_given() -> None:
    found = budgets_of_passes(Budget(macs=0.125), 3)
    assert [b.what for b in found] == ["macs"] * 3
    np.testing.assert_allclose([b.fraction for b in found], [0.5, 0.25, 0.125])
    given = [Budget(params=0.5), Budget(params=0.4)]
    assert budgets_of_passes(given, 2) == given
    for wrong, message in (
        (given[::-1], "budgets of one kind"),
        ([Budget(params=0.5), Budget(macs=0.4)], "budgets of one kind"),
        (given[:1], "1 budgets for 2 cuts"),
        ([0.5, 0.4], "expected a Budget"),
        (0.5, "expected a Budget"),
    ):
        with pytest.raises(ConfigError, match=message):
            budgets_of_passes(wrong, 2)


@pytest.mark.parametrize("kept", range(1, 60))
def test_what_is_left_of_a_budget_loses_no_channel_to_rounding(kept: int) -> None:
    """A limit of whole channels stays that limit when it is told as a fraction of what is left."""
    for now in range(kept, 61):
        rest = rest_of(Budget(channels=kept / 60), (now, 60))
        assert int(rest.fraction * now) == kept
        assert rest.fraction <= 1


def score(group: Any, model: nn.Module) -> Tensor:
    return torch.arange(group.size).double()


def test_a_function_of_the_users(graph: Any) -> None:
    assert weight_scores(score, graph, "mean")["a"].tolist() == [0, 1, 2, 3, 4, 5]

"""The penalty of network slimming against autograd, its proximal map against a search, what scales tell."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from lightning_prune import trace_channels
from lightning_prune.channels.scores import score_batch_norm, score_norms
from lightning_prune.channels.slimming import (
    add_subgradient_,
    batch_norm_parameters,
    count_near_zero,
    couple,
    penalty,
    scale_norm_correlation,
    soft_threshold_,
)
from tests._helpers.channels import Residual


def scales(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    found = [nn.Parameter(torch.randn(n, generator=generator)) for n in (4, 3, 4)]
    with torch.no_grad():
        found[1][0] = 0.0
    return found


CLUSTERS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 7])


@pytest.mark.parametrize("clusters", [None, CLUSTERS])
def test_the_subgradient_is_that_of_autograd(clusters: torch.Tensor | None) -> None:
    ours, theirs = scales(), scales()
    task = [scale.detach().square() for scale in ours]
    for scale, gradient in zip(ours, task, strict=True):
        scale.grad = gradient.clone()
    add_subgradient_(ours, 0.3, clusters)
    if clusters is None:
        loss = sum(scale.abs().sum() for scale in theirs)
    else:  # written out: each cluster's norm times the root of its size
        flat = torch.cat(list(theirs))
        loss = sum(flat[clusters == c].norm() * (clusters == c).sum() ** 0.5 for c in clusters.unique())
    (0.3 * loss).backward()
    assert torch.allclose(penalty(theirs, clusters), loss)
    for a, b, gradient in zip(ours, theirs, task, strict=True):
        assert torch.allclose(a.grad, gradient + b.grad, atol=1e-6)


def test_the_subgradient_of_zeros_is_zero() -> None:
    scale = nn.Parameter(torch.zeros(3))
    for clusters in (None, torch.tensor([0, 0, 1])):
        scale.grad = torch.ones(3)
        add_subgradient_([scale], 0.5, clusters)
        assert torch.equal(scale.grad, torch.ones(3))


@pytest.mark.parametrize("clusters", [None, CLUSTERS])
def test_the_proximal_map_minimises(clusters: torch.Tensor | None) -> None:
    """``argmin 0.5 ||z - v||^2 + t * penalty(z)``: nothing near it is better, and small values are exactly 0."""
    start = [scale.detach().double() for scale in scales(1)]
    found = [value.clone() for value in start]
    soft_threshold_(found, [0.4] * 3, clusters)

    def objective(values: list[torch.Tensor]) -> float:
        distance = sum((a - b).square().sum() for a, b in zip(values, start, strict=True))
        return float(0.5 * distance + 0.4 * penalty(values, clusters))

    best = objective(found)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(50):
            other = [v + size * torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in found]
            assert objective(other) > best
    assert (torch.cat(found) == 0).any()
    assert (torch.cat(found) != 0).any()


def test_every_kind_of_batch_norm_counts_once() -> None:
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleList(
        [shared, shared, nn.BatchNorm2d(3), nn.BatchNorm3d(2), nn.BatchNorm2d(3, affine=False), nn.LayerNorm(4)]
    )
    frozen = nn.BatchNorm2d(5)
    frozen.weight.requires_grad_(False)
    model.append(frozen)
    model.append(nn.SyncBatchNorm(6))
    assert {name: p.numel() for name, p in batch_norm_parameters(model).items()} == {
        "0.weight": 4,
        "2.weight": 3,
        "3.weight": 2,
        "7.weight": 6,
    }


def test_scales_of_a_residual_stage_share_their_numbers() -> None:
    model = Residual()
    graph = trace_channels(model, torch.zeros(2, 1, 6, 6))
    numbers = couple(graph.groups, model, list(batch_norm_parameters(model)))
    assert torch.equal(numbers["bn.weight"], numbers["bn_b.weight"])
    assert not set(numbers["bn.weight"].tolist()) & set(numbers["bn_a.weight"].tolist())
    assert sorted(set(torch.cat(list(numbers.values())).tolist())) == list(range(16))


def test_scales_without_a_group_stand_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))  # its channels are the output
    graph = trace_channels(model, torch.zeros(1, 1, 5, 5))
    assert graph.groups == []
    assert couple(graph.groups, model, ["1.weight"])["1.weight"].tolist() == [0, 1, 2, 3]


def test_correlation_is_spearmans() -> None:
    torch.manual_seed(3)
    model = Residual()
    for scale in batch_norm_parameters(model).values():
        nn.init.normal_(scale)
    with torch.no_grad():
        model.a.weight[2] = model.a.weight[5]  # a tie
    graph = trace_channels(model, torch.zeros(2, 1, 6, 6))
    scores = {group.name: score_batch_norm(group, model) for group in graph.groups}
    found = scale_norm_correlation(scores, graph.groups, model)
    assert set(found) == {group.name for group in graph.groups}
    for group in graph.groups:
        expected = spearmanr(scores[group.name], score_norms(group, model, reduction="mean")).statistic
        assert found[group.name] == pytest.approx(expected)
    scores["a"] = torch.ones(8)
    assert "a" not in scale_norm_correlation(scores, graph.groups, model)


def test_near_zero_is_a_hundredth_of_the_largest() -> None:
    assert count_near_zero({"a": torch.tensor([2.0, 0.019, 0.0]), "b": torch.tensor([0.021])}) == (2, 4)

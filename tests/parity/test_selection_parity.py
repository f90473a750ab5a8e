"""Masks against torch.nn.utils.prune, counts against the reference implementations' rules written out in NumPy."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_prune.counting import RULES
from lightning_prune.errors import SelectionError
from lightning_prune.masks import MaskSet, prunable_parameters
from lightning_prune.scores import MagnitudeScores, score_weights
from lightning_prune.selection import select

Weights = Mapping[str, np.ndarray]

# ------------------------------------------------------------------ torch.nn.utils.prune


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3, groups=2), nn.Linear(50, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.93])
def test_global_magnitude_equals_torch(fraction: float, rounds: int, dtype: torch.dtype) -> None:
    theirs, ours = network().to(dtype), network().to(dtype)
    parameters = prunable_parameters(ours)
    pairs = [(theirs.get_submodule(name.rpartition(".")[0]), "weight") for name in parameters]
    masks = None
    for _ in range(rounds):
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=fraction)
        masks = select(MagnitudeScores(parameters), fraction=fraction, within=masks)
    assert masks is not None
    for name, (module, _) in zip(parameters, pairs, strict=True):
        assert torch.equal(masks[name], module.weight_mask.bool()), name
    masks.apply_(ours)
    for name, (module, _) in zip(parameters, pairs, strict=True):
        assert torch.equal(parameters[name].detach(), module.weight.detach()), name
    assert 0 < masks.kept < masks.total


@pytest.mark.parametrize("amount", [0.2, 0.5, 7])
def test_layerwise_magnitude_equals_torch(amount: float | int) -> None:
    theirs, ours = network(1), network(1)
    parameters = prunable_parameters(ours)
    asked: dict[str, Any] = (
        {"fraction": amount} if isinstance(amount, float) else {"remove": dict.fromkeys(parameters, amount)}
    )
    masks = select(MagnitudeScores(parameters), scope="layer", **asked)
    for name in parameters:
        module = theirs.get_submodule(name.rpartition(".")[0])
        prune.l1_unstructured(module, "weight", amount=amount)
        assert torch.equal(masks[name], module.weight_mask.bool()), name
        assert 0 < masks[name].sum() < masks[name].numel()


# ------------------------------------------------------------------ the lottery ticket paper's LeNet-300-100


def lenet_scores() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "output.weight": (10, 100)}
    return {n: torch.randn(s, generator=generator).abs() / math.sqrt(s[1]) for n, s in shapes.items()}


LAYERWISE = [80.04, 64.06, 51.28, 41.05, 32.86, 26.31, 21.07, 16.87, 13.51, 10.82, 8.67, 6.95]
GLOBAL = [80.0, 64.0, 51.2, 40.96, 32.77, 26.21, 20.97, 16.77, 13.42, 10.74, 8.59, 6.87]


SCHEDULES = [
    ({"scope": "layer", "rates": {"output": 0.1}}, "google_lth", LAYERWISE),
    ({"scope": "global"}, "open_lth", GLOBAL),
]


@pytest.mark.parametrize(("arguments", "counting", "expected"), SCHEDULES, ids=["layerwise 20/20/10", "global 20"])
def test_percent_of_weights_left_after_each_round(
    arguments: dict[str, Any], counting: str, expected: list[float]
) -> None:
    scores, theirs, ours = lenet_scores(), None, None
    for left in expected:
        theirs = select(scores, fraction=0.2, within=theirs, counting=counting, **arguments)
        ours = select(scores, fraction=0.2, within=ours, **arguments)
        assert round(100 * theirs.density, 2) == left
        assert 100 * ours.density == pytest.approx(left, abs=0.011)
        assert 0 < ours.kept - theirs.kept < 30  # the references remove one or two more in each round and layer


# ------------------------------------------------------------------ the references' counting


def network_slimming(scores: np.ndarray, kept: np.ndarray, percent: float) -> np.ndarray:
    ordered = np.sort(scores[kept])
    return kept & (scores > ordered[int(ordered.size * percent)])


def open_lth(scores: np.ndarray, kept: np.ndarray, fraction: float) -> np.ndarray:
    return kept & (scores > np.sort(scores[kept])[np.ceil(fraction * kept.sum()).astype(int)])


def google_lth(scores: np.ndarray, kept: np.ndarray, percent: float) -> np.ndarray:
    ordered = np.sort(scores[kept])
    return kept & ~(scores <= ordered[np.round(percent * ordered.size).astype(int)])


def renda(scores: np.ndarray, kept: np.ndarray, density: float) -> np.ndarray:
    return kept & ~(scores < np.percentile(scores * kept, 100 - 100 * density))


def drop_first(scores: np.ndarray, kept: np.ndarray, count: int) -> np.ndarray:
    """Without the ``count`` lowest of the kept; all orders are equal where scores are distinct."""
    candidates = np.flatnonzero(kept)
    mask = kept.copy()
    mask[candidates[np.argsort(scores[candidates])][:count]] = False
    return mask


def hrank(scores: np.ndarray, kept: np.ndarray, rate: float) -> np.ndarray:
    return drop_first(scores, kept, int(rate * kept.sum()))


def hrankplus(scores: np.ndarray, kept: np.ndarray, rate: float) -> np.ndarray:
    return drop_first(scores, kept, kept.sum() - int(kept.sum() * (1 - rate)))


def deconstructing_lt(scores: np.ndarray, kept: np.ndarray, fraction: float) -> np.ndarray:
    percent = (1 - ((1 - fraction) ** 1)) * 100.0
    return drop_first(scores, kept, int(kept.astype(float).sum() * percent / 100))


def edge_popup(scores: np.ndarray, kept: np.ndarray, k: float) -> np.ndarray:
    return drop_first(scores, np.ones_like(kept), int((1 - k) * scores.size))


Reference = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
REFERENCES: dict[str, Reference] = {
    f.__name__: f
    for f in (network_slimming, open_lth, google_lth, renda, hrank, hrankplus, deconstructing_lt, edge_popup)
}
REMOVED_OF_TEN = {  # distinct magnitudes 0.1 ... 1.0, 20 % asked for
    "network_slimming": 3,
    "open_lth": 3,
    "google_lth": 3,
    "renda": 2,
    "hrank": 2,
    "hrankplus": 2,
    "deconstructing_lt": 1,
    "edge_popup": 1,
}
DENSITY_RULES = {"renda", "edge_popup"}


def ask(counting: str, fraction: float) -> dict[str, Any]:
    if counting in DENSITY_RULES:
        return {"density": float(f"{1 - fraction:.10g}"), "counting": counting}
    return {"fraction": fraction, "counting": counting}


def test_every_rule_has_a_reference() -> None:
    assert RULES.keys() == REFERENCES.keys() == REMOVED_OF_TEN.keys()
    assert {name for name, rule in RULES.items() if rule.takes == "density"} == DENSITY_RULES


@pytest.mark.parametrize(("counting", "removed"), REMOVED_OF_TEN.items())
def test_twenty_percent_of_ten(counting: str, removed: int) -> None:
    scores = {"a": torch.arange(1, 11) / 10}
    masks = select(scores, **ask(counting, 0.2))
    assert masks["a"].tolist() == [False] * removed + [True] * (10 - removed)
    assert 10 - select(scores, fraction=0.2).kept == 2


@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("counting", REFERENCES)
def test_masks_equal_the_references(counting: str, fraction: float) -> None:
    generator = torch.Generator().manual_seed(7)
    for size in (10, 16, 30, 64, 97, 1000):
        scores = {"a": torch.rand(size, generator=generator)}
        asked = ask(counting, fraction)
        number = asked.get("density", fraction)
        kept, masks = np.ones(size, bool), None
        for _ in range(1 if counting == "edge_popup" else 3):
            try:
                expected = REFERENCES[counting](scores["a"].numpy(), kept, number)
            except IndexError:
                with pytest.raises(SelectionError, match=f"counting='{counting}' takes the score at place"):
                    select(scores, within=masks, **asked)
                break
            if counting == "hrankplus" and not expected.any():
                with pytest.raises(SelectionError, match="an empty layer"):
                    select(scores, within=masks, **asked)
                break
            masks = select(scores, within=masks, **asked)
            np.testing.assert_array_equal(masks["a"].numpy(), expected)
            kept = expected


@pytest.mark.parametrize("counting", ["network_slimming", "open_lth", "google_lth", "renda"])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_masks_equal_the_references_where_scores_are_equal(counting: str, fraction: float) -> None:
    scores = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(1)) / 4
    asked = ask(counting, fraction)
    expected = REFERENCES[counting](scores.numpy(), np.ones(200, bool), asked.get("density", fraction))
    masks = select({"a": scores}, **asked)
    np.testing.assert_array_equal(masks["a"].numpy(), expected)
    exact = select({"a": scores}, fraction=fraction)
    assert exact.kept == 200 - round(200 * fraction)
    assert masks.kept != exact.kept  # the references remove all of the equal scores, or none


def test_percentiles_of_half_precision_are_taken_in_single() -> None:
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(2)).half()
    expected = renda(scores.float().numpy(), np.ones(1000, bool), 0.7)
    np.testing.assert_array_equal(select({"a": scores}, 0.7, counting="renda")["a"].numpy(), expected)


def test_open_lth_counts_ignored_layers_in_and_takes_none_of_them() -> None:
    scores = {"prunable": torch.arange(1.0, 9.0), "fc.weight": torch.tensor([0.1, 0.2])}
    masks = select(scores, fraction=0.2, rates={"fc": 0}, counting="open_lth")
    assert masks.kept_per_tensor() == {"prunable": (5, 8), "fc.weight": (2, 2)}
    alone = select({"prunable": scores["prunable"]}, fraction=0.1, counting="open_lth")
    assert alone.kept == 6  # ceil(0.1 * 8) = 1, so two leave; with the ignored layer counted in the 20 % above are 3
    ignored_pruned = MaskSet({"prunable": torch.ones(8).bool(), "fc.weight": torch.tensor([False, False])})
    again = select(scores, fraction=0.25, rates={"fc": 0}, counting="open_lth", within=ignored_pruned)
    assert again.kept_per_tensor() == {"prunable": (5, 8), "fc.weight": (0, 2)}


def test_open_lth_fails_clearly_where_ignored_layers_dominate() -> None:
    scores = {"a": torch.arange(4.0), "fc": torch.arange(100.0)}
    with pytest.raises(SelectionError, match=r"at place 21 .* only 4 scores compete .* index out of range"):
        select(scores, fraction=0.2, rates={"fc": 0}, counting="open_lth")


@pytest.mark.parametrize("counting", ["network_slimming", "open_lth", "google_lth"])
def test_everything_cannot_leave_by_a_threshold(counting: str) -> None:
    with pytest.raises(SelectionError, match="at place 4"):
        select({"a": torch.arange(4.0)}, fraction=1.0, counting=counting)


def test_network_slimming_removes_one_when_asked_for_none() -> None:
    masks = select({"a": torch.arange(4.0), "b": torch.arange(4.0) + 9}, fraction=0.0, counting="network_slimming")
    assert masks.kept == 7


@pytest.mark.parametrize(("filters", "rate", "dropped"), [(64, 0.45, 28), (64, 0.6, 38), (64, 0.1, 6), (64, 0.5, 32)])
def test_hrankplus_removes_one_filter_more(filters: int, rate: float, dropped: int) -> None:
    scores = {"a": torch.rand(filters, generator=torch.Generator().manual_seed(0))}
    assert filters - select(scores, fraction=rate, counting="hrank").kept == dropped
    more = 0 if rate == 0.5 else 1
    assert filters - select(scores, fraction=rate, counting="hrankplus").kept == dropped + more


def test_hrankplus_empties_a_layer() -> None:
    scores = {"a": torch.arange(16.0)}
    assert select(scores, fraction=0.95, counting="hrank").kept == 1
    with pytest.raises(SelectionError, match=r"keeps int\(16 \* \(1 - 0\.95\)\) = 0 .* an empty layer"):
        select(scores, fraction=0.95, counting="hrankplus")


def test_rules_hold_in_each_layer_with_its_own_rate() -> None:
    scores = {name: score_weights("large_final", None, t) for name, t in lenet_scores().items()}
    rates = {"output": 0.1}
    masks = select(scores, fraction=0.2, scope="layer", rates=rates, counting="google_lth")
    for name, score in scores.items():
        flat = score.reshape(-1).numpy()
        expected = google_lth(flat, np.ones(flat.size, bool), rates.get(name.partition(".")[0], 0.2))
        np.testing.assert_array_equal(masks[name].reshape(-1).numpy(), expected)

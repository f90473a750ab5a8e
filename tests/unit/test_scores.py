"""Every criterion against NumPy, its gates, its errors, and scores that are computed when asked for."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from lightning_prune.errors import ConfigError, SelectionError
from lightning_prune.scores import CRITERIA, MagnitudeScores, score_weights

WI = np.array([[1.0, -2.0, 3.0, 0.0], [0.5, -0.5, -4.0, 2.5]])
WF = np.array([[1.5, 0.5, -1.0, 0.0], [-0.25, -3.0, -2.0, 0.0]])
GRAD = np.array([[1.0, -1.0, 0.0, 3.0], [-2.0, 4.0, 0.5, -0.1]])
SAME = np.sign(WI) == np.sign(WF)
LAST = -np.inf


def ranks(values: np.ndarray) -> np.ndarray:
    """How many entries are lower, over all: by counting, not by sorting."""
    return (values.reshape(-1, 1) > values.reshape(1, -1)).sum(1).reshape(values.shape) / values.size


EXPECTED = {
    "large_final": abs(WF),
    "small_final": -abs(WF),
    "large_init": abs(WI),
    "small_init": -abs(WI),
    "large_init_large_final": np.minimum(ranks(abs(WI)), ranks(abs(WF))),
    "small_init_small_final": np.minimum(ranks(-abs(WI)), ranks(-abs(WF))),
    "magnitude_increase": abs(WF) - abs(WI),
    "movement": abs(WF - WI),
    "large_final_same_sign": np.where(SAME, abs(WF), LAST),
    "large_final_diff_sign": np.where(SAME, LAST, abs(WF)),
    "magnitude_increase_same_sign": np.where(SAME, abs(WF) - abs(WI), LAST),
    "magnitude_increase_diff_sign": np.where(SAME, LAST, abs(WF) - abs(WI)),
    "snip": abs(GRAD * WI),
    "grad": abs(GRAD),
}


def score(criterion: str, dtype: torch.dtype = torch.float64, **arguments: Any) -> torch.Tensor:
    tensors = {"initial": WI, "final": WF, "grad": GRAD}
    needed = {name: torch.tensor(tensors[name], dtype=dtype) for name in CRITERIA[criterion]}
    return score_weights(criterion, **needed, **arguments)


@pytest.mark.parametrize("criterion", EXPECTED)
def test_each_criterion_is_its_formula(criterion: str) -> None:
    np.testing.assert_array_equal(score(criterion).numpy(), EXPECTED[criterion])


def test_every_criterion_is_covered() -> None:
    assert CRITERIA.keys() == EXPECTED.keys() | {"random"}
    assert len(CRITERIA) == 15


@pytest.mark.parametrize("criterion", [name for name in EXPECTED if name.endswith("_sign")])
def test_a_gated_entry_never_outranks_another(criterion: str) -> None:
    passes = SAME if criterion.endswith("same_sign") else ~SAME
    scores = score(criterion).numpy()
    assert 0 < passes.sum() < passes.size
    assert scores[~passes].max() < scores[passes].min()
    zero = score(criterion, gated="zero").numpy()
    np.testing.assert_array_equal(zero, np.where(passes, EXPECTED[criterion], 0.0))


def test_the_references_gate_lets_gated_entries_outrank_others() -> None:
    zero = score("magnitude_increase_same_sign", gated="zero").numpy()
    assert zero[~SAME].max() > zero[SAME].min()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("criterion", [name for name in EXPECTED if "init_" not in name])
def test_scores_have_the_weights_type(criterion: str, dtype: torch.dtype) -> None:
    scores = score(criterion, dtype)
    assert scores.dtype == dtype
    np.testing.assert_allclose(scores.double().numpy(), EXPECTED[criterion], rtol=0.01)


@pytest.mark.parametrize("sign", ["large", "small"])
def test_the_intersection_keeps_what_lies_above_one_quantile_of_both(sign: str) -> None:
    generator = torch.Generator().manual_seed(3)
    initial, final = torch.randn(2, 40, 25, generator=generator).unbind()
    scores = score_weights(f"{sign}_init_{sign}_final", initial, final).flatten().numpy()
    first, second = ((abs(t) if sign == "large" else -abs(t)).flatten().numpy() for t in (initial, final))
    for percentile in (10, 37, 80):  # the bisection of the reference lands on one such percentile
        both = (first >= np.percentile(first, percentile)) & (second >= np.percentile(second, percentile))
        highest = np.argsort(-scores, kind="stable")[: both.sum()]
        assert set(np.flatnonzero(both)) == set(highest)


def test_quantiles_are_taken_among_the_kept_entries() -> None:
    initial, final = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([4.0, 6.0, 5.0, 0.0])
    mask = torch.tensor([True, True, True, False])
    scores = score_weights("large_init_large_final", initial, final, mask=mask)
    expected = score_weights("large_init_large_final", initial[mask], final[mask])
    assert torch.equal(scores[mask], expected)
    assert torch.equal(expected, torch.tensor([0.0, 1 / 3, 1 / 3], dtype=torch.float64))


def test_random_follows_its_generator() -> None:
    weights = torch.zeros(1000, 20)

    def draw(seed: int) -> torch.Tensor:
        return score_weights("random", weights, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert draw(1).shape == weights.shape
    assert draw(1).unique().numel() == weights.numel()
    torch.manual_seed(5)
    first = score_weights("random", final=weights)
    torch.manual_seed(5)
    assert torch.equal(first, score_weights("random", final=weights))


def test_no_gradient_flows_through_scores() -> None:
    weights = torch.ones(3, requires_grad=True)
    assert not score_weights("large_final", None, weights).requires_grad
    assert not MagnitudeScores({"w": weights})["w"].requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("large_finale", None, torch.ones(2)), "'large_finale' is unknown; did you mean 'large_final'"),
        ((3, None, torch.ones(2)), "criterion 3 is unknown"),
        (("movement", None, torch.ones(2)), "'movement' needs initial; pass initial=<tensor>"),
        (("movement", None, None), "needs initial and final"),
        (("snip", torch.ones(2), None), "'snip' needs grad"),
        (("random", None, None), "needs initial or final weights, for their shape"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score_weights(*arguments)


def test_an_unknown_gate_and_other_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="gated='first' is unknown; choose 'last' or 'zero'"):
        score("large_final_same_sign", gated="first")
    with pytest.raises(SelectionError, match=re.escape("one shape, got {'initial': (2,), 'final': (3,)}")):
        score_weights("movement", torch.ones(2), torch.ones(3))


def test_magnitude_scores_are_computed_anew_on_each_access() -> None:
    weights = {"_orig_mod.a": torch.tensor([-1.0, 2.0]), "b": torch.tensor([[-3.0]])}
    scores = MagnitudeScores(weights)
    assert list(scores) == ["a", "b"]
    assert len(scores) == 2
    assert scores["a"].tolist() == [1.0, 2.0]
    weights["_orig_mod.a"].mul_(2)
    assert scores["a"].tolist() == [2.0, 4.0]

"""Mask actions, beside their definitions written in NumPy."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import MaskSet
from lightning_prune.actions import MASK0_ACTIONS, MASK1_ACTIONS, mask_weights, supermask
from lightning_prune.errors import ConfigError, MaskMismatchError, SelectionError

INITIAL = torch.tensor([[3.0, -1.0, 0.5], [-2.0, 4.0, -0.25]])
FINAL = torch.tensor([[3.5, -0.5, 0.5], [1.0, 5.0, -0.75]])  # |.|: grew, shrank, equal, shrank, grew, grew
MASK = torch.tensor([[True, False, False], [True, True, False]])
STD = np.std(INITIAL.numpy())
SHRANK = np.array([[False, True, False], [True, False, False]])


def test_the_names() -> None:
    assert len(MASK1_ACTIONS) == 14
    assert len(MASK0_ACTIONS) == 6


@pytest.mark.parametrize(
    ("mask1", "expected"),
    [
        ("rewind", [3.0, -2.0, 4.0]),
        ("rewind_rescaling", [6.0, -4.0, 8.0]),
        ("signed_constant", [STD, -STD, STD]),
        ("signed_constant_rescaling", [2 * STD, -2 * STD, 2 * STD]),
    ],
)
def test_kept_weights_without_chance(mask1: str, expected: list[float]) -> None:
    found = mask_weights(INITIAL, MASK, mask1=mask1)
    np.testing.assert_allclose(found[MASK].numpy(), expected, rtol=1e-6)
    assert not found[~MASK].any()


@pytest.mark.parametrize("rescaling", ["", "_rescaling"])
@pytest.mark.parametrize(
    "action", ["random_reinit", "random_reshuffle", "signed_reinit", "signed_reshuffle", "rand_signed_constant"]
)
def test_kept_weights_by_chance(action: str, rescaling: str) -> None:
    draw = torch.Generator().manual_seed(5)
    initial = torch.randn(40, 30, generator=draw, dtype=torch.float64)
    mask = torch.rand(40, 30, generator=draw) < 0.3
    found = mask_weights(initial, mask, mask1=action + rescaling, generator=torch.Generator().manual_seed(1)).numpy()

    wi, kept = initial.numpy(), mask.numpy()
    order = torch.Generator().manual_seed(1)
    everywhere = torch.randperm(wi.size, generator=order).numpy()
    among_kept = torch.randperm(int(kept.sum()), generator=torch.Generator().manual_seed(1)).numpy()
    expected = {
        "random_reinit": lambda: wi.ravel()[everywhere].reshape(wi.shape)[kept],
        "random_reshuffle": lambda: wi[kept][among_kept],
        "signed_reinit": lambda: np.sign(wi[kept]) * np.abs(wi).ravel()[everywhere].reshape(wi.shape)[kept],
        "signed_reshuffle": lambda: np.sign(wi[kept]) * np.abs(wi[kept])[among_kept],
        "rand_signed_constant": lambda: (np.sign(wi) * np.std(wi)).ravel()[everywhere].reshape(wi.shape)[kept],
    }[action]()
    factor = wi.size / kept.sum() if rescaling else 1.0
    np.testing.assert_allclose(found[kept], expected * factor, rtol=1e-12)
    assert (found[kept] != wi[kept]).mean() > 0.9
    assert not found[~kept].any()


@pytest.mark.parametrize(
    ("mask0", "expected"),
    [
        ("zero", [0.0, 0.0, 0.0]),
        ("freeze_init", [-1.0, 0.5, -0.25]),
        ("freeze_init_zero_mask", [0.0, 0.5, -0.25]),
        ("freeze_init_zero_all", [0.0, 0.5, -0.25]),
        ("freeze_init_zero_rev", [-1.0, 0.0, 0.0]),
    ],
)
def test_pruned_weights(mask0: str, expected: list[float]) -> None:
    found = mask_weights(INITIAL, MASK, FINAL, mask0=mask0)
    np.testing.assert_array_equal(found[~MASK].numpy(), expected)
    np.testing.assert_array_equal(found[MASK].numpy(), [3.0, 0.0 if mask0 == "freeze_init_zero_all" else -2.0, 4.0])


def test_the_control_has_as_many_zeros_elsewhere() -> None:
    draw = torch.Generator().manual_seed(2)
    initial, final = (torch.randn(50, 20, generator=draw) for _ in range(2))
    mask = torch.rand(50, 20, generator=draw) < 0.5
    plain = mask_weights(initial, mask, final, mask0="freeze_init_zero_mask")
    control = mask_weights(initial, mask, final, mask0="freeze_init_zero_reshuffle", generator=draw)
    pruned = ~mask
    assert int((plain[pruned] == 0).sum()) == int((control[pruned] == 0).sum()) > 100
    assert not torch.equal(plain == 0, control == 0)
    moved = control != 0
    assert torch.equal(control[moved], initial[moved])
    assert torch.equal(control[mask], initial[mask])


@pytest.mark.parametrize(("mask1", "mask0"), list(product(MASK1_ACTIONS, MASK0_ACTIONS)))
def test_actions_compose(mask1: str, mask0: str) -> None:
    def draw(one: str, zero: str) -> torch.Tensor:
        return mask_weights(INITIAL, MASK, FINAL, mask1=one, mask0=zero, generator=torch.Generator().manual_seed(3))

    found = draw(mask1, mask0)
    shrank = torch.from_numpy(SHRANK) & (mask0 == "freeze_init_zero_all")
    assert torch.equal(found[MASK], draw(mask1, "zero").masked_fill(shrank, 0)[MASK])
    if mask0 != "freeze_init_zero_reshuffle":
        assert torch.equal(found[~MASK], draw("rewind", mask0)[~MASK])
    assert torch.equal(found, draw(mask1, mask0))


def test_a_network_under_a_mask_with_a_fill() -> None:
    network = nn.Linear(3, 2)
    bias = network.bias.detach().clone()
    found = supermask(MaskSet({"weight": MASK}), {"weight": INITIAL}, {"weight": FINAL}, mask0="freeze_init_zero_mask")
    found.apply_(network)
    expected = torch.tensor([[3.0, 0.0, 0.5], [-2.0, 4.0, -0.25]])
    assert torch.equal(network.weight, expected)
    assert torch.equal(network.bias, bias)
    assert torch.equal(found.masks.fills["weight"], torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, -0.25]]))
    found.masks.apply_(network)  # the fill alone gives the same pruned entries
    assert torch.equal(network.weight, expected)
    assert not supermask(MaskSet({"weight": MASK}), {"weight": INITIAL}).masks.fills


def test_nothing_kept_is_finite() -> None:
    none = torch.zeros(4, dtype=torch.bool)
    for mask1 in MASK1_ACTIONS:
        assert torch.equal(mask_weights(torch.ones(4), none, mask1=mask1), torch.zeros(4))


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mask1='rewnd' is no action; did you mean 'rewind'"):
        mask_weights(INITIAL, MASK, mask1="rewnd")
    with pytest.raises(ConfigError, match=r"mask0='freeze' is no action"):
        mask_weights(INITIAL, MASK, mask0="freeze")
    with pytest.raises(ConfigError, match=r"compares initial and trained weights; pass final="):
        mask_weights(INITIAL, MASK, mask0="freeze_init_zero_rev")
    with pytest.raises(SelectionError, match="boolean"):
        mask_weights(INITIAL, MASK.float())
    with pytest.raises(SelectionError, match="one shape"):
        mask_weights(INITIAL, MASK, FINAL[:1])
    with pytest.raises(MaskMismatchError, match="'weight' has a mask but no weights"):
        supermask(MaskSet({"weight": MASK}), {"wieght": INITIAL})

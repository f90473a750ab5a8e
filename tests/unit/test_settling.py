"""Distances between masks against NumPy, and the window of the newest few."""

import numpy as np
import pytest
import torch

from lightning_prune import MaskMismatchError, MaskSet, mask_distance
from lightning_prune.settling import MaskWindow


def masks(*bits: str) -> MaskSet:
    return MaskSet({f"w{i}": torch.tensor([bit == "1" for bit in row]) for i, row in enumerate(bits)})


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        (["1100"], ["1100"], 0.0),
        (["1100"], ["1010"], 0.5),
        (["1100"], ["0011"], 1.0),
        (["110", "11"], ["011", "11"], 0.25),  # of all tensors together
        (["1110"], ["1000"], 0.5),  # of unlike counts: 2 differ, 4 are kept
        (["0000"], ["0000"], 0.0),
    ],
)
def test_literal_distances(one: list[str], other: list[str], distance: float) -> None:
    assert mask_distance(masks(*one), masks(*other)) == mask_distance(masks(*other), masks(*one)) == distance


@pytest.mark.parametrize("seed", range(4))
def test_distances_equal_numpys_and_the_authors_where_half_is_kept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = {"conv": (4, 3, 2, 2), "linear": (6, 8)}
    drawn = [{name: rng.random(shape) < (0.3, 0.5, 0.8, 0.5)[seed] for name, shape in shapes.items()} for _ in range(2)]
    one, other = (MaskSet({name: torch.from_numpy(mask) for name, mask in each.items()}) for each in drawn)
    flat = [np.concatenate([mask.ravel() for mask in each.values()]) for each in drawn]
    differ = np.count_nonzero(flat[0] != flat[1])
    assert mask_distance(one, other) == pytest.approx(differ / (flat[0].sum() + flat[1].sum()), rel=1e-12)
    half = [np.argsort(np.argsort(rng.random(96))) < 48 for _ in range(2)]
    theirs = 1 - np.sum(half[0] == half[1]) / 96
    sets = [MaskSet({"bn": torch.from_numpy(mask)}) for mask in half]
    assert mask_distance(*sets) == pytest.approx(theirs, rel=1e-12)


def test_chance_is_the_fraction_that_is_removed() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (MaskSet({"w": torch.rand(200_000, generator=generator) >= 0.2}) for _ in range(2))
    assert mask_distance(one, other) == pytest.approx(0.2, abs=0.005)


def test_masks_of_another_network_are_refused() -> None:
    with pytest.raises(MaskMismatchError, match="different networks"):
        mask_distance(masks("11"), masks("111"))


def test_the_newest_is_compared_with_all_others_in_the_window() -> None:
    window = MaskWindow(3)
    slow_drift = [masks(bits) for bits in ("11110000", "01111000", "00111100", "00011110")]
    assert [window.push(each) for each in slow_drift] == [None, 0.25, 0.5, 0.5]  # not 0.25, as neighbours have
    assert window.is_full
    again = MaskWindow(3)
    again.load_state_dict(window.state_dict())
    assert again.is_full
    assert again.push(slow_drift[-1]) == window.push(slow_drift[-1]) == 0.25
    window.clear()
    assert not window.is_full
    assert window.push(slow_drift[0]) is None

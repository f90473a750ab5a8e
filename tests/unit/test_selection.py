"""Selection: exact counts, the tie rule, scopes, rates, every kind of number, and what is refused."""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune import ranking
from lightning_prune.errors import ConfigError, MaskMismatchError, SelectionError
from lightning_prune.masks import MaskSet
from lightning_prune.selection import select

INF = float("inf")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool]


def reference(scores: Mapping[str, Tensor], remove: int, within: MaskSet | None = None) -> dict[str, np.ndarray]:
    """Sort all entries stably, best first, earliest first among equals; keep all but the last ``remove`` candidates."""
    flat = np.concatenate([s.detach().to(torch.float64).numpy().reshape(-1) for s in scores.values()])
    kept = np.concatenate(
        [np.ones(s.numel(), bool) if within is None else within[n].numpy().reshape(-1) for n, s in scores.items()]
    )
    candidates = np.flatnonzero(kept)
    order = candidates[np.argsort(-flat[candidates], kind="stable")]
    mask = np.zeros(flat.size, bool)
    mask[order[: order.size - remove]] = True
    parts = np.split(mask, np.cumsum([s.numel() for s in scores.values()])[:-1])
    return {name: part.reshape(tuple(s.shape)) for (name, s), part in zip(scores.items(), parts, strict=True)}


def assert_same(masks: MaskSet, expected: Mapping[str, np.ndarray]) -> None:
    assert list(masks) == list(expected)
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask.numpy(), expected[name], err_msg=name)


def draw(
    seed: int, dtype: torch.dtype = torch.float32, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or {"a": (3, 5), "b": (7,), "c": (2, 3, 4), "d": ()}
    scale = 10.0 ** (seed % 3)
    return {
        n: (torch.randn(shape, generator=generator) * scale).clamp(-99, 99).to(dtype) for n, shape in shapes.items()
    }


# ------------------------------------------------------------------ against the stable sort


numbers = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, INF, -INF, 1e-45, -1e-45, 1e-30, 3e38, -3e38, 0.1, 0.10000001]
)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.lists(numbers, max_size=9), min_size=1, max_size=4),
    portion=st.fractions(0, 1),
    mask_seed=st.integers(0, 9),
    double=st.booleans(),
)
@example([[0.0, -1e-45, -1e-45]], Fraction(1, 2), 0, False)  # the highest scores that share upper bits with -0
@example([[0.0, -0.0, -5e-324, -5e-324, -1e-320]], Fraction(1, 2), 0, True)
def test_any_scores_give_the_stable_sorts_mask(
    values: list[list[float]], portion: Fraction, mask_seed: int, double: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    scores = {f"t{i}": torch.tensor(v, dtype=dtype) for i, v in enumerate(values)}
    generator = torch.Generator().manual_seed(mask_seed)
    keep = 1.1 if mask_seed == 0 else 0.6
    within = MaskSet({n: torch.rand(s.shape, generator=generator) < keep for n, s in scores.items()})
    remove = round(portion * within.kept)
    masks = select(scores, fraction=portion, within=within)
    assert masks.kept == within.kept - remove
    assert masks <= within
    assert_same(masks, reference(scores, remove, within))
    assert masks == select(scores, remove=remove, within=within)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_every_dtype_gives_the_stable_sorts_mask(dtype: torch.dtype, seed: int) -> None:
    scores = draw(seed, dtype)
    total = sum(s.numel() for s in scores.values())
    for remove in (0, 1, total // 3, total - 1, total):
        assert_same(select(scores, remove=remove), reference(scores, remove))


@pytest.mark.parametrize(
    "make",
    [
        lambda g: torch.randn(300_000, generator=g),
        lambda g: torch.randn(300_000, generator=g).abs(),
        lambda g: torch.randn(300_000, generator=g).half(),
        lambda g: 1 + torch.rand(300_000, generator=g) * 1e-5,  # all in one bucket of the upper bits
        lambda g: -1 - torch.rand(300_000, generator=g) * 1e-5,
        lambda g: 1 + torch.rand(300_000, generator=g, dtype=torch.float64) * 1e-9,
        lambda g: -torch.randn(300_000, generator=g).clamp(min=0),  # many zeros, all of them negative
        lambda g: torch.randint(0, 3, (300_000,), generator=g),
        lambda g: torch.randint(-(2**62), 2**62, (300_000,), generator=g),
        lambda g: torch.full((300_000,), -7.5),
    ],
)
def test_many_entries_in_any_distribution(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_PIECE", 50_003)  # several pieces, none a multiple of eight
    generator = torch.Generator().manual_seed(1)
    scores = {"a": make(generator), "b": make(generator)[:200_001].reshape(3, -1)}
    within = MaskSet({n: torch.rand(s.shape, generator=generator) < 0.7 for n, s in scores.items()})
    for remove in (1, 100_000, 340_000):
        if scores["a"].dtype == torch.int64 and scores["a"].abs().max() > 2**53:
            order = np.argsort(np.concatenate([s.numpy().reshape(-1) for s in scores.values()]), kind="stable")
            removed = np.ones(order.size, bool)
            removed[order[:remove]] = False
            assert (
                np.concatenate([m.numpy().reshape(-1) for m in select(scores, remove=remove).values()]) == removed
            ).all()
            continue
        assert_same(select(scores, remove=remove), reference(scores, remove))
        assert_same(select(scores, remove=remove, within=within), reference(scores, remove, within))


@pytest.mark.parametrize("arrange", ["channels_last", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("ties", [False, True])
def test_memory_layout_does_not_matter(arrange: str, ties: bool) -> None:
    base = torch.randn(6, 4, 5, 2, generator=torch.Generator().manual_seed(0))
    base = base.round() if ties else base
    score = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.permute(3, 1, 0, 2),
        "strided": base[:, ::2, 1:4],
        "expanded": base[:, :1].expand(6, 3, 5, 2),
    }[arrange]
    assert not score.is_contiguous()
    scores, plain = {"a": score, "b": base}, {"a": score.contiguous(), "b": base}
    within = select(plain, fraction=0.3)
    assert select(scores, fraction=0.3) == within
    moved = MaskSet({"a": torch.empty_like(scores["a"], dtype=torch.bool).copy_(within["a"]), "b": within["b"]})
    assert select(scores, fraction=0.4, within=within) == select(plain, fraction=0.4, within=within)
    assert select(plain, fraction=0.4, within=moved) == select(plain, fraction=0.4, within=within)
    assert_same(within, reference(plain, round(0.3 * sum(s.numel() for s in plain.values()))))


def test_a_single_score_may_have_any_stride() -> None:
    scores = {"a": torch.ones(1).as_strided((1,), (0,)), "b": torch.tensor([2.0, 0.5, 3.0])}
    assert scores["a"].stride() == (0,)
    assert_same(select(scores, remove=2), reference(scores, 2))


def test_equal_scores_leave_from_the_end() -> None:
    scores = {"b": torch.ones(2, 2), "a": torch.ones(3)}
    masks = select(scores, remove=4)
    assert masks["b"].tolist() == [[True, True], [True, False]]
    assert masks["a"].tolist() == [False, False, False]
    turned = select({"a": scores["a"], "b": scores["b"]}, remove=4)
    assert turned["a"].all()
    assert not turned["b"].any()


def test_zeros_of_either_sign_are_equal() -> None:
    scores = {"a": torch.tensor([0.0, -0.0, 0.0, -0.0, 1e-45, -1e-45])}
    assert select(scores, remove=3)["a"].tolist() == [True, True, False, False, True, False]


def test_infinities_are_ordinary_values() -> None:
    scores = {"a": torch.tensor([-INF, INF, 1.0, -INF, INF])}
    assert select(scores, remove=1)["a"].tolist() == [True, True, True, False, True]
    assert select(scores, remove=3)["a"].tolist() == [False, True, False, False, True]
    assert select(scores, remove=4)["a"].tolist() == [False, True, False, False, False]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), fraction=st.fractions(0, 1), decimals=st.integers(0, 2))
def test_what_leaves_is_never_above_what_stays(seed: int, fraction: Fraction, decimals: int) -> None:
    scores = {name: s.mul(3).round(decimals=decimals) for name, s in draw(seed).items()}
    masks = select(scores, fraction=fraction)
    kept = [float(s[masks[n]].min()) for n, s in scores.items() if masks[n].any()]
    pruned = [float(s[~masks[n]].max()) for n, s in scores.items() if not masks[n].all()]
    assert not kept or not pruned or max(pruned) <= min(kept)
    again = select(scores, fraction=fraction)
    assert again == masks
    assert again.digest() == masks.digest()


# ------------------------------------------------------------------ how many


@pytest.mark.parametrize(
    ("total", "fraction", "removed"),
    [
        (10, 0.2, 2),
        (10, 0.25, 2),  # 2.5: half to even
        (10, 0.35, 4),  # 3.5, though the float 0.35 lies below it
        (30, 0.15, 4),  # 4.5
        (50, 0.29, 14),  # 14.5; in floats 14.499999999999998
        (10, Fraction(1, 3), 3),
        (10, Decimal("0.25"), 2),
        (10, np.float32(0.35), 4),
        (10, np.float64(0.35), 4),
        (7, 1, 7),
        (7, 0, 0),
        (1, 0.5, 0),
        (3, 0.5, 2),
    ],
)
def test_a_fraction_is_rounded_exactly(total: int, fraction: Any, removed: int) -> None:
    scores = {"a": torch.arange(total).float()}
    assert total - select(scores, fraction=fraction).kept == removed
    kept = select(scores, density=fraction).kept
    assert kept == removed  # the same portion, kept instead of removed


def test_rounds_of_a_fraction_of_what_remains() -> None:
    scores = draw(0, shapes={"a": (100, 26), "b": (61,)})
    masks, expected = None, 2661
    for _ in range(12):
        before = masks
        masks = select(scores, fraction=0.2, within=masks)
        expected -= round(Fraction(expected, 5))
        assert masks.kept == expected
        assert before is None or masks <= before


def test_density_is_of_the_original_total_and_never_unprunes() -> None:
    scores = draw(1, shapes={"a": (60,), "b": (40,)})
    first = select(scores, density=0.5)
    second = select({n: -s for n, s in scores.items()}, density=0.2, within=first)
    assert second.kept == 20
    assert second <= first
    assert select(scores, density=0.7, within=first) == first


def test_scopes() -> None:
    scores = {"low": torch.arange(10).float(), "high": 100 + torch.arange(20).float()}
    glob = select(scores, fraction=0.3).kept_per_tensor()
    layer = select(scores, fraction=0.3, scope="layer").kept_per_tensor()
    assert glob == {"low": (1, 10), "high": (20, 20)}
    assert layer == {"low": (7, 10), "high": (14, 20)}
    assert select(scores, 0.3, scope="layer").kept_per_tensor() == {"low": (3, 10), "high": (6, 20)}
    within = select(scores, fraction=0.3)
    assert select(scores, 0.3, scope="layer", within=within).kept_per_tensor() == {"low": (1, 10), "high": (6, 20)}


def test_remove_takes_a_number_for_each_tensor() -> None:
    scores = draw(2, shapes={"a": (8,), "b": (8,), "c": (8,)})
    for scope in ("global", "layer"):
        masks = select(scores, remove={"b": 3, "_orig_mod.c": 8}, scope=scope)
        assert masks.kept_per_tensor() == {"a": (8, 8), "b": (5, 8), "c": (0, 8)}
    assert_same(MaskSet({"b": select(scores, remove={"b": 3})["b"]}), reference({"b": scores["b"]}, 3))
    assert select(scores, remove=np.int64(5)).kept == 19


def test_rates_of_their_own() -> None:
    scores = {"net.a": torch.arange(10.0), "net.b": torch.arange(20.0), "net.out": torch.arange(10.0) - 50}
    layer = select(scores, fraction=0.2, scope="layer", rates={"*.out": 0.1})
    assert layer.kept_per_tensor() == {"net.a": (8, 10), "net.b": (16, 20), "net.out": (9, 10)}
    glob = select(scores, fraction=0.2, rates={"net.out": 0.1})
    assert glob.kept_per_tensor() == {"net.a": (7, 10), "net.b": (17, 20), "net.out": (9, 10)}
    spared = select(scores, fraction=0.2, rates={"net.out": 0})
    assert spared["net.out"].all()
    assert spared.kept == 40 - 6


def test_tensors_of_one_pattern_compete_and_the_last_pattern_counts() -> None:
    scores = {"x.a": torch.arange(10.0), "x.b": torch.arange(10.0) + 100, "y": torch.arange(10.0)}
    rates = {"x": 0.5}
    assert select(scores, fraction=0.1, rates=rates).kept_per_tensor() == {
        "x.a": (0, 10),
        "x.b": (10, 10),
        "y": (9, 10),
    }
    rates = {"x": 0.5, "x.b": 0.3}
    assert select(scores, fraction=0.1, rates=rates).kept_per_tensor() == {"x.a": (5, 10), "x.b": (7, 10), "y": (9, 10)}
    rates = {"x.b": 0.3, "x": 0.5}
    assert select(scores, fraction=0.1, rates=rates).kept_per_tensor() == {
        "x.a": (0, 10),
        "x.b": (10, 10),
        "y": (9, 10),
    }


def test_density_and_rates_speak_of_different_tensors() -> None:
    scores = {"a": torch.arange(10.0), "b": torch.arange(10.0)}
    assert select(scores, density=0.2, rates={"b": 0}).kept_per_tensor() == {"a": (2, 10), "b": (10, 10)}
    assert select(scores, density=0.2, rates={"*": 0.5}).kept == 10


# ------------------------------------------------------------------ scores of many kinds


class Counting(Mapping[str, Tensor]):
    """Scores computed on access, that watch how many are alive at once."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes, self.reads = sizes, 0

    def __getitem__(self, name: str) -> Tensor:
        self.reads += 1
        return torch.arange(self.sizes[name]).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def test_scores_may_be_computed_on_access() -> None:
    lazy = Counting({"a": 100, "b": 50})
    masks = select(lazy, fraction=0.5)
    assert masks.kept == 75
    assert masks == select(dict(lazy), fraction=0.5)
    lazy.reads = 0
    select(lazy, remove=1)
    assert lazy.reads <= 4 * 2


def test_parameters_themselves_may_be_scores() -> None:
    module = torch.nn.Linear(4, 4)
    masks = select(dict(module.named_parameters()), density=0.5)
    assert masks.kept == 10
    assert not masks["weight"].requires_grad


def test_names_of_a_compiled_module_are_plain() -> None:
    assert list(select({"_orig_mod.a": torch.arange(4.0)}, 0.5, within=MaskSet({"a": torch.ones(4).bool()}))) == ["a"]


def test_half_and_single_precision_compete_by_value() -> None:
    scores = {
        "a": torch.tensor([1.0, 1.001]).half(),
        "b": torch.tensor([1.0005, 1.00001]),
        "c": torch.tensor([1.0]).bfloat16(),
    }
    assert_same(select(scores, remove=3), reference(scores, 3))
    scores["d"] = torch.tensor([1 + 1e-12], dtype=torch.float64)
    assert_same(select(scores, remove=3), reference(scores, 3))


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("portion", [-0.1, 1.1, 20, float("nan"), INF, "0.2", True, torch.tensor(0.2), [0.2], 1 + 0j])
@pytest.mark.parametrize("argument", ["density", "fraction", "rates"])
def test_what_is_no_portion_is_refused(argument: str, portion: Any) -> None:
    given = {"rates": {"a": portion}, "fraction": 0.1} if argument == "rates" else {argument: portion}
    with pytest.raises(ConfigError, match=rf"{argument}.*(must be a number in \[0, 1\]|lies outside \[0, 1\])"):
        select({"a": torch.arange(4.0)}, **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of density=, fraction= and remove=, got none"),
        ({"density": 0.5, "fraction": 0.5}, "got density, fraction"),
        ({"density": 0.5, "scope": "network"}, "scope='network' is unknown"),
        ({"density": 0.5, "counting": "openlth"}, "'openlth' is unknown; did you mean 'open_lth'"),
        ({"remove": 1.0}, r"remove must be a whole number, 0 or more, got 1\.0"),
        ({"remove": True}, "remove must be a whole number"),
        ({"remove": -1}, "remove must be a whole number"),
        ({"remove": {"a": -1}}, r"remove\['a'\] must be a whole number"),
        ({"remove": {"aa": 1}}, "remove: 'aa' has no scores; did you mean 'a'"),
        ({"remove": 1, "scope": "layer"}, "with scope='layer', remove= takes a mapping"),
        ({"remove": {"a": 1}, "rates": {"b": 0}}, "leave out rates="),
        ({"remove": 1, "counting": "hrank"}, "remove= is an exact count; leave out counting='hrank'"),
        ({"fraction": 0.2, "rates": {"c*": 0.1}}, r"rates: 'c\*' matches no parameter"),
        ({"fraction": 0.2, "counting": "renda"}, "'renda' starts from density=, got a fraction for 'a'"),
        ({"density": 0.2, "counting": "hrank"}, "'hrank' starts from fraction=, got a density"),
        ({"density": 0.2, "counting": "renda", "rates": {"b": 0.1}}, "rates of their own other than 0 are fractions"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select({"a": torch.arange(4.0), "b": torch.arange(4.0)}, **arguments)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "at least one"),
        ([torch.ones(2)], "must be a mapping"),
        ({"a": [1.0]}, "'a' must be a tensor, got list"),
        ({3: torch.ones(2)}, "named by strings"),
        ({"a": torch.ones(2), "_orig_mod.a": torch.ones(2)}, "each parameter once"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "'a' are complex"),
        ({"a": torch.ones(2), "b": torch.ones(2).int()}, "'b' are torch.int32, others are floats"),
    ],
)
def test_what_is_no_score_is_refused(scores: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select(scores, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("remove", [0, 2])
def test_nan_is_named_with_its_tensor_and_number(dtype: torch.dtype, sign: float, remove: int) -> None:
    nan = torch.tensor(float("nan")).copysign(torch.tensor(sign))
    scores = draw(0, dtype)
    scores["b"][[1, 4]] = nan.to(dtype)
    with pytest.raises(SelectionError, match="scores of 'b' hold 2 NaN among 7 entries"):
        select(scores, remove=remove)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1])
def test_every_bit_pattern_of_nan_is_seen(bits: int) -> None:
    scores = {"a": torch.tensor([bits, 0, 1], dtype=torch.int32).view(torch.float32)}
    assert scores["a"].isnan().sum() == 1
    with pytest.raises(SelectionError, match="hold 1 NaN"):
        select(scores, 0.5)


def test_nan_where_nothing_is_left_to_select_does_not_matter() -> None:
    scores = {"a": torch.tensor([1.0, float("nan"), 2.0])}
    within = MaskSet({"a": torch.tensor([True, False, True])})
    assert select(scores, remove=1, within=within)["a"].tolist() == [False, False, True]


def test_more_than_there_is_cannot_leave() -> None:
    scores = {"a": torch.arange(4.0), "b": torch.arange(4.0)}
    with pytest.raises(SelectionError, match="remove=9 asks for more than the 8 entries left in 2 tensors"):
        select(scores, remove=9)
    within = select(scores, remove={"b": 3})
    with pytest.raises(SelectionError, match="remove=2 asks for more than the 1 entries left in 'b'"):
        select(scores, remove={"b": 2}, within=within)


def test_masks_of_another_network_are_refused() -> None:
    scores = {"a": torch.arange(4.0)}
    with pytest.raises(MaskMismatchError, match="only one of them has 'a', 'b'"):
        select(scores, 0.5, within=MaskSet({"b": torch.ones(4).bool()}))
    with pytest.raises(MaskMismatchError, match=r"within\['a'\] has shape \(2, 2\), its scores \(4,\)"):
        select(scores, 0.5, within=MaskSet({"a": torch.ones(2, 2).bool()}))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_gpu_selects_the_same(dtype: torch.dtype) -> None:
    scores = draw(4, dtype, {"a": (300, 500), "b": (1001,)})
    scores["b"][:500] = 0
    there = {name: score.to("cuda") for name, score in scores.items()}
    within = select(scores, fraction=0.3)
    for arguments in ({"fraction": 0.2}, {"density": 0.1, "scope": "layer"}, {"remove": 800}):
        masks = select(there, within=within.to("cuda"), **arguments)
        assert masks["a"].is_cuda
        assert masks == select(scores, within=within, **arguments)

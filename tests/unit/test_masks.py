"""Mask sets: counts, algebra, application, the same bits on disk and in checkpoints, and files that lie."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune.errors import FileFormatError, MaskMismatchError, SelectionError
from lightning_prune.files import pack_bits, write_tensors
from lightning_prune.masks import MaskSet, canonical_name


def masks_for(module: nn.Module, seed: int = 0, keep: float = 0.5) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    return MaskSet({name: torch.rand(p.shape, generator=generator) < keep for name, p in weights.items()})


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(7, 3))


def filled(seed: int = 0) -> MaskSet:
    masks = masks_for(network(), seed)
    return MaskSet(masks, {"3.weight": torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))})


# ------------------------------------------------------------------ a mapping with counts


def test_counts_name_their_denominator() -> None:
    masks = MaskSet({"a": torch.tensor([[True, False], [False, False]]), "b": torch.tensor([True] * 6)})
    assert (masks.kept, masks.total) == (7, 10)
    assert masks.density == 0.7
    assert masks.sparsity == 0.3
    assert masks.kept_per_tensor() == {"a": (1, 4), "b": (6, 6)}
    assert list(masks) == ["a", "b"]
    assert len(masks) == 2
    assert repr(masks) == "MaskSet(2 tensors, 7 of 10 entries kept)"


def test_an_empty_set_is_dense() -> None:
    assert (MaskSet({}).density, MaskSet({}).sparsity, MaskSet({}).total) == (1.0, 0.0, 0)


def test_dense_like_keeps_all() -> None:
    masks = MaskSet.dense_like(dict(network().named_parameters()))
    assert masks.kept == masks.total == sum(p.numel() for p in network().parameters())
    assert not any(mask.requires_grad for mask in masks.values())


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({1: torch.ones(2, dtype=torch.bool)}, "named by strings .* got 1"),
        ({"a": torch.ones(2)}, "mask of 'a' must be a boolean tensor .* got torch.float32"),
        ({"a": [True]}, "mask of 'a' must be a boolean tensor .* got list"),
        ({"a": torch.ones(1).bool(), "_orig_mod.a": torch.ones(1).bool()}, "two masks for 'a'"),
    ],
)
def test_what_is_no_mask_is_refused(masks: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        MaskSet(masks)


@pytest.mark.parametrize(
    ("fills", "message"),
    [
        ({"weigth": torch.ones(2)}, "fill for 'weigth' but no mask; did you mean 'weight'"),
        ({"weight": torch.ones(3)}, r"floating tensor of its mask's shape \(2,\), got \(3,\)"),
        ({"weight": torch.ones(2, dtype=torch.int64)}, "floating tensor"),
        ({"weight": 1.0}, "got float"),
    ],
)
def test_what_is_no_fill_is_refused(fills: Any, message: str) -> None:
    with pytest.raises(MaskMismatchError, match=message):
        MaskSet({"weight": torch.ones(2, dtype=torch.bool)}, fills)


# ------------------------------------------------------------------ application


def test_apply_sets_exact_zeros_and_nothing_else() -> None:
    module = network()
    with torch.no_grad():
        module[0].weight.view(-1)[0] = float("inf")  # a product would leave NaN here
        module[0].weight.view(-1)[1] = -1.0  # and -0 here
    masks = masks_for(module)
    masks["0.weight"].view(-1)[:2] = False
    before = copy.deepcopy(module.state_dict())
    parameters = list(module.parameters())
    masks.apply_(module)
    assert list(map(id, module.parameters())) == list(map(id, parameters))
    for name, after in module.state_dict().items():
        expected = before[name].clone()
        if name in masks:
            expected[~masks[name]] = 0.0
            assert not torch.signbit(after[~masks[name]]).any()
        assert torch.equal(after, expected), name


def test_apply_uses_the_fill_where_there_is_one() -> None:
    module, masks = network(), filled()
    before = module[3].weight.detach().clone()
    masks.apply_(module)
    fill = masks.fills["3.weight"]
    assert torch.equal(module[3].weight.detach(), torch.where(masks["3.weight"], before, fill))
    assert (module[3].weight[~masks["3.weight"]] != 0).all()
    assert (module[0].weight[~masks["0.weight"]] == 0).all()


def test_apply_takes_a_fill_in_place_of_an_infinity() -> None:
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[float("nan"), 1.0]]))
    MaskSet({"weight": torch.tensor([[False, True]])}, {"weight": torch.tensor([[3.0, 9.0]])}).apply_(module)
    assert module.weight.tolist() == [[3.0, 1.0]]


def test_masks_of_a_compiled_module_fit_the_plain_one_and_back() -> None:
    plain = network()
    wrapped = nn.ModuleDict({"net": torch.compile(plain)})
    names = [name for name, _ in wrapped.named_parameters()]
    assert any("_orig_mod" in name for name in names)
    masks = masks_for(wrapped)
    assert list(masks) == ["net.0.weight", "net.3.weight"]
    assert masks["net._orig_mod.0.weight"] is masks["net.0.weight"]
    masks.apply_(wrapped)
    assert (plain[0].weight == 0).sum() == (~masks["net.0.weight"]).sum() > 0
    other = nn.ModuleDict({"net": network()})
    masks.apply_(other)
    assert (other["net"][3].weight == 0).sum() == (~masks["net.3.weight"]).sum() > 0


def test_canonical_names_lose_only_whole_parts() -> None:
    assert canonical_name("_orig_mod.a._orig_mod.b") == "a.b"
    assert canonical_name("a.my_orig_mod.b") == "a.my_orig_mod.b"


def test_masks_apply_to_a_shared_parameter_under_each_of_its_names() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    MaskSet({"1.weight": torch.eye(3, dtype=torch.bool)}).apply_(module)
    assert torch.count_nonzero(module[0].weight) == 3


def test_masks_of_another_network_are_refused_before_anything_is_written() -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MaskMismatchError, match=r"no parameter '3.weigth'; did you mean '3.weight'"):
        MaskSet({"0.weight": torch.zeros(5, 3, 3, 3).bool(), "3.weigth": torch.ones(3, 7).bool()}).apply_(module)
    with pytest.raises(MaskMismatchError, match=r"'3.weight' of Sequential has shape \(3, 7\), its mask \(7, 3\)"):
        MaskSet({"0.weight": torch.zeros(5, 3, 3, 3).bool(), "3.weight": torch.ones(7, 3).bool()}).apply_(module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


# ------------------------------------------------------------------ algebra


def test_intersection_and_nesting() -> None:
    a, b = masks_for(network(), 0, 0.7), masks_for(network(), 1, 0.7)
    both = a & b
    assert all(torch.equal(both[name], a[name] & b[name]) for name in a)
    assert both <= a
    assert both <= b
    assert not a <= b
    assert a <= a
    assert both.kept < min(a.kept, b.kept)


def test_an_entry_pruned_by_both_takes_the_left_fill() -> None:
    left = MaskSet({"w": torch.tensor([True, False, False, True])}, {"w": torch.tensor([9.0, 1.0, 2.0, 9.0])})
    right = MaskSet({"w": torch.tensor([False, False, True, True])}, {"w": torch.tensor([5.0, 6.0, 9.0, 9.0])})
    bare = MaskSet({"w": right["w"]})
    assert (left & right).fills["w"].tolist() == [5.0, 1.0, 2.0, 0.0]
    assert (right & left).fills["w"].tolist() == [5.0, 6.0, 2.0, 0.0]
    assert (left & bare).fills["w"].tolist() == [0.0, 1.0, 2.0, 0.0]
    assert (bare & left).fills["w"].tolist() == [0.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("operation", [lambda a, b: a & b, lambda a, b: a <= b])
def test_masks_of_different_networks_do_not_mix(operation: Any) -> None:
    one = MaskSet({"a": torch.ones(2).bool()})
    with pytest.raises(MaskMismatchError, match="only one of them has 'a', 'b'"):
        operation(one, MaskSet({"b": torch.ones(2).bool()}))
    with pytest.raises(MaskMismatchError, match=r"'a' has shape \(2,\) in one and \(3,\) in the other"):
        operation(one, MaskSet({"a": torch.ones(3).bool()}))


def test_equality_ignores_order_and_what_a_fill_holds_at_kept_entries() -> None:
    masks = filled()
    turned = MaskSet(dict(reversed(list(masks.items()))), masks.fills)
    assert list(turned) != list(masks)
    assert turned == masks
    assert turned.digest() == masks.digest()
    noisy = {name: torch.where(masks[name], torch.tensor(7.0), fill) for name, fill in masks.fills.items()}
    assert MaskSet(masks, noisy) == masks
    assert MaskSet(masks, noisy).digest() == masks.digest()
    assert masks != dict(masks)


@pytest.mark.parametrize("change", ["bit", "name", "shape", "fill", "no fill"])
def test_every_difference_changes_equality_and_digest(change: str) -> None:
    masks = filled()
    other, fills = {name: mask.clone() for name, mask in masks.items()}, dict(masks.fills)
    if change == "bit":
        other["0.weight"].view(-1)[-1] ^= True
    elif change == "name":
        other["1.weight"] = other.pop("0.weight")
    elif change == "shape":
        other["0.weight"] = other["0.weight"].reshape(-1)
    elif change == "fill":
        fills["3.weight"] = fills["3.weight"] + 1
    else:
        fills = {}
    assert MaskSet(other, fills) != masks
    assert MaskSet(other, fills).digest() != masks.digest()


def test_the_digest_is_the_same_in_every_version() -> None:
    masks = MaskSet({"a": torch.tensor([[True, False, True]])})
    assert masks.digest() == "6830a9aa2c246b73bac233d9bbb5be72659fa8cb62b965741bcc403acb389415"


# ------------------------------------------------------------------ on disk


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_files_and_states_give_back_the_same_masks(tmp_path: Path, layout: torch.memory_format) -> None:
    masks = filled()
    masks = MaskSet({n: m.to(memory_format=layout) if m.dim() == 4 else m for n, m in masks.items()}, masks.fills)
    masks.save(tmp_path / "masks.safetensors")
    torch.save({"callback": masks.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = MaskSet.load(tmp_path / "masks.safetensors")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["callback"]
    for other in (loaded, MaskSet.from_state_dict(state)):
        assert other == masks
        assert list(other) == list(masks)
        assert other.digest() == masks.digest()
        assert torch.equal(other.fills["3.weight"], masks.fills["3.weight"])


@given(shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=4), seed=st.integers(0, 99))
def test_any_shapes_survive_a_state(shapes: list[list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = MaskSet({f"t{i}": torch.rand(shape, generator=generator) < 0.5 for i, shape in enumerate(shapes)})
    assert MaskSet.from_state_dict(masks.state_dict()) == masks


def test_a_state_takes_one_bit_an_entry() -> None:
    masks = MaskSet({"w": torch.rand(1000, 80) < 0.5})
    stored = sum(t.numel() * t.element_size() for t in masks.state_dict()["tensors"].values())
    assert stored == 10_000


def header(**changes: Any) -> dict[str, Any]:
    return {"shapes": {"w": [2, 3]}, "fills": {}} | changes


BITS = {"mask:w": pack_bits(torch.ones(2, 3).bool())}
LIES = {
    "negative shape": (header(shapes={"w": [-2, -3]}), BITS),
    "gigantic shape": (header(shapes={"w": [2**31, 2**31]}), BITS),
    "overflowing shape": (header(shapes={"w": [2**63, 0]}), {"mask:w": torch.zeros(0, dtype=torch.uint8)}),
    "empty but impossible shape": (header(shapes={"w": [2**40, 2**40, 0]}), {"mask:w": torch.zeros(0).byte()}),
    "boolean shape": (header(shapes={"w": [True, 6]}), BITS),
    "shape of floats": (header(shapes={"w": [2.0, 3.0]}), BITS),
    "shape of text": (header(shapes={"w": "23"}), BITS),
    "other shape": (header(shapes={"w": [3, 3]}), BITS),
    "missing tensor": (header(shapes={"w": [2, 3], "v": [1]}), BITS),
    "extra tensor": (header(), BITS | {"mask:v": BITS["mask:w"]}),
    "wrong dtype": (header(), {"mask:w": torch.ones(1)}),
    "wrong rank": (header(), {"mask:w": torch.ones(1, 1, dtype=torch.uint8)}),
    "no header": (None, BITS),
    "header of a list": ([], BITS),
    "shapes of a list": (header(shapes=["w"]), BITS),
    "fill without mask": (header(fills={"v": "torch.float32"}), BITS | {"fill:v": torch.ones(2, 3)}),
    "fill of another shape": (header(fills={"w": "torch.float32"}), BITS | {"fill:w": torch.ones(3)}),
    "fill of integers": (header(fills={"w": "torch.int64"}), BITS | {"fill:w": torch.ones(2, 3, dtype=torch.int64)}),
}


def test_an_honest_file_loads(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m", BITS, kind="masks", version=1, header=header())
    assert MaskSet.load(tmp_path / "m") == MaskSet({"w": torch.ones(2, 3).bool()})


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_file_gives_one_clear_error(tmp_path: Path, lie: str) -> None:
    content, tensors = LIES[lie]
    write_tensors(tmp_path / "m", tensors, kind="masks", version=1, header=content)
    with pytest.raises(FileFormatError, match=str(tmp_path / "m")):
        MaskSet.load(tmp_path / "m")
    with pytest.raises(FileFormatError, match="the masks' state"):
        MaskSet.from_state_dict({"version": 1, "header": content, "tensors": tensors})


@pytest.mark.parametrize("state", [None, [], {}, {"tensors": 3}, {"version": "1", "tensors": {}}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(FileFormatError, match="masks"):
        MaskSet.from_state_dict(state)


def test_a_state_whose_tensors_are_none_is_refused() -> None:
    state = {"version": 1, "header": header(), "tensors": {"mask:w": "bits"}}
    with pytest.raises(FileFormatError, match="'w' has no packed mask, got str"):
        MaskSet.from_state_dict(state)


def test_a_later_version_asks_for_an_upgrade(tmp_path: Path) -> None:
    state: dict[str, Any] = filled().state_dict()
    with pytest.raises(FileFormatError, match="version 2, this library reads up to 1; upgrade"):
        MaskSet.from_state_dict(state | {"version": 2})
    write_tensors(tmp_path / "m", BITS, kind="masks", version=2, header=header())
    with pytest.raises(FileFormatError, match="version 2"):
        MaskSet.load(tmp_path / "m")


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(FileFormatError, match="does not exist"):
        MaskSet.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(FileFormatError, match="not a lightning_prune masks file"):
        MaskSet.load(path)
    write_tensors(path, BITS, kind="ticket", version=1, header=header())
    with pytest.raises(FileFormatError, match="ticket"):
        MaskSet.load(path)
    filled().save(path)
    whole = path.read_bytes()
    for size in (0, 4, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match=str(path)):
            MaskSet.load(path)


def test_a_state_is_plain() -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(inner) for key, inner in value.items())
        return isinstance(value, (str, int, Tensor)) or (isinstance(value, list) and all(map(plain, value)))

    state = filled().state_dict()
    assert plain(state)
    assert json.loads(json.dumps(state["header"])) == state["header"]


@pytest.mark.gpu
def test_masks_on_a_gpu_are_the_same_masks(tmp_path: Path) -> None:
    masks, module = filled(), network()
    moved, there = masks.to("cuda"), copy.deepcopy(module).to("cuda")
    assert moved == masks
    assert moved.digest() == masks.digest()
    masks.apply_(module)
    masks.apply_(there)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there.parameters(), module.parameters(), strict=True))
    moved.save(tmp_path / "m")
    assert MaskSet.load(tmp_path / "m") == masks

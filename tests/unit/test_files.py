import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightning_prune.errors import FileFormatError
from lightning_prune.files import (
    atomic_write,
    pack_bits,
    read_json,
    read_tensors,
    unpack_bits,
    write_json,
    write_tensors,
)


@given(st.lists(st.booleans(), max_size=70))
def test_bits_are_numpys(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.tolist() == np.packbits(np.array(bits, dtype=bool)).tolist()
    assert unpack_bits(packed, mask.shape).tolist() == bits


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5), (0, 4), (1, 1, 1, 17)])
def test_bits_of_every_shape(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), shape), mask)


def test_bits_of_a_view() -> None:
    mask = torch.rand(6, 5) > 0.5
    assert torch.equal(unpack_bits(pack_bits(mask.t()), (5, 6)), mask.t())


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {
        "float": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(7),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "nan": torch.tensor([float("nan"), float("inf")]),
        "transposed": torch.randn(3, 4).t(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    header = {"text": "ä", "list": [1, 2.5, None], "nested": {"a": True}}
    write_tensors(tmp_path / "x", tensors, kind="test", version=1, header=header)
    loaded, read = read_tensors(tmp_path / "x", kind="test", version=1)
    assert read == header
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].nan_to_num(1.5), tensor.detach().nan_to_num(1.5)), name


def test_any_safetensors_reader_reads_them(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    write_tensors(tmp_path / "x", {"w": weight}, kind="test", version=1, header={})
    assert torch.equal(load_file(tmp_path / "x")["w"], weight)


def test_one_tensor_under_two_names_is_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(500, 20)
    write_tensors(tmp_path / "one", {"a": weight}, kind="test", version=1, header={})
    write_tensors(tmp_path / "tied", {"a": weight, "b": weight}, kind="test", version=1, header={})
    write_tensors(tmp_path / "two", {"a": weight, "b": weight.clone()}, kind="test", version=1, header={})
    sizes = {name: (tmp_path / name).stat().st_size for name in ("one", "tied", "two")}
    assert sizes["tied"] - sizes["one"] < 100
    assert sizes["two"] - sizes["one"] >= 4 * weight.numel()
    loaded, _ = read_tensors(tmp_path / "tied", kind="test", version=1)
    assert loaded["a"] is loaded["b"]
    assert torch.equal(loaded["a"], weight)


def test_views_of_one_storage_keep_their_own_values(tmp_path: Path) -> None:
    whole = torch.randn(4, 4)
    tensors = {"whole": whole, "row": whole[1], "transposed": whole.t(), "flat": whole.view(-1)}
    write_tensors(tmp_path / "x", tensors, kind="test", version=1, header={})
    loaded, _ = read_tensors(tmp_path / "x", kind="test", version=1)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["flat"].shape == (16,)


def test_the_file_is_the_same_each_time(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    for name in ("x", "y"):
        write_tensors(tmp_path / name, tensors, kind="test", version=1, header={"k": 1})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_json_round_trip_and_strictness(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, "ä", None, True]}
    write_json(tmp_path / "deep" / "x.json", content)
    assert read_json(tmp_path / "deep" / "x.json", "a test") == content
    assert json.loads((tmp_path / "deep" / "x.json").read_text(encoding="utf-8")) == content
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "y.json", float("nan"))
    assert not (tmp_path / "y.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX")
def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_json(tmp_path / "ours", 1)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")}
    assert len(modes) == 1


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_data_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "data")
        fsync(handle)

    def watched_replace(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_json(tmp_path / "x", 1)
    assert order == ["data", "rename", "folder"]


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "x", {"format": "pt"})
    with pytest.raises(FileFormatError, match=r"x is not a lightning_prune test file: it is foreign"):
        read_tensors(tmp_path / "x", kind="test", version=1)


def test_a_file_of_another_kind_or_a_later_version_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {}, kind="ticket", version=3, header={})
    with pytest.raises(FileFormatError, match=r"is not a lightning_prune masks file: it is a 'ticket' file"):
        read_tensors(tmp_path / "x", kind="masks", version=3)
    with pytest.raises(FileFormatError, match=r"layout version 3, this library reads 1 to 2; upgrade lightning-prune"):
        read_tensors(tmp_path / "x", kind="ticket", version=2)

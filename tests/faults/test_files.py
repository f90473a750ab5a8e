"""Full disks, damaged files, hostile headers: one clear error, earlier files intact, bounded memory."""

import errno
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune import files
from lightning_prune.checkpoint import Ticket, load_ticket, save_ticket
from lightning_prune.errors import ConfigError, FileFormatError, PruneError, WriteError
from lightning_prune.files import FORMAT_KEY, pack_bits, read_json, read_tensors, unpack_bits, write_json, write_tensors
from lightning_prune.masks import MaskSet
from lightning_prune.record import Round, RunRecord


def _ticket(value: float) -> Ticket:
    return Ticket(MaskSet({"w": torch.tensor([True, False])}), {"w": torch.tensor([value, 0.0])}, {"round": 1})


def _record(digest: str) -> RunRecord:
    record = RunRecord({"P": {}}, seed=0, environment={})
    record.add_round(Round(round=0, step=1, epoch=1, steps=1, kept=2, total=2, digest=digest))
    return record


WRITERS: dict[str, Callable[[Path, int], Any]] = {
    "json": lambda folder, i: write_json(folder / "x.json", {"i": i}),
    "ticket": lambda folder, i: save_ticket(folder / "x.safetensors", _ticket(float(i))),
    "masks": lambda folder, i: MaskSet({"w": torch.tensor([True, bool(i)])}).save(folder / "x.masks"),
    "record": lambda folder, i: _record(str(i)).write(folder),
}


def _full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("fails", ["write", "sync", "rename"])
def test_a_full_disk_leaves_the_earlier_file(
    writer: str, fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[writer](tmp_path, 0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        if fails == "write":
            patch.setattr(Path, "write_bytes", _full_disk)
            patch.setattr(Path, "write_text", _full_disk)
            patch.setattr("lightning_prune.record.run.write_csv", _full_disk)
        else:
            patch.setattr(os, {"sync": "fsync", "rename": "replace"}[fails], _full_disk)
        with pytest.raises(WriteError, match=r"could not write .*: No space left on device; .*unchanged") as caught:
            WRITERS[writer](tmp_path, 1)
    assert isinstance(caught.value, PruneError)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    WRITERS[writer](tmp_path, 1)  # with space again it writes, and what it writes differs
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after != before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device(tmp_path: Path) -> None:
    def write() -> None:
        with files.atomic_write(tmp_path / "x") as temporary:
            temporary.unlink()
            temporary.symlink_to("/dev/full")
            temporary.write_bytes(b"1" * 100_000)

    with pytest.raises(WriteError, match="No space left on device"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_middle_leaves_the_earlier_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x", "earlier")

    def write() -> None:
        with files.atomic_write(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert read_json(tmp_path / "x", "a test") == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"could not write .*x: Is a directory"):
        write_json(tmp_path / "x", 1)
    with pytest.raises(WriteError, match=r"could not write .*below"):
        write_json(tmp_path / "file" / "below", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "x"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1', b"[NaN]", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b"[1] 2"]
)
def test_damaged_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"x is not a test: it is not valid JSON"):
        read_json(tmp_path / "x", "a test")


def test_missing_json_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"x does not exist; expected a test"):
        read_json(tmp_path / "x", "a test")
    with pytest.raises(FileFormatError, match=r"cannot be read: Is a directory; expected a test"):
        read_json(tmp_path, "a test")
    with pytest.raises(FileFormatError, match=r"does not exist or is no file; expected a lightning_prune ticket file"):
        load_ticket(tmp_path)


def test_every_damaged_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_ticket(path, _ticket(1.0))
    whole = path.read_bytes()
    assert load_ticket(path).weights["w"].tolist() == [1.0, 0.0]
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(FileFormatError):
            load_ticket(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            load_ticket(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FileFormatError):
        load_ticket(path)


def _hostile(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _ours(content: Any) -> dict[str, Any]:
    return {"__metadata__": {FORMAT_KEY: content if isinstance(content, str) else json.dumps(content)}}


GOOD = {"kind": "ticket", "version": 1, "header": {}, "same_as": {}, "checksum": "0"}
HOSTILE = {
    "length beyond the file": (b"{}", b"", 2**63),
    "length of all memory": (b"{}", b"", 2**40),
    "offsets beyond the file": ({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, b""),
    "shape that overflows": ({"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}}, b""),
    "negative offsets": ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234"),
    "overlap": (
        {
            "v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        b"1234",
    ),
    "unknown type": ({"w": {"dtype": "EVIL", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "no JSON": (b"\x80\x04cos\nsystem\n", b""),
    "metadata no JSON": (_ours("{"), b""),
    "metadata deeply nested": (_ours("[" * 100_000), b""),
    "metadata a list": (_ours([1]), b""),
    "metadata NaN": (_ours("NaN"), b""),
    "no checksum": (_ours({"kind": "ticket", "version": 1, "header": {}, "same_as": {}}), b""),
    "wrong checksum": (_ours(GOOD), b""),
    "version true": (_ours(GOOD | {"version": True}), b""),
    "version 0": (_ours(GOOD | {"version": 0}), b""),
    "version text": (_ours(GOOD | {"version": "1" * 10_000}), b""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case: str, tmp_path: Path) -> None:
    _hostile(tmp_path / "x", *HOSTILE[case])
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError) as caught:
            load_ticket(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def _with_checksum(path: Path, tensors: dict[str, torch.Tensor], **parts: Any) -> None:
    """A file that only someone who knows the checksum can make."""
    content = {"kind": "ticket", "version": 1, "header": {}, "same_as": {}} | parts
    content["checksum"] = files._checksum(tensors, content)
    path.write_bytes(files._serialize(tensors, {FORMAT_KEY: json.dumps(content)}))


PACKED = {"mask/mask:w": pack_bits(torch.tensor([True] * 8))}


@pytest.mark.parametrize(
    "shape",
    [[2**40], [9], [-8], [8.0], [True, 8], ["8"], [0, 2**62, 2**62], [1] * 100 + [8], None, "8", {}, [10**400], [[8]]],
    ids=lambda shape: f"{shape!r:.20}",
)
def test_hostile_mask_shapes(shape: Any, tmp_path: Path) -> None:
    masks = {"version": 1, "header": {"shapes": {"w": shape}, "fills": {}}}
    _with_checksum(tmp_path / "x", PACKED, header={"info": {}, "masks": masks, "digest": "0"})
    with pytest.raises(FileFormatError, match="x"):
        load_ticket(tmp_path / "x")
    for packed in (PACKED["mask/mask:w"], torch.zeros(0, dtype=torch.uint8)):
        with pytest.raises(FileFormatError):
            unpack_bits(packed, shape)


@pytest.mark.parametrize(
    "parts",
    [
        {"header": None},
        {"header": {"info": {}}},
        {"header": {"info": [], "masks": {}}},
        {"header": {"info": {}, "masks": {"version": 1, "header": {"shapes": {}, "fills": {}}}, "digest": "0"}},
        {"header": {"info": {}, "masks": {"version": 1, "header": {"shapes": {"w": [8]}, "fills": {}}}, "digest": "0"}},
        {"header": {"info": {}, "masks": {"version": 9, "header": {}}}},
        {"same_as": {"a": "nothing"}},
        {"same_as": [1]},
        {"same_as": {"a": ["list"]}},
    ],
    ids=lambda parts: f"{parts!r:.60}",
)
def test_hostile_tickets_with_a_right_checksum(parts: dict[str, Any], tmp_path: Path) -> None:
    _with_checksum(tmp_path / "x", PACKED, **parts)
    with pytest.raises(FileFormatError, match="x"):
        load_ticket(tmp_path / "x")


def test_a_version_that_is_no_number_with_a_right_checksum(tmp_path: Path) -> None:
    _with_checksum(tmp_path / "x", PACKED, version=True)
    with pytest.raises(FileFormatError, match="layout version True"):
        load_ticket(tmp_path / "x")


def test_a_header_longer_than_any_of_ours_is_not_parsed(tmp_path: Path) -> None:
    _hostile(tmp_path / "x", b"{}" + b" " * (2 * files.MAX_HEADER_BYTES))
    with pytest.raises(FileFormatError, match=r"its header claims \d+ bytes"):
        load_ticket(tmp_path / "x")


def test_a_tensor_that_the_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"safetensors cannot hold .*complex128"):
        write_tensors(tmp_path / "x", {"w": torch.zeros(2, dtype=torch.complex128)}, kind="t", version=1, header={})
    with pytest.raises(ConfigError, match=r"header of .* takes \d+ bytes"):
        write_tensors(tmp_path / "x", {}, kind="t", version=1, header="x" * (files.MAX_HEADER_BYTES + 1))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"w": torch.zeros(1), "bomb": Bomb()}, tmp_path / "x")
    with pytest.raises(FileFormatError, match="x"):
        read_tensors(tmp_path / "x", kind="ticket", version=1)
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "x", weights_only=False)  # the bomb works
    assert (tmp_path / "exploded").exists()

"""Reading and writing files so that nothing is half-written and nothing read can run code."""

import hashlib
import json
import math
import os
import pickle
import secrets
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as _serialize
from torch import Tensor

from lightning_prune.errors import ConfigError, FileFormatError, WriteError

FORMAT_KEY = "lightning_prune"
MAX_HEADER_BYTES = 16 * 2**20


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; rename it to ``path`` when the block ends without an error.

    The data is on disk before the rename and the rename before the return, so a reader sees the earlier file or the
    whole new one, also after a crash. On an error the temporary file is removed and the earlier file stays as it was.
    A process killed in between leaves a file ``.<name>.<random>.tmp`` behind, which nothing reads.

    Raises:
        WriteError: The system could not write: full disk, no permission, not a folder.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch(exist_ok=False)  # with the permissions that any new file of this user gets
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        with suppress(OSError):  # some network file systems cannot do this for a folder
            _sync(path.parent)
    except OSError as error:
        raise WriteError(
            f"could not write {path}: {error.strerror or error}; what was there before is unchanged. "
            "Check free space and permissions."
        ) from error


def _sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on disk before returning."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders and needs none opened
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically. NaN and infinities are refused: they are not JSON."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path, what: str) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        what: What the file should be, for the message ("a run record").

    Raises:
        FileFormatError: The file is missing, cannot be read, or is not JSON.
    """
    path = Path(path)
    try:
        return _parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} does not exist; expected {what}.") from error
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror or error}; expected {what}.") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not {what}: it is not valid JSON ({error}).") from error


def _parse_json(text: str) -> Any:
    """Parse strict JSON: Python also reads NaN and Infinity, which other readers do not."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, version: int, header: Any) -> None:
    """Write tensors and a JSON header as one safetensors file, atomically.

    Names of the same tensor (tied weights) share one copy in the file. A checksum over everything goes with it.

    Args:
        path: The file.
        tensors: Tensors by name; written dense and contiguous.
        kind: What the file is (``"ticket"``, ``"masks"``, ``"compact"``); checked on reading.
        version: Version of this kind's layout, at least 1.
        header: JSON content that goes with the tensors.

    Raises:
        ConfigError: A tensor that the format cannot hold, or a header that is no JSON content.
        WriteError: The system could not write.
    """
    distinct, same_as = _store_once(tensors)
    content = {"kind": kind, "version": version, "header": header, "same_as": same_as}
    try:
        content = json.loads(json.dumps(content, allow_nan=False))  # as it will be read, so that checksums agree
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the header (info) of {path} is no JSON content: {error}.") from error
    content["checksum"] = _checksum(distinct, content)
    text = json.dumps(content)
    if len(text) > MAX_HEADER_BYTES:
        raise ConfigError(f"the header of {path} takes {len(text)} bytes, more than the {MAX_HEADER_BYTES} allowed.")
    try:
        data = _serialize(distinct, {FORMAT_KEY: text})
    except (KeyError, ValueError) as error:
        dtypes = sorted({str(t.dtype) for t in distinct.values()})
        raise ConfigError(f"{path}: safetensors cannot hold one of these tensors ({', '.join(dtypes)}).") from error
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: str | Path, *, kind: str, version: int) -> tuple[dict[str, Tensor], Any]:
    """Read a file that :func:`write_tensors` wrote: the tensors (on the CPU) and the header.

    Nothing in the file can run code or ask for more memory than a small multiple of the file's own size.

    Raises:
        FileFormatError: The file is missing, damaged, of another kind, or of a later version.
    """
    path = Path(path)
    what = f"a lightning_prune {kind} file"
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist or is no file; expected {what}.")
    try:
        _check_header_size(path)
        with safe_open(path, framework="pt") as file:
            content = _parse_json((file.metadata() or {}).get(FORMAT_KEY, "null"))
            _check_kind(content, path, kind, version)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        checksum = content.pop("checksum")
        if checksum != _checksum(tensors, content):
            raise ValueError("its checksum does not match its content")
        tensors |= {name: tensors[original] for name, original in content["same_as"].items()}
        header = content["header"]
    except FileFormatError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise FileFormatError(f"{path} is damaged or not {what}: {error}") from error
    return tensors, header


def check_archive(path: str | Path) -> None:
    """See that every record of a file of ``torch.save``, such as a checkpoint, is what was written.

    Reading with ``torch.load`` compares no checksums: changed bytes of a weight would go unnoticed. Records that were
    written without one (``torch.serialization.set_crc32_options(False)``) cannot be judged and pass.

    Raises:
        FileFormatError: It is damaged, or no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise zipfile.BadZipFile("it is compressed, and could hold more than memory does")
            if sum(record.file_size for record in records) > Path(path).stat().st_size:
                raise zipfile.BadZipFile("it claims to hold more than it does")
            for record in records:
                if record.CRC:
                    with archive.open(record) as content:
                        while content.read(2**20):
                            pass
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: there is no such file; expected one that torch.save has written.") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, LookupError) as error:
        raise FileFormatError(
            f"{path} is damaged, or no file that torch.save has written ({error}). Use an earlier checkpoint."
        ) from error


def load_archive(path: str | Path, map_location: Any = "cpu") -> Any:
    """Read a file of ``torch.save`` without running code that is in it, after :func:`check_archive`.

    Raises:
        FileFormatError: Missing, damaged, or with objects that only code could restore.
    """
    check_archive(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise FileFormatError(
            f"{path} cannot be read without running code that is in it, or is damaged: {reason} "
            "Objects of your own in save_hyperparameters are the usual cause: leave them out (ignore=[...])."
        ) from error
    except MemoryError as error:
        raise FileFormatError(f"{path} asks for more memory than there is; it is damaged, or made to.") from error
    except Exception as error:  # torch.load raises what the damaged bytes happen to lead to
        reason = (str(error).splitlines() or [""])[0]
        raise FileFormatError(f"{path} is damaged ({type(error).__name__}: {reason:.200}).") from error


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint of Lightning's without running code from it.

    Raises:
        FileFormatError: It is missing, damaged, no checkpoint, or holds objects that only code could restore.
    """
    if not Path(path).is_file():
        raise FileFormatError(f"{path} does not exist, or is no file; expected a checkpoint of Lightning's.")
    checkpoint = load_archive(path, map_location)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise FileFormatError(f"{path} is no checkpoint of Lightning's: it has no state_dict.")
    return checkpoint


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read tensors by name: a ``state_dict`` or a checkpoint in a file of ``torch.save``, or any safetensors file.

    Raises:
        FileFormatError: It is missing, damaged, holds something else, or objects that only code could restore.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        content = load_archive(path)
    elif not path.is_file():
        raise FileFormatError(f"{path}: there is no such file; expected tensors by name.")
    else:
        try:
            _check_header_size(path)
            content = load_file(path)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise FileFormatError(f"{path} is damaged or no safetensors file: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileFormatError(f"{path} holds a {type(content).__name__}; expected tensors by name.")
    return state


def _check_header_size(path: Path) -> None:
    """Refuse a header that is longer than any of ours before anything parses it."""
    with open(path, "rb") as file:
        declared = int.from_bytes(file.read(8), "little")
    if declared > min(2 * MAX_HEADER_BYTES, path.stat().st_size - 8):
        raise ValueError(f"its header claims {declared} bytes")


def _check_kind(content: Any, path: Path, kind: str, version: int) -> None:
    what = f"a lightning_prune {kind} file"
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = f"a {content['kind']!r:.40} file" if isinstance(content, dict) and "kind" in content else "foreign"
        raise FileFormatError(f"{path} is not {what}: it is {found}.")
    given = content.get("version")
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= version:
        raise FileFormatError(
            f"{path} has layout version {given!r:.40}, this library reads 1 to {version}; upgrade lightning-prune."
        )


def _store_once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Dense CPU tensors without two names for one; the names left out, with the name that stands for each."""
    distinct: dict[str, Tensor] = {}
    same_as: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages = set()
    for name, tensor in tensors.items():
        view = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in first:
            same_as[name] = first[view]
            continue
        first[view] = name
        dense = tensor.detach().cpu().contiguous()
        storage = dense.untyped_storage().data_ptr()
        if storage in storages:  # another view of a tensor that is stored already: safetensors wants its own copy
            dense = dense.clone()
        storages.add(dense.untyped_storage().data_ptr())
        distinct[name] = dense
    return distinct, same_as


def _checksum(tensors: Mapping[str, Tensor], content: Any) -> str:
    """SHA-256 over the JSON content and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"|{json.dumps(name)}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean tensor into ``ceil(numel / 8)`` bytes, the first element in the highest bit."""
    flat = mask.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack_bits`.

    ``shape`` may come from a file that nobody vouches for: it is checked before anything of its size is made.

    Raises:
        FileFormatError: ``shape`` is no shape, or ``packed`` does not hold as many bytes as it needs.
    """
    sizes = list(shape) if isinstance(shape, list | tuple) else [-1]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes)
    if not whole or len(sizes) > 64 or math.prod(n or 1 for n in sizes) >= 2**62:
        raise FileFormatError(f"{shape!r:.80} is not the shape of a mask; expected a list of whole numbers.")
    numel = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != (numel + 7) // 8:
        raise FileFormatError(
            f"a packed mask of shape {tuple(shape)} takes {(numel + 7) // 8} bytes (uint8), "
            f"got {tuple(packed.shape)} of {packed.dtype}."
        )
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) & weights).ne(0).reshape(-1)[:numel].reshape(tuple(shape))

"""Reading and writing files so that nothing is half-written and nothing read can run code."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as _serialize
from torch import Tensor

from lightning_prune.errors import FileFormatError

FORMAT_KEY = "lightning_prune"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; rename it to ``path`` when the block ends without an error.

    The data is on disk before the rename, so a reader sees the earlier file or the whole new one, also after a crash.
    On an error the temporary file is removed and the earlier file stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        FileFormatError: The file is missing or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} does not exist; expected {what}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} is not {what}: it is not valid JSON ({error}).") from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, version: int, header: Any) -> None:
    """Write tensors and a JSON header as one safetensors file, atomically.

    Args:
        path: The file.
        tensors: Tensors by name; written dense and contiguous.
        kind: What the file is (``"ticket"``, ``"masks"``, ``"compact"``); checked on reading.
        version: Version of this kind's layout.
        header: JSON content that goes with the tensors.
    """
    metadata = {FORMAT_KEY: json.dumps({"kind": kind, "version": version, "header": header}, allow_nan=False)}
    data = _serialize({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: str | Path, *, kind: str, version: int) -> tuple[dict[str, Tensor], Any]:
    """Read a file that :func:`write_tensors` wrote: the tensors (on the CPU) and the header.

    Raises:
        FileFormatError: The file is missing, damaged, of another kind, or of a later version.
    """
    path = Path(path)
    what = f"a lightning_prune {kind} file"
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist or is no file; expected {what}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content = json.loads(metadata.get(FORMAT_KEY, "null"))
            if not isinstance(content, dict) or content.get("kind") != kind:
                found = content.get("kind") if isinstance(content, dict) else None
                raise FileFormatError(f"{path} is not {what}: " + (f"it is a {found} file." if found else "it was written by something else."))
            if not isinstance(content.get("version"), int) or content["version"] > version:
                raise FileFormatError(
                    f"{path} has layout version {content.get('version')!r}, this library reads up to {version}; "
                    "upgrade lightning-prune."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, json.JSONDecodeError, OSError, RuntimeError, KeyError) as error:
        raise FileFormatError(f"{path} is damaged or not {what}: {error}") from error
    return tensors, content["header"]


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean tensor into ``ceil(numel / 8)`` bytes, the first element in the highest bit."""
    flat = mask.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Undo :func:`pack_bits`.

    Raises:
        FileFormatError: ``packed`` does not hold as many bytes as ``shape`` needs.
    """
    numel = int(torch.Size(shape).numel())
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != (numel + 7) // 8:
        raise FileFormatError(
            f"a packed mask of shape {tuple(shape)} takes {(numel + 7) // 8} bytes (uint8), "
            f"got {tuple(packed.shape)} of {packed.dtype}."
        )
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) & weights).ne(0).reshape(-1)[:numel].reshape(tuple(shape))

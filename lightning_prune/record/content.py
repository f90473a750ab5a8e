"""What a record holds, as plain JSON content and back."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lightning_prune.errors import ConfigError, FileFormatError

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_plain(content: Any, where: str) -> Any:
    """A copy of ``content`` in plain JSON types (non-finite floats stay floats).

    Raises:
        ConfigError: Something that JSON cannot hold.
    """
    for kind in (bool, int, float, str):  # exact types: a subclass, such as torch's version, is no plain content
        if isinstance(content, kind):
            return kind(content)
    if content is None:
        return None
    if isinstance(content, Mapping):
        return {str(k): to_plain(v, f"{where}.{k}") for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [to_plain(v, f"{where}[{i}]") for i, v in enumerate(content)]
    if isinstance(content, torch.Tensor | np.ndarray | np.generic) and math.prod(content.shape) == 1:
        return content.item()
    raise ConfigError(
        f"{where} of the record is a {type(content).__name__}; expected numbers, text, lists or mappings."
    )


def encode(content: Any) -> Any:
    """Content for JSON: numbers that it cannot hold become the texts ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``."""
    if isinstance(content, float) and not math.isfinite(content):
        return "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"
    if isinstance(content, Mapping):
        return {k: encode(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [encode(v) for v in content]
    return content


def decode(content: Any) -> Any:
    """Undo :func:`encode`."""
    if isinstance(content, str):
        return _NOT_FINITE.get(content, content)
    if isinstance(content, dict):
        return {k: decode(v) for k, v in content.items()}
    if isinstance(content, list):
        return [decode(v) for v in content]
    return content


def check_header(content: Any, what: str, where: str, wanted: str, newest: int) -> None:
    """See that content is a record of ours which this version reads: its ``format`` and its ``version``.

    Args:
        content: From a source that nobody vouches for.
        what: What it should be, for the message.
        where: Where it comes from, for the message.
        wanted: The format.
        newest: The latest version that can be read; the first is 1.

    Raises:
        FileFormatError: Foreign, or of a later version.
    """
    if not isinstance(content, dict) or content.get("format") != wanted:
        found = content.get("format") if isinstance(content, dict) else None
        raise FileFormatError(f"{where} is no {what}: its format is {found!r:.80}, expected {wanted!r}.")
    version = content.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise FileFormatError(f"{where} has no valid version: {version!r:.80}, expected 1 to {newest}.")
    if version > newest:
        raise FileFormatError(
            f"{where} has version {version}, this library reads up to {newest}; upgrade lightning-prune."
        )

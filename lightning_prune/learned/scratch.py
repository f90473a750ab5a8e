"""Go over tensors in pieces that stay in a cache, with memory for intermediate results that is kept between calls.

A mask is a chain of cheap passes over the weights. Done on whole tensors each pass fetches them from memory, and its
result needs fresh pages, which on a CPU costs more than the arithmetic.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**17
"""Entries of a piece."""


class Scratch:
    """Small tensors by a slot's number, overwritten at every use."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def like(self, piece: Tensor, slot: int) -> Tensor:
        """A flat tensor of the length, dtype and device of ``piece``; its values mean nothing.

        Args:
            piece: A flat piece of :func:`pieces`.
            slot: Different ones for what is needed at the same time.
        """
        key = (slot, piece.dtype, piece.device)
        held = self._held.get(key)
        if held is None or len(held) < len(piece):
            held = self._held[key] = torch.empty(len(piece), dtype=piece.dtype, device=piece.device)
        return held[: len(piece)]


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat pieces of tensors of one shape, side by side; views, so that they can be written to.

    Args:
        tensors: Contiguous. On a CPU a piece has :data:`PIECE` entries at most, elsewhere it is the whole.
    """
    size = PIECE if tensors[0].device.type == "cpu" else tensors[0].numel()
    return zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)

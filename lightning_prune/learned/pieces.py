"""Go over tensors in pieces that stay in a cache.

A mask is a chain of cheap passes over the weights. Done on whole tensors each pass fetches them from memory, which on a
CPU costs more than the arithmetic; done on small pieces the calls cost more.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**16
"""Entries of a piece."""


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat pieces of tensors of one shape, side by side; views, so that they can be written to.

    Args:
        tensors: Contiguous, outside of any graph. On a CPU a piece has :data:`PIECE` entries at most, elsewhere it is
            the whole.
    """
    flat = [tensor.view(-1) for tensor in tensors]
    size = PIECE if flat[0].device.type == "cpu" else flat[0].numel()
    return zip(*(torch.unsafe_split(tensor, size) for tensor in flat), strict=True)

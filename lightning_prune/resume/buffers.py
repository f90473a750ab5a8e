"""Buffers that are each process's own, such as BatchNorm's statistics: a checkpoint holds those of rank 0 alone."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


def get_own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that differ from rank 0's; a collective, empty for rank 0 and for one process.

    DDP hands rank 0's round before each forward pass of its wrapper. Other passes read each process's own, and with
    ``broadcast_buffers=False`` all do.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    own = {name: buffer.detach() for name, buffer in module.named_buffers() if type(buffer) is Tensor}
    digests = {name: _digest(buffer) for name, buffer in own.items()}
    first: list[Any] = [digests if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(first, src=0)
    return {name: own[name].to("cpu", copy=True) for name in own if digests[name] != first[0].get(name)}


def set_own_buffers(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """Undo :func:`get_own_buffers`; what has no place in the module is left alone."""
    for name, buffer in module.named_buffers():
        if name in saved and saved[name].shape == buffer.shape:
            with torch.no_grad():
                buffer.copy_(saved[name])


def _digest(buffer: Tensor) -> str:
    content = buffer.cpu().contiguous().reshape(-1).view(torch.uint8) if buffer.numel() else torch.empty(0)
    return hashlib.sha256(bytes(content.numpy().data)).hexdigest()

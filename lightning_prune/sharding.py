"""Tensors that are spread over processes (``DTensor``): which part lies here, and how parts and counts come together.

Nothing here asks how a tensor is sharded: FSDP2, tensor parallelism and both together give each process a box of the
whole. Several processes may hold the same box (replicas); the first of them counts it. Plain tensors beside sharded
ones are taken to be equal on all processes.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import SelectionError
from lightning_prune.files import pack_bits, unpack_bits


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``: a global shape, of which this process holds a part."""
    module = sys.modules.get("torch.distributed.tensor")  # else there can be none, and its import takes its time
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Any]) -> bool:
    """Whether one of the tensors is sharded."""
    return any(is_sharded(tensor) for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory and without gradient; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # else a DTensor goes through autograd to give its part
        return tensor.to_local().detach()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it begins and how large it is, along every axis."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Its number of entries."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """It as an index of the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))


def box_of(tensor: Tensor) -> Box:
    """Which box of a tensor lies here; of a plain tensor the whole.

    Raises:
        SelectionError: A layout that is no box, such as a sum over processes that is still to be made.
    """
    if not is_sharded(tensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape))
    here = tuple(local(tensor).shape)
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    boxes = _everyones_boxes(tensor.shape, mesh, placements)
    box = _own_box(tensor.shape, mesh, placements) if boxes is None else boxes[torch.distributed.get_rank()]
    if any(placement.is_partial() for placement in placements) or (box.shape != here and box.numel + math.prod(here)):
        raise SelectionError(f"a tensor lies in {placements}, of which no process holds a box; redistribute it first.")
    return box


@lru_cache(maxsize=256)  # tensors of one shape are many, and each is asked for more than once a cut
def _own_box(shape: torch.Size, mesh: Any, placements: Any) -> Box:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if mesh.get_coordinate() is None:  # this process has no part
        return Box((0,) * len(shape), (0,) * len(shape))
    own, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return Box(tuple(offset), tuple(own))


@lru_cache(maxsize=256)
def _everyones_boxes(shape: torch.Size, mesh: Any, placements: Any) -> tuple[Box, ...] | None:
    """The box of each process, by its rank; ``None``: only they know.

    So it is where chunks are not along axes one by one, and where others may lie on a mesh of their own.
    """
    from torch.distributed.tensor import Replicate, Shard

    ranks: Tensor = mesh.mesh
    boxes = [Box((0,) * len(shape), (0,) * len(shape))] * torch.distributed.get_world_size()
    if ranks.numel() != len(boxes) or any(type(placement) not in (Replicate, Shard) for placement in placements):
        return None
    for place in itertools.product(*map(range, ranks.shape)):
        offset, size = [0] * len(shape), list(shape)
        for at, count, placement in zip(place, ranks.shape, placements, strict=True):
            if placement.is_shard():
                axis = placement.dim
                chunk = -(-size[axis] // count)
                start = min(at * chunk, size[axis])
                offset[axis], size[axis] = offset[axis] + start, min(chunk, size[axis] - start)
        boxes[int(ranks[place])] = Box(tuple(offset), tuple(size))
    return tuple(boxes)


@lru_cache(maxsize=256)
def _owners(shape: torch.Size, boxes: tuple[Box, ...]) -> dict[Box, int] | None:
    """For each box of a tensor the first process that holds it; ``None`` if they do not make up the tensor."""
    owners: dict[Box, int] = {}
    for rank, box in enumerate(boxes):
        if box.numel:
            owners.setdefault(box, rank)
    return owners if sum(box.numel for box in owners) == shape.numel() else None


@dataclass(frozen=True)
class Part:
    """What this process holds of a tensor, without the tensor itself.

    Args:
        shape: Of the whole.
        box: What lies here.
        spread: Function that makes a tensor in this layout from the part that this process holds; ``None``: plain.
        boxes: What lies on each process, by rank; ``None`` if they have to be asked.
    """

    shape: torch.Size
    box: Box
    spread: Callable[[Tensor], Tensor] | None
    boxes: tuple[Box, ...] | None

    @classmethod
    def of(cls, tensor: Tensor) -> "Part":
        """This process's part of a tensor.

        Raises:
            SelectionError: No box; see :func:`box_of`.
        """
        if not is_sharded(tensor):
            whole = box_of(tensor)
            return cls(tensor.shape, whole, None, (whole,))
        from torch.distributed.tensor import DTensor

        given: dict[str, Any] = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]

        def spread(part: Tensor) -> Tensor:
            return DTensor.from_local(part, mesh, placements, **given)

        return cls(tensor.shape, box_of(tensor), spread, _everyones_boxes(tensor.shape, mesh, placements))

    def cut(self, tensor: Tensor) -> Tensor:
        """The same part of another tensor of this shape.

        Args:
            tensor: Plain: the whole, of which the part is cut out (a view). Sharded: in the same layout.

        Raises:
            SelectionError: It is sharded in another layout.
        """
        if not is_sharded(tensor):
            return tensor if self.spread is None else tensor[self.box.slices]
        if self.spread is None or box_of(tensor) != self.box:
            raise SelectionError(
                f"two tensors of shape {tuple(tensor.shape)} are spread over the processes in different ways; "
                "distribute one like the other."
            )
        return local(tensor)


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of ``tensor`` that this process holds of ``like``; see :meth:`Part.cut`."""
    return Part.of(like).cut(tensor)


def spread_like(part: Tensor, like: Tensor) -> Tensor:
    """A tensor in the layout of ``like``, of which this process holds ``part``."""
    spread = Part.of(like).spread
    return part if spread is None else spread(part)


def reshard(module: nn.Module) -> None:
    """Let FSDP2 give up the whole parameters that it may hold after a forward pass, so that shards can be changed.

    What is written to a shard while FSDP2 holds the whole would be passed over by the next forward pass. Without effect
    on anything else.
    """
    kind = _fsdp_module()
    for part in module.modules() if kind is not None else ():
        if isinstance(part, kind):  # type: ignore[arg-type]
            part.reshard()  # type: ignore[operator]


def own_class(module: nn.Module) -> type:
    """The class of a module before FSDP2 put its own in front of it."""
    kind = _fsdp_module()
    if kind is None or not isinstance(module, kind):
        return type(module)
    return next(found for found in type(module).__mro__ if not issubclass(found, kind))


def _fsdp_module() -> type | None:
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


class Layout:
    """Who holds what of some tensors, and who counts it.

    Building one is a collective, of a few bytes a tensor, if chunks of one of them are not along its axes one by one
    (so does FSDP2 over tensor parallelism cut) or it lies on some of the processes only, as others may have its like.
    Else every process knows what the others hold.

    Args:
        parts: What this process holds; the same names and global shapes on every process.

    Raises:
        SelectionError: The parts do not make up the tensors.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self.parts = dict(parts)
        boxes = {name: part.boxes for name, part in parts.items()}
        if any(known is None for known in boxes.values()):
            boxes = self._ask()
        rank = torch.distributed.get_rank()
        self.owners: dict[str, dict[Box, int]] = {}
        """For each tensor its boxes, and the process that counts each."""
        for name, part in parts.items():
            held = boxes[name]
            assert held is not None
            owners = _owners(part.shape, held)
            if owners is None:
                raise SelectionError(
                    f"the parts of {name!r} on {torch.distributed.get_world_size()} processes do not make up its shape "
                    f"{tuple(part.shape)}; every process must take part, with the same tensors."
                )
            self.owners[name] = owners
        self.owned = {name for name, part in parts.items() if self.owners[name].get(part.box) == rank}
        """The tensors of which this process counts its part."""
        self.total = sum(part.shape.numel() for part in parts.values())
        """Entries of all tensors together."""

    def _ask(self) -> dict[str, tuple[Box, ...] | None]:
        everyones: list[Any] = [None] * torch.distributed.get_world_size()
        own = {name: (part.box.offset, part.box.shape) for name, part in self.parts.items()}
        torch.distributed.all_gather_object(everyones, own)
        return {name: tuple(Box(*held[name]) for held in everyones) for name in own}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """The layout of tensors."""
        return cls({name: Part.of(tensor) for name, tensor in tensors.items()})

    def spread(self, name: str, part: Tensor) -> Tensor:
        """A tensor in the layout of the one of that name, of which this process holds ``part``."""
        spread = self.parts[name].spread
        return part if spread is None else spread(part)

    def count(self, masks: Mapping[str, Tensor]) -> dict[str, int]:
        """How many entries are ``True`` of each of the tensors, all parts together. A collective."""
        own = [int(torch.count_nonzero(local(m))) if n in self.owned else 0 for n, m in masks.items()]
        return dict(zip(masks, add_up(torch.tensor(own)).tolist(), strict=True))


def add_up(counts: Tensor, largest: int | None = None) -> Tensor:
    """The sum of whole numbers over all processes. A collective.

    Args:
        counts: Of this process, int64.
        largest: No sum is larger, the same on all processes: where they fit, numbers travel in half as many bits.
    """
    short = largest is not None and largest < 2**31
    total = counts.to(_wire(), torch.int32 if short else counts.dtype, copy=True)
    torch.distributed.all_reduce(total)
    return total.to(counts.device, counts.dtype)


def _wire() -> torch.device:
    """Where tensors must be to travel: NCCL takes them from GPUs only, Gloo best from the CPU."""
    if torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def agree(good: bool) -> bool:
    """Whether it is ``True`` on all processes. A collective."""
    return int(add_up(torch.tensor([not good], dtype=torch.int64))) == 0


def collect(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    """Bring tensors together on process 0, one after the other: for files. A collective.

    Booleans travel as bits.

    Yields:
        The name, and on process 0 the whole tensor (on the CPU if it was sharded); ``None`` elsewhere.
    """
    rank = torch.distributed.get_rank()
    layout = Layout.of(tensors)
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            yield name, tensor if rank == 0 else None
            continue
        part = local(tensor)
        whole = torch.empty(tensor.shape, dtype=tensor.dtype) if rank == 0 else None
        for box, owner in layout.owners[name].items():
            if rank == owner == 0:
                assert whole is not None
                whole[box.slices] = part.cpu()
            elif rank == owner:
                torch.distributed.send(_as_bytes(part).to(_wire()), 0)
            elif rank == 0:
                assert whole is not None
                received = _as_bytes(torch.empty(box.shape, dtype=tensor.dtype)).to(_wire())
                torch.distributed.recv(received, owner)
                whole[box.slices] = _from_bytes(received.cpu(), box, tensor.dtype)
        yield name, whole


def _as_bytes(part: Tensor) -> Tensor:
    return pack_bits(part) if part.dtype == torch.bool else part.contiguous().reshape(-1).view(torch.uint8)


def _from_bytes(received: Tensor, box: Box, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return unpack_bits(received, box.shape)
    return received.view(dtype).reshape(box.shape)

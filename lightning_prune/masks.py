"""Named boolean masks: which entries of which parameters are kept."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.counted import Counted
from lightning_prune.errors import FileFormatError, MaskMismatchError, SelectionError
from lightning_prune.files import pack_bits, read_tensors, unpack_bits, write_tensors
from lightning_prune.prunable import canonical_name, close_names, prunable_parameters
from lightning_prune.sharding import Layout, agree, any_sharded, collect, local, part_like, reshard, spread_like

__all__ = ["MaskSet", "canonical_name", "prunable_parameters"]

_VERSION = 1


class MaskSet(Counted, Mapping[str, Tensor]):
    """Masks of a module's parameters: name -> boolean tensor of the parameter's shape, ``True`` = kept.

    A set is a value: its operations give new sets, and its tensors are not to be written to. Names are kept in the
    order given and without the parts that ``torch.compile`` adds (:func:`canonical_name`), so that masks of a compiled
    module fit the plain one; look-ups take either spelling. Two sets are equal when names, masks and fills are,
    whatever the order.

    Masks of sharded parameters (``DTensor``) are sharded as these are: each process holds its part, and counts,
    digests, comparisons and files are of the whole. Each of these is a collective; counts and the digest are
    remembered, so that one process alone may ask for them again.

    Args:
        masks: Boolean tensors by parameter name.
        fills: Values that pruned entries of some of the parameters hold instead of 0, by name, each of its mask's
            shape; values at kept entries are forgotten. For supermask actions that freeze pruned weights at a nonzero
            value. Default: ``None``, pruned entries are 0.

    Raises:
        SelectionError: A name that is no string, a mask that is no boolean tensor, or the same name twice.
        MaskMismatchError: A fill without a mask, of another shape, or not of a floating dtype.

    Example:
        >>> masks = MaskSet({"weight": torch.tensor([[True, False], [True, True]])})
        >>> masks.kept, masks.total, masks.density
        (3, 4, 0.75)
    """

    def __init__(self, masks: Mapping[str, Tensor], fills: Mapping[str, Tensor] | None = None) -> None:
        self._masks: dict[str, Tensor] = {}
        for name, mask in masks.items():
            if not isinstance(name, str):
                raise SelectionError(f"masks are named by strings (a parameter's name), got {name!r}.")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                found = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
                raise SelectionError(
                    f"the mask of {name!r} must be a boolean tensor (True = kept), got {found}; use `tensor != 0`."
                )
            if canonical_name(name) in self._masks:
                raise SelectionError(f"there are two masks for {canonical_name(name)!r}; give each parameter one.")
            self._masks[canonical_name(name)] = mask  # booleans have no gradient
        self._fills: dict[str, Tensor] = {}
        for name, fill in (fills or {}).items():
            name = canonical_name(name)
            if name not in self._masks:
                raise MaskMismatchError(f"there is a fill for {name!r} but no mask{close_names(name, self._masks)}")
            if not isinstance(fill, Tensor) or fill.shape != self._masks[name].shape or not fill.is_floating_point():
                found = f"{tuple(fill.shape)} of {fill.dtype}" if isinstance(fill, Tensor) else type(fill).__name__
                raise MaskMismatchError(
                    f"the fill of {name!r} must be a floating tensor of its mask's shape "
                    f"{tuple(self._masks[name].shape)}, got {found}."
                )
            mask = self._masks[name]
            self._fills[name] = fill.detach().to(mask.device).masked_fill(mask, 0)
        self._counts: dict[str, tuple[int, int]] | None = None
        self._digest: str | None = None

    @classmethod
    def dense_like(cls, tensors: Mapping[str, Tensor]) -> "MaskSet":
        """Masks that keep everything, one for each of ``tensors``, on their devices."""
        return cls({n: torch.ones_like(t, dtype=torch.bool, requires_grad=False) for n, t in tensors.items()})

    # ------------------------------------------------------------------ a mapping

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name] if name in self._masks else self._masks[canonical_name(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        filled = f", {len(self._fills)} with a fill" if self._fills else ""
        return f"MaskSet({len(self)} tensors, {self.kept} of {self.total} entries kept{filled})"

    @property
    def fills(self) -> Mapping[str, Tensor]:
        """What pruned entries hold instead of 0, by name; empty where all are 0."""
        return dict(self._fills)

    # ------------------------------------------------------------------ counts

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only its part of some of the masks."""
        return any_sharded(self._masks.values())

    @property
    def kept(self) -> int:
        """Number of kept entries."""
        return sum(kept for kept, _ in self.kept_per_tensor().values())

    @property
    def total(self) -> int:
        """Number of entries, kept or not, of the tensors that have a mask."""
        return sum(mask.numel() for mask in self._masks.values())

    def kept_per_tensor(self) -> dict[str, tuple[int, int]]:
        """Kept entries and all entries of each tensor, by name."""
        if self._counts is None:
            if self.is_sharded:
                counts = Layout.of(self._masks).count(self._masks)
            else:
                counts = {name: int(torch.count_nonzero(mask)) for name, mask in self._masks.items()}
            self._counts = {name: (count, self._masks[name].numel()) for name, count in counts.items()}
        return dict(self._counts)

    # ------------------------------------------------------------------ use

    def apply_(self, module: nn.Module) -> None:
        """Set the pruned entries of ``module``'s parameters, in place, to exactly 0 or to their fill.

        Every parameter is checked before the first is written to. Only values change: no hooks, no new parameters. Of
        sharded parameters each process sets its own part; the masks may be sharded alike, or whole.

        Args:
            module: A module with a parameter for every mask; compiled or plain.

        Raises:
            MaskMismatchError: A parameter is missing or has another shape.
            SelectionError: Sharded masks, and parameters that are sharded in another way or not at all.
        """
        reshard(module)
        found = {canonical_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
        for name, mask in self._masks.items():
            if name not in found:
                raise MaskMismatchError(
                    f"the masks belong to another network: {type(module).__name__} has no parameter {name!r}"
                    + close_names(name, found)
                )
            if found[name].shape != mask.shape:
                raise MaskMismatchError(
                    f"the masks belong to another network: parameter {name!r} of {type(module).__name__} has shape "
                    f"{tuple(found[name].shape)}, its mask {tuple(mask.shape)}."
                )
        with torch.no_grad():
            for name, mask in self._masks.items():
                whole = found[name]
                parameter = local(whole)
                pruned = part_like(mask, whole).to(parameter.device).logical_not()
                parameter.masked_fill_(pruned, 0)
                if name in self._fills:
                    fill = part_like(self._fills[name], whole)
                    parameter.copy_(torch.where(pruned, fill.to(parameter), parameter))

    def to(self, device: torch.device | str) -> "MaskSet":
        """The same masks on ``device``."""
        return MaskSet(
            {name: mask.to(device) for name, mask in self._masks.items()},
            {name: fill.to(device) for name, fill in self._fills.items()},
        )

    def placed_like(self, tensors: Mapping[str, Tensor]) -> "MaskSet":
        """The same masks where ``tensors`` lie: on their devices, and of whole masks the parts of sharded ones.

        Args:
            tensors: One of the same shape for every mask, by name.
        """

        def place(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
            placed = {}
            for name, tensor in own.items():
                part = part_like(tensor, tensors[name]).to(local(tensors[name]).device)
                placed[name] = spread_like(part, tensors[name])
            return placed

        return MaskSet(place(self._masks), place(self._fills))

    def __and__(self, other: "MaskSet") -> "MaskSet":
        """Keep what both keep. An entry pruned by both takes the left set's fill (or 0), else that of its pruner.

        Raises:
            MaskMismatchError: Other names or shapes.
        """
        if not isinstance(other, MaskSet):
            return NotImplemented
        self._require_same_tensors(other)
        if self.is_sharded:
            other = other.placed_like(self._masks)
        masks, fills = {}, {}
        for name, mask in self._masks.items():
            masks[name] = mask & other._masks[name].to(mask.device)
            if name in self._fills or name in other._fills:
                dtype = (self._fills if name in self._fills else other._fills)[name].dtype
                zero = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                mine, theirs = self._fills.get(name, zero).to(zero), other._fills.get(name, zero).to(zero)
                fills[name] = torch.where(mask, theirs, mine)
        return MaskSet(masks, fills)

    def __le__(self, other: "MaskSet") -> bool:
        """Whether these masks are nested in ``other``: every entry that these keep, ``other`` keeps.

        Raises:
            MaskMismatchError: Other names or shapes.
        """
        if not isinstance(other, MaskSet):
            return NotImplemented
        self._require_same_tensors(other)
        pairs = [(local(mask), part_like(other._masks[name], mask)) for name, mask in self._masks.items()]
        nested = all(not bool((mask & ~outer.to(mask.device)).any()) for mask, outer in pairs)
        return agree(nested) if self.is_sharded else nested

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        if other.is_sharded and not self.is_sharded:
            return other == self
        equal = _equal(self._masks, other._masks) and _equal(self._fills, other._fills)
        return agree(equal) if self.is_sharded else equal

    __hash__ = None  # type: ignore[assignment]  # holds tensors

    def _require_same_tensors(self, other: "MaskSet") -> None:
        if self._masks.keys() != other._masks.keys():
            odd = ", ".join(map(repr, sorted(self._masks.keys() ^ other._masks.keys())[:5]))
            raise MaskMismatchError(f"the two mask sets belong to different networks: only one of them has {odd}.")
        for name, mask in self._masks.items():
            if mask.shape != other._masks[name].shape:
                raise MaskMismatchError(
                    f"the two mask sets belong to different networks: {name!r} has shape {tuple(mask.shape)} in one "
                    f"and {tuple(other._masks[name].shape)} in the other."
                )

    # ------------------------------------------------------------------ on disk

    def digest(self) -> str:
        """SHA-256 (hexadecimal) over names, shapes, masks and fills. Equal sets have equal digests on every device.

        Sharded masks have the digest of the whole ones: their bits, one a weight, go to process 0.
        """
        if self._digest is None:
            self._digest = self._compute_digest()
        return self._digest

    def _compute_digest(self) -> str:
        sha = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        for _, tensor in self._packed(in_order=True):
            if tensor is not None:
                sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        found = [sha.hexdigest()]
        if self.is_sharded:
            torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def save(self, path: str | Path) -> None:
        """Write the masks to ``path``, one bit an entry, atomically: after an error the earlier file is intact.

        Of sharded masks process 0 writes the whole.
        """
        state = self.state_dict()
        if not self.is_sharded or torch.distributed.get_rank() == 0:
            write_tensors(path, state["tensors"], kind="masks", version=_VERSION, header=state["header"])

    @classmethod
    def load(cls, path: str | Path) -> "MaskSet":
        """Read what :meth:`save` wrote. The masks are on the CPU.

        Raises:
            FileFormatError: The file is missing, damaged, foreign or of a later version.
        """
        tensors, header = read_tensors(path, kind="masks", version=_VERSION)
        return cls._unpack(tensors, header, str(path))

    def state_dict(self) -> dict[str, Any]:
        """The masks, one bit an entry, as plain dicts, lists, strings, numbers and CPU tensors.

        ``torch.load(weights_only=True)`` reads it back. Of sharded masks process 0 gets the whole, and the others a
        state without tensors, as torch's full state dicts do.
        """
        tensors = {name: tensor for name, tensor in self._packed() if tensor is not None}
        return {"version": _VERSION, "header": self._header(), "tensors": tensors}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "MaskSet":
        """Undo :meth:`state_dict`. The masks are on the CPU.

        Raises:
            FileFormatError: ``state`` is not such a state, or of a later version.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("tensors"), Mapping):
            raise FileFormatError("this is no state of masks: expected what MaskSet.state_dict() returns.")
        version = state.get("version")
        if not isinstance(version, int) or not 1 <= version <= _VERSION:
            raise FileFormatError(
                f"the masks' state has version {version!r}, this library reads up to {_VERSION}; "
                "upgrade lightning-prune."
            )
        return cls._unpack(state["tensors"], state.get("header"), "the masks' state")

    def _header(self) -> dict[str, Any]:
        shapes = {name: list(mask.shape) for name, mask in self._masks.items()}
        return {"shapes": shapes, "fills": {name: str(fill.dtype) for name, fill in self._fills.items()}}

    def _packed(self, in_order: bool = False) -> Iterator[tuple[str, Tensor | None]]:
        """Tensors of the file, one after the other; of sharded masks on process 0, ``None`` elsewhere."""
        own = {f"mask:{name}": mask for name, mask in self._masks.items()}
        own |= {f"fill:{name}": fill for name, fill in self._fills.items()}
        if in_order:
            own = {name: own[name] for name in sorted(own)}
        whole: Iterable[tuple[str, Tensor | None]] = collect(own) if self.is_sharded else own.items()
        for name, tensor in whole:
            if tensor is not None:
                tensor = (pack_bits(tensor) if name.startswith("mask:") else tensor.contiguous()).cpu()
            yield name, tensor

    @classmethod
    def _unpack(cls, tensors: Mapping[str, Tensor], header: Any, where: str) -> "MaskSet":
        shapes = header.get("shapes") if isinstance(header, Mapping) else None
        fills = header.get("fills") if isinstance(header, Mapping) else None
        if not isinstance(shapes, Mapping) or not isinstance(fills, Mapping) or not fills.keys() <= shapes.keys():
            raise FileFormatError(f"{where}: the header does not list the masks and their shapes.")
        expected = {f"mask:{name}" for name in shapes} | {f"fill:{name}" for name in fills}
        if tensors.keys() != expected:
            odd = ", ".join(map(repr, sorted(tensors.keys() ^ expected)[:5]))
            raise FileFormatError(f"{where}: the header and the tensors do not belong together; they differ in {odd}.")
        masks = {name: _unpack_mask(tensors[f"mask:{name}"], shape, name, where) for name, shape in shapes.items()}
        try:
            return cls(masks, {name: tensors[f"fill:{name}"] for name in fills})
        except (SelectionError, MaskMismatchError) as error:
            raise FileFormatError(f"{where}: {error}") from error


def _unpack_mask(packed: Any, shape: Any, name: str, where: str) -> Tensor:
    """One mask from its bits; the shape comes from a file and may be anything."""
    if not isinstance(packed, Tensor):
        raise FileFormatError(f"{where}: {name!r} has no packed mask, got {type(packed).__name__}.")
    try:
        return unpack_bits(packed, shape)
    except FileFormatError as error:
        raise FileFormatError(f"{where}: {name!r}: {error}") from error


def _equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    if left.keys() != right.keys() or any(tensor.shape != right[name].shape for name, tensor in left.items()):
        return False
    pairs = [(local(tensor), part_like(right[name], tensor)) for name, tensor in left.items()]
    return all(torch.equal(one, other.to(one.device)) for one, other in pairs)

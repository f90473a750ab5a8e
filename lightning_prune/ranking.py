"""Exact order statistics over scores that lie in many tensors, without bringing them together.

A float's bits, read as an integer, are in the order of the floats (mirrored below zero). So the n-th smallest of all
scores is found sixteen bits at a time: count how many scores have each upper half, find the half that holds the n-th,
then count the lower halves of those few. Each step is one pass over cache-sized pieces, whatever the distribution.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.errors import SelectionError

_PIECE = 2**18  # entries; 1 MiB of float32, so that a piece stays in the cache from one operation to the next
_BUCKETS = 2**16


class Pool:
    """Scores that compete with each other: of some tensors, the entries that are still kept.

    Args:
        scores: Scores by name. Read anew in each pass, so values may be computed on access.
        names: The tensors that take part; their order is the order of ties.
        within: Entries that take part, by name; a tensor without a mask here takes part whole.
        dtype: The type in which scores are compared (:func:`common_dtype`).
    """

    def __init__(
        self, scores: Mapping[str, Tensor], names: Sequence[str], within: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        self._scores = scores
        self._names = names
        self._within = within
        self._dtype = dtype
        self._bits = 32 if self._dtype == torch.float32 else 64

    def keep_largest(self, remove: int) -> dict[str, Tensor]:
        """Masks that keep all but the ``remove`` smallest scores. Among equal scores the later position leaves first.

        Args:
            remove: From 0 to the number of entries that take part.

        Raises:
            SelectionError: A score is NaN.
        """
        counts = self._count(self._bits - 16, None)
        bound = self._smallest(remove, counts) if remove else None
        masks: dict[str, Tensor] = {}
        above = 0
        for name in self._names:
            score, within = self._read(name)
            mask = torch.ones_like(score, dtype=torch.bool) if within is None else within.clone()
            if bound is not None:
                for values, out in zip(_pieces(score), _pieces(mask), strict=True):
                    larger = values.to(self._dtype) > bound
                    above += int(torch.count_nonzero(out.logical_and_(larger)))
            masks[name] = mask
        if bound is not None:
            self._keep_first_equals(masks, bound, int(counts.sum()) - remove - above)
        return masks

    def ordered(self) -> Tensor:
        """All scores that take part, ascending, in one CPU tensor. For the counting rules that need them."""
        self._count(self._bits - 16, None)
        parts = []
        for name in self._names:
            score, within = self._read(name)
            parts.append((score.reshape(-1) if within is None else score[within]).to("cpu", self._dtype))
        return torch.cat(parts).sort().values

    def _smallest(self, n: int, counts: Tensor) -> float | int:
        """The ``n``-th smallest score, counted from 1; ``counts`` as for the highest sixteen bits."""
        prefix: int | None = None
        for shift in range(self._bits - 16, -1, -16):
            if prefix is not None:
                counts = self._count(shift, prefix)
            order = self._ascending(prefix)
            reached = counts[order].cumsum(0)
            place = int(torch.searchsorted(reached, n))
            n -= int(reached[place - 1]) if place else 0
            bucket = int(order[place])
            if prefix is None:  # the sign bit
                prefix = bucket - _BUCKETS if bucket >= _BUCKETS // 2 else bucket
            else:
                prefix = prefix * _BUCKETS + bucket
        if not self._dtype.is_floating_point:
            return prefix  # type: ignore[return-value]
        return torch.tensor(prefix, dtype=_word(self._dtype)).view(self._dtype).item()

    def _ascending(self, prefix: int | None) -> Tensor:
        """The buckets from the lowest scores to the highest; ``prefix`` holds the bits above, if any."""
        upwards = torch.arange(_BUCKETS)
        is_float = self._dtype.is_floating_point
        if prefix is None:
            positive, negative = upwards.chunk(2)
            return torch.cat([negative.flip(0) if is_float else negative, positive])
        return upwards.flip(0) if is_float and prefix < 0 else upwards

    def _count(self, shift: int, prefix: int | None) -> Tensor:
        """How many scores whose bits above ``shift + 16`` are ``prefix`` have each value of the next sixteen bits."""
        total = torch.zeros(_BUCKETS, dtype=torch.int64)
        for name in self._names:
            score, within = self._read(name)
            here = torch.zeros(_BUCKETS + 1, dtype=torch.int64, device=score.device)
            pruned = None if within is None else ~within
            masks: Iterator[Tensor | None] = iter(()) if pruned is None else _pieces(pruned)
            for values in _pieces(score):
                words = values.to(self._dtype).view(_word(self._dtype))
                out = next(masks, None)
                if prefix is None:
                    buckets = (words >> shift).bitwise_and_(_BUCKETS - 1)
                    if out is not None:
                        buckets.masked_fill_(out, _BUCKETS)
                else:
                    inside = (words >> (shift + 16)) == prefix
                    if out is not None:
                        inside.logical_and_(~out)
                    buckets = (words[inside] >> shift).bitwise_and_(_BUCKETS - 1)
                here += torch.bincount(buckets, minlength=_BUCKETS + 1)
            counts = here[:_BUCKETS].cpu()
            if prefix is None and self._dtype.is_floating_point:
                self._refuse_nan(name, counts)
            total += counts
        return total

    def _refuse_nan(self, name: str, counts: Tensor) -> None:
        first = 0x7F80 if self._bits == 32 else 0x7FF0  # all exponent bits set: infinities and NaN
        if not bool(counts.view(2, -1)[:, first:].any()):
            return
        score, within = self._read(name)
        found = score.isnan() if within is None else score.isnan() & within
        if bool(found.any()):
            raise SelectionError(
                f"the scores of {name!r} hold {int(found.sum())} NaN among {score.numel()} entries, so nothing can be "
                "selected; look for a loss or a learning rate that made the weights diverge."
            )

    def _keep_first_equals(self, masks: Mapping[str, Tensor], bound: float | int, keep: int) -> None:
        """Also keep the first ``keep`` entries whose score is exactly ``bound``, by order of names and flat index."""
        for name in self._names:
            if keep == 0:
                return
            score, within = self._read(name)
            equal = (score.to(self._dtype) == bound).contiguous()
            if within is not None:
                equal.logical_and_(within)
            for piece in equal.view(-1).split(_PIECE):
                found = int(torch.count_nonzero(piece))
                if found > keep:
                    piece[piece.nonzero().squeeze(1)[keep:]] = False
                keep -= min(keep, found)
            masks[name].logical_or_(equal)

    def _read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The scores of one tensor and which of them take part, both in one memory layout without gaps."""
        score = self._scores[name].detach()
        if not score.permute(_by_stride(score)).is_contiguous():
            score = score.contiguous()
        within = self._within.get(name)
        if within is not None and (within.stride() != score.stride() or within.device != score.device):
            within = torch.empty_like(score, dtype=torch.bool).copy_(within)
        return score, within


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views of a tensor's entries in the order in which they lie in memory; whole where there is no cache to mind."""
    flat = tensor.permute(_by_stride(tensor)).view(-1)
    return iter(flat.split(_PIECE) if tensor.device.type == "cpu" else (flat,))


def _by_stride(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _word(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.float32 else torch.int64


def common_dtype(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """A type that holds every score exactly: float32, float64 or int64.

    Raises:
        SelectionError: Scores that cannot be compared: complex ones, or integers beside floats.
    """
    floating = {name for name, dtype in dtypes.items() if dtype.is_floating_point}
    for name, dtype in dtypes.items():
        if dtype.is_complex:
            raise SelectionError(f"the scores of {name!r} are complex ({dtype}), which have no order; use their abs().")
    if not floating:
        return torch.int64
    if len(floating) < len(dtypes):
        name = next(name for name in dtypes if name not in floating)
        raise SelectionError(f"the scores of {name!r} are {dtypes[name]}, others are floats; make all of one kind.")
    return torch.float64 if torch.float64 in dtypes.values() else torch.float32

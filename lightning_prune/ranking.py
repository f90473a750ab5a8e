"""Exact order statistics over scores that lie in many tensors, without bringing them together.

A float's bits, read as an integer, are in the order of the floats (mirrored below zero). One pass counts how many
scores have each upper half of the bits; that gives a narrow bracket around the n-th smallest. A second pass compares
with the bracket and looks closer only at the few scores inside. Where many scores share those bits, further passes
narrow the bracket first. All go over pieces that fit a cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.errors import SelectionError

_PIECE = 2**20  # entries; small enough to stay in a cache between operations, large enough to make their overhead small
BUCKETS = 2**16


@dataclass(frozen=True)
class Bracket:
    """The ``inside`` scores whose bits from ``shift`` up are ``prefix``; ``below`` others are lower."""

    prefix: int
    shift: int
    below: int
    inside: int


@dataclass(frozen=True)
class Inside:
    """Scores within a bracket, in one piece of a tensor.

    Args:
        name: The tensor.
        start: Where the piece begins, in the order in which the tensor lies in memory.
        mask: The piece of its mask.
        index: Positions in the piece.
        values: Scores there, on the CPU.
    """

    name: str
    start: int
    mask: Tensor
    index: Tensor
    values: Tensor


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
        self._word = torch.int32 if dtype == torch.float32 else torch.int64
        self._bits = 32 if dtype == torch.float32 else 64
        self._negative_zero = False

    def keep_largest(self, remove: int) -> dict[str, Tensor]:
        """Masks that keep all but the ``remove`` smallest scores. Among equal scores the later position leaves first.

        Args:
            remove: From 0 to the number of entries that take part.

        Raises:
            SelectionError: A score is NaN.
        """
        counts = self._count_highest()
        if remove == 0:
            return {name: self._taking_part(name) for name in self._names}
        bracket = self._bracket(remove, counts)
        low, high = self._bounds(bracket)
        masks, found = self._split(low, high)
        bound, above = low, 0
        if found:
            values = torch.cat([part.values for part in found])
            bound = values.kthvalue(remove - bracket.below).values.item()
            above = int(torch.count_nonzero(values > bound))
            keep_above(found, bound)
        self._keep_first_equals(masks, bound, bracket.inside - (remove - bracket.below) - above)
        return masks

    def ordered(self) -> Tensor:
        """All scores that take part, ascending, in one CPU tensor. For the counting rules that need them.

        Raises:
            SelectionError: A score is NaN.
        """
        self._count_highest()
        parts = []
        for name in self._names:
            score, within = self._read(name)
            parts.append((score.reshape(-1) if within is None else score[within]).to("cpu", self._dtype))
        return torch.cat(parts).sort().values

    # ------------------------------------------------------------------ the bracket

    def _bracket(self, n: int, counts: Tensor) -> Bracket:
        """A narrow bracket around the ``n``-th smallest score, counted from 1; ``counts`` of the highest bits."""
        few = max(BUCKETS, int(counts.sum()) // 16)
        bracket = self._narrow(n, None, counts)
        while bracket.inside > few and bracket.shift:
            bracket = self._narrow(n, bracket, self._count_inside(bracket.prefix, bracket.shift - 16))
        return bracket

    def _narrow(self, n: int, outer: Bracket | None, counts: Tensor) -> Bracket:
        """The bracket around the ``n``-th smallest score by sixteen more bits, of which ``counts`` are."""
        order = self._ascending(None if outer is None else outer.prefix)
        below = 0 if outer is None else outer.below
        reached = counts[order].cumsum(0)
        place = int(torch.searchsorted(reached, n - below))
        below += int(reached[place - 1]) if place else 0
        bucket = int(order[place])
        inside = int(counts[bucket])
        if outer is None:  # the first of these bits is the sign
            return Bracket(bucket - BUCKETS if bucket >= BUCKETS // 2 else bucket, self._bits - 16, below, inside)
        return Bracket(outer.prefix * BUCKETS + bucket, outer.shift - 16, below, inside)

    def _ascending(self, prefix: int | None) -> Tensor:
        """The buckets from the lowest scores to the highest; ``prefix`` holds the bits above, if any."""
        upwards = torch.arange(BUCKETS)
        is_float = self._dtype.is_floating_point
        if prefix is None:
            positive, negative = upwards.chunk(2)
            return torch.cat([negative.flip(0) if is_float else negative, positive])
        return upwards.flip(0) if is_float and prefix < 0 else upwards

    def _bounds(self, bracket: Bracket) -> tuple[float | int, float | int]:
        """The lowest and the highest score that a bracket can hold."""
        first, last = bracket.prefix << bracket.shift, ((bracket.prefix + 1) << bracket.shift) - 1
        if not self._dtype.is_floating_point:
            return first, last
        if first == -(1 << (self._bits - 1)):  # -0, which has become +0 and lies above these
            first += 1
        ends = torch.tensor([first, last]).to(self._word).view(self._dtype).tolist()
        infinity = float("inf") if bracket.prefix >= 0 else float("-inf")
        low, high = sorted(infinity if end != end else end for end in ends)  # beyond an infinity the bits mean NaN
        return low, high

    def _count_highest(self) -> Tensor:
        """How many scores have each value of the sixteen highest bits."""
        total = torch.zeros(BUCKETS, dtype=torch.int64)
        for name in self._names:
            total += self._count_of(name)
        for name, nan in self._count_nan(self._names, total).items():
            if nan:
                raise nan_error(name, nan, self._scores[name].numel())
        if self._must_count_anew(total):
            return self._count_highest()
        return total

    def _count_of(self, name: str) -> Tensor:
        score, within = self._read(name)
        here = torch.zeros(BUCKETS, dtype=torch.int64, device=score.device)
        for values, kept in self._pieces(score, within):
            buckets = (values.view(self._word) >> (self._bits - 16)).bitwise_and_(BUCKETS - 1)
            if kept is not None:
                buckets.mul_(kept.to(self._word))
            here += torch.bincount(buckets, minlength=BUCKETS)
        if within is not None:
            here[0] -= torch.count_nonzero(~within)
        return here.cpu()

    def _must_count_anew(self, total: Tensor) -> bool:
        """Whether there may be a -0: it equals 0, so from now on it is counted with it."""
        if self._dtype.is_floating_point and not self._negative_zero and bool(total[BUCKETS // 2]):
            self._negative_zero = True
            return True
        return False

    def _count_inside(self, prefix: int, shift: int) -> Tensor:
        return self._count_inside_of(self._names, prefix, shift)

    def _count_inside_of(self, names: Sequence[str], prefix: int, shift: int) -> Tensor:
        """How many scores whose bits above ``shift + 16`` are ``prefix`` have each value of the next sixteen bits."""
        total = torch.zeros(BUCKETS, dtype=torch.int64)
        for name in names:
            for values, kept in self._pieces(*self._read(name)):
                words = values.view(self._word)
                inside = (words >> (shift + 16)) == prefix
                if kept is not None:
                    inside.logical_and_(kept)
                buckets = (words[inside] >> shift).bitwise_and_(BUCKETS - 1)
                total += torch.bincount(buckets, minlength=BUCKETS).cpu()
        return total

    def _count_nan(self, names: Sequence[str], counts: Tensor) -> dict[str, int]:
        """How many scores of each tensor are NaN; looked at only where ``counts`` of all of them leave it open."""
        first = 0x7F80 if self._bits == 32 else 0x7FF0  # all exponent bits set: infinities and NaN
        if not self._dtype.is_floating_point or not bool(counts.view(2, -1)[:, first:].any()):
            return dict.fromkeys(names, 0)
        found = {}
        for name in names:
            score, within = self._read(name)
            found[name] = int(torch.count_nonzero(score.isnan() if within is None else score.isnan() & within))
        return found

    # ------------------------------------------------------------------ the masks

    def _split(self, low: float | int, high: float | int) -> tuple[dict[str, Tensor], list[Inside]]:
        """Masks that keep what lies above ``high``, and what lies from ``low`` to ``high`` where the two differ."""
        masks: dict[str, Tensor] = {}
        found = []
        for name in self._names:
            score, within = self._read(name)
            masks[name] = torch.empty_like(score, dtype=torch.bool)
            start = 0
            for (values, kept), mask in zip(self._pieces(score, within), flat_pieces(masks[name]), strict=True):
                # On a CPU a comparison that gives floats is vectorised; one that gives booleans takes far longer.
                mask.copy_(torch.gt(values, high, out=torch.empty_like(values)))
                if low < high:
                    inside = torch.ge(values, low, out=torch.empty_like(values)).to(torch.bool).logical_xor_(mask)
                    index = _positions(inside if kept is None else inside.logical_and_(kept))
                    found.append(Inside(name, start, mask, index, values[index].cpu()))
                if kept is not None:
                    mask.logical_and_(kept)
                start += len(mask)
        return masks, found

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

    # ------------------------------------------------------------------ reading

    def _taking_part(self, name: str) -> Tensor:
        score, within = self._read(name)
        return torch.ones_like(score, dtype=torch.bool) if within is None else within.clone()

    def _read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The scores of one tensor and which of them take part, both in one memory layout without gaps."""
        score = self._scores[name].detach()
        if not score.permute(by_stride(score)).is_contiguous():
            score = score.contiguous()
        within = self._within.get(name)
        if within is not None and (within.stride() != score.stride() or within.device != score.device):
            within = torch.empty_like(score, dtype=torch.bool).copy_(within)
        return score, within

    def _pieces(self, score: Tensor, within: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Flat pieces of what :meth:`_read` gave: the scores in the common type, and which of them take part."""
        kept: Iterator[Tensor | None] = iter(()) if within is None else flat_pieces(within)
        for values in flat_pieces(score):
            values = values.to(self._dtype)
            yield (values + 0.0 if self._negative_zero else values), next(kept, None)


def keep_above(found: Sequence[Inside], bound: float | int) -> None:
    """Also keep what is found above ``bound``, in the masks themselves."""
    for part in found:
        part.mask[part.index[(part.values > bound).to(part.index.device)]] = True


def nan_error(name: str, nan: int, total: int) -> SelectionError:
    """What to say of scores that are NaN."""
    return SelectionError(
        f"the scores of {name!r} hold {nan} NaN among {total} entries, so nothing can be selected; look for a loss or "
        "a learning rate that made the weights diverge."
    )


def flat_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views of a tensor's entries in the order in which they lie in memory; whole where there is no cache to mind."""
    flat = tensor.permute(by_stride(tensor)).view(-1)
    return iter(flat.split(_PIECE) if tensor.device.type == "cpu" else (flat,))


def by_stride(tensor: Tensor) -> list[int]:
    """The axes of a tensor, from the one with the longest stride to the one with the shortest."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _positions(few: Tensor) -> Tensor:
    """Where a flat mask is ``True``, when it rarely is: eight entries are looked at as one number."""
    if few.numel() < 8:
        return few.nonzero().squeeze(1)
    whole = few.numel() // 8 * 8
    eights = few[:whole].view(torch.int64).nonzero().squeeze(1)
    hits = few[:whole].view(-1, 8)[eights].nonzero()
    rest = few[whole:].nonzero().squeeze(1) + whole
    return torch.cat([eights[hits[:, 0]] * 8 + hits[:, 1], rest])


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

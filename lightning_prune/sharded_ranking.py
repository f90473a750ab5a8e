"""Exact order statistics over scores that are sharded between processes, without bringing them together.

Each process counts its own part as :mod:`lightning_prune.ranking` does; only the counts of 2^16 buckets are added up,
two to four times for a selection, and once one number a tensor. What travels does not depend on how many scores there
are. The result is the single process's, ties included: of equal scores the later position in the whole leaves first.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.errors import ConfigError
from lightning_prune.ranking import (
    BUCKETS,
    Bracket,
    Inside,
    Pool,
    by_stride,
    flat_pieces,
    keep_above,
    nan_error,
)
from lightning_prune.sharding import Layout, add_up, local


class ShardedPool(Pool):
    """Scores that compete with each other, of which each process holds a part. Every method is a collective.

    Args:
        scores: This process's parts of the scores, by name; of plain tensors, which are the same on all processes, the
            whole.
        names: The tensors that take part; their order is the order of ties.
        within: Entries that take part, by name, in the layout of the scores.
        dtype: The type in which scores are compared.
        layout: Of the scores.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        names: Sequence[str],
        within: Mapping[str, Tensor],
        dtype: torch.dtype,
        layout: Layout,
    ) -> None:
        super().__init__(scores, names, {name: local(mask) for name, mask in within.items()}, dtype)
        self._layout = layout
        self._owned = [name for name in names if name in layout.owned]

    def keep_largest(self, remove: int) -> dict[str, Tensor]:
        """Masks in the layout of the scores, as :meth:`Pool.keep_largest` makes them of the whole."""
        counts = self._count_highest()
        if remove == 0:
            return {name: self._layout.spread(name, self._taking_part(name)) for name in self._names}
        bracket = self._bracket(remove, counts)
        low, high = self._bounds(bracket)
        masks, found = self._split(low, high)
        if low < high:  # else all scores inside are equal: at the last bits, and at infinities before
            bracket = self._refine(remove, bracket, found)
        bound, _ = self._bounds(bracket)
        keep_above(found, bound)
        self._keep_first(masks, found if low < high else None, bound, bracket.inside - (remove - bracket.below))
        return {name: self._layout.spread(name, mask) for name, mask in masks.items()}

    def ordered(self) -> Tensor:
        """Refused: there is no place for all scores.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "this counting rule needs all scores in one place, and they are sharded between processes. Use "
            "counting='exact', or 'hrank', 'deconstructing_lt' or 'edge_popup', which only count."
        )

    # ------------------------------------------------------------------ counting

    def _count_highest(self) -> Tensor:
        counts = torch.zeros(BUCKETS, dtype=torch.int64)
        for name in self._owned:
            counts += self._count_of(name)
        nan = dict.fromkeys(self._names, 0) | self._count_nan(self._owned, counts)
        own = torch.cat([counts, torch.tensor(list(nan.values()))])
        total, everyones = add_up(own, self._layout.total).split([BUCKETS, len(nan)])
        for name, number in zip(self._names, everyones.tolist(), strict=True):
            if number:
                raise nan_error(name, number, self._layout.parts[name].shape.numel())
        return self._count_highest() if self._must_count_anew(total) else total

    def _count_inside(self, prefix: int, shift: int) -> Tensor:
        return add_up(self._count_inside_of(self._owned, prefix, shift), self._layout.total)

    def _refine(self, n: int, bracket: Bracket, found: Sequence[Inside]) -> Bracket:
        """The one value that the ``n``-th smallest score has, by what was found within ``bracket``."""
        own = [part.values.view(self._word) for part in found if part.name in self._layout.owned]
        words = torch.cat(own) if own else torch.empty(0, dtype=self._word)
        while bracket.shift:
            words = words[(words >> bracket.shift) == bracket.prefix]
            next_bits = (words >> (bracket.shift - 16)).bitwise_and_(BUCKETS - 1)
            counts = add_up(torch.bincount(next_bits, minlength=BUCKETS), self._layout.total)
            bracket = self._narrow(n, bracket, counts)
        return bracket

    # ---------------------------------------------------------------------- ties

    def _keep_first(
        self, masks: Mapping[str, Tensor], inside: Sequence[Inside] | None, bound: float | int, keep: int
    ) -> None:
        """Also keep the first ``keep`` scores that are exactly ``bound``, by order of names and flat index."""
        if keep == 0:  # the same on all processes
            return
        found: dict[str, list[Inside]] | None = None if inside is None else {name: [] for name in self._names}
        for part in inside or ():
            assert found is not None
            found[part.name].append(part)
        own = [
            sum(len(index) for _, index, _ in self._equal(name, masks, found, bound)) if name in self._owned else 0
            for name in self._names
        ]
        for name, equal in zip(self._names, add_up(torch.tensor(own, dtype=torch.int64)).tolist(), strict=True):
            if keep == 0:
                return
            last = None if equal <= keep else self._nth_place(name, masks, found, bound, keep)
            for mask, index, positions in self._equal(name, masks, found, bound):
                if last is not None:
                    index = index[self._places(name, masks[name], positions) <= last]
                mask[index] = True
            keep -= min(keep, equal)

    def _equal(
        self, name: str, masks: Mapping[str, Tensor], found: Mapping[str, list[Inside]] | None, bound: float | int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Where scores of a tensor are ``bound``: pieces of its mask, positions there and in this process's part."""
        if found is not None:
            for part in found[name]:
                index = part.index[(part.values == bound).to(part.index.device)]
                yield part.mask, index, part.start + index
            return
        start = 0
        for (values, kept), mask in zip(self._pieces(*self._read(name)), flat_pieces(masks[name]), strict=True):
            equal = values == bound
            index = (equal if kept is None else equal.logical_and_(kept)).nonzero().squeeze(1)
            yield mask, index, start + index
            start += len(mask)

    def _places(self, name: str, part: Tensor, positions: Tensor) -> Tensor:
        """Flat indices in the whole tensor of positions in this process's part, as it lies in memory."""
        offset, whole = self._layout.parts[name].box.offset, self._layout.parts[name].shape
        places, rest, stride = torch.zeros_like(positions), positions, 1
        coordinates = {}
        for axis in reversed(by_stride(part)):
            coordinates[axis] = rest % part.shape[axis] + offset[axis]
            rest = rest // part.shape[axis]
        for axis in reversed(range(part.dim())):
            places += coordinates[axis] * stride
            stride *= whole[axis]
        return places

    def _nth_place(
        self,
        name: str,
        masks: Mapping[str, Tensor],
        found: Mapping[str, list[Inside]] | None,
        bound: float | int,
        n: int,
    ) -> int:
        """The ``n``-th smallest flat index, counted from 1, of scores of a tensor that are ``bound``."""
        prefix = 0
        for shift in reversed(range(0, max(1, self._layout.parts[name].shape.numel().bit_length()), 16)):
            counts = torch.zeros(BUCKETS, dtype=torch.int64)
            if name in self._owned:
                for _, _, positions in self._equal(name, masks, found, bound):
                    places = self._places(name, masks[name], positions)
                    inside = places[(places >> (shift + 16)) == prefix]
                    counts += torch.bincount((inside >> shift) & (BUCKETS - 1), minlength=BUCKETS).cpu()
            reached = add_up(counts, self._layout.total).cumsum(0)
            bucket = int(torch.searchsorted(reached, n))
            n -= int(reached[bucket - 1]) if bucket else 0
            prefix = prefix * BUCKETS + bucket
        return prefix

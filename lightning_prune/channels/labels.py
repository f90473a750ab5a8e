"""Channel labels: an identity for every position of every parameter's axes, carried through recorded operations.

A label is an integer: position ``i`` along axis ``a`` of a parameter or buffer. Activations carry the labels of the
weights that made them. 0 stands for a position that never leaves (padding, a constant).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from lightning_prune.channels.recording import Op, Value
from lightning_prune.errors import TraceError

if TYPE_CHECKING:
    from lightning_prune.channels.approximate import Statistic

FIXED = 0
FIXED_SIZE = "it meets a tensor that does not shrink"
MAX_ENTRIES = 100_000_000  # two int64 arrays each: 1.6 GB


def span(factor: np.ndarray) -> tuple[int, ...]:
    """The axes along which a label array varies."""
    return tuple([a for a, size in enumerate(factor.shape) if size > 1])


def lift(factor: np.ndarray, ndim: int) -> np.ndarray:
    """Prepend axes of size 1, as broadcasting does."""
    return factor if factor.ndim == ndim else factor.reshape((1,) * (ndim - factor.ndim) + factor.shape)


_WIDTH_WORDS = (
    "head", "group", "dim", "channel", "chs", "width", "inner", "hidden", "size", "feature", "plane", "embed",
)  # fmt: skip


def width_attributes(module: nn.Module) -> dict[str, int]:
    """A module's integer attributes that by their names are widths or counts of channels."""
    return {n: v for n, v in vars(module).items() if type(v) is int and any(word in n for word in _WIDTH_WORDS)}


def size_lists(module: nn.Module) -> dict[str, list[int] | tuple[int, ...]]:
    """A module's attributes that are lists of integers, such as the sizes that it splits an axis into."""
    lists = {n: v for n, v in vars(module).items() if isinstance(v, (list, tuple)) and len(v) > 1}
    return {n: v for n, v in lists.items() if all(type(size) is int for size in v)}


@dataclass(frozen=True, slots=True)
class Slot:
    """The labels of one axis of one parameter or buffer: ``base`` to ``base + size - 1``."""

    name: str
    axis: int
    base: int
    size: int


@dataclass(frozen=True, slots=True)
class Product:
    """The multiply-adds of one operation: ``constant`` times the kept entries of each label array."""

    op: Op
    constant: int
    arrays: tuple[np.ndarray, ...]


class Labels:
    """What propagation finds: which labels must leave together, which must stay, which rows must stay equally long.

    Args:
        given: Label arrays by parameter name and axis, for a network whose channels were removed already; by default
            every axis gets fresh labels.
        approximate: Whether channels may leave from what a normalisation averages over.
        trusted: Modules whose sizes are known to follow a removal although Python code spells them out.
        thinned: Attention modules in which every head loses the same places, instead of heads that leave whole.
    """

    def __init__(
        self,
        given: dict[str, list[np.ndarray]] | None = None,
        approximate: bool = False,
        trusted: frozenset[str] = frozenset(),
        thinned: frozenset[str] = frozenset(),
    ) -> None:
        self.given = given
        self.approximate = approximate
        self.trusted = trusted
        self.thinned = thinned
        self.count = 1
        self.entries = 0
        self.slots: list[Slot] = []
        self.edges: list[tuple[np.ndarray, np.ndarray, Op]] = []
        self.frozen: list[tuple[np.ndarray, str, Op | None]] = []
        self.issued: list[np.ndarray] = []
        self.consuming: list[np.ndarray] = []
        self.silenced: list[np.ndarray] = []  # read by no weight: zero where they are made, if they leave
        # rows of which each must keep as many as the others, and whether a row that is one channel may leave whole
        self.balanced: list[tuple[np.ndarray, Op, bool]] = []
        self.thick: set[str | None] = set()  # weights of grouped convolutions with several inputs a group
        self.suspects: list[tuple[np.ndarray, Op]] = []
        self.products: list[Product] = []
        self.grouped: list[tuple[str, str, np.ndarray, int]] = []
        self.statistics: list[Statistic] = []
        self.normalised: list[tuple[str, np.ndarray]] = []
        self.reordered = False
        self.interleaved: dict[int, tuple[np.ndarray, int]] = {}  # by identity: array, how many rows are interleaved
        self.modules: dict[str, nn.Module] = {}
        self.op: Op | None = None
        self._leaves: dict[str, list[np.ndarray]] = {}
        self._buffers: list[tuple[int, int]] = []  # least and greatest label of each buffer's axes

    def factors(self, value: Value) -> list[np.ndarray]:
        """The label arrays of a value; a parameter or buffer gets one for each of its axes on first use."""
        if value.factors is None:
            value.factors = self._leaf(value) if value.name is not None else []
        return value.factors

    def known(self, name: str) -> list[np.ndarray]:
        """The label arrays that a parameter or buffer has by now."""
        return self._leaves.get(name, [])

    def _leaf(self, value: Value) -> list[np.ndarray]:
        assert value.name is not None
        if value.name in self._leaves:  # seen in an earlier recording of the same model
            return self._leaves[value.name]
        factors = self._leaves[value.name] = []
        ndim = len(value.shape)
        for axis, size in enumerate(value.shape):
            if size <= 1:
                continue
            if self.given is not None:
                ids = self.given[value.name][axis]
            else:
                ids = np.arange(self.count, self.count + size)
                self.slots.append(Slot(value.name, axis, self.count, size))
                self.count += size
            if value.buffer:
                self._buffers.append((int(ids.min()), int(ids.max())))
            factors.append(ids.reshape((1,) * axis + (size,) + (1,) * (ndim - axis - 1)))
        return factors

    def unify(self, a: np.ndarray, b: np.ndarray) -> None:
        """Demand that entries at the same place leave together.

        Raises:
            TraceError: The demands of the whole model would need too much memory.
        """
        if a is not b:
            assert self.op is not None
            self.entries += a.size
            if self.entries > MAX_ENTRIES:
                raise TraceError(
                    f"following channels up to {self.op.where()} gave {self.entries} bonds between them, more than the "
                    f"{MAX_ENTRIES} that are held in memory. Trace a part of the model, or a narrower one."
                )
            self.edges.append((a.ravel(), b.ravel(), self.op))

    def freeze(self, factors: np.ndarray | Iterable[np.ndarray], reason: str) -> None:
        """Demand that no label in these arrays leaves."""
        for factor in [factors] if isinstance(factors, np.ndarray) else factors:
            self.frozen.append((factor.ravel(), reason, self.op))

    def silence(self, factors: Iterable[np.ndarray]) -> None:
        """Note that an operation without weights reads these labels, as if those that leave were 0 there."""
        for factor in factors:
            self.consuming.append(factor.ravel())
            self.silenced.append(factor.ravel())

    def collapse(self, factor: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Make labels along ``axes`` leave together, so that the array no longer varies there."""
        for axis in axes:
            if factor.shape[axis] > 1:
                first = np.take(factor, [0], axis=axis)
                self.unify(np.broadcast_to(first, factor.shape), factor)
                factor = first
        return factor

    def along(self, value: Value, axis: int) -> np.ndarray | None:
        """The labels along one axis as a vector; a joint array is collapsed over its other axes. None if unlabelled."""
        axis %= len(value.shape)
        for factor in self.factors(value):
            if factor.shape[axis] > 1:
                others = [a for a in span(factor) if a != axis]
                return (self.collapse(factor, others) if others else factor).reshape(-1)
        return None

    def meet(self, a: Value, a_axis: int, b: Value, b_axis: int, what: str) -> None:
        """Demand that two axes of the same size lose the same positions."""
        first, second = self.along(a, a_axis), self.along(b, b_axis)
        if first is not None and second is not None:
            self.unify(first, second)
        elif first is not None:
            self.freeze(first, f"{what} does not shrink")
        elif second is not None:
            self.freeze(second, f"{what} does not shrink")

    def drop(self, value: Value, axes: Iterable[int], reason: str, free: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
        """Factors left when ``axes`` are mixed: joint arrays are collapsed over them, others on them are frozen.

        Those in ``free`` are left out, and not frozen.
        """
        left = []
        mixed = {a % len(value.shape) for a in axes} if value.shape else set()
        for factor in self.factors(value):
            varying = set(span(factor))
            if any(factor is f for f in free):
                continue
            if not varying & mixed:
                left.append(factor)
            elif varying <= mixed:
                self.freeze(factor, reason)
            else:
                left.append(self.collapse(factor, sorted(varying & mixed)))
        return left

    def suspect(self, factor: np.ndarray) -> None:
        """Note that the operation's sizes were written out in Python, which may not follow a removal."""
        assert self.op is not None
        if self.op.module not in self.trusted:
            self.suspects.append((factor.ravel(), self.op))

    def held(self, places: Iterable[int]) -> bool:
        """Whether the running module keeps all these sizes as attributes, which a removal can change along."""
        assert self.op is not None
        module = self.modules.get(self.op.module)
        return module is not None and set(places) <= set(width_attributes(module).values())

    def held_as_list(self, sizes: Sequence[int]) -> bool:
        """Whether the running module keeps these sizes as one list."""
        assert self.op is not None
        module = self.modules.get(self.op.module)
        return module is not None and any(list(v) == list(sizes) for v in size_lists(module).values())

    def balance_pieces(self, factor: np.ndarray, axis: int, pieces: Sequence[np.ndarray]) -> None:
        """Demand that equal pieces of an axis stay equally long.

        Where the axis interleaves several rows (a shuffle), each piece must also hold equally many of each row: the
        code cuts by position, so what lies in a piece depends on it.
        """
        assert self.op is not None
        self.balanced.append((np.stack([np.moveaxis(p, axis, 0).ravel() for p in pieces]), self.op, False))
        _, rows = self.interleaved.get(id(factor), (factor, 1))
        if rows > 1 and len(span(factor)) == 1 and all(p.size % rows == 0 for p in pieces):
            for piece in pieces:
                self.balanced.append((piece.reshape(-1, rows).T, self.op, True))

    def product(self, sizes: Sequence[int], factors: Sequence[np.ndarray]) -> None:
        """Note the multiply-adds of an index space; wider label arrays stand for narrower ones on the same axes."""
        assert self.op is not None
        free, chosen = set(range(len(sizes))), []
        for factor in sorted(factors, key=lambda f: -len(span(f))):
            varying = set(span(factor))
            if varying and varying <= free:
                chosen.append(factor.ravel())
                free -= varying
        constant = 1
        for axis in free:
            constant *= sizes[axis]
        self.products.append(Product(self.op, constant, tuple(chosen)))

    def join(self, operands: Sequence[Value], shape: tuple[int, ...]) -> list[np.ndarray]:
        """Labels of an element-wise result: labels that meet are unified, one that meets a fixed size is frozen."""
        ndim = len(shape)
        merged: list[np.ndarray] = []
        sizes: list[int] = [1] * ndim
        for value in operands:
            if not value.shape:
                continue
            pad = ndim - len(value.shape)
            own = [lift(f, ndim) for f in self.factors(value)]
            # Where a value is constant because a factory made it so, it counts as broadcast.
            own_sizes = [1] * pad + [1 if a in value.wild else n for a, n in enumerate(value.shape)]
            if merged or own:
                merged = self._join_two(merged, sizes, own, own_sizes)
            sizes = [max(a, b) for a, b in zip(sizes, own_sizes, strict=True)]
        self._suspect_constants(operands, ndim, merged)
        return merged

    def _suspect_constants(self, operands: Sequence[Value], ndim: int, factors: Sequence[np.ndarray]) -> None:
        """A constant that meets channels may have its size written out in Python."""
        long = {a + ndim - len(v.shape) for v in operands for a in v.wild if v.shape[a] > 1}
        for factor in factors:
            if long & set(span(factor)):
                self.suspect(factor)

    def _join_two(
        self, first: list[np.ndarray], first_sizes: list[int], second: list[np.ndarray], second_sizes: list[int]
    ) -> list[np.ndarray]:
        merged, left = [], list(second)
        for f in first:
            kept = self._meet(f, left, first_sizes, second_sizes)
            if kept is not None:
                merged.append(kept)
        for g in left:
            kept = self._beside(g, first_sizes)
            if kept is not None and not any(set(span(kept)) & set(span(f)) for f in merged):
                merged.append(kept)
        return merged

    def _meet(
        self, f: np.ndarray, left: list[np.ndarray], first_sizes: list[int], second_sizes: list[int]
    ) -> np.ndarray | None:
        """Bind ``f`` to what it meets of the other operand's ``left``; what is left of it, None if it is frozen."""
        varying = set(span(f))
        # By identity: == on arrays is element-wise.
        index = next((i for i, g in enumerate(left) if varying & set(span(g))), None)
        if index is None:
            return self._beside(f, second_sizes)
        g = left.pop(index)
        if varying == set(span(g)):
            self.unify(f, g)
            return f
        for joint, part, sizes in ((f, g, second_sizes), (g, f, first_sizes)):
            axes, extra = span(part), sorted(set(span(joint)) - set(span(part)))
            if not set(axes) < set(span(joint)):
                continue
            if self._of_buffer(part) and max(extra) < min(axes) and all(sizes[a] == 1 for a in extra):
                # The same constant in every row (a rotary embedding in every head): rows leave whole.
                self.freeze(part, "every row of channels reads it")
                rows = self.collapse(joint, axes)
                if joint is f:
                    return self._meet(rows, left, first_sizes, second_sizes)
                left.append(rows)
                return None
            self.unify(self.collapse(joint, extra), part)
            return joint
        self.freeze([f, g], FIXED_SIZE)
        return None

    def _beside(self, factor: np.ndarray, sizes: list[int]) -> np.ndarray | None:
        """Labels that meet a tensor without any: rows stay whole along the axes where it has a size of its own."""
        fixed = [a for a in span(factor) if sizes[a] > 1]
        if fixed and len(fixed) == len(span(factor)):
            self.freeze(factor, FIXED_SIZE)  # and no longer carried: merged axes would be frozen for its sake
            return None
        return self.collapse(factor, fixed) if fixed else factor

    def _of_buffer(self, factor: np.ndarray) -> bool:
        first = int(factor.flat[0])
        return any(low <= first <= high for low, high in self._buffers)

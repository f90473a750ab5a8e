"""Channel groups: channels that can only leave together, and axes that may not leave, with the reason."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from lightning_prune.channels.labels import FIXED, Labels, Slot
from lightning_prune.channels.recording import Op


@dataclass(eq=False)
class ChannelGroup:
    """Channels of one kind: each leaves from the same axes of the same tensors.

    Attributes:
        name: Name of the layer that makes these channels (the first of several).
        size: How many channels the group has.
        channels: Component number of each channel, in the order of the layer that makes them.
        members: Parameters and buffers that shrink, as (name, axis, entries for each channel).
        makers: The (name, axis) pairs among the members that make the channel; the others read it or go along.
        key: Identifies the group among traces of the same code at different widths.
        tied: Whether its width is bound to other groups' (halves of a chunk, groups of a shuffle).
    """

    name: str
    size: int
    channels: np.ndarray
    members: list[tuple[str, int, int]]
    makers: list[tuple[str, int]]
    key: int = 0
    tied: bool = False
    _slots: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, repr=False)

    def positions(self, name: str, axis: int) -> np.ndarray:
        """Where each channel lies along an axis of a member: (size, entries for each channel) of indices."""
        return self._slots[name, axis]


@dataclass(frozen=True)
class FrozenAxis:
    """Channels that may not leave.

    Attributes:
        name: The parameter that makes them.
        axis: Its axis.
        size: How many of the axis' positions are frozen.
        reason: Why.
        where: The operation that demands it.
    """

    name: str
    axis: int
    size: int
    reason: str
    where: str


@dataclass(eq=False)
class Balance:
    """Rows of channels that must keep equally many: ``sum(matrix[row] * kept) + fixed[row]`` is the same for all rows.

    ``matrix`` is (rows, groups): entries in a row for each channel of a group; ``fixed`` counts entries that never
    leave.
    """

    matrix: np.ndarray
    fixed: np.ndarray
    op: Op


@dataclass(eq=False)
class Grouping:
    """Components of labels, and what follows from them."""

    component: np.ndarray
    removable: np.ndarray
    groups: list[ChannelGroup]
    frozen: list[FrozenAxis]
    balances: list[Balance]
    group_of: np.ndarray


def components(labels: Labels) -> np.ndarray:
    """The component of each label: labels joined by an edge leave together. Label 0 stays alone."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if not labels.edges:
        return np.arange(labels.count)
    a = np.concatenate([e[0] for e in labels.edges])
    b = np.concatenate([e[1] for e in labels.edges])
    free = (a != FIXED) & (b != FIXED)
    a, b = a[free], b[free]
    graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(labels.count, labels.count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _reasons(labels: Labels, component: np.ndarray) -> tuple[np.ndarray, list[tuple[str, Op | None]]]:
    """For each component the index of the first reason that freezes it, or -1; and the reasons."""
    count = int(component.max()) + 1
    why = np.full(count, -1)
    reasons: list[tuple[str, Op | None]] = []
    entries = list(labels.frozen)
    for a, b, op in labels.edges:
        for one, other in ((a, b), (b, a)):
            if one[0] == FIXED or (one == FIXED).any():
                hit = other[(one == FIXED) & (other != FIXED)]
                if hit.size:
                    entries.append((hit, "it meets positions that never leave (padding or a constant)", op))
    for array, reason, op in reversed(entries):  # the first reason is written last
        why[component[array[array != FIXED]]] = len(reasons)
        reasons.append((reason, op))
    return why, reasons


def _hashes(component: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Sum of 64-bit keys over the labels of each component (wraps around)."""
    order = np.argsort(component, kind="stable")
    starts = np.searchsorted(component[order], np.arange(count))
    return np.add.reduceat(keys[order], starts)


def _slot_of(labels: Labels) -> np.ndarray:
    index = np.full(labels.count, -1)
    for i, slot in enumerate(labels.slots):
        index[slot.base : slot.base + slot.size] = i
    return index


def _row_matrices(
    labels: Labels, component: np.ndarray, removable: np.ndarray
) -> list[tuple[np.ndarray, Op, tuple[int, int]]]:
    """Balance demands that are not met by themselves: (rows, entries) of components, -1 for what never leaves."""
    found = []
    for number, (array, op, whole) in enumerate(labels.balanced):
        sizes = [n for n in array.shape if n > 1]
        comps = np.where(array == FIXED, -1, component[array])
        comps = np.where((comps >= 0) & removable[comps], comps, -1)
        for level in range(1, len(sizes)):
            rows = comps.reshape(int(np.prod(sizes[:level])), -1)
            ordered = np.sort(rows, axis=1)
            if (ordered == ordered[:1]).all() or (whole and (ordered[:, :1] == ordered[:, -1:]).all()):
                continue
            found.append((rows, op, (number, level)))
    return found


def _freeze_unbalanced(rows_list: list[tuple[np.ndarray, Op, tuple[int, int]]], removable: np.ndarray) -> dict[int, Op]:
    """A row that cannot shrink keeps the others whole: components to freeze, with the operation that demands it."""
    lost: dict[int, Op] = {}
    changed = True
    while changed:
        changed = False
        for rows, op, _ in rows_list:
            free = (rows >= 0) & removable[rows]
            if free.any() and not free.any(axis=1).all():
                for c in np.unique(rows[free]):
                    lost[int(c)] = op
                    removable[c] = False
                changed = True
    return lost


def _touched(component: np.ndarray, arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Whether each component has a label in these arrays."""
    touched = np.zeros(int(component.max()) + 1, dtype=bool)
    for array in arrays:
        touched[component[array[array != FIXED]]] = True
    return touched


def make_groups(labels: Labels) -> Grouping:
    """Sort all labels into channel groups and frozen axes."""
    component = components(labels)
    why, reasons = _reasons(labels, component)
    # What nothing was seen to read may be read where nobody looks: through NumPy, or a list of numbers.
    removable = _touched(component, labels.issued) & _touched(component, labels.consuming) & (why < 0)
    removable[component[FIXED]] = False
    rows_list = _row_matrices(labels, component, removable)
    for c, op in _freeze_unbalanced(rows_list, removable).items():
        why[c] = len(reasons)
        reasons.append(("other channels that must stay equally many cannot leave", op))
    slot_of, hashes = _hashed_by_slots(labels, component)
    rows_list = [entry for entry in rows_list if ((entry[0] >= 0) & removable[entry[0]]).any()]
    for rows, _, number in rows_list:
        row_keys = np.random.default_rng(number).integers(1, 2**63, size=len(rows), dtype=np.uint64)
        flat, keys = rows.ravel(), np.repeat(row_keys, rows.shape[1])
        np.add.at(hashes, flat[flat >= 0], keys[flat >= 0])
    groups, group_of = _collect_groups(labels, component, removable, hashes, slot_of)
    balances = _balances(rows_list, removable, group_of, groups)
    frozen = _frozen_axes(labels, component, removable, why, reasons)
    return Grouping(component, removable, groups, frozen, balances, group_of)


def frozen_groups(labels: Labels, grouping: Grouping) -> list[ChannelGroup]:
    """Channels that may not leave, sorted like those that may: each of a group lies in the same axes."""
    component = grouping.component
    held = _touched(component, labels.issued) & ~grouping.removable
    held[component[FIXED]] = False
    slot_of, hashes = _hashed_by_slots(labels, component)
    return _collect_groups(labels, component, held, hashes, slot_of)[0] if held.any() else []


def _hashed_by_slots(labels: Labels, component: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The slot of each label, and for each component a number that says how often it lies in which slots."""
    slot_of = _slot_of(labels)
    random = np.random.default_rng(0)
    slot_keys = random.integers(1, 2**63, size=len(labels.slots) + 1, dtype=np.uint64)
    keys = np.where(slot_of >= 0, slot_keys[slot_of], 0).astype(np.uint64)
    return slot_of, _hashes(component, keys, int(component.max()) + 1)


def _collect_groups(
    labels: Labels, component: np.ndarray, removable: np.ndarray, hashes: np.ndarray, slot_of: np.ndarray
) -> tuple[list[ChannelGroup], np.ndarray]:
    group_of = np.full(len(removable), -1)
    issued = np.zeros(labels.count, dtype=bool)
    for array in labels.issued:
        issued[array] = True
    ids = np.flatnonzero(removable[component] & (slot_of >= 0))
    # Labels sorted by group (in order of first appearance), slot, component order.
    keys = hashes[component[ids]]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    group_of[component[ids]] = rank[inverse]
    groups: list[ChannelGroup] = []
    by_group = np.argsort(rank[inverse], kind="stable")
    bounds = np.searchsorted(rank[inverse][by_group], np.arange(len(first) + 1))
    names: dict[str, int] = {}
    for g in range(len(first)):
        own = ids[by_group[bounds[g] : bounds[g + 1]]]
        group = _one_group(labels, component, own, slot_of, issued)
        group.key = int(hashes[group.channels[0]])
        names[group.name] = names.get(group.name, 0) + 1
        if names[group.name] > 1:
            group.name += f" ({names[group.name]})"
        groups.append(group)
    return groups, group_of


def _one_group(
    labels: Labels, component: np.ndarray, own: np.ndarray, slot_of: np.ndarray, issued: np.ndarray
) -> ChannelGroup:
    slots = slot_of[own]
    cuts = np.flatnonzero(np.diff(slots)) + 1
    pieces = np.split(own, cuts)
    lead = next((p for p in pieces if issued[p[0]]), pieces[0])
    _, index = np.unique(component[lead], return_index=True)
    channels = component[lead][np.sort(index)]
    place = np.empty(int(channels.max()) + 1, dtype=np.int64)
    place[channels] = np.arange(len(channels))
    members, makers, positions = [], [], {}
    for piece in pieces:
        slot: Slot = labels.slots[slot_of[piece[0]]]
        order = np.argsort(place[component[piece]], kind="stable")
        table = (piece[order] - slot.base).reshape(len(channels), -1)
        members.append((slot.name, slot.axis, table.shape[1]))
        positions[slot.name, slot.axis] = table
        if issued[piece[0]]:
            makers.append((slot.name, slot.axis))
    name = labels.slots[slot_of[lead[0]]].name
    name = name.rpartition(".")[0] or name
    return ChannelGroup(name, len(channels), channels, members, makers, _slots=positions)


def _balances(
    rows_list: list[tuple[np.ndarray, Op, tuple[int, int]]],
    removable: np.ndarray,
    group_of: np.ndarray,
    groups: list[ChannelGroup],
) -> list[Balance]:
    balances = []
    for rows, op, _ in rows_list:
        matrix = np.zeros((len(rows), len(groups)))
        fixed = np.zeros(len(rows))
        for r, row in enumerate(rows):
            free = row[(row >= 0) & removable[row]]
            np.add.at(matrix[r], group_of[free], 1)
            fixed[r] = len(row) - len(free)
        sizes = np.array([g.size for g in groups])
        matrix /= sizes
        for g in np.flatnonzero(matrix.any(axis=0)):
            groups[g].tied = True
        balances.append(Balance(matrix, fixed, op))
    return balances


def _frozen_axes(
    labels: Labels, component: np.ndarray, removable: np.ndarray, why: np.ndarray, reasons: list[tuple[str, Op | None]]
) -> list[FrozenAxis]:
    issued = np.zeros(labels.count, dtype=bool)
    for array in labels.issued:
        issued[array] = True
    frozen = []
    for slot in labels.slots:
        ids = slice(slot.base, slot.base + slot.size)
        if not issued[slot.base]:
            continue
        held = ~removable[component[ids]]
        if not held.any():
            continue
        numbers = why[component[ids]][held]
        number = numbers[numbers >= 0][:1]
        reason, op = reasons[int(number[0])] if number.size else ("no recorded operation reads it as channels", None)
        frozen.append(FrozenAxis(slot.name, slot.axis, int(held.sum()), reason, op.where() if op else "the model"))
    return frozen

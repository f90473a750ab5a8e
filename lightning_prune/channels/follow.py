"""Does the forward code follow a removal? Try it: shrink, run, compare every operation with what labels predict."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lightning_prune.channels.attention import replaced
from lightning_prune.channels.groups import make_groups
from lightning_prune.channels.labels import FIXED, Labels
from lightning_prune.channels.recording import Op, Recording, record
from lightning_prune.channels.surgery import named_tensors, set_attributes, substituted, take
from lightning_prune.errors import PruneError

if TYPE_CHECKING:
    from lightning_prune.channels.plan import RemovalPlan
    from lightning_prune.channels.trace import ChannelGraph

MAX_TRIALS = 12
MAX_FITS = 24
# Whether memory must be copied depends on sizes (of a single head, never): these ops are not held against each other.
_COPIES = {"clone", "contiguous"}
_VIEWS = {"view", "_unsafe_view", "_reshape_alias", "reshape"}


@dataclass
class Outcome:
    """How the compact model's recording differs from the prediction.

    Attributes:
        index: Number of the first operation that differs, or None.
        why: What differs there.
        orders: New orders of kept indices, by (name, axis), where channels arrive shuffled.
        child: The compact model's whole recording, if it ran to the end.
    """

    index: int | None = None
    why: str = ""
    orders: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    child: Recording | None = None


class _ChildLabels(Labels):
    """Labels of a compact model: its axes carry the labels that its parent's had, and whatever meets must agree."""

    def __init__(self, graph: "ChannelGraph", plan: "RemovalPlan") -> None:
        given: dict[str, list[np.ndarray]] = {}
        self.slot_of = np.full(graph.labels.count, -1)
        self.parent = graph.labels
        for number, slot in enumerate(graph.labels.slots):
            ids = np.arange(slot.base, slot.base + slot.size)
            self.slot_of[ids] = number
            keep = plan.keep.get(slot.name, {}).get(slot.axis)
            axes = given.setdefault(slot.name, [])
            axes += [np.zeros(1, dtype=np.int64)] * (slot.axis + 1 - len(axes))
            axes[slot.axis] = ids if keep is None else ids[keep]
        for name, tensor in named_tensors(graph.model).items():
            axes = given.setdefault(name, [])
            axes += [np.zeros(n, dtype=np.int64) for n in tensor.shape[len(axes) :]]
        super().__init__(given, graph.labels.approximate)
        self.component = graph.grouping.component.copy()
        self.component[FIXED] = -1
        self.removable = graph.grouping.removable
        self.used: set[int] = set()
        self.bad: list[Op] = []
        self.orders: dict[tuple[str, int], list[int]] = {}

    def unify(self, a: np.ndarray, b: np.ndarray) -> None:
        if a is b:
            return
        a, b = a.reshape(-1), b.reshape(-1)
        left, right = self.component[a], self.component[b]
        if a.shape == b.shape and (left == right).all():
            self._mark(a, b)
            return
        assert self.op is not None
        if a.shape != b.shape or (not self._reorder(a, right) and not self._reorder(b, left)):
            one_fixed = (
                a.shape == b.shape and not self._removable(a[left != right]) and not self._removable(b[left != right])
            )
            if not one_fixed and not self._one_row(left, b) and not self._one_row(right, a):
                self.bad.append(self.op)
        self._mark(a, b)

    def _removable(self, ids: np.ndarray) -> bool:
        ids = ids[ids != FIXED]
        return bool(ids.size and self.removable[self.component[ids]].any())

    def _one_row(self, components: np.ndarray, others: np.ndarray) -> bool:
        """Whether all belong to one channel, such as the only head left, and meet what never leaves."""
        return (
            components.shape == others.shape
            and bool((components == components[:1]).all())
            and (not self._removable(others))
        )

    def _mark(self, *arrays: np.ndarray) -> None:
        for array in arrays:
            if array.size and array[0] != FIXED:
                self.used.add(int(self.slot_of[array[0]]))

    def _reorder(self, ids: np.ndarray, wanted: np.ndarray) -> bool:
        """Put an axis that nothing has met yet into the order in which its channels arrive."""
        number = int(self.slot_of[ids[0]])
        if number < 0 or number in self.used:
            return False
        slot = self.parent.slots[number]
        own = self.given[slot.name][slot.axis]  # type: ignore[index]
        if own.shape != ids.shape or (np.sort(own) != np.sort(ids)).any():
            return False
        have = np.argsort(self.component[own], kind="stable")
        want = np.argsort(wanted, kind="stable")
        if (self.component[own][have] != wanted[want]).any():
            return False
        order = np.empty(len(own), dtype=np.int64)
        order[want] = own[have]
        own[...] = order  # in place: every label array of this axis is a view of it
        self.orders[slot.name, slot.axis] = (order - slot.base).tolist()
        return True


def run_child(graph: "ChannelGraph", plan: "RemovalPlan") -> tuple[Recording, str | None]:
    """Record the model as the plan would leave it, with its own values. The model is as it was afterwards.

    Returns:
        The recording, cut short at an error, and the error.
    """
    tensors = named_tensors(graph.model)
    small = {name: take(tensors[name], axes) for name, axes in plan.keep.items()}
    recording = Recording()
    before = set_attributes(graph.model, plan.attributes)
    try:
        with replaced(graph.model, graph.replaced), substituted(graph.model, small):
            record(graph.model, graph.example_inputs, into=recording)
    except Exception as error:
        return recording, f"{type(error).__name__}: {error}"
    finally:
        set_attributes(graph.model, before)
    return recording, None


def examine(graph: "ChannelGraph", plan: "RemovalPlan", stays: np.ndarray) -> Outcome:
    """Run the compact model and hold each of its operations against the parent's.

    Args:
        graph: The traced parent.
        plan: What leaves.
        stays: Whether each label stays.
    """
    from lightning_prune.channels.trace import propagate

    parent = graph.recordings[0]
    child, error = run_child(graph, plan)
    outcome = Outcome()
    cache: dict[int, int] = {}
    ours = [i for i, op in enumerate(parent.ops) if op.name not in _COPIES]
    theirs = [i for i, op in enumerate(child.ops) if op.name not in _COPIES]
    seen = child.ops
    for one, other in zip(ours, theirs, strict=False):
        difference = _differs(parent.ops[one], child.ops[other], stays, cache)
        if difference:
            outcome.index, outcome.why, seen = one, difference, child.ops[:other]
            break
    else:
        if error or len(ours) != len(theirs):
            outcome.index = ours[min(len(theirs), len(ours) - 1)]
            outcome.why = error or "another number of operations ran"
    labels = _ChildLabels(graph, plan)
    propagate([Recording(seen, [] if outcome.index is not None else child.outputs)], labels)
    outcome.child = None if error else child
    if labels.bad:
        places = dict(zip(theirs, ours, strict=False))
        first = next(places[i] for i, op in enumerate(seen) if op is labels.bad[0] and i in places)
        if outcome.index is None or first < outcome.index:
            outcome.index, outcome.why = first, "channels meet in another order or number"
    outcome.orders = labels.orders
    return outcome


def _differs(parent: Op, child: Op, stays: np.ndarray, cache: dict[int, int]) -> str:
    if parent.name != child.name and not {parent.name, child.name} <= _VIEWS:
        return f"{child.name} ran in the place of {parent.name}"
    for one, other in zip(parent.outs, child.outs, strict=False):
        if len(one.shape) != len(other.shape):
            return f"{parent.name} gave {other.shape}"
        left = set(range(len(one.shape)))
        for factor in one.factors or []:
            axes = [a for a, n in enumerate(factor.shape) if n > 1]
            left -= set(axes)
            if id(factor) not in cache:
                cache[id(factor)] = int(stays[factor].sum())
            if int(np.prod([other.shape[a] for a in axes])) != cache[id(factor)]:
                return f"{parent.name} gave {other.shape} where {cache[id(factor)]} channels were expected"
        wild = one.wild
        if any(one.shape[a] != other.shape[a] for a in left if a not in wild):
            return f"{parent.name} gave {other.shape} for {one.shape}, along an axis that should not change"
    return ""


def fit_shuffled(
    graph: "ChannelGraph", widths: np.ndarray, values: list[np.ndarray]
) -> tuple[np.ndarray, "RemovalPlan", Outcome]:
    """Adjust bound widths to what the compact model's own wiring makes of them.

    Code that cuts a shuffled axis by position decides by itself how many of each kind of channel end up where. Where
    the
    given widths do not come out, the compact model is traced as a network of its own: its groups have the same keys as
    the parent's, and their sizes are the widths that fit. Where the parent has too few channels of a kind, the next
    narrower width is tried.

    Args:
        graph: The traced parent.
        widths: Channels kept of each group, as the budget would have it.
        values: Scores of each group's channels.

    Returns:
        The components that stay, the plan, and how the compact model follows it (not at all, if nothing fits).
    """
    from lightning_prune.channels.budget import LEVELS, Family, families

    bound = [Family(graph, members, 1) for members in families(graph)]
    levels = [LEVELS] * len(bound)
    widths = widths.copy()
    kept, plan, outcome = _attempt(graph, widths, values)
    for _ in range(MAX_FITS):
        if outcome.index is None:
            break
        found, unfit = _settle(graph, outcome, widths)
        if not unfit:
            if (found == widths).all():
                break
            kept, plan, outcome = _attempt(graph, found, values)
            if outcome.index is None:
                break
            unfit = {g for g, group in enumerate(graph.groups) if group.tied and widths[g] < group.size}
        for number, family in enumerate(bound):
            if not unfit & set(family.members.tolist()):
                continue
            now = widths[family.members].sum()
            while levels[number] > 1 and family.state(levels[number]).sum() >= now:
                levels[number] -= 1
            narrower = family.state(levels[number])
            widths[family.members] = narrower if narrower.sum() < now else family.state(LEVELS)
        kept, plan, outcome = _attempt(graph, widths, values)
    return kept, plan, outcome


def _attempt(
    graph: "ChannelGraph", widths: np.ndarray, values: list[np.ndarray]
) -> tuple[np.ndarray, "RemovalPlan", Outcome]:
    from lightning_prune.channels.plan import choose, make_plan

    kept = choose(graph, values, widths)
    plan = make_plan(graph, kept)
    stays = kept[graph.grouping.component]
    stays[FIXED] = True
    return kept, plan, examine(graph, plan, stays)


def _settle(graph: "ChannelGraph", outcome: Outcome, widths: np.ndarray) -> tuple[np.ndarray, set[int]]:
    """Widths by the compact model's own groups, and the numbers of groups of which the parent has too few."""
    from lightning_prune.channels.trace import propagate

    if outcome.child is None:
        return widths, set()
    for op in outcome.child.ops:
        for value in [*op.tensors(), *op.outs]:
            value.factors = None
    labels = Labels(approximate=graph.labels.approximate, trusted=graph.labels.trusted)
    groups = {group.key: group for group in make_groups(propagate([outcome.child], labels)).groups}
    found, unfit = widths.copy(), set()
    owners: dict[tuple[str, int], int] = {}
    for number, group in enumerate(graph.groups):
        if not group.tied:
            continue
        own = groups.pop(group.key, None)
        found[number] = 0 if own is None else min(own.size, group.size)
        if own is not None and own.size > group.size:
            unfit.add(number)
        owners.update({(name, axis): number for name, axis, _ in group.members})
    for group in groups.values():  # kinds of channels that the parent does not have
        unfit |= {owners[name, axis] for name, axis, _ in group.members if (name, axis) in owners and group.tied}
    return found, unfit


def followed(graph: "ChannelGraph", plan: "RemovalPlan", kept: np.ndarray) -> bool:
    """Whether the forward code follows a plan; where it does not, the channels there are frozen.

    Trials cannot show every bond: code may take the size of one group from another whose trial width was the same.
    """
    stays = kept[graph.grouping.component]
    stays[FIXED] = True
    outcome = examine(graph, plan, stays)
    if outcome.index is None:
        return True
    _freeze_at(graph, graph.recordings[0].ops[outcome.index], outcome.why, everything=False)
    graph.grouping = make_groups(graph.labels)
    return False


def freeze_fixed_sizes(graph: "ChannelGraph") -> None:
    """Freeze channels whose sizes the forward code holds fixed, found by trying to remove half of them.

    Only channels that pass an operation whose sizes Python spelled out are tried. Where the compact model fails or
    takes another shape, the channels there are frozen, in every module of that kind, and the rest is tried again.
    """
    passed = 0
    for trial in range(MAX_TRIALS):
        widths = _trial(graph, uneven=passed == 1)
        if widths is None:
            if passed:
                return
            passed = 1
            continue
        blank = [np.zeros(group.size) for group in graph.groups]
        try:
            if graph.labels.reordered and any(group.tied for group in graph.groups):
                outcome = fit_shuffled(graph, widths, blank)[2]
            else:
                outcome = _attempt(graph, widths, blank)[2]
        except PruneError as error:
            outcome = Outcome(0, str(error))
        if outcome.index is None:
            passed += 1
            if passed == 2:
                return
            continue
        passed = 0
        op = graph.recordings[0].ops[outcome.index]
        _freeze_at(graph, op, outcome.why, everything=trial >= MAX_TRIALS - 2)
        graph.grouping = make_groups(graph.labels)


def _trial(graph: "ChannelGraph", uneven: bool) -> np.ndarray | None:
    """Widths when every group that passes a spelled-out size loses channels; None if there is nothing to try.

    Args:
        graph: The traced model.
        uneven: Whether groups lose different fractions: code may take the size of one from another. Bound widths then
            stay as they are.
    """
    from lightning_prune.channels.budget import LEVELS, Family, families

    grouping = graph.grouping
    touched: set[int] = set()
    for array, _ in graph.labels.suspects:
        numbers = grouping.group_of[grouping.component[array[array != FIXED]]]
        touched.update(np.unique(numbers[numbers >= 0]).tolist())
    free = sorted(g for g in touched if not graph.groups[g].tied)
    if uneven:  # every group: a size that is spelled out for frozen channels may come from any of them
        free = [g for g, group in enumerate(graph.groups) if not group.tied and group.size > 1]
        alike: dict[int, int] = {}
        widths = {}
        for g in free:  # groups of one size get different widths, in turn
            size = graph.groups[g].size
            alike[size] = alike.get(size, 0) + max(1, (size - 1) // 3)
            widths[g] = 1 + alike[size] % max(1, size - 1)
        return np.array([widths.get(g, group.size) for g, group in enumerate(graph.groups)]) if len(free) else None
    widths = {g: max(1, graph.groups[g].size // 2) for g in free}
    for members in families(graph):
        if touched & set(members):
            family = Family(graph, members, 1)
            widths.update(zip(members, family.state(LEVELS // 2).tolist(), strict=True))
    if all(n == graph.groups[g].size for g, n in widths.items()):
        return None
    return np.array([widths.get(g, group.size) for g, group in enumerate(graph.groups)])


def _met_in(graph: "ChannelGraph", module: str) -> set[int]:
    """Removable components that the operations of a module meet."""
    grouping, found = graph.grouping, set()
    for op in graph.recordings[0].ops:
        if op.module != module:
            continue
        for value in [*op.tensors(), *op.outs]:
            for factor in value.factors or []:
                found.update(np.unique(grouping.component[factor[factor != FIXED]]).tolist())
    return {int(c) for c in found if grouping.removable[c]}


def _freeze_at(graph: "ChannelGraph", op: Op, why: str, everything: bool) -> None:
    """Freeze what an operation that did not follow touches; likewise in every other module of that kind."""
    labels, grouping = graph.labels, graph.grouping
    modules = dict(graph.model.named_modules())
    kind = type(modules.get(op.module))
    near = set()
    for value in [*op.tensors(), *op.outs]:
        for factor in value.factors or []:
            near.update(np.unique(grouping.component[factor[factor != FIXED]]).tolist())
    near = {c for c in near if grouping.removable[c]}
    live: list[tuple[np.ndarray, set[int], Op]] = []
    places: list[tuple[type, int]] = []
    counts: dict[str, int] = {}
    for array, suspect in labels.suspects:
        place = (type(modules.get(suspect.module)), counts.setdefault(suspect.module, 0))
        counts[suspect.module] += 1
        comps = grouping.component[array[array != FIXED]]
        if grouping.removable[comps].any():
            live.append((array, set(np.unique(comps).tolist()), suspect))
            places.append(place)
    # The spelled-out sizes next to the failure and their like in other modules of the kind; else all in the kind.
    hits = {place for place, (_, comps, _) in zip(places, live, strict=True) if near & comps}
    hit = [array for place, (array, _, _) in zip(places, live, strict=True) if place in hits or everything]
    if not hit and op.module:
        hit = [array for array, _, suspect in live if type(modules.get(suspect.module)) is kind]
    reason = f"the forward code holds its size fixed ({why[:160]})"
    labels.op = op
    if not hit and near:
        hit = [np.flatnonzero(np.isin(grouping.component, list(near)))]
    if not hit:  # sizes of channels that stay were taken from channels that leave: from some that this module meets
        touched = _met_in(graph, op.module)
        hit = [np.flatnonzero(np.isin(grouping.component, list(touched)))] if touched else []
    if not hit:  # nothing of what was tried is near: none of it can be trusted
        hit = [array for array, _ in labels.suspects]
    labels.freeze(hit, reason)
    labels.op = None

"""Does the forward code follow a removal? Try it: shrink, run, compare every operation with what labels predict."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_prune.channels.attention import replaced
from lightning_prune.channels.labels import FIXED, Labels
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.plan_content import choose, make_plan
from lightning_prune.channels.recording import Op, Recording, record
from lightning_prune.channels.surgery import named_tensors, set_attributes, substituted, take
from lightning_prune.channels.trace import ChannelGraph, propagate

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

    def __init__(self, graph: ChannelGraph, plan: RemovalPlan) -> None:
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
        self.thinned = graph.labels.thinned
        self.thick = graph.labels.thick  # one input a group may be all that is left
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

    def held(self, places: Iterable[int]) -> bool:
        return True  # the child ran, so its attributes were right

    def held_as_list(self, sizes: Sequence[int]) -> bool:
        return True

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


def run_child(graph: ChannelGraph, plan: RemovalPlan) -> tuple[Recording, str | None]:
    """Record the model as the plan would leave it, with its own values. The model is as it was afterwards.

    Returns:
        The recording, cut short at an error, and the error.
    """
    tensors = named_tensors(graph.model)
    small = {name: take(tensors[name], axes) for name, axes in plan.keep.items()}
    for name, tensor in small.items():  # matrix products go other ways where nothing needs a gradient
        tensor.requires_grad_(tensors[name].requires_grad)
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


def examine(graph: ChannelGraph, plan: RemovalPlan, stays: np.ndarray) -> Outcome:
    """Run the compact model and hold each of its operations against the parent's.

    Args:
        graph: The traced parent.
        plan: What leaves.
        stays: Whether each label stays.
    """
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


def attempt(
    graph: ChannelGraph, widths: np.ndarray, values: list[np.ndarray]
) -> tuple[np.ndarray, RemovalPlan, Outcome]:
    """Plan these widths, and see whether the compact model follows: components that stay, the plan, the outcome."""
    kept = choose(graph, values, widths)
    plan = make_plan(graph, kept)
    stays = kept[graph.grouping.component]
    stays[FIXED] = True
    return kept, plan, examine(graph, plan, stays)

"""Sizes that forward code holds fixed: found by trying, frozen where the compact model does not follow."""

import numpy as np

from lightning_prune.channels.budget import LEVELS, Family, families
from lightning_prune.channels.follow import Outcome, attempt, examine
from lightning_prune.channels.groups import make_groups
from lightning_prune.channels.labels import FIXED
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.recording import Op, record
from lightning_prune.channels.shuffles import fit_shuffled
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.errors import PruneError

MAX_TRIALS = 12


def followed(graph: ChannelGraph, plan: RemovalPlan, kept: np.ndarray) -> bool:
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


def freeze_fixed_sizes(graph: ChannelGraph, settled: bool) -> bool:
    """Freeze channels whose sizes the forward code holds fixed, found by trying to remove half of them.

    Only channels that pass an operation whose sizes Python spelled out are tried. Where the compact model fails or
    takes another shape, the channels there are frozen, in every module of that kind, and the rest is tried again.

    Returns:
        False if the model itself, not ``settled`` yet, ran other operations than when it was recorded: code that keeps
        something from its first call. Nothing is frozen then, so that it can be recorded again.
    """
    passed = 0
    for trial in range(MAX_TRIALS):
        widths = _trial(graph, uneven=passed == 1)
        if widths is None:
            if passed:
                return True
            passed = 1
            continue
        blank = [np.zeros(group.size) for group in graph.groups]
        try:
            if graph.labels.reordered and any(group.tied for group in graph.groups):
                outcome = fit_shuffled(graph, widths, blank)[2]
            else:
                outcome = attempt(graph, widths, blank)[2]
        except PruneError as error:
            outcome = Outcome(0, str(error))
        if outcome.index is None:
            passed += 1
            if passed == 2:
                return True
            continue
        passed = 0
        if not settled:
            again, settled = record(graph.model, graph.example_inputs), True
            if [op.name for op in again.ops] != [op.name for op in graph.recordings[0].ops]:
                return False
        op = graph.recordings[0].ops[outcome.index]
        _freeze_at(graph, op, outcome.why, everything=trial >= MAX_TRIALS - 2)
        graph.grouping = make_groups(graph.labels)
    return True


def _trial(graph: ChannelGraph, uneven: bool) -> np.ndarray | None:
    """Widths when every group that passes a spelled-out size loses channels; None if there is nothing to try.

    Args:
        graph: The traced model.
        uneven: Whether groups lose different fractions: code may take the size of one from another. Bound widths then
            stay as they are.
    """
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
            least = min(2, size - 1)  # an axis of length 1 carries no labels, so that little could be compared
            widths[g] = least + alike[size] % max(1, size - least)
        return np.array([widths.get(g, group.size) for g, group in enumerate(graph.groups)]) if len(free) else None
    widths = {g: max(1, graph.groups[g].size // 2) for g in free}
    for members in families(graph):
        if touched & set(members):
            family = Family(graph, members, 1)
            widths.update(zip(members, family.state(LEVELS // 2).tolist(), strict=True))
    if all(n == graph.groups[g].size for g, n in widths.items()):
        return None
    return np.array([widths.get(g, group.size) for g, group in enumerate(graph.groups)])


def _met_in(graph: ChannelGraph, module: str, within: bool = False) -> set[int]:
    """Removable components that the operations of a module meet, or also those of the modules within it."""
    grouping, found = graph.grouping, set()
    for op in graph.recordings[0].ops:
        if op.module != module and not (within and op.module.startswith(f"{module}.")):
            continue
        for value in [*op.tensors(), *op.outs]:
            for factor in value.factors or []:
                found.update(np.unique(grouping.component[factor[factor != FIXED]]).tolist())
    return {int(c) for c in found if grouping.removable[c]}


def _freeze_at(graph: ChannelGraph, op: Op, why: str, everything: bool) -> None:
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
        touched = _met_in(graph, op.module) or _met_in(graph, op.module, within=True)
        hit = [np.flatnonzero(np.isin(grouping.component, list(touched)))] if touched else []
    if not hit:  # nothing of what was tried is near: none of it can be trusted
        hit = [array for array, _ in labels.suspects]
    labels.freeze(hit, reason)
    labels.op = None

"""Widths that come out of shuffles: code that cuts a shuffled axis by position decides what ends up where."""

import numpy as np

from lightning_prune.channels.budget import LEVELS, Family, families
from lightning_prune.channels.follow import Outcome, attempt
from lightning_prune.channels.groups import make_groups
from lightning_prune.channels.labels import Labels
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.trace import ChannelGraph, propagate

MAX_FITS = 24


def fit_shuffled(
    graph: ChannelGraph, widths: np.ndarray, values: list[np.ndarray]
) -> tuple[np.ndarray, RemovalPlan, Outcome]:
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
    bound = [Family(graph, members, 1) for members in families(graph)]
    levels = [LEVELS] * len(bound)
    widths = widths.copy()
    kept, plan, outcome = attempt(graph, widths, values)
    for _ in range(MAX_FITS):
        if outcome.index is None:
            break
        found, unfit = _settle(graph, outcome, widths)
        if not unfit:
            if (found == widths).all():
                break
            kept, plan, outcome = attempt(graph, found, values)
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
        kept, plan, outcome = attempt(graph, widths, values)
    return kept, plan, outcome


def _settle(graph: ChannelGraph, outcome: Outcome, widths: np.ndarray) -> tuple[np.ndarray, set[int]]:
    """Widths by the compact model's own groups, and the numbers of groups of which the parent has too few."""
    if outcome.child is None:
        return widths, set()
    for op in outcome.child.ops:
        for value in [*op.tensors(), *op.outs]:
            value.factors = None
    labels = Labels(approximate=graph.labels.approximate, trusted=graph.labels.trusted, thinned=graph.labels.thinned)
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

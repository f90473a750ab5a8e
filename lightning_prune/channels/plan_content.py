"""From the channels that stay to a plan: indices by tensor and axis, and module attributes that hold sizes."""

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_prune.channels.approximate import normalised_sizes, statistics_of
from lightning_prune.channels.attention import narrowed, replaced
from lightning_prune.channels.budget import CostModel
from lightning_prune.channels.labels import FIXED, size_lists, width_attributes
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.recording import Value
from lightning_prune.channels.rules.shape import free_axes
from lightning_prune.channels.surgery import leaf_attributes
from lightning_prune.channels.trace import ChannelGraph


def choose(graph: ChannelGraph, values: list[np.ndarray], widths: np.ndarray) -> np.ndarray:
    """Whether each component stays: the best-scored channels of each group do; of equals, the earlier."""
    kept = np.ones(len(graph.grouping.removable), dtype=bool)
    for group, value, width in zip(graph.groups, values, widths, strict=True):
        order = np.argsort(-value, kind="stable")
        kept[group.channels[order[width:]]] = False
    return kept


def make_plan(graph: ChannelGraph, kept: np.ndarray, costs: CostModel | None = None) -> RemovalPlan:
    """Turn the components that stay into a plan."""
    costs = costs or CostModel(graph)
    labels, grouping = graph.labels, graph.grouping
    stays = kept[grouping.component]
    stays[FIXED] = True
    tensors: dict[str, Tensor] = {**dict(graph.model.named_parameters()), **dict(graph.model.named_buffers())}
    reading = np.zeros(labels.count, dtype=bool)
    for array in labels.consuming:
        reading[array] = True
    silent = np.zeros(len(grouping.removable), dtype=bool)
    for array in labels.silenced:
        silent[grouping.component[array]] = True
    reading |= silent[grouping.component]
    plan = RemovalPlan({}, {})
    for slot in labels.slots:
        ids = slice(slot.base, slot.base + slot.size)
        own = stays[ids]
        if own.all():
            continue
        plan.keep.setdefault(slot.name, {})[slot.axis] = np.flatnonzero(own).tolist()
        plan.shapes[slot.name] = list(tensors[slot.name].shape)
        if reading[ids].any():
            plan.reads.append((slot.name, slot.axis))
    after = np.array([int(kept[g.channels].sum()) for g in graph.groups])
    plan.groups = [{"name": g.name, "size": g.size, "kept": int(n)} for g, n in zip(graph.groups, after, strict=True)]
    plan.costs = {w: (costs.cost(w, costs.sizes), costs.cost(w, after)) for w in ("channels", "params", "macs")}
    plan.training, plan.unseen = graph.training, list(graph.unseen)
    plan.without_effect = [name for name in graph.without_effect if name in plan.keep]
    plan.attributes = leaf_attributes(graph.model, plan, _group_counts(graph, stays))
    plan.statistics = statistics_of(graph, stays)
    for module, sizes in normalised_sizes(graph.model, plan.statistics).items():
        plan.attributes.setdefault(module, {}).update(sizes)
    for module, channels in labels.normalised:
        if isinstance(graph.model.get_submodule(module), _NormBase) and not stays[channels].all():
            plan.attributes[module] = {"num_features": int(stays[channels].sum())}
    for module, changes in _written_sizes(graph, stays).items():
        for attribute, value in changes.items():
            plan.attributes.setdefault(module, {}).setdefault(attribute, value)
    with replaced(graph.model, graph.replaced):
        names, sizes = narrowed(graph.model, plan, graph.labels.thinned)
    plan.replaced = {name: graph.replaced[name] for name in names if name in graph.replaced}
    for module, changes in sizes.items():
        plan.attributes.setdefault(module, {}).update(changes)
    return plan


def _group_counts(graph: ChannelGraph, stays: np.ndarray) -> dict[str, int]:
    """How many groups each grouped convolution and GroupNorm has left, by module name."""
    return {module: int(stays[table].sum()) for _, module, table, _ in graph.labels.grouped}


def _written_sizes(graph: ChannelGraph, stays: np.ndarray) -> dict[str, dict[str, Any]]:
    """Attributes of modules whose code spelled out a size that changes: head counts, inner widths, sizes of pieces."""
    modules = dict(graph.model.named_modules())
    found: dict[str, dict[str, Any]] = {}
    conflicts: set[tuple[str, str]] = set()

    def change(module: str, attribute: str, after: Any) -> None:
        if found.setdefault(module, {}).setdefault(attribute, after) != after:
            conflicts.add((module, attribute))

    for factor, op in graph.labels.suspects:
        if stays[factor].all():
            continue
        cut = op.name.startswith(("split", "slice"))
        value = op.args[0] if cut else op.outs[0]
        changes = size_changes(value.factors or [], stays)
        free = free_axes(op, len(value.shape))
        constant = {n for a, n in enumerate(value.shape) if a not in free and all(a != axis for axis, _, _ in changes)}
        if cut:  # the pieces' own sizes too, along the axis that is cut
            pieces = [one for out in op.outs for one in size_changes(out.factors or [], stays)]
            changes += [(axis, before, after) for axis, before, after in pieces if value.shape[axis] != before]
        for axis, before, after in changes:
            if axis in free and before in constant:  # an attribute of this value holds the other size, which stays
                continue
            for attribute, number in width_attributes(modules[op.module]).items():
                if number == before:
                    change(op.module, attribute, after)
        if len(op.outs) > 1:
            for attribute, sizes in size_lists(modules[op.module]).items():
                for axis in range(len(op.outs[0].shape)):
                    if [out.shape[axis] for out in op.outs] == list(sizes):
                        change(op.module, attribute, [_along(out, axis, stays) for out in op.outs])
    for module, places, groups in _own_groups(graph, modules):
        for attribute, number in width_attributes(modules[module]).items():
            if number == groups and not stays[places].all():
                change(module, attribute, int(stays[places].sum()))
    for name, attribute in conflicts:
        del found[name][attribute]
    return found


def _own_groups(graph: ChannelGraph, modules: dict[str, nn.Module]) -> list[tuple[str, np.ndarray, int]]:
    """Grouped convolutions that code other than torch's own modules calls: module, one label a group, groups."""
    known = (_ConvNd, nn.GroupNorm)
    return [(m, table, len(table)) for _, m, table, _ in graph.labels.grouped if not isinstance(modules[m], known)]


def _along(value: Value, axis: int, stays: np.ndarray) -> int:
    """How many positions of an axis stay."""
    return next((after for a, _, after in size_changes(value.factors or [], stays) if a == axis), value.shape[axis])


def size_changes(factors: list[np.ndarray], stays: np.ndarray) -> list[tuple[int, int, int]]:
    """Each labelled axis, and its size before and after removal, where it changes and is the same in every row."""
    changes = []
    for factor in factors:
        alive = stays[factor]
        for axis, size in enumerate(factor.shape):
            if size == 1:
                continue
            inner = tuple(range(axis + 1, factor.ndim))
            counts = (alive.any(axis=inner) if inner else alive).sum(axis=axis)
            counts = np.unique(counts[counts > 0])
            if len(counts) == 1 and counts[0] != size:
                changes.append((axis, size, int(counts[0])))
    return changes

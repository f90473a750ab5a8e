"""Removal plans: which channels leave, by parameter and axis; JSON that a fresh model replays without inputs."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_prune.channels.alignment import AUTO, RoundTo, resolve_round_to
from lightning_prune.channels.approximate import normalised_sizes, statistics_of
from lightning_prune.channels.attention import narrowed, replaced
from lightning_prune.channels.budget import LEVELS, Budget, CostModel, Family, families, search
from lightning_prune.channels.labels import FIXED, size_lists, width_attributes
from lightning_prune.channels.plan_checks import check_content
from lightning_prune.channels.recording import Value
from lightning_prune.channels.residual import BlockScores
from lightning_prune.channels.rules.shape import free_axes
from lightning_prune.channels.scores import ChannelScores, fetch, resolve
from lightning_prune.channels.surgery import check_fits, leaf_attributes
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.errors import ConfigError, FileFormatError, TraceError
from lightning_prune.prunable import close_names
from lightning_prune.wrappers import bare, uncompiled

VERSION = 1


@dataclass
class RemovalPlan:
    """Which positions of which axes stay, and which module attributes change with them.

    Attributes:
        keep: For each parameter or buffer that shrinks: axis -> indices that stay, in their new order.
        shapes: Shape before removal of each tensor in ``keep``.
        reads: The (name, axis) pairs that read channels: the masked parent has zeros there.
        attributes: New values of module attributes, by module name.
        groups: One entry a group: name, size before, size after.
        costs: ``channels``, ``params`` and ``macs``: (before, after). MACs at the traced example inputs. With a latency
            budget ``latency``: nanoseconds.
        latency: With a latency budget what was measured: ratio and interval against the original, candidates, device.
        training: Whether the check must also run the branches that only training takes.
        replaced: Modules that are replaced by ones with a free inner width before channels leave: name -> kind.
        statistics: Operations that average over channels of which some leave: module, which of the module's, ``axis``
            from the end, indices that stay. Empty unless the graph was traced with ``approximate=True``.
        unseen: Parameters that the traced pass did not use. Code that chooses its path by values may use them later.
        without_effect: Parameters on which no output depended in the traced pass; the check cannot see them.
        left: Residual blocks that leave whole: their name, the module and its additions, and what stands for each
            module that leaves. ``shapes`` then has the tensors that leave with them.
    """

    keep: dict[str, dict[int, list[int]]]
    shapes: dict[str, list[int]]
    reads: list[tuple[str, int]] = field(default_factory=list)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[str, tuple[int, int]] = field(default_factory=dict)
    training: bool = False
    replaced: dict[str, str] = field(default_factory=dict)
    statistics: list[dict[str, Any]] = field(default_factory=list)
    latency: dict[str, Any] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)
    left: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON content."""
        content = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        content["keep"] = {n: {str(a): i for a, i in axes.items()} for n, axes in self.keep.items()}
        return {"version": VERSION, **content}

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | str) -> "RemovalPlan":
        """Read what :meth:`to_json` gave (content, or its text).

        Raises:
            FileFormatError: Not a plan, or one of a later version.
        """
        try:
            data = dict(json.loads(content) if isinstance(content, str) else content)
            version = data.pop("version")
            if not isinstance(version, int) or version > VERSION:
                raise FileFormatError(
                    f"the plan has version {version!r}, this library reads up to {VERSION}; upgrade lightning-prune."
                )
            data["keep"] = {n: {int(a): list(i) for a, i in axes.items()} for n, axes in data["keep"].items()}
            data["reads"] = [(str(n), int(a)) for n, a in data["reads"]]
            data["costs"] = {k: (int(v[0]), int(v[1])) for k, v in data["costs"].items()}
            plan = cls(**data)
            check_content(plan)
            return plan
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"this is not a removal plan ({type(error).__name__}: {error}).") from error

    def apply_(self, model: nn.Module) -> None:
        """Carry the plan out on a fresh model of the original shape, without a check of outputs.

        Raises:
            MaskMismatchError: The model is not of the architecture that the plan was made for.
        """
        from lightning_prune.channels.surgery import carry_out

        model = bare(model)
        with uncompiled(model):
            check_fits(self, model)
            carry_out(self, model)

    def digest(self) -> str:
        """SHA-256 of the plan's content, as hexadecimal text: equal plans have equal digests."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def plan_removal(
    graph: ChannelGraph,
    budget: Budget,
    scores: ChannelScores | BlockScores | None = None,
    round_to: RoundTo | None = None,
    min_channels: int = 1,
    scope: str = "layer",
    granularity: str = "channel",
    max_layer_fraction: float = 1.0,
) -> RemovalPlan:
    """Choose which channels leave, or which residual blocks.

    Args:
        graph: The traced model.
        budget: What to keep; see :class:`Budget`.
        scores: ``{group name: (size,) tensor}`` or a function of a group and the model; higher is kept. None: the L2
            norm of the weights that make the channel, over all layers of its group.
        round_to: Widths become multiples of this (a group that starts narrower or uneven may keep its width). Widths
            that are bound to each other (chunks, shuffles) follow their own balance instead. A number, ``"auto"``, a
            device, or numbers by device type; see :func:`alignment` for the rule. Default: 1; ``"auto"`` for a latency.
        min_channels: Least width of a group, at least 1.
        scope: ``"layer"``: every group loses the same fraction. ``"global"``: scores of all groups compete.
        granularity: ``"channel"``, or ``"block"``: residual blocks leave whole, see :func:`plan_blocks`, and ``scores``
            has a number for each block; the three arguments before this one, and the next, are not for blocks. Plans of
            both kinds can follow each other on one model, which is traced anew in between.
        max_layer_fraction: At most this fraction of any group leaves, in (0, 1].

    Returns:
        The plan. It holds what stays of each parameter and buffer, so it can be replayed on a fresh model.

    Raises:
        BudgetError: The budget cannot be met.
        MeasurementError: A latency too small to be timed.
        ConfigError: An argument out of range, or scores that do not fit.

    Limits:
        Ties in scores: the later channel leaves first.
    """
    if budget.what == "latency":
        from lightning_prune.channels.latency_search import plan_latency

        def plan_at(macs: float) -> RemovalPlan:
            step = AUTO if round_to is None and granularity == "channel" else round_to
            return plan_removal(
                graph, Budget(macs=macs), scores, step, min_channels, scope, granularity, max_layer_fraction
            )

        return plan_latency(graph.model, graph.example_inputs, budget.fraction, plan_at)
    round_to = 1 if round_to is None else round_to
    if granularity not in ("channel", "block"):
        raise ConfigError(f"granularity={granularity!r}: expected 'channel' or 'block'.")
    if granularity == "block":
        from lightning_prune.channels.blocks import plan_blocks

        if (round_to, min_channels, scope, max_layer_fraction) != (1, 1, "layer", 1.0):
            raise ConfigError(
                "round_to, min_channels, scope and max_layer_fraction are for channels; leave them out with blocks."
            )
        return plan_blocks(graph, budget, cast("BlockScores | None", scores))
    round_to = resolve_round_to(round_to, graph.model)
    if min_channels < 1:
        raise ConfigError(f"min_channels={min_channels} must be at least 1.")
    if scope not in ("layer", "global"):
        raise ConfigError(f"scope={scope!r}: expected 'layer' or 'global'.")
    if not 0 < max_layer_fraction <= 1:
        raise ConfigError(f"max_layer_fraction={max_layer_fraction!r} must lie in (0, 1].")
    chosen = cast("ChannelScores | None", scores)

    def widths(costs: CostModel, values: list[np.ndarray]) -> np.ndarray:
        ranked = [np.sort(v) for v in values] if scope == "global" else None
        return search(graph, budget, costs, round_to, min_channels, ranked, max_layer_fraction)

    with uncompiled(graph.model):
        return _plan(graph, widths, chosen)


def plan_widths(graph: ChannelGraph, widths: Mapping[str, int], scores: ChannelScores | None = None) -> RemovalPlan:
    """Choose which channels leave where it is known how many of each group stay.

    Args:
        graph: The traced model.
        widths: Channels that stay, by group name, from 1 to the group's size; a group that is not named stays whole.
            Groups that are bound to each other come as near to the fraction that all of them together keep as their
            balance allows.
        scores: As for :func:`plan_removal`.

    Returns:
        The plan.

    Raises:
        ConfigError: A name that is no group's, or a width that would empty or widen it.
    """
    sizes = {group.name: group.size for group in graph.groups}
    for name, width in widths.items():
        if name not in sizes:
            raise ConfigError(f"widths names {name!r}, which is no group{close_names(name, sizes)}")
        if not 1 <= width <= sizes[name]:
            raise ConfigError(
                f"{width} of {sizes[name]} channels of {name} would stay; expected from 1 (a layer cannot be emptied) "
                f"to {sizes[name]}."
            )

    def wanted(costs: CostModel, values: list[np.ndarray]) -> np.ndarray:
        found = np.array([widths.get(group.name, group.size) for group in graph.groups])
        for members in families(graph):
            level = round(LEVELS * float(found[members].sum() / costs.sizes[members].sum()))
            found[members] = Family(graph, members, 1).state(max(1, level))
        return found

    with uncompiled(graph.model):
        return _plan(graph, wanted, scores)


def _check_any(graph: ChannelGraph) -> None:
    if not graph.groups:
        raise ConfigError("no channel of this model can leave; graph.explain() says why.")


def _plan(
    graph: ChannelGraph,
    choose_widths: Callable[[CostModel, list[np.ndarray]], np.ndarray],
    scores: ChannelScores | None,
) -> RemovalPlan:
    _check_any(graph)
    values = [resolve(scores, group, graph.model).numpy() for group in graph.groups]
    costs = CostModel(graph)
    widths = choose_widths(costs, values)
    if graph.labels.reordered and any(group.tied for group in graph.groups):
        return _shuffled_plan(graph, widths, values)
    kept = choose(graph, values, widths)
    plan = make_plan(graph, kept, costs)
    if graph.labels.suspects:
        from lightning_prune.channels.fixed_sizes import followed

        groups = len(graph.groups)
        if not followed(graph, plan, kept) and len(graph.groups) < groups:  # what is left is planned anew
            return _plan(graph, choose_widths, scores)
    return plan


def _shuffled_plan(graph: ChannelGraph, widths: np.ndarray, values: list[np.ndarray]) -> RemovalPlan:
    """Where channels are shuffled, give every axis that reads them the order in which they arrive."""
    from lightning_prune.channels.shuffles import fit_shuffled

    _, plan, outcome = fit_shuffled(graph, widths, values)
    if outcome.index is not None:
        op = graph.recordings[0].ops[outcome.index]
        raise TraceError(
            f"no width near this budget comes out of the shuffles of the forward code: at {op.where()}, {outcome.why}. "
            "Choose another budget."
        )
    for (name, axis), order in outcome.orders.items():
        plan.keep.setdefault(name, {})[axis] = order
        plan.shapes.setdefault(name, list(fetch(graph.model, name).shape))
    return plan


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

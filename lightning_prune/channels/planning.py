"""Choose which channels leave: so many that a budget is met, or to given widths."""

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np

from lightning_prune.channels.alignment import AUTO, RoundTo, resolve_round_to
from lightning_prune.channels.blocks import plan_blocks
from lightning_prune.channels.budget import LEVELS, Budget, CostModel, Family, families, search
from lightning_prune.channels.fixed_sizes import followed
from lightning_prune.channels.latency_search import plan_latency
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.plan_content import choose, make_plan
from lightning_prune.channels.residual import BlockScores
from lightning_prune.channels.scores import ChannelScores, fetch, resolve
from lightning_prune.channels.shuffles import fit_shuffled
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.errors import ConfigError, TraceError
from lightning_prune.prunable import close_names
from lightning_prune.wrappers import uncompiled


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


def _plan(
    graph: ChannelGraph,
    choose_widths: Callable[[CostModel, list[np.ndarray]], np.ndarray],
    scores: ChannelScores | None,
) -> RemovalPlan:
    if not graph.groups:
        raise ConfigError("no channel of this model can leave; graph.explain() says why.")
    values = [resolve(scores, group, graph.model).numpy() for group in graph.groups]
    costs = CostModel(graph)
    widths = choose_widths(costs, values)
    if graph.labels.reordered and any(group.tied for group in graph.groups):
        return _shuffled_plan(graph, widths, values)
    kept = choose(graph, values, widths)
    plan = make_plan(graph, kept, costs)
    if graph.labels.suspects:
        groups = len(graph.groups)
        if not followed(graph, plan, kept) and len(graph.groups) < groups:  # what is left is planned anew
            return _plan(graph, choose_widths, scores)
    return plan


def _shuffled_plan(graph: ChannelGraph, widths: np.ndarray, values: list[np.ndarray]) -> RemovalPlan:
    """Where channels are shuffled, give every axis that reads them the order in which they arrive."""
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

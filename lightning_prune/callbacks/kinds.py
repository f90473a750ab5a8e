"""What leaves at a cut: channels or whole residual blocks; what each kind is counted, named and kept by."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Protocol

from torch import nn

from lightning_prune.channels.block_scores import parameters_of
from lightning_prune.channels.blocks import BlockCosts, find_blocks
from lightning_prune.channels.budget import CostModel
from lightning_prune.channels.groups import ChannelGroup
from lightning_prune.channels.scores import fetch
from lightning_prune.channels.trace import ChannelGraph


class Kind(Protocol):
    """What a pruner asks of the kind of thing that leaves.

    Attributes:
        unit: What is counted, in the plural.
    """

    unit: str

    def sizes(self, graph: ChannelGraph) -> dict[str, int]:
        """How many units each thing that can leave has, by name."""

    def costs(self, graph: ChannelGraph) -> dict[str, int]:
        """What the network costs now, in units, parameters and multiply-adds."""

    def frozen(self, graph: ChannelGraph) -> list[dict[str, Any]]:
        """What may not leave, with the reason."""

    def hold(self, graph: ChannelGraph, parameters: Iterable[str], reason: str) -> None:
        """Keep whatever these parameters make, in place."""

    def nothing(self, graph: ChannelGraph) -> str:
        """What is said where nothing can leave."""


class Channels:
    """Channels leave, in groups."""

    unit = "channels"

    def sizes(self, graph: ChannelGraph) -> dict[str, int]:
        """Channels of each group."""
        return {group.name: group.size for group in graph.groups}

    def costs(self, graph: ChannelGraph) -> dict[str, int]:
        """Channels that can leave, all parameters, multiply-adds."""
        costs = CostModel(graph)
        return {what: costs.cost(what, costs.sizes) for what in ("channels", "params", "macs")}

    def frozen(self, graph: ChannelGraph) -> list[dict[str, Any]]:
        """Frozen axes."""
        return [asdict(axis) for axis in graph.frozen]

    def hold(self, graph: ChannelGraph, parameters: Iterable[str], reason: str) -> None:
        """Keep the groups whose channels these parameters make."""
        chosen = set(parameters)
        graph.keep_whole([g for g in graph.groups if any(n in chosen for n in _shaping(g, graph.model))], reason)

    def nothing(self, graph: ChannelGraph) -> str:
        """Where to read why."""
        return f"no channel of {type(graph.model).__name__} can leave. trace_channels(...).explain() says why."


class WholeBlocks:
    """Residual blocks leave whole."""

    unit = "blocks"

    def sizes(self, graph: ChannelGraph) -> dict[str, int]:
        """One for each block."""
        return {block.name: 1 for block in find_blocks(graph).removable}

    def costs(self, graph: ChannelGraph) -> dict[str, int]:
        """Blocks that can leave, all parameters, multiply-adds."""
        before = BlockCosts(graph, find_blocks(graph)).before
        return {what: before[what] for what in ("blocks", "params", "macs")}

    def frozen(self, graph: ChannelGraph) -> list[dict[str, Any]]:
        """Residual additions that stay."""
        return [
            {"name": name, "axis": 0, "size": 1, "reason": reason, "where": name}
            for name, reason in find_blocks(graph).staying
        ]

    def hold(self, graph: ChannelGraph, parameters: Iterable[str], reason: str) -> None:
        """Keep the blocks with which one of these parameters would leave."""
        chosen, found = set(parameters), find_blocks(graph)
        found.keep_whole([b for b in found.removable if chosen.intersection(parameters_of(graph.model, b))], reason)

    def nothing(self, graph: ChannelGraph) -> str:
        """What was found."""
        return f"no residual block of {type(graph.model).__name__} can leave. {find_blocks(graph).explain()}"


KINDS: dict[str, Kind] = {"channel": Channels(), "block": WholeBlocks()}
"""By granularity."""


def _shaping(group: ChannelGroup, model: nn.Module) -> list[str]:
    """The parameters that make a group's channels or go with them one to one, not those that read them."""
    return [n for n, _ in group.makers] + [name for name, _, _ in group.members if fetch(model, name).dim() == 1]

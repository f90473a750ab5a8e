"""``lightning-prune channels``: which channels of a network can leave, which stay and why, and what that saves."""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lightning_prune.channels.budget import Budget, CostModel
from lightning_prune.channels.groups import ChannelGroup
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.planning import plan_removal
from lightning_prune.channels.trace import ChannelGraph, trace_channels
from lightning_prune.commands.target import add_target_arguments, load_target
from lightning_prune.errors import ConfigError
from lightning_prune.reports.coverage import shapes_text

WIDTH = 140
"""Columns of the output where it goes to no terminal."""


@dataclass
class GroupFacts:
    """One group as the command shows it: who makes its channels, who reads them, who goes along; and what it costs."""

    group: ChannelGroup
    kept: int | None
    makers: list[str]
    readers: list[str]
    others: list[str]
    params: float
    macs: float

    def content(self) -> dict[str, Any]:
        """The facts as JSON content; costs are fractions of the whole network, saved by halving this group alone."""
        return {
            "name": self.group.name,
            "size": self.group.size,
            **({} if self.kept is None else {"kept": self.kept}),
            "tied": self.group.tied,
            "made_by": self.makers,
            "read_by": self.readers,
            "go_along": self.others,
            "params_saved_by_half": round(self.params, 6),
            "macs_saved_by_half": round(self.macs, 6),
        }


def main(arguments: Sequence[str]) -> None:
    """Trace the network and print its groups, its frozen channels and its costs.

    Raises:
        ConfigError: An option that does not fit.
        BudgetError: A budget that cannot be met.
        TraceError: The network does not run with these inputs.
    """
    parser = argparse.ArgumentParser("lightning-prune channels", description=__doc__)
    add_target_arguments(parser)
    parser.add_argument(
        "--budget", metavar="channels=0.5", help="plan a removal: the fraction kept of channels|params|macs|latency"
    )
    parser.add_argument("--round-to", type=int, metavar="N", help="with --budget: widths are multiples of N")
    parser.add_argument("--min-channels", type=int, default=1, metavar="N", help="with --budget: least width of groups")
    parser.add_argument("--all", action="store_true", help="every group with all its members, and every frozen axis")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    given = parser.parse_args(arguments)
    budget = parse_budget(given.budget) if given.budget else None
    model, inputs = load_target(given)
    graph = trace_channels(model, inputs)
    plan = plan_removal(graph, budget, None, given.round_to, given.min_channels) if budget else None
    facts = group_facts(graph, plan)
    if given.json:
        print(json.dumps(to_json(given.model, graph, plan, facts), indent=1))
    elif given.all:
        print(graph.explain())
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        _print(console, given.model, graph, plan, facts)


def parse_budget(text: str) -> Budget:
    """A budget from ``"channels=0.5"``.

    Raises:
        ConfigError: Of another form, or out of range.
    """
    kind, _, value = text.partition("=")
    try:
        return Budget(**{kind.strip(): float(value)})
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"--budget {text}: expected channels=X, params=X, macs=X or latency=X with X the fraction kept, in (0, 1]."
        ) from error


def group_facts(graph: ChannelGraph, plan: RemovalPlan | None) -> list[GroupFacts]:
    """What the command says about each group."""
    labels, costs = graph.labels, CostModel(graph)
    reading = np.zeros(labels.count, dtype=bool)
    for array in labels.consuming:
        reading[array] = True
    bases = {(slot.name, slot.axis): slot.base for slot in labels.slots}
    whole = {what: max(costs.cost(what, costs.sizes), 1) for what in ("params", "macs")}
    found = []
    for number, group in enumerate(graph.groups):
        makers: list[str] = []
        readers: list[str] = []
        others: list[str] = []
        for name, axis, _ in group.members:
            module = name.rpartition(".")[0] or name
            ids = bases[name, axis] + group.positions(name, axis)
            kind = makers if (name, axis) in group.makers else readers if reading[ids].any() else others
            if module not in kind:
                kind.append(module)
        others = [name for name in others if name not in makers and name not in readers]
        half = costs.sizes.copy()
        half[number] //= 2
        saved = {what: 1 - costs.cost(what, half) / whole[what] for what in whole}
        kept = None if plan is None else int(plan.groups[number]["kept"])
        found.append(GroupFacts(group, kept, makers, readers, others, saved["params"], saved["macs"]))
    return found


def to_json(name: str, graph: ChannelGraph, plan: RemovalPlan | None, facts: Sequence[GroupFacts]) -> dict[str, Any]:
    """Everything the command knows, as JSON content."""
    costs = CostModel(graph)
    whats = ("channels", "params", "macs")
    content: dict[str, Any] = {
        "model": name,
        "inputs": shapes_text(graph.example_inputs),
        "operations": graph.operations,
        "costs": {what: costs.cost(what, costs.sizes) for what in whats},
        "groups": [fact.content() for fact in facts],
        "frozen": [vars(axis) for axis in graph.frozen],
        "unseen": graph.unseen,
    }
    if plan is not None:
        content["kept"] = {what: plan.costs[what][1] for what in whats}
    return content


def _print(
    console: Console, name: str, graph: ChannelGraph, plan: RemovalPlan | None, facts: Sequence[GroupFacts]
) -> None:
    costs = CostModel(graph)
    console.print(f"[bold]{name}[/bold]: {graph.operations} operations recorded at {shapes_text(graph.example_inputs)}")
    for what, label in (("channels", "channels that can leave"), ("params", "parameters"), ("macs", "MACs")):
        after = ""
        if plan is not None:
            kept = plan.costs[what][1]
            after = f" -> {kept:,} ({kept / max(costs.cost(what, costs.sizes), 1):.1%} kept)"
        console.print(f"  {costs.cost(what, costs.sizes):>15,} {label}{after}", highlight=False)
    console.print(_group_table(facts, plan is not None))
    if graph.frozen:
        console.print(_frozen_table(graph))
    if graph.unseen:
        first = ", ".join(graph.unseen[:3])
        console.print(f"{len(graph.unseen)} parameters that the recorded pass did not use stay: {first}", markup=False)
    console.print("Only the path that ran with these example inputs was seen. --all lists every member, --json too.")


def _group_table(facts: Sequence[GroupFacts], planned: bool) -> Table:
    """Groups that are alike but for the numbers in their names share a row."""
    alike: dict[tuple[Any, ...], list[GroupFacts]] = {}
    for fact in facts:
        place, _, leaf = fact.group.name.rpartition(".")
        key = (re.sub(r"\d+", "*", place), "*" if leaf.isdigit() else leaf, fact.group.size, fact.kept, fact.group.tied)
        alike.setdefault(key, []).append(fact)
    tied = any(fact.group.tied for fact in facts)
    table = Table(title=f"{len(facts)} groups: channels of a group leave together", title_justify="left")
    for column in ("groups", "width", *(["kept"] if planned else [])):
        table.add_column(column, justify="right")
    for column in ("made by", "read by", "go along"):
        table.add_column(column, overflow="fold")
    table.add_column("params", justify="right")
    table.add_column("MACs", justify="right")
    for members in alike.values():
        one = members[0]
        width = f"{one.group.size}{' =' if one.group.tied else ''}"
        cells = [str(len(members)), width, *([str(one.kept)] if planned else [])]
        cells += [_names([m.makers for m in members]), _names([m.readers for m in members])]
        cells += [_names([m.others for m in members])]
        cells += [f"{sum(m.params for m in members):.1%}", f"{sum(m.macs for m in members):.1%}"]
        table.add_row(*cells)
    table.caption = "params, MACs: share of the network saved by halving this row's groups, each alone"
    table.caption += "; '=' widths are tied to other groups'" if tied else ""
    table.caption_justify = "left"
    return table


def _names(lists: Sequence[Sequence[str]]) -> str:
    """The first of each group's modules, with ``*`` where several groups differ, and how many more there are."""
    named = [names for names in lists if names]
    if not named:
        return "-"
    parts = [names[0].split(".") for names in named]
    if len({len(p) for p in parts}) == 1:
        first = ".".join(p[0] if len(set(p)) == 1 else "*" for p in zip(*parts, strict=True))
    else:
        first = re.sub(r"\d+", "*", named[0][0])
    least, most = min(len(n) for n in named) - 1, max(len(n) for n in named) - 1
    if most == 0:
        return first
    return f"{first} + {most}" if least == most else f"{first} + {least} to {most}"


def _frozen_table(graph: ChannelGraph) -> Table:
    by_reason: dict[str, list[Any]] = {}
    for axis in graph.frozen:
        by_reason.setdefault(axis.reason, []).append(axis)
    table = Table(title=f"{len(graph.frozen)} axes with channels that stay", title_justify="left")
    table.add_column("axes", justify="right")
    table.add_column("channels", justify="right")
    for column in ("why", "where", "such as"):
        table.add_column(column, overflow="fold")
    for reason, axes in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        where = Counter(re.sub(r"\d+", "*", axis.where) for axis in axes).most_common(1)[0][0]
        example = f"{axes[0].name}, axis {axes[0].axis}"
        table.add_row(str(len(axes)), f"{sum(a.size for a in axes):,}", reason, where, example)
    return table

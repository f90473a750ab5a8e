"""A sweep's report as Markdown, as a table for a spreadsheet and as JSON for programs."""

from dataclasses import asdict
from typing import Any

from lightning_prune.record.content import encode
from lightning_prune.reports.runs import lower_is_better
from lightning_prune.reports.sweep.cells import place_of
from lightning_prune.reports.sweep.fairness import off_limit
from lightning_prune.reports.sweep.result import COSTS, SweepResult
from lightning_prune.reports.sweep.verdicts import Difference
from lightning_prune.reports.sweep.words import (
    cells_in_words,
    differences_in_words,
    how_told,
    scores_in_words,
    sentences,
)
from lightning_prune.reports.tables import Cell as TableCell
from lightning_prune.reports.tables import markdown_of

FORMAT, VERSION = "lightning_prune sweep report", 1


def markdown(result: SweepResult) -> str:
    """The report in Markdown."""
    parts = [f"# Sweep: {result.metric}", _safe(result.fairness)]
    parts += ["\n".join(f"- {_safe(note)}" for note in result.notes)] if result.notes else []
    if result.scores:
        parts += ["## Wins and losses", "Networks and budgets in which a method beats / is worse / cannot be told."]
        parts += [markdown_of(*scores_in_words(result)), "\n".join(f"- {_safe(line)}" for line in sentences(result))]
        parts += [how_told(result)]
    for network, cells in result.networks.items():
        parts.append(f"## {_safe(network)}")
        for title, own in (("Methods", [c for c in cells if not c.role]), ("Controls", [c for c in cells if c.role])):
            if own:
                parts += [f"### {title}", markdown_of(*cells_in_words(result, own))]
        if any(own.cell.network == network for own in result.differences):
            parts += ["### Differences", markdown_of(*differences_in_words(result, cells))]
    return "\n\n".join(parts) + "\n"


def numbers(result: SweepResult) -> tuple[list[str], list[list[TableCell]]]:
    """Heading and rows for a spreadsheet: one row a network, method and budget; the metric as recorded."""
    quantities = (
        "macs",
        "params",
        "nonzero_params",
        "nonzero_macs",
        "latency",
        "before",
        "after_cut",
        "cost",
        "seconds",
    )
    head = ["network", "method", "kind", "control", "budget", "budget_on", "seeds", *quantities]
    head += ["latency_low", "latency_high", result.metric, "deviation", "lowest", "highest", "count"]
    parts = ("control", "mean", "low", "high", "seeds", "verdict")
    head += [f"{role}_{part}" for role in result.roles for part in parts]
    head += [f"front_{quantity}" for quantity in COSTS]
    known = {(id(own.cell), own.role): own for own in result.differences}
    rows: list[list[TableCell]] = []
    for network, cells in result.networks.items():
        for index, cell in enumerate(cells):
            seeds = " ".join(str(arm.seed) for arm in cell.arms)
            row: list[TableCell] = [network, cell.method, cell.kind, cell.role, cell.budget, cell.budget_on, seeds]
            row += [place_of(cell, name) for name in quantities]
            row += list(cell.latency_range or (None, None))
            own = cell.values.get("metric")
            row += [None] * 5 if own is None else [own.mean, cell.deviation, own.low, own.high, own.count]
            for role in result.roles:
                row += _difference(known.get((id(cell), role)))
            row += [int(index in result.fronts[network, quantity]) for quantity in COSTS]
            rows.append(row)
    return head, rows


def content(result: SweepResult) -> dict[str, Any]:
    """The report as JSON content: the table of :func:`numbers`, scores, costs off their limit, and notes."""
    head, rows = numbers(result)
    return encode(
        {
            "format": FORMAT,
            "version": VERSION,
            "metric": result.metric,
            "lower_is_better": lower_is_better(result.metric),
            "cells": [dict(zip(head, row, strict=True)) for row in rows],
            "scores": {
                method: {role: asdict(score) for role, score in own.items()} for method, own in result.scores.items()
            },
            "fairness": result.fairness,
            "off_limit": [
                {"network": a.network, "method": a.method, "budget": a.budget, "seed": a.seed, "deviation": deviation}
                for a, deviation in off_limit(result.arms)
            ],
            "notes": list(result.notes),
        }
    )


def _difference(own: Difference | None) -> list[TableCell]:
    if own is None:
        return [None] * 6
    single = len(own.seeds) < 2
    ends: list[TableCell] = [None, None] if single else [own.mean - own.half_width, own.mean + own.half_width]
    return [own.control.method, own.mean, *ends, len(own.seeds), own.verdict]


def _safe(text: str) -> str:
    """Text from files that is no Markdown of its own."""
    return text.replace("\\", "\\\\").replace("<", "&lt;").replace("`", "\\`").replace("[", "\\[").replace("\n", " ")

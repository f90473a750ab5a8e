"""Rounds of several methods as one table: for Markdown, for a spreadsheet, for a page."""

import csv
import io
from collections.abc import Sequence

from lightning_prune.record.round import UNITS
from lightning_prune.reports.runs import QUANTITIES, Group

Cell = str | int | float | None


def table_of(groups: Sequence[Group], metric: str) -> tuple[list[str], list[list[Cell]]]:
    """Heading and rows, one row a method and round; quantities that no run knows have no column.

    The metric has three columns, its mean over the runs with the lowest and the highest of them; everything else is a
    mean. ``sparsity`` is what was removed of the prunable weights (channels, blocks), in per cent.
    """
    known = [name for name in QUANTITIES if any(name in point.values for group in groups for point in group.points)]
    head = ["method", "round", "runs", "sparsity, %", metric, "lowest", "highest"]
    head += [QUANTITIES[name] for name in known]
    rows: list[list[Cell]] = []
    for group in groups:
        for point in group.points:
            left = next((point.values[unit] for unit in UNITS if unit in point.values), None)
            value = point.values.get("metric")
            row: list[Cell] = [group.name, point.round, left.count if left else 0, 100 - left.mean if left else None]
            row += [None, None, None] if value is None else [value.mean, value.low, value.high]
            row += [point.values[name].mean if name in point.values else None for name in known]
            rows.append(row)
    return head, rows


def cell_text(cell: Cell) -> str:
    """A cell for reading: five significant digits, thousands not grouped, nothing for None."""
    if cell is None:
        return ""
    return f"{cell:.5g}" if isinstance(cell, float) else str(cell)


def markdown_of(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The table in Markdown; names cannot break out of their cell."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_markdown(cell_text(cell)) for cell in line) + " |" for line in lines)


def csv_of(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The table for a spreadsheet, numbers in full."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def _markdown(text: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", " "), ("\r", " ")):
        text = text.replace(plain, escaped)
    return text

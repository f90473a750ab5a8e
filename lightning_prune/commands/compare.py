"""``lightning-prune compare A B``: two runs, or two methods over their seeds, side by side in the terminal."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_prune.reports.runs import (
    QUANTITIES,
    Point,
    Spread,
    choose_metric,
    group_runs,
    notes_on,
    points_of,
    read_runs,
)


def main(arguments: Sequence[str]) -> None:
    """Print the rounds of both.

    Raises:
        ConfigError: A side without a readable run, or no metric that both have.
    """
    parser = argparse.ArgumentParser("lightning-prune compare", description=__doc__)
    parser.add_argument("first", metavar="A", help="a run folder, a record, or a folder of one method's runs")
    parser.add_argument("second", metavar="B", help="the same")
    parser.add_argument("--metric", help="a recorded metric (default: as for report)")
    given = parser.parse_args(arguments)
    sides = []
    for path in (given.first, given.second):
        runs, problems = read_runs([path])
        for problem in problems:
            print(f"left out: {problem}", file=sys.stderr)
        sides.append(runs)
    metric = choose_metric([*sides[0], *sides[1]], given.metric)
    for note in notes_on(group_runs([*sides[0], *sides[1]], metric)):
        print(f"note: {note}", file=sys.stderr)
    console = Console(highlight=False)
    for name, path, runs in zip("AB", (given.first, given.second), sides, strict=True):
        method = escape(" + ".join(runs[0].method))
        console.print(f"{name}: {escape(path)}: {method}, {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
    console.print(compare_table(points_of(sides[0], metric), points_of(sides[1], metric), metric))


def compare_table(first: Sequence[Point], second: Sequence[Point], metric: str) -> Table:
    """One row for each quantity and round that either has: A, B (each mean and spread), B - A.

    Args:
        first: The rounds of A.
        second: The rounds of B.
        metric: What to call ``metric`` of the points.
    """
    table = Table("what", "round", "A", "B", "B - A")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, label in {"metric": metric, **QUANTITIES}.items():
        added = False
        for number in range(max(len(first), len(second))):
            sides = [points[number].values.get(name) if number < len(points) else None for points in (first, second)]
            if sides[0] is None and sides[1] is None:
                continue
            a, b = sides
            difference = "" if a is None or b is None else f"{b.mean - a.mean:+.4g}"
            table.add_row("" if added else escape(label), str(number), _text(a), _text(b), difference)
            added = True
        if added:
            table.add_section()
    return table


def _text(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    mean = f"{spread.mean:.4g}"
    return mean if spread.low == spread.high else f"{mean} ({spread.low:.4g} to {spread.high:.4g})"

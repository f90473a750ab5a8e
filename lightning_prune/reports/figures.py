"""Which charts a report has, as data: the page and the pictures draw the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.reports.runs import QUANTITIES, Group, Spread, front, lower_is_better
from lightning_prune.reports.svg import Axis, Line, Mark

CHARTS = ("sparsity", "channels", "blocks", "params", "macs", "latency", "speedup", "barrier", "line")
"""The charts that there can be."""

_FRACTIONS = ("weights", "channels", "blocks", "params", "macs")


@dataclass(frozen=True)
class Figure:
    """A chart.

    Attributes:
        title: Its title.
        note: How to read it.
        lines: Its lines.
        x: The axis across.
        y: The axis upwards.
        ideal: The name of the line on which both axes are equal; empty: none is drawn.
        guide: Where a horizontal line is drawn.
        tag: What the number of a point counts.
        key: A word to choose it by: one of :data:`CHARTS`.
    """

    title: str
    note: str
    lines: tuple[Line, ...]
    x: Axis
    y: Axis
    ideal: str = ""
    guide: float | None = None
    tag: str = "round"
    key: str = ""


def label_of(index: int) -> str:
    """The short name of a method in charts: A to Z, then A1 and so on."""
    letter, again = chr(ord("A") + index % 26), index // 26
    return f"{letter}{again}" if again else letter


def direction_of(metric: str) -> str:
    """The metric's name with what is better."""
    return f"{metric} ({'lower' if lower_is_better(metric) else 'higher'} is better)"


def figures_of(groups: Sequence[Group], metric: str) -> list[Figure]:
    """Every chart that the runs have numbers for: the metric against what is left, and speed-up against speed-up."""
    titles = {
        "weights": f"{metric} against sparsity",
        "channels": f"{metric} against channels removed",
        "blocks": f"{metric} against blocks removed",
        "params": f"{metric} against parameters",
        "macs": f"{metric} against MACs",
        "latency_ms": f"{metric} against measured latency",
    }
    figures = [_against(groups, metric, name, title) for name, title in titles.items()]
    figures.append(_speedups(groups))
    return [figure for figure in figures if figure is not None]


def mark_of(x: float, y: Spread, tag: int | None = None) -> Mark:
    """A point at the mean of several values."""
    return Mark(x, y.mean, y.low, y.high, y.count, tag)


def axis_over(label: str, lines: Sequence[Line], *others: float) -> Axis:
    """An upward axis that holds every point with its spread."""
    return Axis.around(label, [*(y for line in lines for m in line.marks for y in (m.low, m.high)), *others])


def _against(groups: Sequence[Group], metric: str, name: str, title: str) -> Figure | None:
    found = [
        (index, [p for p in g.points if name in p.values and "metric" in p.values]) for index, g in enumerate(groups)
    ]
    pairs = [(p.values[name].mean, p.values["metric"].mean) for _, points in found for p in points]
    if len({x for x, _ in pairs}) < 2:
        return None
    best, lines, before = set(front(pairs, lower_is_better(metric))), [], 0
    for index, points in found:
        marks = [mark_of(p.values[name].mean, p.values["metric"], p.round) for p in points]
        rings = frozenset(i for i in range(len(points)) if before + i in best)
        lines.append(Line(label_of(index), marks, index, rings))
        before += len(points)
    xs = [x for x, _ in pairs]
    log = name in _FRACTIONS and min(xs) > 0
    note = "Rings: the Pareto front; no other point is better in both."
    if name == "macs":
        note += " Theoretical: multiplications by 0 are not counted, whether or not hardware skips them."
    if name == "latency_ms":
        note += " Medians, on the devices named below."
    x_axis = Axis.around(QUANTITIES[name] + (" (log scale)" if log else ""), xs, log=log, falling=True)
    key = {"weights": "sparsity", "latency_ms": "latency"}.get(name, name)
    return Figure(title, note, tuple(lines), x_axis, axis_over(direction_of(metric), lines), key=key)


def _speedups(groups: Sequence[Group]) -> Figure | None:
    lines = []
    for index, group in enumerate(groups):
        known = [p for p in group.points if {"theoretical_speedup", "measured_speedup"} <= p.values.keys()]
        marks = [mark_of(p.values["theoretical_speedup"].mean, p.values["measured_speedup"], p.round) for p in known]
        if marks:
            lines.append(Line(label_of(index), marks, index))
    if not lines:
        return None
    values = [v for line in lines for mark in line.marks for v in (mark.x, mark.low, mark.high)]
    log = min(values) > 0 and max(values) > 4 * min(values)
    note = "One scale both ways. Masks leave every multiplication in place; channels that leave take theirs along."
    scale = ", × (log scale)" if log else ", ×"
    x_axis = Axis.around(f"theoretical speed-up, by MACs{scale}", [*values, 1.0], log=log)
    y_axis = Axis.around(f"measured speed-up{scale}", [*values, 1.0], log=log)
    title = "Theoretical against measured speed-up"
    return Figure(title, note, tuple(lines), x_axis, y_axis, ideal="measured = theoretical", key="speedup")

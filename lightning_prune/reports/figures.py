"""Which charts a report has, as data: the page and the pictures draw the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.reports.runs import QUANTITIES, Group, front, lower_is_better
from lightning_prune.reports.svg import Axis, Line

_FRACTIONS = ("weights", "channels", "params", "macs")


@dataclass(frozen=True)
class Figure:
    """A chart: its title, a sentence on how to read it, lines and axes."""

    title: str
    note: str
    lines: tuple[Line, ...]
    x: Axis
    y: Axis
    diagonal: bool = False


def label_of(index: int) -> str:
    """The short name of a method in charts: A to Z, then A1 and so on."""
    letter, again = chr(ord("A") + index % 26), index // 26
    return f"{letter}{again}" if again else letter


def figures_of(groups: Sequence[Group], metric: str) -> list[Figure]:
    """Every chart that the runs have numbers for: the metric against what is left, and speed-up against speed-up."""
    titles = {
        "weights": f"{metric} against sparsity",
        "channels": f"{metric} against channels removed",
        "params": f"{metric} against parameters",
        "macs": f"{metric} against MACs",
        "latency_ms": f"{metric} against measured latency",
    }
    figures = [_against(groups, metric, name, title) for name, title in titles.items()]
    figures.append(_speedups(groups))
    return [figure for figure in figures if figure is not None]


def _against(groups: Sequence[Group], metric: str, name: str, title: str) -> Figure | None:
    found = [
        (index, g, [p for p in g.points if name in p.values and "metric" in p.values]) for index, g in enumerate(groups)
    ]
    pairs = [(p.values[name].mean, p.values["metric"].mean) for _, _, points in found for p in points]
    if len({x for x, _ in pairs}) < 2:
        return None
    best, lines, before = set(front(pairs, lower_is_better(metric))), [], 0
    for index, group, points in found:
        drawn = []
        for p in points:
            x, y = p.values[name].mean, p.values["metric"]
            spread = f" ({y.low:.4g} to {y.high:.4g}, {y.count} runs)" if y.count > 1 else ""
            drawn.append((x, y.mean, y.low, y.high, f"{group.name}, round {p.round}: {x:.4g}, {y.mean:.4g}{spread}"))
        rings = frozenset(i for i in range(len(points)) if before + i in best)
        lines.append(Line(label_of(index), drawn, index, rings))
        before += len(points)
    xs = [x for x, _ in pairs]
    ys = [y for line in lines for point in line.points for y in point[2:4]]
    fraction = name in _FRACTIONS
    label = QUANTITIES[name] + (" (log scale)" if fraction else "")
    note = "Rings: no other point is better in both."
    if name == "macs":
        note += " Theoretical: multiplications by 0 are not counted, whether or not hardware skips them."
    x_axis = Axis.around(label, xs, log=fraction and min(xs) > 0, falling=True)
    return Figure(title, note, tuple(lines), x_axis, Axis.around(metric, ys))


def _speedups(groups: Sequence[Group]) -> Figure | None:
    lines = []
    for index, group in enumerate(groups):
        drawn = []
        for p in group.points:
            x, y = p.values.get("theoretical_speedup"), p.values.get("measured_speedup")
            if x is not None and y is not None:
                hint = f"{group.name}, round {p.round}: theoretical {x.mean:.3g}, measured {y.mean:.3g}"
                drawn.append((x.mean, y.mean, y.low, y.high, hint))
        if drawn:
            lines.append(Line(label_of(index), drawn, index))
    if not lines:
        return None
    xs = [point[0] for line in lines for point in line.points]
    ys = [y for line in lines for point in line.points for y in point[2:4]]
    note = "Dashed: the clock sees all that the count promises. Masks alone leave every multiplication in place."
    axes = Axis.around(QUANTITIES["theoretical_speedup"], [*xs, 1.0]), Axis.around("measured", [*ys, 1.0])
    return Figure("Theoretical against measured speed-up", note, tuple(lines), *axes, diagonal=True)

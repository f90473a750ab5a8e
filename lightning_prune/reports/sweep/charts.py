"""Accuracy against what is kept, a chart for each network and cost: its points, and what to say of the others."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.reports.figures import Figure, axis_over, direction_of, label_of
from lightning_prune.reports.runs import Spread
from lightning_prune.reports.svg import Axis, Line, Mark
from lightning_prune.reports.sweep.cells import ROLES, Cell, place_of
from lightning_prune.reports.sweep.fairness import settings_text
from lightning_prune.reports.sweep.result import COSTS, SweepResult
from lightning_prune.reports.sweep.scatter import Entry, Spot, scatter_chart

NOTES: dict[str, str] = {
    "macs": "Masks leave every multiply-add in place: masked networks stand at the dense network's.",
    "nonzero_params": "Parameters that are not 0: masked networks stand at what their masks leave.",
    "latency": "Masks save no time by themselves: masked networks that were not timed stand at the dense latency.",
}
"""What to say of networks with masks."""


@dataclass(frozen=True)
class Scatter:
    """A chart of a network.

    Attributes:
        quantity: What the metric is drawn against, of :data:`COSTS`.
        figure: Its lines, one a point, with axes and words.
        spots: Its points.
    """

    quantity: str
    figure: Figure
    spots: tuple[Spot, ...]

    def drawn(self, key: Sequence[Entry] = ()) -> str:
        """As SVG text; with a list of names where ``key`` is given, see :func:`scatter_chart`."""
        return scatter_chart(self.figure.title, self.spots, self.figure.x, self.figure.y, key)


def entries_of(result: SweepResult) -> dict[str, Entry]:
    """Methods, then controls, by name; each has the same letters in every network."""
    first = {cell.method: cell for cell in reversed(result.cells)}
    methods = dict.fromkeys(cell.method for cell in result.cells if cell.role is None)
    controls = dict.fromkeys(c.method for role in ROLES for c in result.cells if c.role == role)
    return {
        name: Entry(label_of(index), name, first[name].kind, index, first[name].role is not None)
        for index, name in enumerate([*methods, *controls])
    }


def charts_of(result: SweepResult, network: str) -> list[Scatter]:
    """The charts of a network for which there are at least two points."""
    entries = entries_of(result)
    charts = [_chart(result, network, quantity, entries) for quantity in COSTS]
    return [chart for chart in charts if chart is not None]


def key_of(result: SweepResult, network: str) -> list[Entry]:
    """What stands in a network's charts."""
    here = {cell.method for cell in result.networks[network]}
    return [entry for name, entry in entries_of(result).items() if name in here]


def _chart(result: SweepResult, network: str, quantity: str, entries: dict[str, Entry]) -> Scatter | None:
    cells, best = result.networks[network], result.fronts[network, quantity]
    budgets = sorted({cell.budget for cell in cells if cell.budget is not None}, reverse=True)
    sizes: dict[float | None, float] = {budget: max(0.5, 1 - 0.25 * index) for index, budget in enumerate(budgets)}
    spots, missing = [], []
    for index, cell in enumerate(cells):
        place = place_of(cell, quantity)
        if place is None or "metric" not in cell.values:
            missing.append(cell.name)
            continue
        entry = entries[cell.method]
        mark = _mark(100 * place, cell.values["metric"], result.scale)
        line = Line(entry.label, (mark,), entry.number, name=cell.name)
        reach = cell.latency_range if quantity == "latency" else None
        ends = None if reach is None else (100 * reach[0], 100 * reach[1])
        spots.append(Spot(line, cell.kind, entry.control, ends, index in best, sizes.get(cell.budget, 1.0)))
    if len(spots) < 2:
        return None
    xs = [value for spot in spots for value in (spot.line.marks[0].x, *(spot.reach or ()))]
    log = min(xs) > 0 and max(xs) > 8 * min(xs)
    label = f"{COSTS[quantity]}, % of dense{' (log scale)' if log else ''}"
    lines = tuple(spot.line for spot in spots)
    y = axis_over(f"{direction_of(result.metric)}{result.unit}", lines)
    title = f"{network}: {result.metric} against {COSTS[quantity]}"
    note = " ".join([*_masked(cells, quantity), *_how(cells, quantity), *_left_out(missing)])
    return Scatter(quantity, Figure(title, note, lines, Axis.around(label, xs, log), y, tag=""), tuple(spots))


def _mark(x: float, own: Spread, scale: float) -> Mark:
    return Mark(x, own.mean * scale, own.low * scale, own.high * scale, own.count)


def _masked(cells: Sequence[Cell], quantity: str) -> list[str]:
    return [NOTES[quantity]] if any(cell.kind == "rounds" for cell in cells) else []


def _how(cells: Sequence[Cell], quantity: str) -> list[str]:
    if quantity != "latency":
        return []
    settings = sorted({settings_text(arm) for cell in cells for arm in cell.arms if arm.latency is not None})
    return [f"Measured: {'; '.join(settings)}. Lines across: the seeds' 95 % intervals."] if settings else []


def _left_out(missing: Sequence[str]) -> list[str]:
    if not missing:
        return []
    named = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
    return [f"Not known, so not drawn: {named}."]

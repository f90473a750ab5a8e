"""The tables of a sweep in words, for reading; a cell may have a second line."""

from collections.abc import Sequence

from lightning_prune.reports.runs import Spread, lower_is_better
from lightning_prune.reports.sections import duration
from lightning_prune.reports.sweep.cells import ROLES, Cell, budget_text
from lightning_prune.reports.sweep.fairness import off_limit
from lightning_prune.reports.sweep.result import SweepResult
from lightning_prune.reports.sweep.verdicts import Difference, Score, sentence_of


def cells_in_words(result: SweepResult, cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of what the arms of one network kept, reached and cost."""
    metric, unit = result.metric, result.unit
    head = ["method", "budget", "seeds", "MACs kept", "parameters kept", "nonzero parameters", "latency kept"]
    head.append(f"{metric}{unit} ± deviation (lowest to highest)")
    cut = any(name in cell.values for cell in cells for name in ("before", "after_cut"))
    head += [f"{result.before}{unit} before the cut → right after it"] if cut else []
    head += ["cost, × dense", "time"]
    rows = []
    for cell in cells:
        row = [cell.method, budget_text(cell), ", ".join(str(arm.seed) for arm in cell.arms)]
        row += [_per_cent(cell.values.get(name)) for name in ("macs", "params", "nonzero_params")]
        row += [_latency(cell), _reached(cell, result.scale)]
        row += [_around(cell, result.scale)] if cut else []
        row += [_cost(cell), duration(cell.values["seconds"].mean)]
        rows.append(row)
    return head, rows


def differences_in_words(result: SweepResult, cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the differences between one network's methods and its controls."""
    roles = [role for role in result.roles if any(cell.role == role for cell in cells)]
    points = " (points)" if result.scale == 100 else ""
    head = ["method", "budget", *(f"against: {ROLES[role]}{points}" for role in roles)]
    known = {(id(own.cell), own.role): own for own in result.differences}
    several = {role for role in roles if len({cell.method for cell in cells if cell.role == role}) > 1}
    rows = []
    for cell in (own for own in cells if own.role is None):
        row = [cell.method, budget_text(cell)]
        for role in roles:
            found = known.get((id(cell), role))
            row.append(
                "no such control" if found is None else difference_text(found, result.scale, named=role in several)
            )
        rows.append(row)
    return head, rows


def difference_text(own: Difference, scale: float, named: bool = False) -> str:
    """A difference with its interval, the number of seeds and the verdict.

    Args:
        own: The difference.
        scale: By which the metric is shown.
        named: Say which control it is.
    """
    mean, half = own.mean * scale, own.half_width * scale
    interval = f" ({mean - half:+.2f} to {mean + half:+.2f})" if len(own.seeds) > 1 else ""
    which = f"; control {own.control.method}" if named else ""
    unit = "" if own.same_unit else f"; its budget: {budget_text(own.control)}"
    return f"{mean:+.2f}{interval}\n{own.verdict}, n = {len(own.seeds)}{which}{unit}"


def scores_in_words(result: SweepResult) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of wins and losses over networks and budgets: beats / worse / cannot be told."""
    head = ["method", *(ROLES[role] for role in result.roles)]
    rows = [
        [method, *(f"{s.beats} / {s.worse} / {s.untold}" if s.told else "–" for s in own.values())]
        for method, own in result.scores.items()
    ]
    return head, rows


def sentences(result: SweepResult) -> list[str]:
    """One sentence a method: how it did against its strictest control that the sweep has."""
    return [sentence_of(method, role, score) for method, own in result.scores.items() for role, score in _first(own)]


def _first(scores: dict[str, Score]) -> list[tuple[str, Score]]:
    return list(scores.items())[:1]


def how_told(result: SweepResult) -> str:
    """What the verdicts mean, and how many of them chance alone would give."""
    told = sum(len(own.seeds) > 1 for own in result.differences)
    text = (
        "Differences are method minus control, paired by seed, with a 95 % interval by Student's t over n seeds. "
        f"A method beats its control, or is worse ({'lower' if lower_is_better(result.metric) else 'higher'} "
        f"{result.metric} is better), where the interval leaves out 0; else it cannot be told. "
    )
    if not told:
        return text + "No comparison has two seeds, so none is decided."
    return text + (
        f"Of {told} comparisons with an interval about {0.05 * told:.0f} would leave out 0 by chance alone, were there "
        "no difference anywhere."
    )


def _per_cent(own: Spread | None) -> str:
    return "" if own is None else f"{100 * own.mean:.1f} %"


def _around(cell: Cell, scale: float) -> str:
    own = [cell.values.get(name) for name in ("before", "after_cut")]
    before, after = ("?" if value is None else f"{value.mean * scale:.2f}" for value in own)
    return "" if own == [None, None] else f"{before} → {after}"


def _reached(cell: Cell, scale: float) -> str:
    own = cell.values.get("metric")
    if own is None:
        return "not known"
    if cell.deviation is None:
        return f"{own.mean * scale:.2f}"
    ends = f"{own.low * scale:.2f} to {own.high * scale:.2f}"
    return f"{own.mean * scale:.2f} ± {cell.deviation * scale:.2f}\n({ends})"


def _latency(cell: Cell) -> str:
    if cell.latency_range is None:
        return "1\n(all operations)" if cell.is_whole else "not measured"
    low, high = cell.latency_range
    return f"{cell.values['latency'].mean:.3f}\n({low:.3f} to {high:.3f})"


def _cost(cell: Cell) -> str:
    text = f"{cell.values['cost'].mean:.3f}" if "cost" in cell.values else "no dense arm"
    off = off_limit(cell.arms)
    return f"{text}\n(off its limit by {100 * off[0][1]:+.1f} %)" if off else text

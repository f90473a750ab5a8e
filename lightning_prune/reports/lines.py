"""Charts of errors along lines between networks, and of barriers, as data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_prune.reports.beside import Curve
from lightning_prune.reports.figures import Figure, axis_over, label_of, mark_of
from lightning_prune.reports.runs import Group, Spread
from lightning_prune.reports.svg import Axis, Line, Mark

STABLE = 2.0
"""Barrier, in points, under which Frankle et al. (arXiv:1912.05671, section 3) call a network stable."""

MOST_METHODS = 6
"""Methods whose lines are drawn one by one."""


def figures_of_rounds(groups: Sequence[Group], curves: Mapping[int, Sequence[Curve]]) -> list[Figure]:
    """Barriers between successive rounds of every method, then the lines of each.

    Args:
        groups: The methods.
        curves: By index of the method: the lines of all its runs.
    """
    lines = []
    for index, own in curves.items():
        marks = [
            mark_of(100 * at[0].density, _spread(curve.barrier for curve in at), number)
            for number, at in _by(own, lambda curve: (curve.rounds or (0, 0))[1]).items()
        ]
        lines.append(Line(label_of(index), marks, index))
    if not lines:
        return []
    split = next(iter(curves.values()))[0].split
    xs = [mark.x for line in lines for mark in line.marks]
    x = Axis.around("weights left in the later round, % of prunable (log scale)", xs, log=min(xs) > 0, falling=True)
    y = axis_over(f"error barrier, {split}, points", lines, 0.0)
    title = "Barrier between the networks of successive rounds"
    note = "Dotted: 2 points, under which networks count as connected."
    figures = [Figure(title, note, tuple(lines), x, y, guide=STABLE, key="barrier")]
    for index in list(curves)[:MOST_METHODS]:
        pairs = _by(curves[index], lambda curve: curve.rounds)
        names = {pair: f"{pair[0]} to {pair[1]}" for pair in pairs}
        title = f"{label_of(index)}: error along the line between successive rounds"
        figures.append(_along(title, pairs, names, "the earlier", "the later network"))
    return figures


def figures_of_analysis(curves: Sequence[Curve]) -> list[Figure]:
    """Errors along the lines between copies, by treatment, and barriers against the step and the weights left."""
    figures = []
    for treatment, own in _by(curves, lambda curve: curve.treatment).items():
        kinds = _by(own, lambda curve: (curve.step, -curve.density))
        names = {key: _name(key, list(kinds)) for key in kinds}
        title = f"Error along the line between copies (BatchNorm: {treatment})"
        figures.append(_along(title, kinds, names, "the other", "one network"))
    for what, value, label in (
        ("step", lambda curve: curve.step, "step at which the copies branched"),
        ("density", lambda curve: -curve.density, "weights left, %"),
    ):
        figure = _barriers(curves, what, value, label)
        figures += [] if figure is None else [figure]
    return figures


def _barriers(curves: Sequence[Curve], what: str, value: Callable[[Curve], float], label: str) -> Figure | None:
    """Barriers at each value of one quantity, a line for each value of the other and each treatment."""
    places = list(_by(curves, value))
    if len(places) < 2:
        return None
    other = (lambda curve: -curve.density) if what == "step" else (lambda curve: curve.step)
    lines: list[Line] = []
    for (rest, treatment), own in _by(curves, lambda curve: (other(curve), curve.treatment)).items():
        at = _by(own, value)
        if len(at) < 2:
            continue
        marks = [mark_of(places.index(key), _spread(curve.barrier for curve in here)) for key, here in at.items()]
        words = f"{-100 * rest:.1f} % of weights" if what == "step" else f"step {rest:,}"
        lines.append(Line(label_of(len(lines)), marks, len(lines), name=f"{words}, BatchNorm: {treatment}"))
    if not lines:
        return None
    texts = tuple((float(i), f"{key:,}" if what == "step" else f"{-100 * key:.3g}") for i, key in enumerate(places))
    x = Axis(label, -0.3, len(places) - 0.7, named=texts)
    y = axis_over(f"error barrier, {curves[0].split}, points", lines, 0.0)
    legend = "; ".join(f"{line.label}: {line.name}" for line in lines)
    note = f"{legend}. Dotted: 2 points, under which a network counts as stable."
    title = f"Barrier against the {label.split(',')[0]}"
    return Figure(title, note, tuple(lines), x, y, guide=STABLE, tag="", key="barrier")


def _along(title: str, kinds: Mapping[Any, Sequence[Curve]], names: Mapping[Any, str], one: str, other: str) -> Figure:
    """Mean error at each place of the line, one curve a kind, in their order from the first colour to the second."""
    lines = []
    for index, (key, own) in enumerate(kinds.items()):
        spreads = [_spread(values) for values in zip(*(curve.errors for curve in own), strict=True)]
        marks = [
            Mark(alpha, spread.mean, spread.mean, spread.mean, spread.count)
            for alpha, spread in zip(own[0].alphas, spreads, strict=True)
        ]
        top = max(range(len(marks)), key=lambda i: marks[i].y)
        shade = index / max(len(kinds) - 1, 1)
        lines.append(Line(names[key], marks, 0, frozenset(), shade, top, names[key]))
    split = next(iter(kinds.values()))[0].split
    x = Axis(f"place on the line: 0 is {other}, 1 {one}", 0.0, 1.0)
    note = "Means over runs. From the first to the last: blue to orange."
    return Figure(title, note, tuple(lines), x, axis_over(f"error, {split}, %", lines), tag="", key="line")


def _name(key: tuple[int, float], keys: Sequence[tuple[int, float]]) -> str:
    step, density = key[0], -100 * key[1]
    parts = [f"step {step:,}"] if len({k[0] for k in keys}) > 1 or len(keys) == 1 else []
    parts += [f"{density:.3g} %"] if len({k[1] for k in keys}) > 1 else []
    return ", ".join(parts)


def _by(curves: Sequence[Curve], key: Callable[[Curve], Any]) -> dict[Any, list[Curve]]:
    return {value: [curve for curve in curves if key(curve) == value] for value in sorted({key(c) for c in curves})}


def _spread(values: Any) -> Spread:
    spread = Spread.of(list(values))
    assert spread is not None  # barriers and errors are finite when they are read
    return spread

"""Charts as SVG text: lines with whiskers, and strips of ranks. Colours come from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 430, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 32, 14, 48
NUM_COLOURS = 6
MOST_LABELS = 26
"""Charts of more lines have no names at their ends: they would lie on each other."""
MOST_DOTS = 200
"""Longer lines are drawn without a dot at each point."""


@dataclass(frozen=True)
class Axis:
    """A scale from values to a place along it.

    Attributes:
        label: What it shows, with its unit.
        low: Its lowest value.
        high: Its highest value.
        log: Whether equal ratios have equal lengths.
        falling: Whether high values come first.
        named: Ticks with texts of their own, in place of round values.
    """

    label: str
    low: float
    high: float
    log: bool = False
    falling: bool = False
    named: tuple[tuple[float, str], ...] = ()

    @classmethod
    def around(cls, label: str, values: Sequence[float], log: bool = False, falling: bool = False) -> "Axis":
        """An axis that holds ``values`` with a little room."""
        low, high = min(values), max(values)
        if log:
            return cls(label, low * 0.9, high * 1.1, True, falling)
        room = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
        return cls(label, low - room, high + room, False, falling)

    def place(self, value: float) -> float:
        """Where ``value`` stands, from 0 to 1."""
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        part = (value - low) / (high - low)
        return 1 - part if self.falling else part

    def texts(self) -> list[tuple[float, str]]:
        """The ticks with what stands at them."""
        return list(self.named) or [(tick, f"{tick:.4g}") for tick in self.ticks()]

    def ticks(self) -> list[float]:
        """Round values along it: 1, 2, 5 and their powers of ten."""
        if self.log:
            start, end = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            found = [m * 10.0**e for e in range(start, end + 1) for m in (1, 2, 5)]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) > 1:
                return found if len(found) <= 7 else found[:: math.ceil(len(found) / 7)]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class Mark:
    """One point of a line: where it lies, from the lowest to the highest of ``count`` values, and its number."""

    x: float
    y: float
    low: float
    high: float
    count: int = 1
    tag: int | None = None


@dataclass(frozen=True)
class Line:
    """One method in a chart.

    Attributes:
        label: A short name that stands beside the line.
        marks: Its points.
        colour: Index of its colour.
        front: Which points lie on the Pareto front.
        shade: Place on a scale from the first colour to the second, in [0, 1], for lines that have an order.
        label_at: Which point the label stands beside; the last.
        name: What the label stands for; None: the method of this colour.
    """

    label: str
    marks: Sequence[Mark]
    colour: int = 0
    front: frozenset[int] = field(default_factory=frozenset)
    shade: float | None = None
    label_at: int = -1
    name: str | None = None


def colour_of(index: int) -> str:
    """The style classes of a method: one of six colours, then the same ones dashed."""
    return f"c{index % NUM_COLOURS} d{index // NUM_COLOURS % 3}"


def line_chart(title: str, lines: Sequence[Line], x: Axis, y: Axis, ideal: str = "", guide: float | None = None) -> str:
    """Lines with their points, a whisker from lowest to highest, and rings around the Pareto front.

    Each line is a few paths whatever its number of points, so that a page of many runs stays light.

    Args:
        title: What a screen reader says.
        lines: At least one point in all.
        x: Across.
        y: Upwards.
        ideal: Draw where both axes are equal, and call it this.
        guide: Draw a horizontal line here.
    """
    parts = [frame(x, y)]
    if ideal:
        parts.append(_ideal(x, y, ideal))
    if guide is not None and y.low <= guide <= y.high:
        parts.append(f'<path class="ideal" d="M{LEFT} {y_of(y, guide)}H{WIDTH - RIGHT}"/>')
    drawn = [line for line in lines if line.marks]
    parts += [_line(line, x, y) for line in drawn]
    if len(drawn) <= MOST_LABELS:
        parts += _labels(drawn, x, y)
    return svg(title, HEIGHT, parts)


def _line(line: Line, x: Axis, y: Axis) -> str:
    places = [(x_of(x, m.x), y_of(y, m.y)) for m in line.marks]
    forth = [a[0] <= b[0] for a, b in pairwise(places)]
    loose = " loose" if any(forth) and not all(forth) else ""  # measured values that go to and fro hang together less
    parts = [f'<path class="way{loose}" d="M{"L".join(f"{px:g} {py:g}" for px, py in places)}"/>']
    whiskers = [
        f"M{px:g} {y_of(y, m.low):g}V{y_of(y, m.high):g}"
        for (px, _), m in zip(places, line.marks, strict=True)
        if m.low != m.high
    ]
    rings = [f"M{px - 6.5:g} {py:g}a6.5 6.5 0 1 0 13 0a6.5 6.5 0 1 0-13 0" for px, py in _at(places, line.front)]
    for name, paths in (("whisker", whiskers), ("front", rings)):
        if paths:
            parts.append(f'<path class="{name}" d="{"".join(paths)}"/>')
    if len(places) <= MOST_DOTS:
        parts.append(f'<path class="dots" d="{"".join(f"M{px:g} {py:g}h0" for px, py in places)}"/>')
    return f"<g {_look(line, 'line')}>{''.join(parts)}</g>"


def _at(places: Sequence[tuple[float, float]], which: frozenset[int]) -> list[tuple[float, float]]:
    return [place for index, place in enumerate(places) if index in which]


def _look(line: Line, kind: str) -> str:
    """Colour, dashes and the number by which the script finds a line."""
    if line.shade is None:
        return f'class="{kind} {colour_of(line.colour)}" data-m="{line.colour}"'
    part = round(100 * line.shade)
    return f'class="{kind}" style="color:color-mix(in oklab,var(--k1) {part}%,var(--k0))"'


def label_places(lines: Sequence[Line], x: Axis, y: Axis) -> list[tuple[Line, float, float]]:
    """Where the names of lines stand, across and down: beside their point, a step up or down where one stands there."""
    step = 14
    wanted = [(y_of(y, line.marks[line.label_at].y), x_of(x, line.marks[line.label_at].x), line) for line in lines]
    done: list[tuple[Line, float, float]] = []
    for py, px, line in sorted(wanted, key=lambda item: item[:2]):
        reach = 9 * len(line.label) + 8
        near = [height for _, other, height in done if abs(px - other) < reach]
        tries = [py + sign * step * times for times in range(len(near) + 2) for sign in (1, -1)]
        free = (t for t in tries if TOP <= t <= HEIGHT - BOTTOM and all(abs(t - height) >= step for height in near))
        done.append((line, px, next(free, py)))
    return done


def _labels(lines: Sequence[Line], x: Axis, y: Axis) -> list[str]:
    parts = []
    for line, px, py in label_places(lines, x, y):
        inside = px + 9 + 7.5 * len(line.label) <= WIDTH
        side = f'x="{px + 9:g}"' if inside else f'x="{px - 9:g}" text-anchor="end"'
        parts.append(f'<text {_look(line, "end")} {side} y="{py + 4:g}">{escape(line.label)}</text>')
    return parts


def _ideal(x: Axis, y: Axis, name: str) -> str:
    low, high = max(x.low, y.low), min(x.high, y.high)
    ends = f'x1="{x_of(x, low)}" y1="{y_of(y, low)}" x2="{x_of(x, high)}" y2="{y_of(y, high)}"'
    place = f'x="{x_of(x, high) - 16:g}" y="{y_of(y, high) + 8:g}" text-anchor="end"'
    return f'<line class="ideal" {ends}/><text class="soft" {place}>{escape(name)}</text>'


def strip_chart(title: str, label: str, rows: Sequence[tuple[str, Sequence[tuple[float, bool]]]]) -> str:
    """One row of dots a layer: kept channels as dots, those that left as crosses.

    Args:
        title: What a screen reader says.
        label: What the axis shows, with its unit.
        rows: ``(layer, [(value in [0, 1], whether it was kept)])``.
    """
    row, left, right, top = 17, 130, WIDTH - 14, 6
    bottom = top + row * len(rows)
    parts = []
    for tick in range(0, 101, 20):
        place = left + tick / 100 * (right - left)
        parts.append(f'<path class="grid" d="M{place:g} {top}V{bottom}"/>')
        parts.append(f'<text x="{place:g}" y="{bottom + 16}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text x="{(left + right) / 2:g}" y="{bottom + 36}" text-anchor="middle">{escape(label)}</text>')
    for index, (name, values) in enumerate(rows):
        middle = top + row * (index + 0.5)
        shown = name if len(name) <= 18 else f"…{name[-17:]}"
        parts.append(
            f'<text x="{left - 10}" y="{middle + 4:g}" text-anchor="end">{escape(shown)}'
            f"<title>{escape(name)}</title></text>"
        )
        places = [(left + value * (right - left), kept) for value, kept in values]
        crosses = "".join(f"M{px - 3:.1f} {middle - 3:g}l6 6m-6 0l6-6" for px, kept in places if not kept)
        dots = "".join(f"M{px:.1f} {middle:g}h0" for px, kept in places if kept)
        parts.append(f'<path class="gone c1" d="{crosses}"/><path class="dots c0" d="{dots}"/>')
    return svg(title, bottom + 44, parts)


def svg(title: str, height: float, parts: Sequence[str]) -> str:
    """The element, with a title for screen readers."""
    name = escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def x_of(axis: Axis, value: float) -> float:
    """How far across a value stands in a chart."""
    return round(LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT), 1)


def y_of(axis: Axis, value: float) -> float:
    """How far down a value stands in a chart."""
    return round(HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM), 1)


def frame(x: Axis, y: Axis) -> str:
    """Grid lines, the texts at them and the axes' labels."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick, text in x.texts():
        place = x_of(x, tick)
        parts.append(f'<path class="grid" d="M{place} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{place}" y="{bottom + 17}" text-anchor="middle">{escape(text)}</text>')
    for tick, text in y.texts():
        place = y_of(y, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {place}H{right}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{place + 4:g}" text-anchor="end">{escape(text)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 9}" text-anchor="middle">{escape(x.label)}</text>')
    turned = f'x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})"'
    return "".join(parts) + f"<text {turned}>{escape(y.label)}</text>"

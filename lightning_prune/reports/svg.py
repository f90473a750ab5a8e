"""Charts as SVG text: lines with whiskers, and bars. Colours come from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 430, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 30, 12, 46
NUM_COLOURS = 6
MOST_HINTS = 2000
"""Charts of more points carry no text to hover over, so that the page stays small."""


@dataclass(frozen=True)
class Axis:
    """A scale from values to a place along it.

    Attributes:
        label: What it shows, with its unit.
        low: Its lowest value.
        high: Its highest value.
        log: Whether equal ratios have equal lengths.
        falling: Whether high values come first.
    """

    label: str
    low: float
    high: float
    log: bool = False
    falling: bool = False

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
class Line:
    """One method in a chart.

    Attributes:
        label: A short name that stands at the line's end.
        points: ``(x, y, lowest y, highest y, text to hover over)``.
        colour: Index of its colour.
        front: Which points lie on the Pareto front.
    """

    label: str
    points: Sequence[tuple[float, float, float, float, str]]
    colour: int = 0
    front: frozenset[int] = field(default_factory=frozenset)


def line_chart(title: str, lines: Sequence[Line], x: Axis, y: Axis, diagonal: bool = False) -> str:
    """Lines with their points, a whisker from lowest to highest, and rings around the Pareto front.

    Args:
        title: What a screen reader says.
        lines: At least one point in all.
        x: Across.
        y: Upwards.
        diagonal: Draw where both axes are equal.
    """
    parts = [_frame(x, y)]
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        ends = f'x1="{_x(x, low)}" y1="{_y(y, low)}" x2="{_x(x, high)}" y2="{_y(y, high)}"'
        parts.append(f'<line class="ideal" {ends}/>')
    hints = sum(len(line.points) for line in lines) <= MOST_HINTS
    for line in lines:
        places = [(_x(x, px), _y(y, py), _y(y, low), _y(y, high), hint) for px, py, low, high, hint in line.points]
        if not places:
            continue
        dash = f" d{line.colour // NUM_COLOURS % 3}"
        parts.append(f'<g class="c{line.colour % NUM_COLOURS}{dash}">')
        parts.append(f'<polyline points="{" ".join(f"{place[0]},{place[1]}" for place in places)}"/>')
        for index, (px, py, low, high, hint) in enumerate(places):
            if low != high:
                parts.append(f'<path class="w" d="M{px} {low}V{high}"/>')
            ring = f'<circle class="front" cx="{px}" cy="{py}" r="7"/>' if index in line.front else ""
            text = f"<title>{escape(hint)}</title>" if hints else ""
            parts.append(f'{ring}<circle class="p" cx="{px}" cy="{py}" r="3.5">{text}</circle>')
        px, py = places[-1][:2]
        parts.append(f'<text class="end" x="{px + 9:g}" y="{py + 4:g}">{escape(line.label)}</text></g>')
    return _svg(title, HEIGHT, parts)


def bar_chart(title: str, bars: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars of fractions.

    Args:
        title: What a screen reader says.
        bars: ``(name, fraction in [0, 1], text at its end)``.
    """
    parts, row, start = [], 22, 150
    length = WIDTH - start - 112
    for index, (name, part, text) in enumerate(bars):
        top = index * row + 4
        shown = name if len(name) <= 21 else f"…{name[-20:]}"
        parts.append(
            f"<g><title>{escape(f'{name}: {text}')}</title>"
            f'<text x="{start - 8}" y="{top + 12}" text-anchor="end">{escape(shown)}</text>'
            f'<rect class="whole" x="{start}" y="{top + 2}" width="{length}" height="12"/>'
            f'<rect class="kept" x="{start}" y="{top + 2}" width="{part * length:.1f}" height="12"/>'
            f'<text x="{start + length + 6}" y="{top + 12}">{escape(text)}</text></g>'
        )
    return _svg(title, len(bars) * row + 8, parts)


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    name = escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _x(axis: Axis, value: float) -> float:
    return round(LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT), 1)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM), 1)


def _frame(x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in x.ticks():
        place = _x(x, tick)
        parts.append(f'<path class="grid" d="M{place} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{place}" y="{bottom + 17}" text-anchor="middle">{tick:.4g}</text>')
    for tick in y.ticks():
        place = _y(y, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {place}H{right}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{place + 4:g}" text-anchor="end">{tick:.4g}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    turned = f'x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})"'
    return "".join(parts) + f"<text {turned}>{escape(y.label)}</text>"

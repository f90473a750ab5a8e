"""Errors on planes through networks as SVG text."""

from collections.abc import Sequence
from html import escape

from lightning_prune.reports.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, frame, svg, x_of, y_of

CIVIDIS = ("#00224e", "#1a386f", "#434e6c", "#61656f", "#7d7c78", "#9b9476", "#bcae6c", "#dec958", "#fee838")
"""Nine of the colours of cividis (arXiv:1712.01662), which rises in lightness alike for every kind of colour vision."""


def plane_chart(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float],
    values: Sequence[Sequence[float]],
    label: str,
    spots: Sequence[tuple[str, tuple[float, float]]],
) -> str:
    """A value over a plane as colours of a grid, with a scale below; a distance has one length both ways.

    Args:
        title: What a screen reader says.
        xs: Places across, evenly spaced.
        ys: Places upwards, evenly spaced.
        values: One row for each of ``ys``.
        label: What the colours show, with the unit.
        spots: Names and places of points on the plane.
    """
    numbers = [value for row in values for value in row]
    low, high = min(numbers), max(numbers)
    log = low > 0 and high > 10 * low
    name = label + (" (log scale)" if log else "")
    scale = Axis(name, low, high, log) if high > low else Axis.around(name, numbers)
    halves = [(places[1] - places[0]) / 2 for places in (xs, ys)]
    x, y = _equal_axes(*((p[0] - half, p[-1] + half) for p, half in zip((xs, ys), halves, strict=True)))
    parts = [frame(x, y), '<g shape-rendering="crispEdges">']
    for row, across in zip(values, ys, strict=True):
        top, bottom = (y_of(y, across + sign * halves[1]) for sign in (1, -1))
        for value, along in zip(row, xs, strict=True):
            left, right = (x_of(x, along + sign * halves[0]) for sign in (-1, 1))
            parts.append(
                f'<rect x="{left:g}" y="{top:g}" width="{right - left:.1f}" height="{bottom - top:.1f}" '
                f'fill="{_shade(scale.place(value))}"><title>{escape(label)}: {value:.4g}</title></rect>'
            )
    parts.append("</g>")
    for text, (along, across) in spots:
        px, py = x_of(x, along), y_of(y, across)
        parts.append(f'<circle class="spot" cx="{px:g}" cy="{py:g}" r="4.5"/>')
        parts.append(f'<text class="spot" x="{px:g}" y="{py - 10:g}" text-anchor="middle">{escape(text)}</text>')
    return svg(title, HEIGHT + 62, [*parts, *_scale(scale, HEIGHT + 12)])


def _equal_axes(across: tuple[float, float], up: tuple[float, float]) -> tuple[Axis, Axis]:
    """Axes that hold both ranges in their middle and give a distance the same length."""
    sizes = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    unit = max((high - low) / size for (low, high), size in zip((across, up), sizes, strict=True))
    x, y = (
        Axis(label, (low + high - unit * size) / 2, (low + high + unit * size) / 2)
        for label, (low, high), size in zip(
            ("distance along the copies", "distance across"), (across, up), sizes, strict=True
        )
    )
    return x, y


def _shade(part: float) -> str:
    """A colour of cividis, for a number in [0, 1]."""
    index = min(int(part * (len(CIVIDIS) - 1)), len(CIVIDIS) - 2)
    rest = part * (len(CIVIDIS) - 1) - index
    pairs = ((int(CIVIDIS[index][i : i + 2], 16), int(CIVIDIS[index + 1][i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + rest * (b - a)):02x}" for a, b in pairs)


def _scale(axis: Axis, top: float, steps: int = 60) -> list[str]:
    """A bar of all colours with the axis's ticks under it."""
    width = (WIDTH - LEFT - RIGHT) / steps
    parts = [
        f'<rect x="{LEFT + i * width:.1f}" y="{top:g}" width="{width + 0.5:.1f}" height="10" '
        f'fill="{_shade((i + 0.5) / steps)}"/>'
        for i in range(steps)
    ]
    for tick, text in axis.texts():
        parts.append(f'<text x="{x_of(axis, tick):g}" y="{top + 26:g}" text-anchor="middle">{escape(text)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text x="{middle:g}" y="{top + 44:g}" text-anchor="middle">{escape(axis.label)}</text>']

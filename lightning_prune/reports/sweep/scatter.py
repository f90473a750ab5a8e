"""Scatter charts as SVG text: a marker and a name at each point, so that nobody needs colour to read them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product

from lightning_prune.reports.svg import BOTTOM, HEIGHT, LEFT, WIDTH, Axis, Line, colour_of, frame, svg
from lightning_prune.reports.svg import x_of as across
from lightning_prune.reports.svg import y_of as down

SHAPES: dict[str, str] = {
    "cut": "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "rounds": "m0-5l4.8 8.4h-9.6z",
    "scratch": "m0-5l5 5l-5 5l-5-5z",
    "narrowed": "m0 5l4.8-8.4h-9.6z",
    "dense": "m-4-4h8v8h-8z",
    "continued": "m-4.5-4.5l9 9m-9 0l9-9",
}
"""A marker for each kind of arm, drawn from its middle; those of controls are hollow."""
SHAPE_NAMES: dict[str, str] = {
    "cut": "channels cut",
    "rounds": "weights masked",
    "scratch": "from scratch",
    "narrowed": "narrowed",
    "dense": "dense",
    "continued": "dense, trained on",
}
_LETTER, _TALL = 8.0, 11.0  # room that a letter of a name takes
_ROW = 17
_AWAY = 12.0  # names farther than this from their point are tied to it by a line


@dataclass(frozen=True)
class Spot:
    """One point of a scatter chart.

    Attributes:
        line: Its name and its only mark.
        kind: Of :data:`SHAPES`.
        control: Whether it is one: drawn hollow and grey.
        reach: Ends of its interval across, where there is one.
        on_front: Whether it lies on the Pareto front.
        size: Of its marker, 1 for a whole one.
    """

    line: Line
    kind: str
    control: bool = False
    reach: tuple[float, float] | None = None
    on_front: bool = False
    size: float = 1.0


@dataclass(frozen=True)
class Entry:
    """A method or a control in a list.

    Attributes:
        label: Its letters in charts.
        name: Its name.
        kind: Of :data:`SHAPES`.
        number: Of its colour.
        control: Whether it is one.
    """

    label: str
    name: str
    kind: str
    number: int
    control: bool = False

    @property
    def look(self) -> str:
        """Its style classes."""
        return "control" if self.control else f"method {colour_of(self.number)}"

    @property
    def sign(self) -> str:
        """Its marker by itself, as SVG text."""
        return f'<svg class="sign" viewBox="0 0 14 14" aria-hidden="true">{_marker(self.kind, 7, 7, self.look)}</svg>'


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "_Box") -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        tall = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(wide, 0.0) * max(tall, 0.0)


def scatter_chart(title: str, spots: Sequence[Spot], x: Axis, y: Axis, key: Sequence[Entry] = ()) -> str:
    """Points with their names, whiskers, and a stair along the Pareto front.

    Args:
        title: What a screen reader says.
        spots: At least one.
        x: Across.
        y: Upwards.
        key: What is listed under the chart.
    """
    places = [(across(x, spot.line.marks[0].x), down(y, spot.line.marks[0].y)) for spot in spots]
    parts = [frame(x, y), _stair([p for p, spot in zip(places, spots, strict=True) if spot.on_front])]
    parts += [_whiskers(spot, place, x, y) for spot, place in zip(spots, places, strict=True)]
    parts += [
        _marker(spot.kind, *place, _look(spot), spot.line.colour, spot.size)
        for spot, place in zip(spots, places, strict=True)
    ]
    rings = "".join(
        f"M{px - 7.5:g} {py:g}a7.5 7.5 0 1 0 15 0a7.5 7.5 0 1 0-15 0"
        for (px, py), spot in zip(places, spots, strict=True)
        if spot.on_front
    )
    parts.append(f'<path class="ring" d="{rings}"/>' if rings else "")
    for spot, (px, py), (left, middle) in zip(spots, places, name_places(spots, places), strict=True):
        parts.append(_name(spot, px, py, left, middle))
    return svg(title, HEIGHT + (10 + _ROW * _rows(key) if key else 0), [*parts, *_listed(key)])


def _rows(key: Sequence[Entry]) -> int:
    return -(-len(key) // _columns(key))


def _columns(key: Sequence[Entry]) -> int:
    return 3 if max((len(entry.name) for entry in key), default=0) <= 15 else 2


def _listed(key: Sequence[Entry]) -> Iterator[str]:
    """What the names in the chart stand for, in columns."""
    for place, entry in enumerate(key):
        column, row = divmod(place, _rows(key))
        left, middle = 14 + column * (WIDTH - 14) / _columns(key), HEIGHT + 8 + _ROW * row
        yield _marker(entry.kind, left, middle, entry.look)
        yield f'<text x="{left + 10:g}" y="{middle + 4:g}"><tspan class="letter">{escape(entry.label)}</tspan> '
        yield f"{escape(entry.name)}</text>"


def name_places(spots: Sequence[Spot], places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where the names of points stand (left end and middle), so that they cover neither each other nor a point.

    Each name takes the nearest free place around its point; where all are taken, the one that covers the least.
    """
    taken = [_Box(px - 5, py - 5, px + 5, py + 5) for px, py in places]
    found: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(spots)), key=lambda i: (places[i][1], places[i][0])):
        wide = _LETTER * len(spots[index].line.label)
        best, least = (0.0, 0.0), float("inf")
        for left, middle in _around(*places[index], wide):
            box = _Box(left, middle - _TALL / 2, left + wide, middle + _TALL / 2)
            inside = box.left > LEFT and box.right < WIDTH and box.top > 0 and box.bottom < HEIGHT - BOTTOM
            covered = sum(box.overlap(other) for other in taken) if inside else float("inf")
            if covered < least:
                best, least = (left, middle), covered
            if covered == 0:
                break
        found[index] = best
        taken.append(_Box(best[0], best[1] - _TALL / 2, best[0] + wide, best[1] + _TALL / 2))
    return [found[index] for index in range(len(spots))]


def _around(px: float, py: float, wide: float) -> Iterator[tuple[float, float]]:
    """Places around a point, the near ones first."""
    yield px + 8, py
    yield px - 8 - wide, py
    yield px - wide / 2, py - 13
    yield px - wide / 2, py + 13
    steps = [(out, up) for out, up in product((0, 14, 28, 42, 56), range(0, 133, 6))]
    for out, up in sorted(steps, key=lambda step: step[0] ** 2 + step[1] ** 2)[1:]:
        for sign in (1, -1):
            yield px + 8 + out, py + sign * up
            yield px - 8 - out - wide, py + sign * up


def _name(spot: Spot, px: float, py: float, left: float, middle: float) -> str:
    wide = _LETTER * len(spot.line.label)
    end = left - 1 if left > px else left + wide + 1 if left + wide < px else left + wide / 2
    far = (end - px) ** 2 + (middle - py) ** 2 > _AWAY**2
    tie = f'<path class="tie" d="M{px:g} {py:g}L{end:g} {middle:g}"/>' if far else ""
    return (
        f'{tie}<text class="end {_look(spot)}" data-m="{spot.line.colour}" x="{left:g}" '
        f'y="{middle + 4:g}">{escape(spot.line.label)}</text>'
    )


def _look(spot: Spot) -> str:
    return "control" if spot.control else f"method {colour_of(spot.line.colour)}"


def _marker(kind: str, px: float, py: float, look: str, number: int | None = None, size: float = 1.0) -> str:
    mine = "" if number is None else f' data-m="{number}"'
    place = f"translate({px:g} {py:g})" + ("" if size == 1 else f" scale({size:g})")
    return f'<path class="marker {look}"{mine} transform="{place}" d="M0 0{SHAPES[kind]}"/>'


def _whiskers(spot: Spot, place: tuple[float, float], x: Axis, y: Axis) -> str:
    (px, py), mark = place, spot.line.marks[0]
    path = f"M{px:g} {down(y, mark.low):g}V{down(y, mark.high):g}" if mark.low != mark.high else ""
    if spot.reach is not None and spot.reach[0] != spot.reach[1]:
        path += f"M{across(x, spot.reach[0]):g} {py:g}H{across(x, spot.reach[1]):g}"
    return f'<path class="whisker {_look(spot)}" d="{path}"/>' if path else ""


def _stair(places: Sequence[tuple[float, float]]) -> str:
    """From each point of the front across to the next and then up: what lies under it is no better."""
    if len(places) < 2:
        return ""
    (px, py), *others = sorted(places)
    path = f"M{px:g} {py:g}" + "".join(f"H{qx:g}V{qy:g}" for qx, qy in others)
    return f'<path class="stair" d="{path}"/>'

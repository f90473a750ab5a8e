"""The error on the plane through three networks."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.connectivity.batch_norm import check_batches, recalibrate
from lightning_prune.connectivity.line import ErrorFunction, numbers
from lightning_prune.connectivity.states import put_back, read_state, state_tensors
from lightning_prune.errors import ConfigError
from lightning_prune.progress import progress

FORMAT = "lightning_prune.plane"

Place = tuple[float, float]


@dataclass(frozen=True)
class ErrorPlane:
    """Errors on a grid over the plane through three networks.

    Attributes:
        xs: Coordinates along the direction from ``a`` to ``b``, in Euclidean distance between parameters.
        ys: Coordinates across it, towards ``c``.
        errors: ``{split: one row for each y, of one error for each x}``.
        places: Where ``a``, ``b`` and ``c`` lie: ``a`` at (0, 0), ``b`` at (distance, 0).
        corners: The errors of the three networks themselves, by split.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    errors: Mapping[str, tuple[tuple[float, ...], ...]]
    places: tuple[Place, Place, Place]
    corners: Mapping[str, tuple[float, float, float]]

    def to_json(self) -> dict[str, Any]:
        """The plane as JSON content."""
        return {"format": FORMAT, "version": 1, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ErrorPlane":
        """A plane from what :meth:`to_json` gave.

        Raises:
            KeyError: Something is missing.
            TypeError: Something is no number or no list.
            ValueError: Numbers are not finite, or do not make a grid.
        """
        xs, ys = _finite(content["xs"]), _finite(content["ys"])
        errors = {str(split): tuple(map(_finite, rows)) for split, rows in content["errors"].items()}
        ends = [(split, _finite(own)) for split, own in content["corners"].items()]
        a, b, c = ((x, y) for x, y in map(_finite, content["places"]))
        corners = {str(split): (one, two, three) for split, (one, two, three) in ends}
        sizes = {(len(rows), len(row)) for rows in errors.values() for row in rows}
        rising = all(len(axis) > 1 and list(axis) == sorted(set(axis)) for axis in (xs, ys))
        if sizes != {(len(ys), len(xs))} or not rising or corners.keys() != errors.keys():
            raise ValueError("places and errors do not belong together")
        return cls(xs, ys, errors, (a, b, c), corners)


def error_plane(
    model: nn.Module,
    state_a: Mapping[str, Any],
    state_b: Mapping[str, Any],
    state_c: Mapping[str, Any],
    error: ErrorFunction,
    points: int = 15,
    margin: float = 0.25,
    batches: Iterable[Any] | None = None,
) -> ErrorPlane:
    """Measure the error on the plane through three networks: two copies and where they branched, for one.

    The model is moved over the plane in place and is afterwards what it was, bit for bit.

    Args:
        model: The network; its own weights do not matter.
        state_a: The first network's ``state_dict``.
        state_b: The second.
        state_c: The third; not on the line through the others.
        error: What to measure, as for :func:`linear_mode_connectivity`.
        points: Places in each direction, at least 2; ``points ** 2`` evaluations.
        margin: How far the grid goes beyond the triangle, as a fraction of its extent; at least 0.
        batches: Inputs on which normalisation statistics are estimated anew at every place. Default: they are
            combined like weights, and variances that become negative outside the triangle count as 0.

    Raises:
        ConfigError: A state of another network, three networks on one line, or an argument out of range.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ConfigError(f"points={points!r}: expected how many places in each direction, at least 2.")
    if not margin >= 0:
        raise ConfigError(f"margin={margin!r}: expected a fraction of the extent, at least 0.")
    if batches is not None:
        check_batches(batches)
    given = (("state_a", state_a), ("state_b", state_b), ("state_c", state_c))
    plane = _Plane(model, *(read_state(model, state, name) for name, state in given))
    xs, ys = (_grid([place[axis] for place in plane.places], points, margin) for axis in (0, 1))

    def at(weights: tuple[float, float]) -> dict[str, float]:
        plane.move_to(*weights)
        if batches is not None:
            recalibrate(model, batches)
        return numbers(error(model), f"place {weights}")

    with put_back(model), torch.no_grad(), progress("errors on the plane, places", points**2) as bar:
        rows = []
        for y in ys:
            rows.append([at(plane.weights(x, y)) for x in xs])
            bar.advance(points)
        corners = [at(weights) for weights in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))]
    errors = {split: tuple(tuple(place[split] for place in row) for row in rows) for split in corners[0]}
    ends = {split: (corners[0][split], corners[1][split], corners[2][split]) for split in corners[0]}
    return ErrorPlane(xs, ys, errors, plane.places, ends)


class _Plane:
    """The states ``a + s (b - a) + t (c - a)``."""

    def __init__(self, model: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor], c: dict[str, Tensor]) -> None:
        self.states = a, b, c
        self._own = state_tensors(model)
        parameters = {id(p) for p in model.parameters()}
        names = list({id(t): name for name, t in self._own.items() if id(t) in parameters}.values())
        to_b, to_c = ([(end[name] - a[name]).double() for name in names] for end in (b, c))
        inner = [[_dot(p, q) for q in (to_b, to_c)] for p in (to_b, to_c)]
        self.width = inner[0][0] ** 0.5
        self.along = inner[0][1] / self.width if self.width else 0.0
        across = inner[1][1] - self.along**2
        if not (self.width > 0 and across > 1e-12 * max(inner[1][1], inner[0][0])):
            raise ConfigError("the three networks lie on one line (or two are equal), so no plane goes through them.")
        self.height = across**0.5
        self.places: tuple[Place, Place, Place] = (0.0, 0.0), (self.width, 0.0), (self.along, self.height)

    def weights(self, x: float, y: float) -> tuple[float, float]:
        """``s`` and ``t`` of a place."""
        t = y / self.height
        return (x - t * self.along) / self.width, t

    def move_to(self, s: float, t: float) -> None:
        """Set the network to a place, in place; what is not floating comes from the heaviest corner."""
        a, b, c = self.states
        heaviest = max(zip((1 - s - t, s, t), self.states, strict=True), key=lambda pair: pair[0])[1]
        corner = {(0.0, 0.0): a, (1.0, 0.0): b, (0.0, 1.0): c}.get((s, t))
        for name, own in self._own.items():
            if corner is not None or not (own.is_floating_point() or own.is_complex()):
                own.copy_((corner or heaviest)[name])
                continue
            value = a[name] + s * (b[name] - a[name]) + t * (c[name] - a[name])
            own.copy_(value.clamp(min=0) if name.rpartition(".")[2] == "running_var" else value)


def _finite(values: Iterable[Any]) -> tuple[float, ...]:
    found = tuple(float(value) for value in values)
    if not all(map(math.isfinite, found)):
        raise ValueError("a number is not finite")
    return found


def _dot(one: list[Tensor], other: list[Tensor]) -> float:
    return sum(float((p * q).sum()) for p, q in zip(one, other, strict=True))


def _grid(places: list[float], points: int, margin: float) -> tuple[float, ...]:
    low, high = min(places), max(places)
    low, high = low - margin * (high - low), high + margin * (high - low)
    return tuple(low + (high - low) * index / (points - 1) for index in range(points))

"""Which of values are the k largest, call after call while they move a little: without sorting, in few passes."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_prune.learned import fused
from lightning_prune.selection import select

_FEW = 2**11  # so many values are put in order in less time than the calls below take
_PIECE = 2**18  # values that are compared in one go: more would take much memory
_COLLECT = 64  # collecting takes as long as looking for the boundary among one value in so many
_NONE = np.empty(0, np.intp)


class Boundary(NamedTuple):
    """Those of larger magnitude than ``below`` are kept, and ``also`` those at some places."""

    below: float
    also: np.ndarray
    """Flat positions, ascending, of values that are ``below`` exactly."""


class TopMask:
    """Which ``kept`` values of one tensor have the largest magnitudes, call after call; of equal ones the first.

    The boundary is looked for among the few values that lay near it when all were looked through. It is right if as
    many values as are to be kept lie above it, which one count tells. Where others have crossed it, those near it are
    collected anew; where it has moved too far for that, one selection over all values finds it again. What is
    remembered changes the time a call takes, never its result.
    """

    def __init__(self) -> None:
        self._at = 0.0  # the boundary
        self._width = 0.0  # half the bracket around it in which values are near
        self._near: np.ndarray | None = None  # their places, ascending
        self._kept_near = 0
        self._calls = 0  # since they were collected
        self._of = (0, 0)
        self._flags = np.empty(0, bool)
        self._compiled = False

    def update(self, values: Tensor, kept: int) -> Boundary | Tensor:
        """Find them.

        Args:
            values: Contiguous, any shape, floating, outside of any graph.
            kept: From 1 to the number of values.

        Returns:
            What tells the mask; or the mask, of the shape of ``values``.

        Raises:
            SelectionError: A value is NaN.
        """
        if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
            return _select(values, kept)
        flat = values.numpy().ravel()
        found: Boundary | None = None
        if kept == len(flat):
            found = Boundary(-1.0, _NONE) if math.isfinite(flat.dot(flat)) else None  # all are larger, if none is NaN
        elif len(flat) <= _FEW:
            found = _of_few(flat, kept)
        elif self._near is not None and self._of == (len(flat), kept):
            found = self._again(flat, kept)
        return self._anywhere(values, kept) if found is None else found

    def _again(self, flat: np.ndarray, kept: int) -> Boundary | None:
        found = self._among_near(flat, kept)
        self._calls += 1
        if found is None:
            self._collect(flat, kept)
            found = self._among_near(flat, kept)
        if found is not None:
            self._at = found.below
        return found

    def _among_near(self, flat: np.ndarray, kept: int) -> Boundary | None:
        """The boundary, if it lies among the values that are near it and no other has crossed it."""
        assert self._near is not None
        rest = len(self._near) - self._kept_near
        if self._kept_near < 1 or rest < 1:
            return None
        magnitudes = np.abs(flat[self._near])
        magnitudes.partition((rest - 1, rest))
        below, least = magnitudes[rest - 1], magnitudes[rest]
        over = self._count_over(flat, least if below == least else below)
        if over == kept and below < least:
            return Boundary(float(below), _NONE)
        if over is None or below != least:
            return None
        equal = (np.abs(flat) == least).nonzero()[0]
        return Boundary(float(least), equal[: kept - over]) if 0 < kept - over <= len(equal) else None

    def _collect(self, flat: np.ndarray, kept: int) -> None:
        """Collect the values that are near the boundary now."""
        if self._near is not None:
            self._width *= 1.3 if _COLLECT * self._calls * len(self._near) < len(flat) else 0.8
        low, high = flat.dtype.type(self._at - self._width), flat.dtype.type(self._at + self._width)
        near, above = [], 0
        for start in range(0, len(flat), _PIECE):
            magnitudes = np.abs(flat[start : start + _PIECE])
            is_above = magnitudes > high
            above += int(np.count_nonzero(is_above))
            near.append(np.equal(is_above, magnitudes < low).nonzero()[0] + start)  # neither; NaN too
        self._near, self._kept_near, self._calls = np.concatenate(near), kept - above, 0

    def _count_over(self, flat: np.ndarray, number: np.floating) -> int | None:
        """How many magnitudes are larger; ``None`` where one may be NaN."""
        count = 0
        for start in range(0, len(flat), _PIECE):
            piece = flat[start : start + _PIECE]
            if self._compiled:
                over, nan = fused.count_over()(piece, number)
            else:
                flags, nan = self._flags[: len(piece)], not math.isfinite(piece.dot(piece))  # an infinity, too
                over = int(np.count_nonzero(np.greater(piece, number, out=flags)))
                over += int(np.count_nonzero(np.less(piece, -number, out=flags)))
            if nan:
                return None
            count += over
        return count

    def _anywhere(self, values: Tensor, kept: int) -> Tensor:
        mask = _select(values, kept)
        if values.numel() > _FEW:
            flat = values.numpy().ravel()
            self._at, self._of = float(np.abs(flat[mask.numpy().ravel()]).min()), (len(flat), kept)
            self._width = min(max(self._width, 0.002 * self._at), 0.02 * self._at)
            self._compiled = fused.usable(values)
            if not self._compiled:
                self._flags = np.empty(min(len(flat), _PIECE), bool)  # fresh memory costs as much as the comparison
            self._collect(flat, kept)
        return mask


def _select(values: Tensor, kept: int) -> Tensor:
    scores = values.abs()
    return select({"the scores of a mask": scores}, remove=scores.numel() - kept)["the scores of a mask"]


def _of_few(flat: np.ndarray, kept: int) -> Boundary | None:
    """By sorting; ``None`` unless the boundary is plain."""
    ordered = np.sort(np.abs(flat))  # NaN goes last
    if np.isnan(ordered[-1]) or ordered[-kept - 1] == ordered[-kept]:
        return None
    return Boundary(float(ordered[-kept - 1]), _NONE)

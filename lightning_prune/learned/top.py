"""Which of values are the k largest, call after call while they move a little: without sorting, in few passes."""

import numpy as np
import torch
from torch import Tensor

from lightning_prune.learned import fused
from lightning_prune.learned.pieces import PIECE
from lightning_prune.selection import select

Changes = tuple[np.ndarray, np.ndarray]
"""Flat positions, and whether the values there are kept now."""

_MANY = 8  # where more than one value in so many is to be looked at by its position, all are done anew
_FEW = 500  # where less than one in so many is, the bracket becomes wider
_ABOVE, _BELOW = np.uint8(1), np.uint8(255)  # a magnitude in the bracket is 0, and so is NaN


class TopMask:
    """Which ``kept`` values of one tensor have the largest magnitudes, call after call; of equal ones the first.

    A call looks for the boundary near the place where the last one found it: two comparisons tell what lies above,
    inside and below a narrow bracket. All values that lie above and were kept, or below and were not, are as they were;
    the few others are looked at one by one. As many of these are kept as were before, so where the smallest of them
    lies inside the bracket, it is the boundary. Where it has left the bracket, one selection over all values finds it
    again. What is remembered changes the time a call takes, never its result.
    """

    def __init__(self) -> None:
        self._at = 0.0  # the boundary: the smallest magnitude that is kept
        self._speed = 0.0
        self._width = 0.0  # of half the bracket
        self._sides: np.ndarray | None = None  # of each value at the last call
        self._kept = 0
        self._bracket: _Bracket | None = None

    def update(self, values: Tensor, kept: int) -> Changes | Tensor:
        """Find them.

        Args:
            values: Contiguous, any shape, floating, outside of any graph.
            kept: From 1 to the number of values.

        Returns:
            Where the mask has changed since the last call; or all of it, of the shape of ``values``.

        Raises:
            SelectionError: A value is NaN.
        """
        sides = self._sides
        if sides is not None and kept == self._kept and len(sides) == values.numel() and _is_fast(values):
            found = self._near(values.view(-1).numpy(), sides)
            if found is not None:
                return found
        return self._anywhere(values, kept)

    def mask(self, shape: torch.Size) -> Tensor:
        """The whole mask of the last call that has told changes.

        Args:
            shape: Of the values.
        """
        assert self._sides is not None
        return torch.from_numpy(self._sides == _ABOVE).view(shape)

    def _near(self, flat: np.ndarray, sides: np.ndarray) -> Changes | None:
        guess = self._at + self._speed
        low, high = flat.dtype.type(guess - self._width), flat.dtype.type(guess + self._width)
        assert self._bracket is not None
        odd = self._bracket.odd(flat, low, high, sides)
        magnitudes, before = np.abs(flat[odd]), sides[odd] == _ABOVE
        kept = np.count_nonzero(before)
        if kept == 0 or len(odd) * _MANY > len(flat):
            return None
        bound = np.partition(magnitudes, len(odd) - kept)[len(odd) - kept]
        passes = magnitudes >= bound
        if not low <= bound <= high:  # NaN too
            return None
        surplus = np.count_nonzero(passes) - kept
        if surplus < 0:  # NaN is no larger than the boundary, though it was sorted above
            return None
        if surplus:
            passes[np.flatnonzero(magnitudes == bound)[-surplus:]] = False
        turned = passes != before
        changed, passes = odd[turned], passes[turned]
        sides[changed] = np.where(passes, _ABOVE, _BELOW)
        self._move(float(bound), float(bound) - self._at, 0.9 if len(odd) * _FEW > len(flat) else 1.3)
        return changed, passes

    def _anywhere(self, values: Tensor, kept: int) -> Tensor:
        magnitudes = values.abs()
        mask = select({"the scores of a mask": magnitudes}, remove=magnitudes.numel() - kept)["the scores of a mask"]
        if _is_fast(values):
            at = float(magnitudes.view(-1).numpy()[mask.view(-1).numpy()].min())
            self._move(at, 0.0, 1.0)
            self._width = min(max(self._width, 0.002 * at), 0.02 * at)
            self._sides, self._kept = np.where(mask.view(-1).numpy(), _ABOVE, _BELOW), kept
            self._bracket = _Bracket(values)
        return mask

    def _move(self, bound: float, speed: float, wider: float) -> None:
        error = abs(bound - self._at - self._speed)
        self._width = max(wider * self._width, 4 * error, 1e-6 * bound, 1e-30)
        self._at, self._speed = bound, speed


def _is_fast(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)


class _Bracket:
    """Finds the values of one tensor that lie inside a bracket, or on another side of it than before.

    Without Numba, NumPy compares into bytes and picks by them several times as fast as torch. Results go where those of
    the last call were: fresh memory would cost as much as the comparisons.

    Args:
        values: Like those that will be looked through.
    """

    def __init__(self, values: Tensor) -> None:
        self._compiled = fused.usable(values)
        if self._compiled:
            self._places = np.empty(values.numel(), np.intp)  # memory is taken as far as it is written to
            return
        size = min(PIECE, values.numel())
        self._magnitudes = np.empty(size, values.view(-1).numpy().dtype)
        self._above = np.empty(size, bool)
        self._odd = np.empty(values.numel(), bool)

    def odd(self, flat: np.ndarray, low: np.floating, high: np.floating, sides: np.ndarray) -> np.ndarray:
        """Where magnitudes lie from ``low`` to ``high``, or on another side of these than ``sides`` has them.

        To be used before the next call.
        """
        if self._compiled:
            return self._places[: fused.elsewhere()(flat, low, high, sides, self._places)]
        for start in range(0, len(flat), PIECE):
            stop = min(start + PIECE, len(flat))
            magnitudes, above, mark = (
                self._magnitudes[: stop - start],
                self._above[: stop - start],
                self._odd[start:stop],
            )
            np.abs(flat[start:stop], out=magnitudes)
            np.greater(magnitudes, high, out=above)
            np.less(magnitudes, low, out=mark)
            side = np.subtract(above.view(np.uint8), mark.view(np.uint8), out=above.view(np.uint8))
            np.not_equal(side, sides[start:stop], out=mark)
        return self._odd.nonzero()[0]

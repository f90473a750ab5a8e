"""Where the k-th largest of values lies that move a little between calls: without sorting, mostly without selecting."""

import numpy as np
import torch
from torch import Tensor

from lightning_prune.errors import SelectionError
from lightning_prune.learned.scratch import Scratch

_PIECE = 2**15  # entries that stay in a cache


class Threshold:
    """The ``kept``-th largest magnitude of one tensor, call after call.

    A call looks for it near the place where the last one found it: two comparisons count what lies above and what lies
    inside a narrow bracket, and only the few values inside are looked at one by one. Where it has left the bracket, one
    selection over all values finds it again. What is remembered changes the time a call takes, never its result.
    """

    def __init__(self) -> None:
        self._at = 0.0
        self._speed = 0.0
        self._width = 0.0  # of half the bracket; 0: nothing is known yet
        self.scratch = Scratch()

    def __call__(self, values: Tensor, kept: int) -> tuple[float, bool]:
        """Find it.

        Args:
            values: Contiguous, any shape, floating.
            kept: From 1 to the number of values.

        Returns:
            The magnitude, and whether exactly ``kept`` magnitudes are as large (else some are equal to it).

        Raises:
            SelectionError: A value is NaN.
        """
        values = values.detach()
        if self._width > 0 and values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
            found = self._near(values, kept)
            if found is not None:
                return found, True
        return self._anywhere(values, kept)

    def _near(self, values: Tensor, kept: int) -> float | None:
        expected = self._at + self._speed
        low, high = expected - self._width, expected + self._width
        above, found = 0, []
        flat = values.view(-1).numpy()  # NumPy compares into bytes and picks by them several times as fast as torch
        for start in range(0, len(flat), _PIECE):
            magnitudes = np.abs(flat[start : start + _PIECE])
            below = magnitudes <= high
            above += len(below) - np.count_nonzero(below)
            found.append(magnitudes[below & (magnitudes >= low)])
        few = np.concatenate(found)
        take = kept - above
        if not 0 < take <= len(few):
            self._width *= 2
            return None
        bound = np.partition(few, len(few) - take)[len(few) - take]
        if np.count_nonzero(few >= bound) != take:
            return None
        share = len(few) / values.numel()
        self._width *= 0.7 if share > 0.02 else 1.4 if share < 0.005 else 1.0
        self._at, self._speed = float(bound), float(bound) - self._at
        return self._at

    def _anywhere(self, values: Tensor, kept: int) -> tuple[float, bool]:
        magnitudes = values.abs().view(-1)
        bound = magnitudes.kthvalue(len(magnitudes) - kept + 1).values
        count = int(torch.count_nonzero(magnitudes >= bound))
        if count < kept:
            raise SelectionError(
                f"{int(magnitudes.isnan().sum())} of {len(magnitudes)} scores are NaN, so nothing can be selected; "
                "lower the learning rate."
            )
        self._at, self._speed = float(bound), 0.0
        self._width = self._width or 0.01 * abs(self._at) + 1e-12
        return self._at, count == kept

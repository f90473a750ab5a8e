"""Passes over the weights of a layer that Numba compiles into one (``pip install numba``).

Without it, NumPy and torch take several passes, with the same result to the bit. What a pass costs is mostly to fetch
the weights from memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, float32, float64

from lightning_prune.compiling import can_compile

SMALLEST = 2**14
"""Of smaller tensors a pass takes no longer than a call; their networks need not wait for the compiler."""

_BLOCK = 128  # values that are compared before one of them is looked at alone


def usable(*tensors: Tensor) -> bool:
    """Whether there is a compiled pass over tensors of one shape: on a CPU, float32 or float64, contiguous, large."""
    first = tensors[0]
    return (
        first.numel() >= SMALLEST
        and first.device.type == "cpu"
        and first.dtype in (float32, float64)
        and all(tensor.dtype == first.dtype and tensor.is_contiguous() for tensor in tensors)
        and can_compile()
    )


def times_sign(out: Tensor, grad: Tensor, weight: Tensor, scores: Tensor) -> None:
    """Write ``grad * weight * sign(scores)`` to ``out``."""
    _times_sign()(*(tensor.view(-1).numpy() for tensor in (out, grad, weight, scores)))


@functools.cache
def _times_sign() -> Callable[..., None]:
    import numba

    def times_sign(out: Any, grad: Any, weight: Any, scores: Any) -> None:
        for i in range(len(out)):
            out[i] = grad[i] * weight[i] * np.sign(scores[i])

    return numba.njit(nogil=True)(times_sign)


def pass_over(out: Tensor, weight: Tensor, probabilities: Tensor, levels: Tensor, step: float, over: float) -> int:
    """Write ``weight`` where ``probability - step * level > over``, else 0; how many do.

    Args:
        out: Flat, as all others.
        weight: The weights.
        probabilities: Of their type.
        levels: int16.
        step: A power of 2.
        over: The bound.
    """
    number = probabilities.numpy().dtype.type
    arrays = (tensor.numpy() for tensor in (out, weight, probabilities, levels))
    return int(_pass_over()(*arrays, number(step), number(over)))


@functools.cache
def _pass_over() -> Callable[..., int]:
    import numba

    def pass_over(out: Any, weight: Any, probabilities: Any, levels: Any, step: Any, over: Any) -> int:
        kept, zero = 0, out.dtype.type(0)
        for i in range(len(out)):
            passes = probabilities[i] - probabilities.dtype.type(levels[i]) * step > over
            out[i] = weight[i] if passes else zero
            kept += passes
        return kept

    return numba.njit(nogil=True)(pass_over)


@functools.cache
def elsewhere() -> Callable[..., int]:
    """Where magnitudes lie from ``low`` to ``high``, or on another side of these than before.

    The function takes ``(values, low, high, sides, places)``, ``sides`` of bytes: 1 above, 255 below. It writes the
    places, ascending, and tells how many.
    """
    import numba

    def elsewhere(values: Any, low: Any, high: Any, sides: Any, places: Any) -> int:
        count, now = 0, np.empty(_BLOCK, np.uint8)
        for start in range(0, len(values), _BLOCK):
            size = min(_BLOCK, len(values) - start)
            block, before = values[start : start + size], sides[start : start + size]
            for i in range(size):
                magnitude = abs(block[i])
                now[i] = np.uint8(1) if magnitude > high else (np.uint8(255) if magnitude < low else np.uint8(0))
            wrong = np.uint8(0)
            for i in range(size):  # bytes all through: a wider number would leave most of a vector unused
                wrong = np.uint8(wrong | np.uint8(now[i] ^ before[i]))
            if wrong:
                for i in range(size):
                    if now[i] != before[i]:
                        places[count] = start + i
                        count += 1
        return count

    return numba.njit(nogil=True)(elsewhere)

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
    """Write ``grad * weight`` to ``out``, times -1 where the score is not positive."""
    _times_sign()(*(tensor.view(-1).numpy() for tensor in (out, grad, weight, scores)))


@functools.cache
def _times_sign() -> Callable[..., None]:
    import numba

    def times_sign(out: Any, grad: Any, weight: Any, scores: Any) -> None:
        for i in range(len(out)):
            product = grad[i] * weight[i]
            out[i] = product if scores[i] > 0 else -product

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
def count_over() -> Callable[..., tuple[int, int]]:
    """How many magnitudes are larger than a number of their type, and how many are NaN.

    The function takes ``(values, number)``, of at most 2**31 values.
    """
    import numba

    def count_over(values: Any, number: Any) -> tuple[Any, Any]:
        over = nan = np.int32(0)
        for i in range(len(values)):  # in 32 bits, as wide as most values: else half of a vector would be unused
            over = np.int32(over + np.int32(abs(values[i]) > number))
            nan = np.int32(nan + np.int32(values[i] != values[i]))
        return over, nan

    return numba.njit(nogil=True)(count_over)

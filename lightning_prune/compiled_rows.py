"""The product of compressed rows with a matrix, compiled for the processor at hand by Numba (``pip install numba``).

torch's own product of compressed rows passes over the result once for every weight. This one takes eight weights of a
row at a time, so that an entry of the result is loaded and stored an eighth as often; the matrix is read in pieces of
rows that stay in the cache.
"""

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

COLUMNS = 512  # of the matrix at a time: two kilobytes of each of its rows
SMALLEST_SHARE = 2**20  # multiply-adds that are worth a thread's start
DTYPES = (torch.float32, torch.float64)


def available(tensor: Tensor) -> bool:
    """Whether there is a compiled product for tensors of this kind: on a CPU, float32 or float64, with Numba."""
    return tensor.device.type == "cpu" and tensor.dtype in DTYPES and _installed()


@functools.cache
def _installed() -> bool:
    return find_spec("numba") is not None  # looks through folders, at every forward pass if it were asked there


def multiplier(starts: Tensor, columns: Tensor, values: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """``matrix -> weight @ matrix + bias``, on as many threads as torch's operators take.

    Args:
        starts: Where each row begins in ``columns`` and ``values``, and where the last one ends: (rows + 1,), int32.
        columns: Column of each weight, (weights,), int32; not checked to lie within the matrix.
        values: The weights, (weights,).
        bias: One for each row, (rows, 1) or (rows,).

    Returns:
        From a matrix (columns of the weight, n) of the same data type, copied where its rows are not contiguous, to
        (rows, n). It reads the memory of these tensors for as long as it lives.
    """
    kernel, rows = _kernel(), len(starts) - 1
    parts = [tensor.detach().numpy() for tensor in (starts, columns, values, bias.reshape(-1))]

    def multiply(matrix: Tensor) -> Tensor:
        matrix = matrix.detach().contiguous()
        out = matrix.new_empty(rows, matrix.shape[1])
        arrays = [*parts, matrix.numpy(), out.numpy()]
        shares = min(torch.get_num_threads(), len(parts[1]) * matrix.shape[1] // SMALLEST_SHARE)
        if shares < 2:
            kernel(*arrays, 0, rows)
            return out
        # rows are cut where each share has as many weights
        wanted = np.linspace(0, len(parts[1]), shares + 1)[1:-1]
        cuts = [0, *np.searchsorted(parts[0], wanted).clip(0, rows).tolist(), rows]
        jobs = [_pool(shares).submit(kernel, *arrays, *share) for share in itertools.pairwise(cuts[1:])]
        kernel(*arrays, *cuts[:2])
        wait(jobs)
        for job in jobs:
            job.result()
        return out

    return multiply


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="lightning_prune_rows")


@functools.cache
def _kernel() -> Callable[..., None]:
    """The compiled loop; it leaves the interpreter's lock to others."""
    import numba

    def rows_times_matrix(
        starts: Any, columns: Any, values: Any, bias: Any, matrix: Any, out: Any, first: int, last: int
    ) -> None:
        for left in range(0, matrix.shape[1], COLUMNS):
            right = min(left + COLUMNS, matrix.shape[1])
            for row in range(first, last):
                sums = out[row, left:right]
                sums[:] = bias[row]
                at, end = starts[row], starts[row + 1]
                while at + 8 <= end:
                    v0, v1, v2, v3 = values[at], values[at + 1], values[at + 2], values[at + 3]
                    v4, v5, v6, v7 = values[at + 4], values[at + 5], values[at + 6], values[at + 7]
                    m0, m1 = matrix[columns[at], left:right], matrix[columns[at + 1], left:right]
                    m2, m3 = matrix[columns[at + 2], left:right], matrix[columns[at + 3], left:right]
                    m4, m5 = matrix[columns[at + 4], left:right], matrix[columns[at + 5], left:right]
                    m6, m7 = matrix[columns[at + 6], left:right], matrix[columns[at + 7], left:right]
                    for j in range(right - left):
                        sums[j] += (
                            v0 * m0[j] + v1 * m1[j] + v2 * m2[j] + v3 * m3[j]
                            + v4 * m4[j] + v5 * m5[j] + v6 * m6[j] + v7 * m7[j]
                        )  # fmt: skip
                    at += 8
                while at < end:
                    v0, m0 = values[at], matrix[columns[at], left:right]
                    for j in range(right - left):
                        sums[j] += v0 * m0[j]
                    at += 1

    return numba.njit(nogil=True, fastmath={"contract", "reassoc"})(rows_times_matrix)

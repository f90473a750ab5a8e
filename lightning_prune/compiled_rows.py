"""The product of compressed rows with a matrix, compiled for the processor at hand by Numba (``pip install numba``).

torch's own product of compressed rows passes over the result once for every weight. This one holds the sums of a row in
registers, for a few vectors of columns at a time, so that a weight costs one load and one multiply-add for each vector.
"""

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.compiled_vectors import BYTES, row_times_columns, transpose_tile
from lightning_prune.compiling import can_compile

MOST_UNITS = 4  # vectors of columns at a time: as many sums hide how long a multiply-add takes
CONFLICTING = 32  # vectors in a row, or a multiple: in most caches, the same places of all rows share a few lines
SMALLEST_SHARE = 2**22  # multiply-adds that are worth waking a thread, which takes as long as some four million
DTYPES = (torch.float32, torch.float64)


def available(tensor: Tensor) -> bool:
    """Whether there is a compiled product for tensors of this kind: on a CPU, float32 or float64, with Numba."""
    return tensor.device.type == "cpu" and tensor.dtype in DTYPES and can_compile()


def multiplier(starts: Tensor, columns: Tensor, values: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """``matrix -> weight @ matrix + bias``, on as many threads as torch's operators take.

    Args:
        starts: Where each row begins in ``columns`` and ``values``, and where the last one ends: (rows + 1,), int32.
        columns: Column of each weight, (weights,), int32; not checked to lie within the matrix.
        values: The weights, (weights,).
        bias: One for each row, (rows, 1) or (rows,).

    Returns:
        From a matrix (columns of the weight, n) of the same data type, copied where its rows are no whole vectors one
        after the other, to (rows, n). It reads the memory of these tensors for as long as it lives.
    """
    kernel, rows, lanes = _product(values.element_size()), len(starts) - 1, BYTES // values.element_size()
    parts = [tensor.detach().numpy() for tensor in (starts, columns, values, bias.reshape(-1))]

    def multiply(matrix: Tensor) -> Tensor:
        count = matrix.shape[1]
        out = matrix.new_empty(rows, max(count, lanes))
        arrays = [*parts, _laid_out(matrix.detach(), lanes).numpy(), out.numpy()]
        shares = min(torch.get_num_threads(), len(parts[1]) * count // SMALLEST_SHARE)
        if shares < 2:
            kernel(*arrays, 0, rows)
            return out[:, :count]
        # rows are cut where each share has as many weights
        wanted = np.linspace(0, len(parts[1]), shares + 1)[1:-1]
        cuts = [0, *np.searchsorted(parts[0], wanted).clip(0, rows).tolist(), rows]
        jobs = [_pool(shares).submit(kernel, *arrays, *share) for share in itertools.pairwise(cuts[1:])]
        kernel(*arrays, *cuts[:2])
        wait(jobs)
        for job in jobs:
            job.result()
        return out[:, :count]

    return multiply


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="lightning_prune_rows")


def _laid_out(matrix: Tensor, lanes: int) -> Tensor:
    """The matrix with rows of whole vectors, one after the other in memory; what is after its columns does not count.

    So that a vector is one line of the cache, not parts of two; and that rows do not all fall on the same few lines.
    """
    rows, count = matrix.shape
    vectors = -(-count // lanes)
    vectors += vectors % CONFLICTING == 0
    if matrix.is_contiguous() and count == vectors * lanes:
        return matrix
    # numbers after few columns are multiplied too: zeros, since what memory holds by chance may be slow to compute with
    new = matrix.new_zeros if count < lanes else matrix.new_empty
    laid_out, source = new(rows, vectors * lanes), matrix.t()
    if source.is_contiguous() and min(matrix.shape) >= lanes:
        _transposition(matrix.element_size())(source.numpy(), laid_out.numpy())
    else:
        laid_out[:, :count] = matrix
    return laid_out


@functools.cache
def _product(size: int) -> Callable[..., None]:
    """The compiled loop over rows; it leaves the interpreter's lock to others."""
    import numba

    lanes = BYTES // size
    one, two, three, four = (row_times_columns(units, size) for units in range(1, MOST_UNITS + 1))

    def rows_times_matrix(
        starts: Any, columns: Any, values: Any, bias: Any, matrix: Any, out: Any, first: int, last: int
    ) -> None:
        count, stride = out.shape[1], size * matrix.shape[1]
        weights, places, begin, end = values.ctypes.data, columns.ctypes.data, matrix.ctypes.data, out.ctypes.data
        done = 0
        while done < count:
            units = min((count - done - 1) // lanes + 1, MOST_UNITS, count // lanes)
            left = min(done, count - units * lanes)  # the last vectors may do columns again
            done = left + units * lanes
            source = begin + np.uint64(size * left)
            for row in range(first, last):
                target = end + np.uint64(size * (row * count + left))
                a, b = starts[row], starts[row + 1]
                if units == 4:
                    four(weights, places, a, b, source, stride, bias[row], target)
                elif units == 3:
                    three(weights, places, a, b, source, stride, bias[row], target)
                elif units == 2:
                    two(weights, places, a, b, source, stride, bias[row], target)
                else:
                    one(weights, places, a, b, source, stride, bias[row], target)

    return numba.njit(nogil=True)(rows_times_matrix)


@functools.cache
def _transposition(size: int) -> Callable[..., None]:
    """The compiled transposition of a matrix of at least one tile."""
    import numba

    lanes = BYTES // size
    tile = transpose_tile(size)

    def transpose(source: Any, target: Any) -> None:
        rows, columns = source.shape
        begin, end = source.ctypes.data, target.ctypes.data
        for across in range(0, columns, lanes):
            column = min(across, columns - lanes)  # the last tiles may do entries again
            for down in range(0, rows, lanes):
                row = min(down, rows - lanes)
                one = begin + np.uint64(size * (row * columns + column))
                other = end + np.uint64(size * (column * target.shape[1] + row))
                tile(one, size * columns, other, size * target.shape[1])

    return numba.njit(nogil=True)(transpose)

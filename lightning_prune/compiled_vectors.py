"""Two pieces of vector code for Numba's loops, which it cannot be led to write by itself.

Numba compiles scalar loops and leaves vectors to LLVM, which here loads and stores a result once for every few weights,
behind a check for every pointer that might overlap another. These pieces are given to LLVM as vectors of 64 bytes: any
processor runs them, in as many registers as that takes.
"""

import functools
from collections.abc import Callable
from typing import Any

BYTES = 64  # of a vector


@functools.cache
def row_times_columns(units: int, size: int) -> Callable[..., None]:
    """One row of a sparse matrix times ``units`` vectors of neighbouring columns, with the sums in registers.

    The function takes ``(values, columns, first, last, matrix, stride, bias, out)``: addresses of the weights and of
    their columns (int32), where the row begins and ends in these, the address of the first row of the matrix and the
    bytes from one to the next, what the sums begin with, and the address that they go to.

    Args:
        units: How many vectors.
        size: Bytes of a number: 4 or 8.
    """
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    real, number = _types(ir, types, size)
    word, index = ir.IntType(64), ir.IntType(32)
    vector = ir.VectorType(real, BYTES // size)

    def spread(builder: Any, value: Any) -> Any:
        nothing = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(nothing, value, index(0))
        return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(index, vector.count), None))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, columns, first, last, matrix, stride, bias, out = args
        values = builder.inttoptr(values, real.as_pointer())
        columns = builder.inttoptr(columns, index.as_pointer())
        out = builder.inttoptr(out, vector.as_pointer())
        start, before = spread(builder, bias), builder.block
        body, after = builder.append_basic_block("weight"), builder.append_basic_block("row_end")
        builder.cbranch(builder.icmp_signed("<", first, last), body, after)

        builder.position_at_end(body)
        at, sums = builder.phi(word), [builder.phi(vector) for _ in range(units)]
        weight = spread(builder, builder.load(builder.gep(values, [at])))
        column = builder.zext(builder.load(builder.gep(columns, [at])), word)
        row = builder.inttoptr(builder.add(matrix, builder.mul(column, stride)), vector.as_pointer())
        following, added = builder.add(at, word(1)), []
        for unit, total in enumerate(sums):
            entries = builder.load(builder.gep(row, [word(unit)]), align=size)
            product = builder.fmul(weight, entries, flags=["contract"])
            added.append(builder.fadd(product, total, flags=["contract"]))
        for phi, begin, end in zip([at, *sums], [first, *[start] * units], [following, *added], strict=True):
            phi.add_incoming(begin, before)
            phi.add_incoming(end, body)
        builder.cbranch(builder.icmp_signed("<", following, last), body, after)

        builder.position_at_end(after)
        results = [builder.phi(vector) for _ in range(units)]
        for unit, result in enumerate(results):
            result.add_incoming(start, before)
            result.add_incoming(added[unit], body)
        for unit, result in enumerate(results):
            builder.store(result, builder.gep(out, [word(unit)]), align=size)
        return context.get_dummy_value()

    @intrinsic
    def row_times_columns(
        typing: Any, values: Any, columns: Any, first: Any, last: Any, matrix: Any, stride: Any, bias: Any, out: Any
    ) -> Any:
        where, count = types.uintp, types.int64
        return types.void(where, where, count, count, where, count, number, where), generate

    return row_times_columns


@functools.cache
def transpose_tile(size: int) -> Callable[..., None]:
    """Transpose a square whose rows are one vector long.

    The function takes ``(source, source_stride, target, target_stride)``: addresses, and bytes from a row to the next.

    Args:
        size: Bytes of a number: 4 or 8.
    """
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    real, _ = _types(ir, types, size)
    count = BYTES // size
    half = count // 2
    word, vector, places = ir.IntType(64), ir.VectorType(real, count), ir.VectorType(ir.IntType(32), count)
    # of two vectors one after the other, the lower and the upper halves zipped
    zips = [ir.Constant(places, [p for k in range(s, s + half) for p in (k, count + k)]) for s in (0, half)]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, source_stride, target, target_stride = args

        def address(base: Any, stride: Any, row: int) -> Any:
            return builder.inttoptr(builder.add(base, builder.mul(stride, word(row))), vector.as_pointer())

        rows = [builder.load(address(source, source_stride, row), align=size) for row in range(count)]
        for _ in range(count.bit_length() - 1):  # zipping rows with those half the square below turns it bit by bit
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [builder.shuffle_vector(*pair, places) for pair in pairs for places in zips]
        for row, entries in enumerate(rows):
            builder.store(entries, address(target, target_stride, row), align=size)
        return context.get_dummy_value()

    @intrinsic
    def transpose_tile(typing: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> Any:
        return types.void(types.uintp, types.int64, types.uintp, types.int64), generate

    return transpose_tile


def _types(ir: Any, types: Any, size: int) -> tuple[Any, Any]:
    """LLVM's and Numba's type of a number."""
    return (ir.FloatType(), types.float32) if size == 4 else (ir.DoubleType(), types.float64)

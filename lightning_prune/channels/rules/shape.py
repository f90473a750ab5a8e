"""Operations that look at the same positions in another shape or order: views, permutations, expansion, repetition."""

from collections.abc import Sequence

import numpy as np

from lightning_prune.channels.labels import Labels, span
from lightning_prune.channels.recording import Op
from lightning_prune.channels.rules.registry import argument, axes_of, rule, tensor

# Python-level functions that ask for sizes by themselves, so that a removal is followed.
SIZE_FREE = {
    "flatten", "squeeze", "unsqueeze", "instance_norm", "batch_norm", "group_norm", "adaptive_avg_pool2d", "linear",
    "matmul", "__matmul__", "__rmatmul__", "einsum", "conv2d", "conv1d", "conv3d", "flatten_", "expand_as", "view_as",
    "reshape_as", "adaptive_avg_pool1d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "avg_pool1d", "max_pool1d", "chunk", "tensor_split", "scaled_dot_product_attention", "repeat_interleave",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "rms_norm", "layer_norm", "interpolate", "stack", "pad",
    "tile", "bilinear", "movedim", "unbind", "hstack", "vstack", "bmm", "baddbmm",
}  # fmt: skip


def _blocks(first: Sequence[int], second: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Match the axes of two shapes of one element count into the shortest runs of equal products; sizes 1 left out."""
    a = [i for i, n in enumerate(first) if n != 1]
    b = [i for i, n in enumerate(second) if n != 1]
    blocks = []
    i = j = 0
    while i < len(a) and j < len(b):
        left, right = [a[i]], [b[j]]
        m, n = first[a[i]], second[b[j]]
        while m != n:
            if m < n:
                i += 1
                left.append(a[i])
                m *= first[a[i]]
            else:
                j += 1
                right.append(b[j])
                n *= second[b[j]]
        i += 1
        j += 1
        blocks.append((left, right))
    return blocks


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_as", "squeeze", "unsqueeze", "flatten", "unflatten")
def view(labels: Labels, op: Op) -> None:
    """Carry labels through a change of axes; an axis split in several must stay rectangular."""
    x, out = tensor(op, 0), op.outs[0]
    out.weight = x.weight
    factors = labels.factors(x)
    if x.wild and all(n == 1 or a in x.wild for a, n in enumerate(x.shape)):
        out.wild = frozenset(range(len(out.shape)))
    if not factors:
        out.factors = []
        return
    if 0 in x.shape:
        labels.freeze(factors, "the tensor is empty")
        out.factors = []
        return
    blocks = _blocks(x.shape, out.shape)
    free = free_axes(op, len(out.shape))
    out.factors = []
    for factor in factors:
        moved = _through(labels, factor, x.shape, out.shape, blocks, free)
        clash = [f for f in out.factors if set(span(f)) & set(span(moved))]
        if clash:
            labels.freeze([moved, *clash], "two kinds of channels are merged into one axis")
        else:
            out.factors.append(moved)


def free_axes(op: Op, ndim: int) -> set[int]:
    """Axes (of the output, or of what is cut) whose sizes the Python code does not spell out."""
    every = set(range(ndim))
    if op.name in ("squeeze", "unsqueeze"):
        return every
    if op.name in ("slice", "narrow", "split", "split_with_sizes"):
        cut = argument(op, 2 if op.name.startswith("split") else 1, "dim", 0)
        return every - set(axes_of(cut, ndim))
    if op.intent is None:
        return set()
    name, given = op.intent
    if name in SIZE_FREE:
        return every
    if name in ("view", "reshape"):
        sizes = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
        return {i for i, size in enumerate(sizes) if size == -1}
    if name == "unflatten":
        axis, sizes = given
        first = int(axis) % (ndim - len(sizes) + 1)
        return every - {first + i for i, size in enumerate(sizes) if size != -1}
    return set()


def _through(
    labels: Labels,
    factor: np.ndarray,
    before: Sequence[int],
    after: Sequence[int],
    blocks: list[tuple[list[int], list[int]]],
    free: set[int],
) -> np.ndarray:
    """One label array after a view; notes balance where an axis is split, and sizes that Python spelled out."""
    varying = set(span(factor))
    full, shape, constant, splits = [1] * factor.ndim, [1] * len(after), [], []
    for left, right in blocks:
        touched = [a for a in left if a in varying]
        if not touched:
            continue
        for a in left:
            full[a] = before[a]
        for b in right:
            shape[b] = after[b]
        if len(left) > 1 or len(right) > 1:
            constant += right
            splits.append((right, len(touched)))
    moved = np.broadcast_to(factor, full).reshape(shape) if constant else factor.reshape(shape)
    for axis in constant:
        first = np.take(moved, [0], axis=axis)
        if moved.shape[axis] > 1 and (moved == first).all():
            moved = first
    for right, touched_count in splits:
        axes = [b for b in right if moved.shape[b] > 1]
        if len(axes) > 1 and len(axes) > touched_count:
            assert labels.op is not None
            labels.balanced.append((moved, labels.op, True))
    if id(factor) in labels.interleaved and len(span(moved)) == 1:
        labels.interleaved[id(moved)] = (moved, labels.interleaved[id(factor)][1])
    if not set(span(moved)) <= free:
        labels.suspect(moved)
    return moved


@rule("permute", "transpose", "t", "transpose_", "t_", "swapaxes", "movedim", "numpy_T")
def permute(labels: Labels, op: Op) -> None:
    """Reorder axes."""
    x, out = tensor(op, 0), op.outs[0]
    ndim = len(x.shape)
    if op.name == "permute":
        order = axes_of(op.args[1], ndim)
    else:
        order = list(range(ndim))
        i, j = (0, ndim - 1) if op.name.startswith("t") and len(op.args) < 3 else axes_of(list(op.args[1:3]), ndim)
        if ndim > 1:
            order[i], order[j] = order[j], order[i]
    out.weight = x.weight
    out.wild = frozenset(i for i, a in enumerate(order) if a in x.wild)
    moved = []
    for factor in labels.factors(x):
        places = [order.index(a) for a in span(factor)]
        moved.append(factor.transpose(order))
        if places != sorted(places):
            labels.reordered = True
            labels.interleaved[id(moved[-1])] = (moved[-1], moved[-1].shape[max(places)])
    out.factors = moved


@rule("expand", "broadcast_to")
def expand(labels: Labels, op: Op) -> None:
    """Repeat without copying: the new extent is constant."""
    x, out = tensor(op, 0), op.outs[0]
    pad = len(out.shape) - len(x.shape)
    sizes = argument(op, 1, "size")
    assert isinstance(sizes, (list, tuple))
    out.weight = x.weight
    out.factors = [f.reshape((1,) * pad + f.shape) for f in labels.factors(x)]
    grown = {a for a, n in enumerate(out.shape) if a < pad or (x.shape[a - pad] == 1 and n > 1)}
    out.wild = frozenset(grown | {a + pad for a in x.wild})
    for factor in out.factors:
        if any(sizes[a] != -1 for a in span(factor)) and (op.intent is None or op.intent[0] not in SIZE_FREE):
            labels.suspect(factor)


@rule("repeat")
def repeat(labels: Labels, op: Op) -> None:
    """Tile labels along with their tensor."""
    x, out = tensor(op, 0), op.outs[0]
    times = list(op.args[1])
    pad = len(out.shape) - len(x.shape)
    out.factors, out.weight = [], x.weight
    for factor in labels.factors(x):
        lifted = factor.reshape((1,) * pad + factor.shape)
        out.factors.append(np.tile(lifted, [n if lifted.shape[a] > 1 else 1 for a, n in enumerate(times)]))

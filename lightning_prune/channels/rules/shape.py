"""Operations that move positions about: views, permutations, concatenation, splitting, padding, indexing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_prune.channels.labels import FIXED, Labels, span
from lightning_prune.channels.recording import Op, Value
from lightning_prune.channels.rules.registry import argument, axes_of, rule, tensor

# Python-level functions that ask for sizes by themselves, so that a removal is followed.
_SIZE_FREE = {
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
    if name in _SIZE_FREE:
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
            labels.balanced.append((moved, labels.op))
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
        if any(sizes[a] != -1 for a in span(factor)) and (op.intent is None or op.intent[0] not in _SIZE_FREE):
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


@rule("cat", "concat", "concatenate")
def cat(labels: Labels, op: Op) -> None:
    """Join labels along one axis; on every other axis they are unified."""
    parts = [v for v in op.args[0] if v.shape != (0,)]
    out = op.outs[0]
    axis = axes_of(argument(op, 1, "dim", 0), len(out.shape))[0]
    _joined(labels, parts, axis, out)


def _joined(labels: Labels, parts: list[Value], axis: int, out: Value) -> None:
    out.weight = all(v.weight for v in parts)
    spans = [[f for f in labels.factors(v) if f.shape[axis] > 1] for v in parts]
    joint = {span(f) for fs in spans for f in fs}
    others = []
    for value in parts:
        stripped = Value(tuple(1 if a == axis else n for a, n in enumerate(value.shape)))
        stripped.factors = [f for f in labels.factors(value) if f.shape[axis] == 1]
        stripped.wild = value.wild
        others.append(stripped)
    if len(joint) == 1 and len(next(iter(joint))) > 1 and all(spans):
        out.factors = [np.concatenate([fs[0] for fs in spans], axis=axis)]
        rest = set(next(iter(joint)))
        out.factors += [f for f in labels.join(others, others[0].shape) if not rest & set(span(f))]
        return
    pieces, any_labels = [], False
    for value in parts:
        ids = labels.along(value, axis)
        any_labels |= ids is not None
        pieces.append(np.zeros(value.shape[axis], dtype=np.int64) + FIXED if ids is None else ids)
    if any(len(s) > 1 for s in joint):  # collapsed just now; what else they carried goes on without them
        others = [_without(v, axis) for v in others]
    out.factors = labels.join(others, tuple(1 if a == axis else n for a, n in enumerate(out.shape)))
    if any_labels:
        out.factors.append(np.concatenate(pieces).reshape([-1 if a == axis else 1 for a in range(len(out.shape))]))


def _without(value: Value, axis: int) -> Value:
    value.factors = [f for f in value.factors or [] if f.shape[axis] == 1]
    return value


@rule("stack")
def stack(labels: Labels, op: Op) -> None:
    """Put tensors side by side on a new axis; each keeps its labels, and all must stay equally long."""
    parts = list(op.args[0])
    out = op.outs[0]
    axis = axes_of(argument(op, 1, "dim", 0), len(out.shape))[0]
    if len(parts) == 1:
        out.factors = [np.expand_dims(f, axis) for f in labels.factors(parts[0])]
        return
    kinds = [[span(f) for f in labels.factors(v)] for v in parts]
    if len(kinds[0]) == 1 and all(k == kinds[0] for k in kinds):
        rows = [np.expand_dims(labels.factors(v)[0], axis) for v in parts]
        joint = np.concatenate(rows, axis=axis)
        assert labels.op is not None
        labels.balanced.append((np.moveaxis(joint, axis, 0).reshape(len(parts), -1), labels.op))
        out.factors = [joint]
        return
    out.factors = [np.expand_dims(f, axis) for f in labels.join(parts, parts[0].shape)]


@rule("split", "split_with_sizes", "chunk", "split_copy", "unsafe_split", "unsafe_chunk", "tensor_split")
def split(labels: Labels, op: Op) -> None:
    """Cut an axis into pieces; equal pieces must stay equally long, unequal ones keep their sizes."""
    x = tensor(op, 0)
    axis = axes_of(argument(op, 2, "dim", 0), len(x.shape))[0]
    sizes = [out.shape[axis] for out in op.outs]
    for out in op.outs:
        out.weight, out.factors, out.wild = x.weight, [], x.wild
    for factor in labels.factors(x):
        if factor.shape[axis] == 1 or len(sizes) == 1:
            pieces = [factor] * len(sizes)
        else:
            pieces = np.split(factor, np.cumsum(sizes)[:-1], axis=axis)
            if len(set(sizes)) > 1 and len(span(factor)) > 1:
                pieces = [labels.collapse(factor, [axis])] * len(sizes)
            elif len(set(sizes)) > 1:
                labels.freeze(factor, "it is split into pieces of fixed sizes")
            else:
                labels.balance_pieces(factor, axis, pieces)
                if op.intent is None or op.intent[0] not in _SIZE_FREE:
                    labels.suspect(factor)
        for out, piece in zip(op.outs, pieces, strict=True):
            assert out.factors is not None
            out.factors.append(piece)


@rule("slice", "narrow")
def slice_(labels: Labels, op: Op) -> None:
    """Take a range of an axis; a part of a labelled axis must be one of equal parts."""
    x, out = tensor(op, 0), op.outs[0]
    axis = axes_of(argument(op, 1, "dim", 0), len(x.shape))[0]
    size = x.shape[axis]
    start, length = argument(op, 2, "start", 0) or 0, out.shape[axis]
    assert isinstance(start, int)
    start = max(start + size, 0) if start < 0 else start
    step = 1 if op.name == "narrow" else argument(op, 4, "step", 1)
    out.weight, out.wild, out.factors = x.weight, x.wild, []
    for factor in labels.factors(x):
        if factor.shape[axis] == 1 or (length == size and step == 1):
            out.factors.append(factor)
            continue
        if step == 1 and length and size % length == 0 and start % length == 0:
            labels.balance_pieces(factor, axis, np.split(factor, size // length, axis=axis))
            labels.suspect(factor)
            out.factors.append(np.take(factor, range(start, start + length), axis=axis))
        elif len(span(factor)) > 1:  # within rows that leave whole, positions stay where they are
            out.factors.append(labels.collapse(factor, [axis]))
        else:
            labels.freeze(factor, "a part of it is taken by fixed positions")


@rule("select", "unbind", "unbind_copy", "select_copy")
def select(labels: Labels, op: Op) -> None:
    """Take one position of an axis: free on an unlabelled axis or one of a joint array, else a fixed position."""
    x = tensor(op, 0)
    ndim = len(x.shape)
    axis = axes_of(argument(op, 1, "dim", 0), ndim)[0]
    if op.name.startswith("select"):
        picks = [int(argument(op, 2, "index", 0)) % x.shape[axis]]
    else:
        picks = list(range(x.shape[axis]))
    for out in op.outs:
        out.weight, out.factors = x.weight, []
        out.wild = frozenset(a - (a > axis) for a in x.wild if a != axis)
    for factor in labels.factors(x):
        if span(factor) == (axis,):
            labels.freeze(factor, "positions of it are taken one by one")
            continue
        for out, pick in zip(op.outs, picks, strict=True):
            assert out.factors is not None
            out.factors.append(np.take(factor, pick if factor.shape[axis] > 1 else 0, axis=axis))


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d", "pad")  # fmt: skip
def pad(labels: Labels, op: Op) -> None:
    """Padding adds positions that never leave, since the code fixes how many there are."""
    x, out = tensor(op, 0), op.outs[0]
    amounts = list(op.args[1])
    out.factors, out.weight = [], x.weight
    ndim = len(x.shape)
    widths = [(0, 0)] * ndim
    for i in range(len(amounts) // 2):
        widths[ndim - 1 - i] = (amounts[2 * i], amounts[2 * i + 1])
    for factor in labels.factors(x):
        own = [widths[a] if factor.shape[a] > 1 else (0, 0) for a in range(ndim)]
        if all(w == (0, 0) for w in own):
            out.factors.append(factor)
        elif len(span(factor)) > 1 or min(min(w) for w in own) < 0 or op.name != "constant_pad_nd":
            labels.freeze(factor, "it is padded")
        else:
            out.factors.append(np.pad(factor, own, constant_values=FIXED))


@rule("roll", "flip")
def roll(labels: Labels, op: Op) -> None:
    """Moves positions along axes; channels that move are frozen, since where they go depends on how many there are."""
    x, out = tensor(op, 0), op.outs[0]
    dims = argument(op, 2, "dims", []) if op.name == "roll" else op.args[1]
    moved = set(axes_of(dims, len(x.shape)))
    out.factors = []
    for factor in labels.factors(x):
        if moved & set(span(factor)):
            labels.freeze(factor, f"{op.name} moves its positions")
        else:
            out.factors.append(factor)


@rule("as_strided", "as_strided_")
def as_strided(labels: Labels, op: Op) -> None:
    """Known only where the shape stays, as pooling does to keep a memory format."""
    x, out = tensor(op, 0), op.outs[0]
    if out.shape == x.shape or out is x:
        out.factors = labels.factors(x)
    else:
        labels.freeze(labels.factors(x), "as_strided addresses memory directly")
        out.factors = []


@rule("index", "index_put_", "index_put", "_index_put_impl_")
def index(labels: Labels, op: Op) -> None:
    """Look positions up by number: what is looked up stays, other axes go on."""
    x, out = tensor(op, 0), op.outs[0]
    picks: list[Any] = list(op.args[1])
    picks += [None] * (len(x.shape) - len(picks))
    looked = [a for a, p in enumerate(picks) if p is not None]
    masks = any(len(picks[a].shape) != 1 for a in looked) and len(looked) > 1
    out.weight = x.weight
    left = labels.drop(x, looked, "its positions are looked up by number")
    for pick in (picks[a] for a in looked):
        labels.freeze(labels.factors(pick), "it is used as positions")
    if op.name != "index":
        labels.freeze(labels.factors(x), "its positions are written by number")
        labels.freeze([f for v in op.tensors() for f in labels.factors(v)], "it is written by number")
        return
    grown = len(out.shape) - (len(x.shape) - len(looked))
    if masks or looked != list(range(looked[0], looked[-1] + 1)):
        labels.freeze(left, "several axes are looked up at once")
        out.factors = []
        return
    out.factors = []
    for factor in left:
        shape = [*factor.shape[: looked[0]], *[1] * grown, *factor.shape[looked[-1] + 1 :]]
        out.factors.append(factor.reshape(shape))


@rule("index_select")
def index_select(labels: Labels, op: Op) -> None:
    """Look positions up by number along one axis."""
    x, out = tensor(op, 0), op.outs[0]
    axis = axes_of(op.args[1], len(x.shape))[0]
    out.factors = labels.drop(x, [axis], "its positions are looked up by number")
    out.weight = x.weight


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(labels: Labels, op: Op) -> None:
    """The r * r channels that make one channel of the result leave together."""
    x, out = tensor(op, 0), op.outs[0]
    axis = len(x.shape) - 3
    ids = labels.along(x, axis)
    out.factors = []
    if ids is None:
        return
    if op.name == "pixel_shuffle":
        ids = labels.collapse(ids.reshape(out.shape[axis], -1), [1])
    else:
        ids = np.repeat(ids, out.shape[axis] // x.shape[axis])
    out.factors = [ids.reshape((1,) * axis + (-1, 1, 1))]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(labels: Labels, op: Op) -> None:
    """Interleave groups of channels, which must stay equally long."""
    x, out = tensor(op, 0), op.outs[0]
    ids = labels.along(x, 1)
    out.factors = []
    if ids is not None:
        table = ids.reshape(int(op.args[1]), -1)
        assert labels.op is not None
        labels.balanced.append((table, labels.op))
        labels.reordered = True
        mixed = table.T.reshape((1, -1) + (1,) * (len(out.shape) - 2))
        labels.interleaved[id(mixed)] = (mixed, len(table))
        out.factors = [mixed]

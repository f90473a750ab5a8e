"""Operations that put tensors together or take parts of them: concatenation, splitting, slicing, padding, indexing."""

from typing import Any

import numpy as np

from lightning_prune.channels.labels import FIXED, Labels, span
from lightning_prune.channels.recording import Op, Value
from lightning_prune.channels.rules.registry import argument, axes_of, rule, tensor
from lightning_prune.channels.rules.shape import SIZE_FREE

_ONE = "positions of it are taken one by one"


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
        labels.balanced.append((np.moveaxis(joint, axis, 0).reshape(len(parts), -1), labels.op, False))
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
            elif len(set(sizes)) > 1 and (labels.held_as_list(sizes) or labels.held(sizes)):
                labels.suspect(factor)
            elif len(set(sizes)) > 1:
                labels.freeze(factor, "it is split into pieces of fixed sizes")
            else:
                labels.balance_pieces(factor, axis, pieces)
                if op.intent is None or op.intent[0] not in SIZE_FREE:
                    labels.suspect(factor)
        if pieces[0].size == 1:
            labels.freeze(factor, _ONE)
            continue
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
        if length == 1 and span(factor) == (axis,):
            labels.freeze(factor, _ONE)
        elif step == 1 and length and size % length == 0 and start % length == 0:
            labels.balance_pieces(factor, axis, np.split(factor, size // length, axis=axis))
            labels.suspect(factor)
            out.factors.append(np.take(factor, range(start, start + length), axis=axis))
        elif len(span(factor)) > 1:  # within rows that leave whole, positions stay where they are
            out.factors.append(labels.collapse(factor, [axis]))
        elif step == 1 and length and labels.held({start, start + length} - {0, size}):
            labels.suspect(factor)
            out.factors.append(np.take(factor, range(start, start + length), axis=axis))
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
            labels.freeze(factor, _ONE)
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


@rule("index_put_", "index_put", "_index_put_impl_")
def index_put(labels: Labels, op: Op) -> None:
    """Write rows by number: rows stay, and along other axes what is written and what it is written into agree."""
    x, values, out = tensor(op, 0), tensor(op, 2), op.outs[0]
    picks: list[Any] = list(op.args[1])
    labels.freeze([f for pick in picks if pick is not None for f in labels.factors(pick)], "it is used as positions")
    if len(picks) != 1 or len(picks[0].shape) != 1 or len(values.shape) > len(x.shape):
        labels.freeze(labels.factors(x), "its positions are written by number")
        labels.freeze(labels.factors(values), "it is written by number")
        return
    rows = []
    for value in (x, values):
        rest = Value(tuple([1, *value.shape[1:]] if len(value.shape) == len(x.shape) else value.shape))
        axes = [0] if len(value.shape) == len(x.shape) else []
        rest.factors = labels.drop(value, axes, "rows are written by number")
        rest.wild = value.wild
        rows.append(rest)
    made = x.factors == []
    out.factors = labels.join(rows, (1, *x.shape[1:]))
    if made and x.wild:  # made by a factory, with a size that only a trial can tell to follow
        for factor in out.factors:
            labels.suspect(factor)
    out.wild = x.wild - {a for f in out.factors for a in span(f)}
    x.factors, x.wild = out.factors, out.wild


@rule("index")
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
    """Look positions up by number along one axis.

    Numbers that a buffer holds (:class:`ChannelSelection`) can leave themselves: what they pick makes channels anew.
    """
    x, numbers, out = tensor(op, 0), tensor(op, 2), op.outs[0]
    axis = axes_of(op.args[1], len(x.shape))[0]
    out.factors = labels.drop(x, [axis], "its positions are looked up by number")
    out.weight = x.weight
    picked = labels.along(numbers, 0) if numbers.buffer and len(numbers.shape) == 1 else None
    if picked is not None:
        labels.issued.append(picked)
        out.factors.append(picked.reshape((1,) * axis + (-1,) + (1,) * (len(x.shape) - axis - 1)))


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
        labels.balanced.append((table, labels.op, False))
        labels.reordered = True
        mixed = table.T.reshape((1, -1) + (1,) * (len(out.shape) - 2))
        labels.interleaved[id(mixed)] = (mixed, len(table))
        out.factors = [mixed]

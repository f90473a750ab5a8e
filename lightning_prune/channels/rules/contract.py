"""Operations that consume channels and issue new ones: convolution, linear maps, matrix products, attention."""

import numpy as np
from torch.nn.modules.conv import _ConvNd

from lightning_prune.channels.labels import Labels, span
from lightning_prune.channels.recording import Op, Value
from lightning_prune.channels.rules.registry import rule, tensor, thin


def _fresh(labels: Labels, weight: Value, axis: int) -> np.ndarray | None:
    """The labels of a weight's output axis, marked as channels that an operation makes."""
    ids = labels.along(weight, axis)
    if ids is not None:
        labels.issued.append(ids)
    return ids


def _consume(labels: Labels, x: np.ndarray | None, weight: np.ndarray | None, what: str) -> None:
    if x is not None and weight is not None:
        labels.unify(weight, x)
        labels.consuming.append(weight)
    elif x is not None:
        labels.freeze(x, f"{what} does not shrink")
    elif weight is not None:
        labels.freeze(weight, "it reads positions that are no channels (an input of the model, or a fixed size)")


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "conv_transpose2d")
def convolution(labels: Labels, op: Op) -> None:
    """Consume axis 1 of the input, issue the weight's output axis; groups keep their inputs at the same places."""
    x, weight, bias = op.args[0], op.args[1], op.args[2]
    transposed, groups = bool(op.args[6]), int(op.args[8])
    ndim, out = len(x.shape), op.outs[0]
    for factor in labels.factors(x):
        varying = span(factor)
        if all(a >= 2 for a in varying):
            labels.freeze(factor, "a convolution slides along it")
    incoming = labels.along(x, 1)
    in_axis, out_axis = (0, 1) if transposed else (1, 0)
    if groups == 1:
        _consume(labels, incoming, labels.along(weight, in_axis), "the weight of a convolution")
        issued = _fresh(labels, weight, out_axis)
    else:
        issued = _grouped(labels, op, incoming, weight, groups, transposed)
    if issued is not None and isinstance(bias, Value):
        own = labels.along(bias, 0)
        if own is not None:
            labels.unify(issued, own)
        else:
            labels.freeze(issued, "the bias does not shrink")
    factors = [f for f in labels.factors(x) if span(f) == (0,)]
    if issued is not None:
        factors.append(issued.reshape((1, -1) + (1,) * (ndim - 2)))
    out.factors = factors
    sizes = [out.shape[0], out.shape[1], int(np.prod(out.shape[2:])), *weight.shape[1 if not transposed else 0 :][:1]]
    if transposed:  # every input position meets out-channels-per-group weights
        sizes = [x.shape[0], out.shape[1], int(np.prod(x.shape[2:])), x.shape[1] // groups]
    sizes.append(int(np.prod(weight.shape[2:])))
    index: list[np.ndarray] = [] if issued is None else [issued.reshape(1, -1, 1, 1, 1)]
    reading = labels.along(weight, in_axis) if groups == 1 or not transposed else None
    if reading is not None:
        index.append(reading.reshape(1, 1, 1, -1, 1))
    labels.product(sizes, index)


def _grouped(
    labels: Labels, op: Op, incoming: np.ndarray | None, weight: Value, groups: int, transposed: bool
) -> np.ndarray | None:
    """Labels that a grouped convolution issues.

    With one input channel a group (depthwise) whole groups leave. Else every group loses its inputs at the same places,
    so that the weight stays one rectangular tensor, and equally many outputs.
    """
    out_channels, in_channels = op.outs[0].shape[1], op.args[0].shape[1]
    per_in, per_out = in_channels // groups, out_channels // groups
    depthwise = (per_in == 1 or (transposed and per_out == 1)) and weight.name not in labels.thick
    if transposed:
        rows = labels.along(weight, 0)
        if incoming is not None and rows is not None:
            labels.unify(incoming, rows)
        elif incoming is not None or rows is not None:
            labels.freeze([a for a in (incoming, rows) if a is not None], "a grouped weight does not shrink")
        if rows is None or not depthwise or per_in != 1 or per_out != 1:
            labels.freeze([a for a in (rows,) if a is not None], "a grouped transposed convolution")
            inner = labels.along(weight, 1)
            if inner is not None:
                labels.freeze(inner, "a grouped transposed convolution")
            return None if rows is None or rows.size != out_channels else rows
        labels.consuming.append(rows)
        labels.grouped.append((weight.name or "", op.module, rows, 1))
        return rows
    issued = _fresh(labels, weight, 0)
    if issued is None:
        if incoming is not None:
            labels.freeze(incoming, "a grouped weight does not shrink")
        return None
    if depthwise:
        table = issued.reshape(groups, per_out)
        labels.collapse(table, [1])
        if incoming is None:
            labels.freeze(issued, "a depthwise convolution reads positions that are no channels")
        else:
            labels.unify(incoming, table[:, 0])
        labels.grouped.append((weight.name or "", op.module, table[:, 0], per_out))
        if not isinstance(labels.modules.get(op.module), _ConvNd):
            labels.suspect(issued)  # how many groups there are is up to code that is not torch's own
        return issued
    labels.thick.add(weight.name)
    if per_out > 1:
        labels.balanced.append((issued.reshape(groups, per_out), op, False))
    places = labels.along(weight, 1)
    if incoming is None:
        if places is not None:
            labels.freeze(places, "a grouped convolution reads positions that are no channels")
    elif places is None:
        labels.freeze(incoming, "a grouped weight does not shrink")
    else:
        labels.unify(np.broadcast_to(places, (groups, per_in)), incoming.reshape(groups, per_in))
        labels.consuming.append(places)
    return issued


def _matrix(labels: Labels, op: Op, a: Value, b: Value) -> list[np.ndarray]:
    """Labels of ``a @ b`` for (m, k) x (k, n), or the same with one batch axis in front."""
    thinned = thin(labels, op)
    ndim = len(a.shape)
    inner_a, inner_b = ndim - 1, ndim - 2
    if ndim == 3:
        _batch(labels, a, b)
    left = [_keep_outer(labels, f, inner_a) for f in labels.factors(a)]
    right = [_keep_outer(labels, f, inner_b) for f in labels.factors(b)]
    k_a = next((f for f in left if span(f) == (inner_a,)), None)
    k_b = next((f for f in right if span(f) == (inner_b,)), None)
    if k_a is not None and k_b is not None and not (a.weight or b.weight):
        labels.unify(k_a, k_b)
        if thinned:
            labels.silence([k_a])
        else:
            labels.freeze(k_a, "two activations are multiplied along it")
    elif b.weight or not a.weight:
        _consume(labels, None if k_a is None else k_a.ravel(), None if k_b is None else k_b.ravel(), "a weight")
    else:
        _consume(labels, None if k_b is None else k_b.ravel(), None if k_a is None else k_a.ravel(), "a weight")
    out_a = [f for f in left if f is not k_a]
    out_b = [f for f in right if f is not k_b]
    labels.issued.extend(f.ravel() for f in out_a + out_b)
    # Index space: (batch,) m, k, n.
    places = [f[..., None] for f in left] + [np.expand_dims(f, inner_a - 1) for f in right]
    labels.product([*a.shape, b.shape[-1]], places)
    # Both results live on (batch,) m, n; a joint array (heads, width) stands for one over heads alone.
    result: list[np.ndarray] = []
    for f in sorted(out_a + out_b, key=lambda f: -len(span(f))):
        if not any(set(span(f)) & set(span(g)) for g in result):
            result.append(f)
    return result


def _keep_outer(labels: Labels, factor: np.ndarray, inner: int) -> np.ndarray:
    """A joint array (heads, width) contracted over its width goes on as heads: whole heads leave."""
    varying = span(factor)
    return labels.collapse(factor, [inner]) if inner in varying and len(varying) > 1 else factor


def _batch(labels: Labels, a: Value, b: Value) -> None:
    labels.meet(a, 0, b, 0, "the batch axis of a matrix product")


@rule("mm", "bmm", "matmul")
def matrix_product(labels: Labels, op: Op) -> None:
    """Contract the inner axis."""
    a, b = tensor(op, 0), tensor(op, 1)
    op.outs[0].factors = _matrix(labels, op, a, b)
    op.outs[0].weight = a.weight and b.weight


@rule("addmm", "baddbmm")
def add_matrix_product(labels: Labels, op: Op) -> None:
    """Contract the inner axis and add."""
    out = op.outs[0]
    product = Value(out.shape)
    product.factors = _matrix(labels, op, tensor(op, 1), tensor(op, 2))
    out.factors = labels.join([product, tensor(op, 0)], out.shape)


@rule("linear")
def linear(labels: Labels, op: Op) -> None:
    """``x @ weight.T + bias`` over the last axis."""
    x, weight = tensor(op, 0), tensor(op, 1)
    last = len(x.shape) - 1
    factors = [_keep_outer(labels, f, last) for f in labels.factors(x)]
    _consume(labels, labels.along(x, last), labels.along(weight, 1), "the weight of a linear map")
    kept = [f for f in factors if span(f) != (last,)]
    issued = _fresh(labels, weight, 0)
    if issued is not None:
        kept.append(issued.reshape((1,) * last + (-1,)))
    product = Value(op.outs[0].shape)
    product.factors = kept
    bias = op.args[2] if len(op.args) > 2 else op.kwargs.get("bias")
    operands = [product, bias] if isinstance(bias, Value) else [product]
    op.outs[0].factors = labels.join(operands, product.shape)
    reading = labels.along(weight, 1)
    index = [f[..., None] for f in kept if f.shape[-1] == 1]
    if issued is not None:
        index.append(issued.reshape((1,) * (last + 1) + (-1,)))
    if reading is not None:
        index.append(reading.reshape((1,) * last + (-1, 1)))
    labels.product([*x.shape, weight.shape[0]], index)


@rule("mv", "dot", "addmv")
def vector_product(labels: Labels, op: Op) -> None:
    """Products with a vector are rare; what they read stays."""
    for value in op.tensors():
        labels.freeze(labels.factors(value), f"{op.name} reads it")
    op.outs[0].factors = []


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "scaled_dot_product_attention",
)
def attention(labels: Labels, op: Op) -> None:
    """Attention over (batch, heads, tokens, width): whole heads leave; the values' width may leave within each head."""
    query, key, value = tensor(op, 0), tensor(op, 1), tensor(op, 2)
    last = len(query.shape) - 1
    if thin(labels, op):
        labels.meet(query, last, key, last, "attention's other operand")
        labels.silence(f for f in labels.factors(query) if span(f) == (last,))
    else:
        for factor in [_keep_outer(labels, f, last) for part in (query, key) for f in labels.factors(part)]:
            if span(factor) == (last,):
                labels.freeze(factor, "attention scores are scaled by its width")
    for axis in range(last - 1):
        labels.meet(query, axis, key, axis, "attention's other operand")
        labels.meet(query, axis, value, axis, "attention's other operand")
    for other in op.tensors()[3:]:  # a mask: (batch, heads, tokens, tokens), broadcast
        for axis in range(last - 1):
            own = axis - (len(query.shape) - len(other.shape))
            if own >= 0 and other.shape[own] > 1 and own not in other.wild:
                labels.meet(query, axis, other, own, "attention's mask")
    op.outs[0].factors = [f for f in labels.factors(value) if last - 1 not in span(f)]
    if len(op.outs) > 1 and len(op.outs[1].shape) == last:  # sums of exponentials: (batch, heads, queries)
        rows = [_keep_outer(labels, f, last) for f in labels.factors(query)]
        op.outs[1].factors = [f[..., 0] for f in rows if f.shape[-1] == 1]
    # Index space of either product: batch, heads, queries, keys, width.
    sizes = [*query.shape[:-1], key.shape[-2]]
    heads = [_keep_outer(labels, f, last) for f in labels.factors(query)]
    labels.product([*sizes, query.shape[-1]], [np.expand_dims(f, last) for f in heads])
    labels.product([*sizes, value.shape[-1]], [np.expand_dims(f, last) for f in op.outs[0].factors])


@rule("embedding")
def embedding(labels: Labels, op: Op) -> None:
    """Issue the width of the table; its rows are looked up by number and stay."""
    table = tensor(op, 0)
    rows, width = labels.along(table, 0), _fresh(labels, table, 1)
    if rows is not None:
        labels.freeze(rows, "rows of a table are looked up by number")
    out = op.outs[0]
    out.factors = [] if width is None else [width.reshape((1,) * (len(out.shape) - 1) + (-1,))]

"""Normalisation, reductions, pooling, and operations that mix positions along an axis."""

import numpy as np

from lightning_prune.channels.approximate import note
from lightning_prune.channels.labels import Labels, span
from lightning_prune.channels.recording import Op, Value
from lightning_prune.channels.rules.registry import argument, axes_of, rule, tensor, thin


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update", "batch_norm")  # fmt: skip
def batch_norm(labels: Labels, op: Op) -> None:
    """Each channel of axis 1 by itself, with its own scale, shift and statistics."""
    x = tensor(op, 0)
    own = [v for v in op.args[1:5] if isinstance(v, Value)]
    for value in own:
        labels.meet(x, 1, value, 0, "a parameter or statistic of BatchNorm")
    out = op.outs[0]
    out.weight = x.weight
    from_batch = op.name != "_native_batch_norm_legit_no_training" and bool(op.args[5] if len(op.args) > 5 else False)
    if not from_batch and len(own) >= 2:
        out.factors = labels.factors(x)
        return
    # Statistics of the batch are taken over every axis but 1.
    others = [a for a in range(len(x.shape)) if a != 1]
    out.factors = labels.drop(x, others, "statistics are taken over it")
    vectors = [f.reshape(-1) for f in out.factors if span(f) == (1,)]
    for statistic in op.outs[1:]:
        if statistic.shape == x.shape[1:2]:
            statistic.factors = vectors
    if not own and vectors:  # InstanceNorm without parameters: only an attribute says how wide it is
        labels.normalised.append((op.module, np.unique(vectors[0])))


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(labels: Labels, op: Op) -> None:
    """Every position of the normalised axes enters the statistics: channels there stay, or leave on request."""
    x, size = tensor(op, 0), len(op.args[1])
    axes = range(len(x.shape) - size, len(x.shape))
    kind = "LayerNorm" if "layer" in op.name else "RMSNorm"
    noted = note(labels, op, axes)
    free = {a for f in noted for a in span(f)}
    op.outs[0].factors = noted + labels.drop(x, set(axes) - free, f"{kind} takes statistics over it", noted)
    for value in op.tensors()[1:]:
        for axis in axes:
            own = labels.along(value, axis - axes[0])
            if own is not None and axis in free:
                labels.meet(x, axis, value, axis - axes[0], f"a parameter of {kind}")
            elif own is not None:
                labels.freeze(own, f"{kind} takes statistics over it")


@rule("native_group_norm", "group_norm")
def group_norm(labels: Labels, op: Op) -> None:
    """Statistics over each group of channels: whole groups leave."""
    x = tensor(op, 0)
    groups = int(op.args[6] if op.name == "native_group_norm" else op.args[1])
    own = [v for v in op.tensors()[1:] if v.shape]
    labels.drop(x, range(2, len(x.shape)), "GroupNorm takes statistics over it")
    for value in own:
        labels.meet(x, 1, value, 0, "a parameter of GroupNorm")
    ids = labels.along(x, 1)
    out = op.outs[0]
    out.factors = [f for f in labels.factors(x) if span(f) == (0,)]
    if ids is None:
        return
    table = ids.reshape(groups, -1)
    if groups == 1 and note(labels, op, [1]):
        pass  # on request
    elif groups == 1:
        labels.freeze(ids, "GroupNorm with one group takes statistics over it")
    else:
        labels.collapse(table, [1])
        labels.grouped.append(("", op.module, table[:, 0], 1))
        for statistic in op.outs[1:]:
            if statistic.shape == (x.shape[0], groups):
                statistic.factors = [table[:, 0].reshape(1, -1)]
    out.factors.append(ids.reshape((1, -1) + (1,) * (len(x.shape) - 2)))


@rule("mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "sum", "prod", "logsumexp", "any",
      "all", "norm", "linalg_vector_norm", "argmax", "argmin", "nansum", "median", "count_nonzero")  # fmt: skip
def reduce(labels: Labels, op: Op) -> None:
    """A reduction depends on every position of its axes: channels there stay; other axes go on."""
    x = tensor(op, 0)
    if len(op.args) > 1 and isinstance(op.args[1], Value):  # max(x, y) is element-wise
        op.outs[0].factors = labels.join([x, op.args[1]], op.outs[0].shape)
        return
    ndim = len(x.shape)
    dims = argument(op, 2 if "norm" in op.name else 1, "dim")
    if isinstance(dims, bool):  # std(x, unbiased)
        dims = None
    axes = axes_of(dims, ndim)
    if "norm" in op.name and thin(labels, op):  # what is 0 adds nothing to a norm
        labels.silence(f for f in labels.factors(x) if span(f) == (ndim - 1,))
        left = [f for f in labels.factors(x) if span(f) != (ndim - 1,)]
    else:
        left = labels.drop(x, axes, f"{op.name} is taken over it", note(labels, op, axes))
    for out in op.outs:
        if len(out.shape) == ndim:
            out.factors = left
        else:
            out.factors = [f.reshape([n for a, n in enumerate(f.shape) if a not in axes]) for f in left]
        out.weight = x.weight


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "topk",
      "glu", "logcumsumexp", "cummax", "kthvalue")  # fmt: skip
def along_axis(labels: Labels, op: Op) -> None:
    """Positions along one axis depend on each other: channels there stay; other axes go on."""
    x = tensor(op, 0)
    if op.name == "glu":
        _glu(labels, op, x)
        return
    position = 2 if op.name in ("topk", "kthvalue") else 1
    axis = axes_of(argument(op, position, "dim", -1), len(x.shape))
    left = labels.drop(x, axis, f"{op.name.strip('_')} is taken along it")
    for out in op.outs:
        out.factors = left if len(out.shape) == len(x.shape) else []


def _glu(labels: Labels, op: Op, x: Value) -> None:
    """The first half is gated by the second at the same places."""
    axis = axes_of(argument(op, 1, "dim", -1), len(x.shape))[0]
    out = op.outs[0]
    out.factors = []
    for factor in labels.factors(x):
        if factor.shape[axis] > 1:
            a, b = np.split(factor, 2, axis=axis)
            labels.unify(a, b)
            factor = a
        out.factors.append(factor)


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d",
      "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
      "adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
      "upsample_nearest3d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
      "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact1d", "upsample_trilinear3d",
      "upsample_linear1d", "grid_sampler_2d", "grid_sampler_3d", "mkldnn_max_pool2d", "im2col",
      "fractional_max_pool2d", "_upsample_nearest_exact3d", "mkldnn_adaptive_avg_pool2d")  # fmt: skip
def pool(labels: Labels, op: Op) -> None:
    """Positions within a channel are mixed, channels are not."""
    x = tensor(op, 0)
    dims = len(x.shape)
    spatial = 1 if "1d" in op.name or "linear1d" in op.name else 3 if "3d" in op.name else 2
    if op.name == "im2col":
        labels.freeze(labels.factors(x), "unfold lays channels and places out along one axis")
        op.outs[0].factors = []
        return
    left = labels.drop(x, range(dims - spatial, dims), f"{op.name} slides along it")
    for other in op.tensors()[1:]:
        labels.freeze(labels.factors(other), f"{op.name} reads it as places")
    for out in op.outs:
        out.factors = left if len(out.shape) == dims else []


@rule("torchvision::roi_align", "torchvision::roi_pool")
def region(labels: Labels, op: Op) -> None:
    """Pool given boxes of given images: images and places are mixed, channels are not."""
    labels.freeze([f for other in op.tensors()[1:] for f in labels.factors(other)], f"{op.name} reads it as boxes")
    op.outs[0].factors = labels.drop(tensor(op, 0), [0, 2, 3], f"{op.name} reads it as images or places")


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(labels: Labels, op: Op) -> None:
    """The norm runs over every axis but one: channels leave along that one only."""
    v, g = tensor(op, 0), tensor(op, 1)
    axis = axes_of(argument(op, 2, "dim", 0), len(v.shape))[0]
    labels.meet(v, axis, g, axis, "the scale of weight norm")
    others = [a for a in range(len(v.shape)) if a != axis]
    op.outs[0].factors = labels.factors(v)
    for factor in labels.factors(v):
        if set(span(factor)) & set(others):
            labels.freeze(factor, "weight norm is taken over it")
    for out in op.outs:
        out.weight = v.weight


@rule("_assert_async", "_assert_tensor_metadata", "_assert_scalar")
def nothing(labels: Labels, op: Op) -> None:
    """Operations without an effect on channels."""

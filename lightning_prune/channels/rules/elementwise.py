"""Operations that treat every element alike, and those that make constants.

The table is explicit: the ``pointwise`` tag of ATen is missing on some of these and says nothing about side effects.
"""

from lightning_prune.channels.labels import Labels
from lightning_prune.channels.recording import Op, Value
from lightning_prune.channels.rules.registry import argument, rule, tensor

_UNARY = """
abs acos acosh alias asin asinh atan atanh bernoulli bitwise_not ceil celu clamp clamp_max clamp_min clone contiguous
cos cosh deg2rad detach digamma dropout elu erf erfc erfinv exp exp2 expm1 fill floor frac gelu hardshrink hardsigmoid
hardswish hardtanh isfinite isinf isnan leaky_relu lgamma lift_fresh lift_fresh_copy log log10 log1p log2 log_sigmoid
logical_not logit masked_fill mish nan_to_num native_dropout neg positive pow rad2deg reciprocal relu relu6 round rsqrt
rsub rrelu_with_noise selu sgn sigmoid sign silu sin sinc sinh softplus softshrink sqrt square tan tanh threshold trunc
zero _to_copy _conj to
"""
_NARY = """
add sub mul div remainder fmod maximum minimum fmax fmin atan2 hypot where lerp addcmul addcdiv copysign
eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor floor_divide true_divide
xlogy logaddexp heaviside __and__ __or__ __xor__ mse_loss smooth_l1_loss
"""
_FACTORIES = "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor empty_strided new_empty_strided"
_LIKE = "zeros_like ones_like full_like empty_like rand_like randn_like"


def _names(text: str) -> list[str]:
    return [n for name in text.split() for n in (name, name + "_")]


POINTWISE = frozenset([*_names(_UNARY), *_names(_NARY)])
"""Operations that treat every element alike."""


@rule(*POINTWISE)
def elementwise(labels: Labels, op: Op) -> None:
    """Labels that meet are unified; the result carries them on."""
    operands = op.tensors()
    out = op.outs[0]
    if op.name.startswith("masked_fill") or len(operands) > 1:
        shape = out.shape
        factors = labels.join(operands, shape)
        out.weight = all(v.weight or v.wild for v in operands)
        wild = _constant_axes(operands, len(shape))
    else:
        factors = labels.factors(operands[0])
        out.weight, wild = operands[0].weight, operands[0].wild
    for result in op.outs:
        if result in operands:
            known = {id(f) for f in labels.factors(result)}
            if any(id(f) not in known for f in factors) and len(factors) > len(known):
                labels.freeze(factors, "it is written into a tensor made with a fixed size")
        elif result.shape == out.shape:
            result.factors, result.wild = factors, wild


def _constant_axes(operands: list[Value], ndim: int) -> frozenset[int]:
    """Axes along which the result is constant: every operand has size 1 there or is constant, and one is longer."""
    if not any(v.wild for v in operands):
        return frozenset()
    axes = []
    for axis in range(ndim):
        sizes = []
        for v in operands:
            own = axis - (ndim - len(v.shape))
            sizes.append(1 if own < 0 or v.shape[own] == 1 else (2 if own in v.wild else 3))
        if max(sizes) == 2:
            axes.append(axis)
    return frozenset(axes)


@rule("prelu", "_prelu_kernel")
def prelu(labels: Labels, op: Op) -> None:
    """A slope for each channel of axis 1, or one for all."""
    x, weight = tensor(op, 0), tensor(op, 1)
    if weight.name is not None or len(weight.shape) == 1:
        size = max(weight.shape, default=1)
        if size > 1 and len(weight.shape) == 1:
            labels.meet(x, 1, weight, 0, "the slope of PReLU")
            op.outs[0].factors = labels.factors(x)
            return
    elementwise(labels, op)


@rule("copy_")
def copy(labels: Labels, op: Op) -> None:
    """What is written over takes the labels of what is written; both must agree where both have them."""
    target, source = tensor(op, 0), tensor(op, 1)
    if set(range(len(target.shape))) <= target.wild:
        labels.freeze(labels.factors(source), "it is copied into a tensor made with a fixed size")
        return
    labels.join([target, source], target.shape)


@rule(*_FACTORIES.split())
def factory(labels: Labels, op: Op) -> None:
    """A constant: it meets any labels, since its size follows the code that asked for it."""
    out = op.outs[0]
    out.factors, out.wild, out.weight = [], frozenset(range(len(out.shape))), True


@rule(*_LIKE.split())
def like(labels: Labels, op: Op) -> None:
    """A constant with the shape, hence the labels, of its argument."""
    out = op.outs[0]
    out.factors = labels.factors(tensor(op, 0))
    out.wild = frozenset(a for a in range(len(out.shape)) if all(f.shape[a] == 1 for f in out.factors))


@rule("rand", "randn", "arange", "linspace", "randperm", "eye", "tril_indices", "triu_indices", "hann_window")
def source(labels: Labels, op: Op) -> None:
    """A tensor whose entries differ along its axes: it carries no labels and freezes what it meets."""
    op.outs[0].factors = []


@rule("uniform_", "normal_", "bernoulli_", "random_")
def refill(labels: Labels, op: Op) -> None:
    """Random contents do not change which channels a tensor carries."""
    _ = argument(op, 0, "self")

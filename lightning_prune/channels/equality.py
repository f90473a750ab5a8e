"""The gate every plan passes: the masked parent and the compact child must compute the same."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.channels.approximate import ignoring
from lightning_prune.channels.attention import replaced
from lightning_prune.channels.left import left_out, silenced
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.surgery import named_tensors, set_attributes, substituted, take
from lightning_prune.errors import EqualityError
from lightning_prune.running import call_model, evaluation, map_tensors, output_tensors

if TYPE_CHECKING:
    from lightning_prune.channels.fold import Fold

GAINS = (1.0, 0.5, 0.35)
"""Scale of random weights, by seed modulo three."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_PERIOD = 10_007  # prime, so that rows of a tiled matrix differ
_DOUBLE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}


@dataclass
class Equality:
    """What the check found.

    Attributes:
        error: Largest difference of an output over the largest magnitude of that output.
        dtype: Precision in which the two were compared.
        blind: Parameters touched by the plan on which no output depended under the check's weights.
    """

    error: float
    dtype: torch.dtype
    blind: list[str]


def random_tensors(model: nn.Module, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Weights and statistics under which every branch counts, whatever the model's own are.

    Parameters of two or more axes are uniform, scaled so that magnitudes neither vanish nor explode; scales are in
    [0.5, 1.5], shifts in [-0.5, 0.5], variances in [0.5, 1.5]. Other buffers keep their values. Sums of many branches
    grow with depth until gates saturate and hide what is behind them: most seeds draw smaller weights.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    offset = 0
    noise = torch.rand(_PERIOD, generator=generator, dtype=dtype) * 2 - 1
    for name, tensor in named_tensors(model).items():
        if tensor.is_complex():
            found[name] = (
                tensor.detach().to(_DOUBLE[tensor.dtype]) if dtype == torch.float64 else tensor.detach().clone()
            )
            continue
        if not tensor.is_floating_point():
            found[name] = tensor.detach().clone()
            continue
        leaf = name.rpartition(".")[2]
        is_parameter = isinstance(tensor, nn.Parameter)
        if not is_parameter and leaf not in ("running_mean", "running_var"):
            found[name] = tensor.detach().to(dtype, copy=True)
            continue
        offset = (offset + 1237) % _PERIOD
        base = torch.roll(noise, offset)
        size = tensor.numel()
        if tensor.dim() >= 2:
            base = base * (GAINS[seed % len(GAINS)] * math.sqrt(6 / max(1, size // tensor.shape[0])))
        elif leaf in ("running_var", "weight", "weight_g", "original0") or leaf.startswith("gamma"):
            base = base * 0.5 + 1
        else:
            base = base * 0.5
        found[name] = base.to(tensor.device).repeat(math.ceil(size / _PERIOD))[:size].reshape(tensor.shape)
    return found


def silence_(plan: RemovalPlan, tensors: Mapping[str, Tensor]) -> None:
    """Silence the leaving channels where each consumer reads them, in place."""
    for name, axis in plan.reads:
        stays = torch.zeros(tensors[name].shape[axis], dtype=torch.bool)
        stays[plan.keep[name][axis]] = True
        leaving = (~stays).nonzero()[:, 0].to(tensors[name].device)
        tensors[name].index_fill_(axis, leaving, 0)


def masked(plan: RemovalPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parent's tensors with the leaving channels silenced where each consumer reads them."""
    result = {**tensors, **{name: tensors[name].detach().clone() for name, _ in plan.reads}}
    silence_(plan, result)
    return result


class _SingleAsDouble(TorchFunctionMode):
    """Gives double precision to forward code that asks for single precision by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args = tuple([torch.float64 if a is torch.float32 else a for a in args])
        return func(*args, **{k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()})


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Constants that a forward pass makes, and what it converts to float32 in a float64 pass, get this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _SingleAsDouble() if dtype == torch.float64 else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def check_inputs(example_inputs: Any, dtype: torch.dtype, seed: int) -> Any:
    """The example inputs with noise on every floating tensor, so that constant inputs cannot hide a difference."""
    generator = torch.Generator().manual_seed(seed)

    def change(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.rand(tensor.shape, generator=generator, dtype=dtype).to(tensor.device)
        return tensor.detach().to(dtype) * 0.5 + noise * 0.5

    return map_tensors(change, example_inputs)


def compare(
    model: nn.Module,
    plan: RemovalPlan,
    example_inputs: Any,
    *,
    precision: torch.dtype = torch.float64,
    seed: int = 0,
    fold: "Fold | None" = None,
) -> Equality:
    """Compare the masked parent with the compact child on random weights.

    The model's own tensors are not touched: other tensors stand in for them. Attributes are set for the child's pass
    and put back.

    Args:
        model: The model that the plan is for.
        plan: What leaves.
        example_inputs: As for :func:`trace_channels`.
        precision: ``torch.float64``, or ``torch.float32``, which is also used where the forward code insists on it.
        seed: Of the weights.
        fold: Constants that are folded; the parent then has constants in these channels instead of zeros.

    Raises:
        EqualityError: The child cannot run, outputs differ in number or shape, or all outputs are 0.
    """
    tensors = random_tensors(model, precision, seed)
    inputs = check_inputs(example_inputs, precision, seed)
    small = {name: take(tensors[name], axes) for name, axes in plan.keep.items()}  # before the parent is silenced
    if fold is None:
        silence_(plan, tensors)
    else:
        fold.hold_(tensors)
        fold.silence_(tensors)
    try:
        with nullcontext() if fold is None else fold.watching(model):
            parent = _parent(model, plan, tensors, inputs, precision)
    except RuntimeError as error:
        if precision == torch.float32 or not any(w in str(error) for w in ("dtype", "Double", "double")):
            raise
        # the forward code asks for single precision by name
        return compare(model, plan, example_inputs, precision=torch.float32, seed=seed, fold=fold)
    if fold is not None:
        small.update(fold.added(model, tensors, small))
    child, blind = _child(model, plan, {**tensors, **small}, inputs, precision)
    return Equality(relative_error(parent, child), precision, blind)


def rounding_error(
    model: nn.Module, plan: RemovalPlan, example_inputs: Any, precision: torch.dtype, seed: int
) -> float:
    """How far the masked parent's outputs move when the last bits of its tensors change, as relative error.

    Under some weights deep networks amplify rounding so much that nothing can be compared.
    """
    tensors = random_tensors(model, precision, seed)
    inputs = check_inputs(example_inputs, precision, seed)
    silence_(plan, tensors)
    outputs = _parent(model, plan, tensors, inputs, precision)
    generator, step = torch.Generator().manual_seed(seed), 4 * torch.finfo(precision).eps
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=precision).to(tensor.device)
            tensors[name] = tensor * (1 + step * (2 * noise - 1))
    return relative_error(outputs, _parent(model, plan, tensors, inputs, precision))


def _parent(
    model: nn.Module, plan: RemovalPlan, tensors: Mapping[str, Tensor], inputs: Any, dtype: torch.dtype
) -> list[Tensor]:
    with (
        substituted(model, tensors),
        default_dtype(dtype),
        evaluation(model, training=plan.training),
        ignoring(model, plan),
        silenced(model, plan),
    ):
        return output_tensors(call_model(model, map_tensors(torch.clone, inputs)))


def _child(
    model: nn.Module, plan: RemovalPlan, tensors: Mapping[str, Tensor], inputs: Any, dtype: torch.dtype
) -> tuple[list[Tensor], list[str]]:
    """Outputs of the compact model, and the parameters of the plan on which they do not depend."""
    parameters = {name for name, _ in model.named_parameters()}
    for name in plan.keep:
        if name in parameters and tensors[name].is_floating_point():
            tensors[name].requires_grad_()
    before = set_attributes(model, plan.attributes)
    try:
        with (
            replaced(model, plan.replaced),
            substituted(model, tensors),
            default_dtype(dtype),
            left_out(model, plan.left, dtype) as probes,
        ):
            watched = {n: p for n, p in model.named_parameters() if p.requires_grad and n in plan.keep} | probes
            try:
                with evaluation(model, grad=True, training=plan.training):
                    outputs = output_tensors(call_model(model, map_tensors(torch.clone, inputs)))
            except Exception as error:
                raise EqualityError(f"the compact model cannot run ({type(error).__name__}: {error}).") from error
            return outputs, blind_parameters(outputs, watched)
    finally:
        set_attributes(model, before)


def relative_error(parent: list[Tensor], child: list[Tensor]) -> float:
    """The largest difference of an output over the largest magnitude of that output.

    Raises:
        EqualityError: Outputs differ in number or shape, are not finite, or are all 0.
    """
    if len(parent) != len(child):
        raise EqualityError(f"the parent returns {len(parent)} tensors, the compact model {len(child)}.")
    worst, largest = 0.0, 0.0
    for a, b in zip(parent, child, strict=True):
        if a.shape != b.shape:
            raise EqualityError(f"an output of shape {tuple(a.shape)} became {tuple(b.shape)}.")
        if a.numel() == 0:
            continue
        a, b = a.detach(), b.detach()
        if not (a.is_floating_point() or a.is_complex()):
            worst = max(worst, float((a != b).any()))
            continue
        scale = float(a.abs().max())
        if not math.isfinite(scale):
            raise EqualityError("an output is not finite under the check's weights, so nothing can be compared.")
        largest = max(largest, scale)
        difference = float((a - b).abs().max())
        worst = max(worst, difference / scale if scale else difference)
    if largest == 0:
        raise EqualityError("every output is 0 under the check's weights: the check would see nothing.")
    return worst


@torch.enable_grad()
def blind_parameters(outputs: list[Tensor], parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of parameters on which no output depends."""
    generator = torch.Generator().manual_seed(1)
    total = None
    for out in outputs:
        if out.requires_grad and out.numel():
            weights = (
                torch.rand(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.real.dtype) + 0.5
            )
            term = (out.real * weights if out.is_complex() else out * weights).sum()
            total = term if total is None else total + term
    if total is None:
        return list(parameters)
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return [n for n, g in zip(parameters, gradients, strict=True) if g is None or not bool(g.any())]

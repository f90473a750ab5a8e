"""Carry a plan out: shrink parameters, buffers, gradients and optimizer state in place, keep module attributes true."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from lightning_prune.channels.attention import check_kinds, replace
from lightning_prune.channels.left import check_holders, check_parts, take_out
from lightning_prune.channels.plan_checks import check_attributes
from lightning_prune.errors import MaskMismatchError, PruneError

if TYPE_CHECKING:
    from lightning_prune.channels.plan import RemovalPlan

Indices = Mapping[int, list[int]]
_ABSENT = object()


def take(tensor: Tensor, axes: Indices) -> Tensor:
    """Copy the positions that stay; the copy keeps channels-last memory if the tensor had it."""
    last = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    result = tensor.detach()
    for axis, indices in axes.items():
        result = result.index_select(axis, torch.tensor(indices, dtype=torch.long, device=tensor.device))
    return result.contiguous(memory_format=torch.channels_last) if last else result


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_fits(plan: "RemovalPlan", model: nn.Module) -> None:
    """Refuse a model that the plan was not made for.

    Raises:
        MaskMismatchError: A tensor is missing or has another shape.
    """
    tensors = named_tensors(model)
    for name, shape in plan.shapes.items():
        if name not in tensors:
            raise MaskMismatchError(
                f"the plan shrinks {name!r}, which this {type(model).__name__} does not have; give a fresh model of "
                "the "
                "architecture that the plan was made for."
            )
        if list(tensors[name].shape) != list(shape):
            raise MaskMismatchError(
                f"{name} has shape {tuple(tensors[name].shape)}, the plan expects {tuple(shape)}; give a fresh "
                "model of "
                "the original width (was the plan carried out already?)."
            )
    check_parts(model, plan)
    check_kinds(model, plan.replaced)
    check_attributes(plan, model)


def leaf_attributes(model: nn.Module, plan: "RemovalPlan", groups: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """New values of the sizes that torch's own modules hold, from the shapes that the plan leaves."""
    modules = dict(model.named_modules())
    found: dict[str, dict[str, Any]] = {}
    for name, axes in plan.keep.items():
        owner = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        leaf = name[len(owner) + 1 :] if owner else name
        if leaf not in ("weight", "weight_v", "running_mean", "bias") and not leaf.startswith(
            "parametrizations.weight"
        ):
            continue
        shape = [len(axes.get(a, range(n))) for a, n in enumerate(plan.shapes[name])]
        changes = _module_sizes(modules[owner], leaf, shape, groups.get(owner))
        if changes:
            found.setdefault(owner, {}).update(changes)
    return found


def _module_sizes(module: nn.Module, leaf: str, shape: list[int], groups: int | None) -> dict[str, Any]:
    one_dimensional = leaf in ("bias", "running_mean")
    if isinstance(module, _ConvNd):
        if one_dimensional or leaf.endswith("original0"):
            return {}
        number = module.groups if groups is None else groups
        first, second = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        changes = {first: shape[0], second: shape[1] * number}
        if number != module.groups:
            changes["groups"] = number
        return changes
    if isinstance(module, nn.Linear):
        return {} if one_dimensional else {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, _NormBase):
        return {"num_features": shape[0]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": shape[0], "num_groups": module.num_groups if groups is None else groups}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    return {}


def check_optimizers(plan: "RemovalPlan", model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizer state that cannot be sliced along.

    Raises:
        PruneError: A state tensor is neither a scalar nor of its parameter's shape.
    """
    optimizers = list(optimizers)
    check_holders(model, plan, optimizers)
    names = {id(p): n for n, p in model.named_parameters() if n in plan.keep}
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
            raise PruneError(
                "LBFGS keeps one flat vector over all parameters, which cannot be sliced by channels. Use another "
                "optimizer, or remove channels before it has taken a step."
            )
        for parameter, state in optimizer.state.items():
            if id(parameter) not in names:
                continue
            for key, value in state.items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                    raise PruneError(
                        f"{type(optimizer).__name__} keeps state {key!r} of shape {tuple(value.shape)} for "
                        f"{names[id(parameter)]} of shape {tuple(parameter.shape)}; only state of the parameter's "
                        "own shape "
                        "can be sliced along. Use another optimizer, or remove channels before it has taken a step."
                    )
                if isinstance(value, (list, tuple, dict)):
                    raise PruneError(
                        f"{type(optimizer).__name__} keeps state {key!r} of type {type(value).__name__} for "
                        f"{names[id(parameter)]}, which is not known how to slice. Use another optimizer."
                    )


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Set module attributes; return what they were."""
    modules = dict(model.named_modules())
    before: dict[str, dict[str, Any]] = {}
    for name, changes in attributes.items():
        module = modules[name]
        before[name] = {key: getattr(module, key, _ABSENT) for key in changes}
        for key, value in changes.items():
            if value is _ABSENT:
                delattr(module, key)
            else:  # JSON knows no tuples
                setattr(module, key, tuple(value) if isinstance(before[name][key], tuple) else value)
    return before


def carry_out(plan: "RemovalPlan", model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
    """Shrink the model in place: the same Parameter objects, gradients and optimizer state along with them."""
    optimizers = list(optimizers)
    tensors = named_tensors(model)
    with torch.no_grad():
        for name, axes in plan.keep.items():
            tensor = tensors[name]
            shape = tensor.shape
            gradient = tensor.grad
            tensor.grad = None
            tensor.set_(take(tensor, axes))  # type: ignore[call-overload]  # .data= would break graphs still alive
            if gradient is not None:
                tensor.grad = take(gradient, axes)
            for optimizer in optimizers:
                state = optimizer.state.get(tensor, {})
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape == shape:
                        state[key] = take(value, axes)
    replace(model, plan.replaced)
    set_attributes(model, plan.attributes)
    take_out(model, plan, optimizers)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()


@contextmanager
def substituted(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let other tensors stand for parameters and buffers, by first name; put the originals back afterwards.

    The originals are never written to, whatever happens inside.
    """
    originals = named_tensors(model)
    fresh: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        original = originals[name]
        fresh[id(original)] = (
            nn.Parameter(tensor, tensor.requires_grad) if isinstance(original, nn.Parameter) else tensor
        )
    undo: list[tuple[Any, str, Any]] = []
    flat: list[tuple[nn.RNNBase, list[Any]]] = []
    try:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for key, held in list(table.items()):
                    if held is not None and id(held) in fresh:
                        undo.append((table, key, held))
                        table[key] = fresh[id(held)]  # type: ignore[assignment]
            if isinstance(module, nn.RNNBase):
                flat.append((module, module._flat_weights))
                module._flat_weights = [fresh.get(id(w), w) for w in module._flat_weights]
        yield
    finally:
        for table, key, original in undo:
            table[key] = original
        for rnn, weights in flat:
            rnn._flat_weights = weights

"""Running a model once, for what it shows: inputs of any form, evaluation mode, which module is at work."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, under its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """Call the model: a tuple holds positional arguments, a dict keyword arguments, anything else is one argument."""
    if isinstance(example_inputs, tuple):
        return model(*example_inputs)
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    return model(example_inputs)


def map_tensors(function: Callable[[Tensor], Any], item: Any) -> Any:
    """Apply ``function`` to every tensor in nested tuples, lists and dicts."""
    if isinstance(item, Tensor):
        return function(item)
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(map_tensors(function, i) for i in item))
    if isinstance(item, (list, tuple)):
        return type(item)(map_tensors(function, i) for i in item)
    if isinstance(item, dict):
        return {k: map_tensors(function, v) for k, v in item.items()}
    return item


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy without the trainer that a LightningModule hangs on (its loaders, its optimizers, itself)."""
    return copy.deepcopy(model, {id(getattr(model, "_trainer", None)): None})


def output_tensors(item: Any, _depth: int = 0) -> list[Tensor]:
    """Every tensor that a model returned, in order, also inside mappings and plain objects with attributes."""
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, dict):
        children: Sequence[Any] = list(item.values())
    elif isinstance(item, (list, tuple)):
        children = item
    elif hasattr(item, "__dict__") and _depth < 4 and not isinstance(item, (type, nn.Module)):
        children = list(vars(item).values())
    else:
        return []
    return [t for child in children for t in output_tensors(child, _depth + 1)]


@contextmanager
def evaluation(
    model: nn.Module, *, grad: bool = False, training: bool = False, fast_path: bool = False
) -> Iterator[None]:
    """Put the model into eval mode with attention's fused fast path off; put every flag back afterwards.

    Args:
        model: The model.
        grad: Whether operations are differentiated.
        training: Whether modules that have children stay in training mode, so that branches that only training takes
            (auxiliary classifiers) run while BatchNorm and dropout behave as in evaluation.
        fast_path: Whether attention may take its fast path all the same.
    """
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast and fast_path)
    try:
        for module, _ in modes:
            children = training and next(module.children(), None) is not None
            if module.training != children:
                module.training = children
        with torch.set_grad_enabled(grad):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


@contextmanager
def following(model: nn.Module) -> Iterator[list[str]]:
    """Keep a list of the names of the modules that are running, the innermost last ("" is the model itself)."""
    running = [""]
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        running.append(names.get(id(module), running[-1]))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if len(running) > 1:
            running.pop()

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield running

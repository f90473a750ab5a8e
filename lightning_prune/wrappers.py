"""The module inside DDP's and ``torch.compile``'s wrappers, and its plain forward code."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lightning_prune.errors import TraceError

_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def is_compiled(module: nn.Module | None) -> bool:
    """Whether this is what ``torch.compile(module)`` returns."""
    return module is not None and "_orig_mod" in module._modules


def bare(model: nn.Module) -> nn.Module:
    """The module inside any wrappers of DDP, ``DataParallel`` and ``torch.compile``.

    Raises:
        TraceError: A wrapper that shards parameters between processes: a tensor there is only a part of itself.
    """
    while True:
        kinds = {kind.__name__ for kind in type(model).__mro__}
        if sharded := kinds.intersection(_SHARDED):
            raise TraceError(
                f"{sharded.pop()} shards parameters between processes, so no channel is whole on any of them; remove "
                "channels before wrapping, or train with DDP."
            )
        if is_compiled(model):
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run plain code inside: compiled submodules are put aside, and with them their part in names.

    Names of parameters are then those of the original code, compiled or not; functions that the user compiled run
    eagerly.
    """
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in list(model.modules()):
                if is_compiled(module):
                    continue
                for name, child in module._modules.items():
                    if child is not None and is_compiled(child):
                        undo.append((module, name, child))
                        module._modules[name] = bare(child)
            yield
        finally:
            for module, name, child in undo:
                if module._modules[name] is bare(child):  # else it has left meanwhile
                    module._modules[name] = child

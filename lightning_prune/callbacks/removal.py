"""Removal inside a fit: optimizers, DDP's wrapper, averaged copies and compiled code go along, or are refused."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_prune.callbacks import monitors
from lightning_prune.channels.compact import remember
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.surgery import carry_out, named_tensors
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.errors import ConfigError
from lightning_prune.wrappers import bare, is_compiled, uncompiled

_NOT_SLICED = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer")


def check_optimizers_of(trainer: pl.Trainer) -> None:
    """Refuse optimizers whose state cannot be sliced by channels.

    Raises:
        ConfigError: LBFGS, or one that shards or averages its state between processes.
    """
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, LBFGS) or type(optimizer).__name__ in _NOT_SLICED:
            raise ConfigError(
                f"{type(optimizer).__name__} keeps state that is not one tensor a parameter, so it cannot be sliced "
                "when channels leave. Use another optimizer, such as SGD or AdamW."
            )


def check_copies(pl_module: pl.LightningModule, graph: ChannelGraph) -> None:
    """Refuse averaged copies that the module keeps itself, and warn of what looks like one.

    Raises:
        ConfigError: An ``AveragedModel`` inside the module.
    """
    for name, module in pl_module.named_modules():
        if isinstance(module, AveragedModel):
            raise ConfigError(
                f"{name} is an AveragedModel inside the module, which would keep its width. Use lightning's "
                "WeightAveraging or EMAWeightAveraging callback: its copy shrinks along."
            )
    used = {id(p) for n, p in graph.model.named_parameters() if n not in graph.unseen}
    shapes = {name: [tuple(p.shape) for p in child.parameters()] for name, child in pl_module.named_children()}
    touched = {name: {id(p) in used for p in child.parameters()} for name, child in pl_module.named_children()}
    for name, own in shapes.items():
        twin = next((other for other in shapes if shapes[other] == own and touched[other] == {True}), None)
        if own and touched[name] == {False} and twin is not None:
            rank_zero_warn(
                f"{name} looks like a copy of {twin} that the forward pass does not use: it keeps its width while "
                f"{twin} shrinks. If one is copied or averaged into the other, that will fail after the first cut; "
                "lightning's EMAWeightAveraging callback keeps a copy that shrinks along."
            )


@dataclass(frozen=True)
class Leftover:
    """What is still there after a removal, for those who remember what there was.

    Attributes:
        staying: Where parameters have left: for each optimizer the numbers, before, of those that it still has.
        renamed: Parameters and buffers that have another name since their first holder left: new name -> old name.
    """

    staying: list[list[int]] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)


def remove(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, plan: RemovalPlan) -> Leftover:
    """Carry a checked plan out on a module in training, on this process.

    The same ``Parameter`` objects shrink, optimizer state with them; averaged copies likewise; DDP's wrapper is built
    anew; compiled code is compiled anew at the next call.

    Args:
        trainer: The trainer, between two steps.
        pl_module: Its module.
        name: Of the submodule that the plan is for; ``""``: ``pl_module`` itself.
        plan: The plan, the same on every process.

    Returns:
        What is left of parameters, buffers and the optimizers' parameters where some have left.
    """
    names = {id(tensor): key for key, tensor in named_tensors(pl_module).items()}
    held = [_parameters(optimizer) for optimizer in trainer.optimizers]
    with without_wrapper(trainer, pl_module):
        _shrink(pl_module.get_submodule(name), plan, trainer.optimizers)
    for average in monitors.averages(trainer):
        copy = average.module
        assert isinstance(copy, nn.Module)
        _shrink(copy.get_submodule(name), plan, [])
    modules = list(pl_module.modules())
    if getattr(pl_module, "_compiler_ctx", None) or any(is_compiled(m) or m._compiled_call_impl for m in modules):
        torch._dynamo.reset()  # code for the old shapes is of no use, and counts against dynamo's limit
    if not plan.left:
        return Leftover()
    now = [{id(p) for p in _parameters(optimizer)} for optimizer in trainer.optimizers]
    staying = [[i for i, p in enumerate(before) if id(p) in left] for before, left in zip(held, now, strict=True)]
    found = {key: names[id(tensor)] for key, tensor in named_tensors(pl_module).items()}
    return Leftover(staying, {key: old for key, old in found.items() if key != old})


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _shrink(module: nn.Module, plan: RemovalPlan, optimizers: list[Any]) -> None:
    module = bare(module)
    with uncompiled(module):
        carry_out(plan, module, optimizers)
    remember(module, plan)


@contextmanager
def without_wrapper(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Without DDP's wrapper, whose buckets have the old sizes; it is built anew afterwards."""
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        yield
        return
    strategy.model = pl_module
    for parameter in pl_module.parameters():
        parameter.grad = None  # may be a view into a bucket
    gc.collect()  # the wrapper's hooks on the parameters go with it
    yield
    strategy.configure_ddp()
    if hasattr(strategy, "_pl_static_graph_delay_done"):
        strategy._pl_static_graph_delay_done = False

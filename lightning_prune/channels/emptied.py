"""Channels that masks have emptied: found exactly, and planned for removal.

A channel is empty where every weight that reads it is 0, whatever its values are. A channel that no weight makes (its
own weights are 0, its bias is not) gives the same value everywhere; that constant is folded into the biases of what
reads it, after which it is empty too.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.channels.budget import CostModel
from lightning_prune.channels.equality import check_inputs
from lightning_prune.channels.fixed_sizes import followed
from lightning_prune.channels.labels import FIXED, Slot
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.plan_content import make_plan
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.running import call_model, evaluation, named_tensors
from lightning_prune.wrappers import uncompiled


def plan_emptied(graph: ChannelGraph) -> RemovalPlan | None:
    """Plan the removal of every channel that is empty with the weights as they are.

    A channel that only emptied channels read is empty as well. A group keeps one channel at least; groups whose widths
    are bound to each other stay whole. Weights are not changed; see :func:`fold_constants_` for what may go before.

    Args:
        graph: The traced model, with its weights (pruned ones are 0).

    Returns:
        The plan, by which :func:`compact` gives a model of the same outputs; None if nothing is empty.
    """
    with uncompiled(graph.model):
        while True:
            kept = _kept(graph)
            if kept.all():
                return None
            plan = make_plan(graph, kept, CostModel(graph))
            if not graph.labels.suspects:
                return plan
            groups = len(graph.groups)
            if followed(graph, plan, kept) or len(graph.groups) >= groups:  # else groups froze: planned anew
                return plan


def _kept(graph: ChannelGraph) -> np.ndarray:
    labels, grouping = graph.labels, graph.grouping
    weights = {name: tensor.detach() != 0 for name, tensor in named_tensors(graph.model)}  # where it is not 0
    held = ~grouping.removable
    for array in labels.silenced:  # read by no weight, so that no weight can show that it is not needed
        held[grouping.component[array]] = True
    for group in graph.groups:
        if group.tied:
            held[group.channels] = True
    empty = np.zeros_like(held)
    while True:
        alive = held.copy()
        for slot, ids, reading in _reading(graph):
            alive[grouping.component[ids[reading & _any_along(weights[slot.name], slot.axis)]]] = True
        more = ~alive & ~empty
        if not more.any():
            break
        empty |= more
        for slot in labels.slots:  # what made an empty channel is needed no more
            gone = empty[grouping.component[slot.base : slot.base + slot.size]]
            if gone.any():
                mask = weights[slot.name]
                mask.index_fill_(slot.axis, torch.from_numpy(np.flatnonzero(gone)).to(mask.device), False)
    kept = ~empty
    for group in graph.groups:
        if not kept[group.channels].any():
            kept[group.channels[0]] = True
    return kept


def _reading(graph: ChannelGraph) -> Iterator[tuple[Slot, np.ndarray, np.ndarray]]:
    """Axes of parameters that read channels: the slot, its labels, and which of them read."""
    reads = np.zeros(graph.labels.count, dtype=bool)
    for array in graph.labels.consuming:
        reads[array] = True
    reads[FIXED] = False
    for slot in graph.labels.slots:
        ids = np.arange(slot.base, slot.base + slot.size)
        if reads[ids].any():
            yield slot, ids, reads[ids]


def _any_along(mask: Tensor, axis: int) -> np.ndarray:
    """Whether anything is True at each position along an axis."""
    return mask.movedim(axis, 0).flatten(1).any(1).cpu().numpy() if mask.dim() > 1 else mask.cpu().numpy()


@torch.no_grad()
def fold_constants_(graph: ChannelGraph, example_inputs: Any) -> int:
    """Fold what channels without weights give into the biases of the linear layers and convolutions that read them.

    The weights that read them become 0, and biases take their products, in place: the model then computes the same up
    to rounding, in evaluation mode. A convolution that pads with zeros takes no constant but 0, since there is none at
    its border; nor does a layer without bias.

    Args:
        graph: The traced model.
        example_inputs: As for :func:`trace_channels`; constants are looked for on two random inputs of this form.

    Returns:
        How many positions of reading weights became 0.
    """
    model, component = graph.model, graph.grouping.component
    tensors = dict(named_tensors(model))
    made = np.zeros(len(graph.grouping.removable), dtype=bool)
    issued = np.zeros(graph.labels.count, dtype=bool)
    for array in graph.labels.issued:
        issued[array] = True
    for slot in graph.labels.slots:
        ids = np.arange(slot.base, slot.base + slot.size)
        if tensors[slot.name].dim() > 1 and issued[ids].any():
            made[component[ids[issued[ids] & _any_along(tensors[slot.name] != 0, slot.axis)]]] = True
    modules = dict(model.named_modules())
    readers: dict[str, np.ndarray] = {}
    for slot, ids, reading in _reading(graph):
        owner, _, leaf = slot.name.rpartition(".")
        wanted = reading & graph.grouping.removable[component[ids]] & ~made[component[ids]]
        if leaf == "weight" and slot.axis == 1 and wanted.any() and _takes_constants(modules[owner]):
            readers[owner] = wanted
    if not readers:
        return 0
    folded = 0
    for owner, (low, high) in _ranges(model, modules, list(readers), example_inputs).items():
        layer: Any = modules[owner]
        constant = torch.from_numpy(readers[owner]).to(low.device) & (low == high)
        if layer.bias is None or (isinstance(layer, nn.Conv2d) and layer.padding not in ((0, 0), "valid")):
            constant &= low == 0
        weight = layer.weight.flatten(2).sum(2) if layer.weight.dim() > 2 else layer.weight
        if layer.bias is not None:
            layer.bias += weight[:, constant] @ low[constant]
        used = constant & (layer.weight != 0).movedim(1, 0).flatten(1).any(1)
        layer.weight[:, constant] = 0
        folded += int(used.sum())
    return folded


def _takes_constants(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return type(layer) is nn.Linear


def _ranges(
    model: nn.Module, modules: dict[str, nn.Module], names: list[str], example_inputs: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and greatest value of each input feature of some layers, over two random inputs and all calls."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    dtype = next(model.parameters()).dtype
    hooks = []
    for name in names:

        def see(layer: nn.Module, args: Any, name: str = name) -> None:
            axis = -1 if isinstance(layer, nn.Linear) else -3
            rows = args[0].movedim(axis, -1).flatten(0, -2)
            low, high = rows.amin(0), rows.amax(0)
            if name in found:
                low, high = torch.minimum(low, found[name][0]), torch.maximum(high, found[name][1])
            found[name] = low, high

        hooks.append(modules[name].register_forward_pre_hook(see))
    try:
        with evaluation(model):
            for seed in range(2):
                call_model(model, check_inputs(example_inputs, dtype, seed))
    finally:
        for hook in hooks:
            hook.remove()
    return found

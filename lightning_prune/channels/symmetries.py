"""Permutation symmetries: channels that can change places without changing what the model computes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.channels.equality import (
    TOLERANCE,
    blind_parameters,
    check_inputs,
    default_dtype,
    random_tensors,
    relative_error,
)
from lightning_prune.channels.groups import ChannelGroup, frozen_groups
from lightning_prune.channels.surgery import named_tensors, substituted
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.errors import EqualityError
from lightning_prune.running import call_model, evaluation, map_tensors, output_tensors
from lightning_prune.wrappers import uncompiled

_SEEDS = range(6)


def permute(
    tensors: Mapping[str, Tensor], groups: Sequence[ChannelGroup], orders: Sequence[np.ndarray]
) -> dict[str, Tensor]:
    """The tensors with channels in another order; those that no group has are the same objects.

    Args:
        tensors: By name; names that are missing are passed over.
        groups: Which channels change places.
        orders: For each group, which channel comes to each place: (size,) of integers.
    """
    indices: dict[tuple[str, int], np.ndarray] = {}
    for group, order in zip(groups, orders, strict=True):
        for name, axis, _ in group.members:
            if name in tensors:
                table = group.positions(name, axis)
                index = indices.setdefault((name, axis), np.arange(tensors[name].shape[axis]))
                index[table.ravel()] = table[order].ravel()
    result = dict(tensors)
    for (name, axis), index in indices.items():
        result[name] = result[name].index_select(axis, torch.from_numpy(index).to(result[name].device))
    return result


def find_symmetries(graph: ChannelGraph) -> list[ChannelGroup]:
    """Groups of channels whose order does not matter, each one tried.

    Candidates are the channels that can leave, and those that are frozen, since order is a weaker demand: a
    LayerNorm's channels, or those that meet padding, may change places. All are permuted at random on a network with
    random weights; where outputs change, the groups at fault are found and left out. So are groups on whose parameters
    no output depends, because trying them would show nothing, and tensors that ``state_dict`` does not hold.

    Args:
        graph: The traced model; best with ``approximate=True``, which sorts normalised channels by what they share.

    Returns:
        The groups, in the order in which the model makes them, removable ones first.

    Raises:
        EqualityError: Each group may be permuted alone but not all together.
    """
    with uncompiled(graph.model):
        held = graph.model.state_dict(keep_vars=True).values()
        known = {id(value) for value in held if isinstance(value, Tensor)}
        tensors = named_tensors(graph.model)
        candidates = [
            group
            for group in [*graph.groups, *frozen_groups(graph.labels, graph.grouping)]
            if group.size > 1 and all(id(tensors[name]) in known for name, _, _ in group.members)
        ]
        trial = _Trial(graph)
        sound = trial.sound(trial.seen(candidates))
        if not trial.equal(sound):
            raise EqualityError(
                "channels of each group can change places, but not of all groups together; groups: "
                + ", ".join(group.name for group in sound[:8])
            )
        return sound


class _Trial:
    """A network with random weights on which groups are permuted."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.dtype = torch.float64
        self.tensors = random_tensors(graph.model, self.dtype, seed=0)
        try:
            self.outputs = self._run(self.tensors)
        except RuntimeError:  # the forward code asks for single precision by name
            self.dtype = torch.float32
            self.tensors = random_tensors(graph.model, self.dtype, seed=0)
            self.outputs = self._run(self.tensors)

    def _run(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return run_with(self.graph.model, tensors, self.graph.example_inputs, self.dtype)

    def seen(self, groups: list[ChannelGroup]) -> list[ChannelGroup]:
        """The groups all of whose parameters the outputs depend on, under one of several draws of weights."""
        model = self.graph.model
        floating = {name for name, p in model.named_parameters() if p.is_floating_point()}
        names = {name for group in groups for name, _, _ in group.members} & floating
        for seed in _SEEDS:
            tensors = random_tensors(model, self.dtype, seed)
            for name in names:
                tensors[name].requires_grad_()
            with substituted(model, tensors):
                outputs = run_with(model, {}, self.graph.example_inputs, self.dtype, grad=True)
                names = set(blind_parameters(outputs, {n: p for n, p in model.named_parameters() if n in names}))
            if not names:
                break
        return [group for group in groups if not names & {name for name, _, _ in group.members}]

    def equal(self, groups: Sequence[ChannelGroup]) -> bool:
        """Whether outputs stay the same when the channels of these groups change places."""
        random = np.random.default_rng(0)
        orders = [np.roll(np.arange(g.size), 1) if g.size < 4 else random.permutation(g.size) for g in groups]
        try:
            outputs = self._run(permute(self.tensors, groups, orders))
            return relative_error(self.outputs, outputs) <= TOLERANCE[self.dtype]
        except (RuntimeError, IndexError, ValueError, EqualityError):  # an index, for one, that is out of range now
            return False

    def sound(self, groups: list[ChannelGroup]) -> list[ChannelGroup]:
        """The groups without those at fault, found by halves."""
        if not groups or self.equal(groups):
            return groups
        if len(groups) == 1:
            return []
        half = len(groups) // 2
        return self.sound(groups[:half]) + self.sound(groups[half:])


def run_with(
    model: nn.Module, tensors: Mapping[str, Tensor], example_inputs: Any, dtype: torch.dtype, grad: bool = False
) -> list[Tensor]:
    """Outputs of the model with other tensors, on the example inputs with noise, in ``dtype`` and eval mode."""
    inputs = check_inputs(example_inputs, dtype, seed=0)
    with substituted(model, tensors), default_dtype(dtype), evaluation(model, grad=grad):
        return output_tensors(call_model(model, map_tensors(torch.clone, inputs)))

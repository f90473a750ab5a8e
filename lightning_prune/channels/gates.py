"""Gates: scales for channels that no BatchNorm scales (hidden units of an MLP, attention heads), always folded away."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.channels.groups import ChannelGroup
from lightning_prune.channels.scores import batch_norm_scales, fetch
from lightning_prune.errors import ResumeError


def gated_groups(groups: Iterable[ChannelGroup], model: nn.Module) -> list[ChannelGroup]:
    """The groups that a gate can scale: no BatchNorm does, and matrices or kernels read their channels."""
    return [g for g in groups if not batch_norm_scales(g, model) and _readers(g, model)]


def _readers(group: ChannelGroup, model: nn.Module) -> list[tuple[str, int]]:
    makers = set(group.makers)
    return [(n, a) for n, a, _ in group.members if (n, a) not in makers and fetch(model, n).dim() > 1]


@dataclass
class _Reader:
    weight: Tensor
    name: str
    axis: int
    places: Tensor  # (size, entries): where each channel lies along the axis

    def rows(self) -> list[int]:
        return [a for a in range(self.weight.dim()) if a != self.axis]


class Gates:
    """A factor on each channel where it is read, 1 at first, that is trained, made sparse and never seen.

    The weights that read a channel hold the factor already, so the network computes with it at no cost, its
    ``state_dict`` is that of the plain network, and nothing is left to fold at the end. The loss's derivative by the
    factor is ``sum(weight * gradient) / factor`` over those weights. After each step of the optimizer the factor takes
    its own: down that derivative by the learning rate, then towards 0 by learning rate times strength, and the weights
    are multiplied by how much it changed. At 0 it stays, with its weights.

    Paper: Liu et al. 2017, arXiv:1708.06519, section 3, for what a scale is; gates without BatchNorm are not in it.

    Args:
        groups: Groups of the traced model, those of :func:`gated_groups`.
        model: The model.
    """

    def __init__(self, groups: Sequence[ChannelGroup], model: nn.Module) -> None:
        self.values: dict[str, Tensor] = {}
        self._readers: dict[str, list[_Reader]] = {}
        self._effects: dict[str, Tensor] = {}
        for group in groups:
            if group.size == 1:  # the last channel of a group stays
                continue
            device = fetch(model, group.makers[0][0]).device
            self.values[group.name] = torch.ones(group.size, device=device)
            self._readers[group.name] = [
                _Reader(fetch(model, n), n, a, torch.from_numpy(group.positions(n, a)).to(device))
                for n, a in _readers(group, model)
            ]

    @torch.no_grad()
    def take_gradients(self, parameters: Iterable[nn.Parameter], scale: float = 1.0) -> None:
        """Before a step: what its gradients say of the factors; those read by other parameters wait.

        Args:
            parameters: What the step moves.
            scale: What gradients were multiplied with (mixed precision).
        """
        moved = {id(p) for p in parameters}
        self._effects = {}
        for name, readers in self._readers.items():
            if not all(id(r.weight) in moved and r.weight.grad is not None for r in readers):
                continue
            effect = torch.zeros_like(self.values[name])
            for reader in readers:
                product = (reader.weight * reader.weight.grad).sum(reader.rows())  # type: ignore[operator]
                effect += product[reader.places].sum(1) / scale
            self._effects[name] = effect

    @torch.no_grad()
    def step(self, rates: Mapping[int, float], strength: float) -> None:
        """After a step: move the factors, and the weights with them.

        Args:
            rates: Learning rate by the identity of each parameter that the step moved.
            strength: Of the penalty.
        """
        for name, effect in self._effects.items():
            old, rate = self.values[name], rates[id(self._readers[name][0].weight)]
            alive = old > 0
            moved = old - rate * effect / old.clamp_min(torch.finfo(old.dtype).tiny)
            new = torch.where(alive & torch.isfinite(moved), moved - rate * strength, old).clamp_min(0)
            ratio = torch.where(alive, new / old.clamp_min(torch.finfo(old.dtype).tiny), 0)
            for reader in self._readers[name]:
                factor = torch.ones(reader.weight.shape[reader.axis], device=old.device, dtype=reader.weight.dtype)
                factor[reader.places] = ratio[:, None].to(factor.dtype)
                shape = [-1 if a == reader.axis else 1 for a in range(reader.weight.dim())]
                reader.weight.mul_(factor.view(shape))
            self.values[name] = new
        self._effects = {}

    def follow(self, keep: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
        """Drop the factors of channels that left, and of one that is the last of its group: it stays.

        Args:
            keep: Of the removal plan: indices that stay by parameter and axis.
        """
        for name, readers in self._readers.items():
            for reader in readers:
                kept = keep.get(reader.name, {}).get(reader.axis)
                if kept is None:
                    continue
                places = torch.as_tensor(kept, device=reader.places.device)
                stays = torch.isin(reader.places[:, 0], places)
                if len(self.values[name]) == len(stays):
                    self.values[name] = self.values[name][stays]
                where = torch.full((int(max(places.max(), reader.places.max())) + 1,), -1, device=places.device)
                where[places] = torch.arange(len(places), device=places.device)
                reader.places = where[reader.places[stays]]
        for name in [name for name, value in self.values.items() if len(value) == 1]:
            del self.values[name], self._readers[name]

    def state_dict(self) -> dict[str, Any]:
        """The factors by group."""
        return {name: value.cpu() for name, value in self.values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up :meth:`state_dict`.

        Raises:
            ResumeError: It is of another network.
        """
        ours = {name: len(value) for name, value in self.values.items()}
        if ours != {name: len(value) for name, value in state.items()}:
            raise ResumeError("the checkpoint's gates are of another network; resume with the same network.")
        self.values = {name: state[name].to(value) for name, value in self.values.items()}

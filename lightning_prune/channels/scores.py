"""Channel scores: one number for each channel of a group, higher is kept."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_prune.channels.groups import ChannelGroup
from lightning_prune.errors import ConfigError

ChannelScores = Mapping[str, Tensor] | Callable[[ChannelGroup, nn.Module], Tensor]
Reduction = Literal["mean", "max", "sum"]


def fetch(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by name."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _per_channel(tensor: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Rows of all entries that belong to each channel: (channels, entries)."""
    moved = tensor.detach().movedim(axis, 0).flatten(1) if tensor.dim() > 1 else tensor.detach()[:, None]
    return moved[positions.to(tensor.device).flatten()].reshape(positions.shape[0], -1)


def score_norms(group: ChannelGroup, model: nn.Module, p: float = 2.0) -> Tensor:
    """Score channels by the norm of the weights that make them, over all layers of the group together.

    Args:
        group: The group.
        model: The model.
        p: Order of the norm, > 0.

    Shape:
        Returns (group.size,), float64 on the CPU.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    for name, axis in group.makers:
        tensor = fetch(model, name).detach()
        others = [a for a in range(tensor.dim()) if a != axis]
        norms = torch.linalg.vector_norm(tensor, p, others) if others else tensor.abs()
        total += (norms.double().cpu()[torch.from_numpy(group.positions(name, axis))] ** p).sum(dim=1)
    return total ** (1 / p)


def score_batch_norm(group: ChannelGroup, model: nn.Module, reduction: Reduction = "mean") -> Tensor:
    """Score channels by the absolute scale of the BatchNorms they pass.

    Paper: Liu et al. 2017, arXiv:1708.06519, section 3. Deviation: a residual stage shares its channels over several
    BatchNorms, which the paper does not treat; their scales are combined by ``reduction`` (the sum favours long
    stages).

    Args:
        group: The group.
        model: The model.
        reduction: How scales of several BatchNorms are combined.

    Shape:
        Returns (group.size,), float64 on the CPU.

    Raises:
        ConfigError: No BatchNorm with a scale lies on the group.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    scales = []
    for name, axis, _ in group.members:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and isinstance(model.get_submodule(owner), _BatchNorm):
            rows = _per_channel(fetch(model, name), axis, torch.from_numpy(group.positions(name, axis)))
            scales.append(rows.double().abs().mean(dim=1).cpu())
    if not scales:
        raise ConfigError(
            f"group {group.name} has no BatchNorm with a scale, so it cannot be scored by BatchNorm scales; use "
            "another "
            "criterion, or give scores for this group."
        )
    stacked = torch.stack(scales)
    if reduction == "max":
        return stacked.amax(dim=0)
    return stacked.sum(dim=0) if reduction == "sum" else stacked.mean(dim=0)


def score_taylor(group: ChannelGroup, model: nn.Module) -> Tensor:
    """Score channels by the first-order change of the loss when they leave: ``(sum of gradient * weight)**2``.

    Uses the ``.grad`` that is there, so a backward pass must have run. The sum is over the weights that make the
    channel.

    Paper: Molchanov et al. 2019, arXiv:1906.10771, section 3.1 (the form over all weights of a filter). Deviation: the
    sum runs over all layers of the group.

    Args:
        group: The group.
        model: The model, with gradients.

    Shape:
        Returns (group.size,), float64 on the CPU.

    Raises:
        ConfigError: A weight of the group has no gradient.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    for name, axis in group.makers:
        tensor = fetch(model, name)
        if tensor.grad is None:
            raise ConfigError(f"{name} has no gradient, which Taylor scores need: run a backward pass first.")
        positions = torch.from_numpy(group.positions(name, axis))
        rows = _per_channel(tensor.detach() * tensor.grad, axis, positions)
        total += rows.double().sum(dim=1).cpu()
    return total**2


def resolve(scores: ChannelScores | None, group: ChannelGroup, model: nn.Module) -> Tensor:
    """The scores of one group from what the user gave.

    Raises:
        ConfigError: Missing, of the wrong length, or not finite.
    """
    if scores is None:
        found = score_norms(group, model)
    elif callable(scores):
        found = scores(group, model)
    elif group.name in scores:
        found = scores[group.name]
    else:
        raise ConfigError(f"scores has no entry for group {group.name!r}; expected one for each of graph.groups.")
    if tuple(found.shape) != (group.size,):
        raise ConfigError(
            f"scores of group {group.name!r} have shape {tuple(found.shape)}, expected ({group.size},): one a channel."
        )
    if not bool(torch.isfinite(found).all()):
        raise ConfigError(f"scores of group {group.name!r} are not all finite; check the model and the criterion.")
    return found.detach().double().cpu()

"""Channel scores: one number for each channel of a group, higher is kept."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

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


def combine(scores: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """One score a channel from those of the several layers that make (or scale) it.

    Args:
        scores: One tensor a layer.
        reduction: ``"mean"``, ``"max"``, or ``"sum"``, which favours groups of many layers.

    Shape:
        scores: each (channels,). Returns (channels,).
    """
    stacked = torch.stack(list(scores))
    if reduction == "max":
        return stacked.amax(dim=0)
    return stacked.sum(dim=0) if reduction == "sum" else stacked.mean(dim=0)


def score_norms(group: ChannelGroup, model: nn.Module, p: float = 2.0, reduction: Reduction | None = None) -> Tensor:
    """Score channels by the norm of the weights that make them.

    Paper: Li et al. 2017, arXiv:1608.08710, section 3.1 (``p=1``). Deviation: a channel that several layers make (a
    residual stage) is scored by all of them; the paper lets the shortcut's layer decide. Channels that a
    :class:`ChannelSelection` passes on are scored by the weights that read them.

    Args:
        group: The group.
        model: The model.
        p: Order of the norm, > 0.
        reduction: How the norms of several layers are combined; None: one norm over the weights of all together.

    Shape:
        Returns (group.size,), float64 on the CPU.
    """
    powers = []
    makers = [maker for maker in group.makers if fetch(model, maker[0]).is_floating_point()]
    for name, axis in makers or _readers(group, model):
        tensor = fetch(model, name).detach()
        others = [a for a in range(tensor.dim()) if a != axis]
        norms = torch.linalg.vector_norm(tensor, p, others) if others else tensor.abs()
        powers.append((norms.double().cpu()[torch.from_numpy(group.positions(name, axis))] ** p).sum(dim=1))
    if reduction is None:
        return combine(powers, "sum") ** (1 / p)
    return combine([power ** (1 / p) for power in powers], reduction)


def _readers(group: ChannelGroup, model: nn.Module) -> list[tuple[str, int]]:
    """The (name, axis) pairs of the matrices and kernels that read a group's channels."""
    return [(name, axis) for name, axis, _ in group.members if fetch(model, name).dim() > 1]


def score_geometric_median(group: ChannelGroup, model: nn.Module, reduction: Reduction = "mean") -> Tensor:
    """Score channels by how far their filter lies from all others of its layer: ``sum_j ||w_i - w_j||_2``.

    A filter near the geometric median of its layer can be replaced by the others.

    Paper: He et al. 2019, arXiv:1811.00250 (FPGM), section 3.3. Deviation: several layers that make one channel are
    combined by ``reduction``.

    Args:
        group: The group.
        model: The model.
        reduction: How scores of several layers are combined.

    Shape:
        Returns (group.size,), float64 on the CPU.
    """
    sums = []
    for name, axis in group.makers:
        rows = _per_channel(fetch(model, name), axis, torch.from_numpy(group.positions(name, axis))).float()
        sums.append(torch.cdist(rows, rows).double().sum(dim=1).cpu())
    return combine(sums, reduction)


def score_random(group: ChannelGroup, generator: torch.Generator) -> Tensor:
    """Score channels at random: a permutation of ``0 .. size - 1``, the control that every criterion has to beat.

    Shape:
        Returns (group.size,), float64 on the CPU.
    """
    return torch.randperm(group.size, generator=generator).double()


def batch_norm_scales(group: ChannelGroup, model: nn.Module) -> list[tuple[str, int]]:
    """The (name, axis) pairs of the group's BatchNorm scales."""
    found = []
    for name, axis, _ in group.members:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and isinstance(model.get_submodule(owner), _BatchNorm):
            found.append((name, axis))
    return found


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
    scales = []
    for name, axis in batch_norm_scales(group, model):
        rows = _per_channel(fetch(model, name), axis, torch.from_numpy(group.positions(name, axis)))
        scales.append(rows.double().abs().mean(dim=1).cpu())
    if not scales:
        raise ConfigError(
            f"group {group.name} has no BatchNorm with a scale, so it cannot be scored by BatchNorm scales; use "
            "another criterion, or give scores for this group."
        )
    return combine(scales, reduction)


Gate = tuple[tuple[str, int], ...]


def gates(group: ChannelGroup, model: nn.Module) -> list[Gate]:
    """Where a factor on each channel would act: the (name, axis) pairs of the affine maps that it would multiply.

    After a normalisation with a scale these are its scale and shift; the weights before it have no say, since a loss
    does not depend on their length. Without one they are weight and bias of each layer that makes the channel.
    """
    members = {name for name, _, _ in group.members}

    def with_shift(name: str, axis: int) -> Gate:
        shift = f"{name.rpartition('.')[0]}.bias".removeprefix(".")
        return ((name, axis), (shift, 0)) if shift in members and shift != name else ((name, axis),)

    scales = []
    for name, axis, _ in group.members:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and isinstance(model.get_submodule(owner), _NormBase | nn.GroupNorm):
            scales.append((name, axis))
    return [with_shift(name, axis) for name, axis in scales or group.makers]


def gate_effect(gate: Gate, group: ChannelGroup, model: nn.Module) -> Tensor:
    """The derivative of the loss by a factor on each channel, at 1: ``sum of weight * gradient`` over a gate.

    It equals the sum over all inputs and places of ``activation * gradient`` where the gate acts.

    Shape:
        Returns (group.size,), float64 on the CPU.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    for name, axis in gate:
        tensor = fetch(model, name)
        if tensor.grad is None:
            continue  # a shift that is not trained
        others = [a for a in range(tensor.dim()) if a != axis]
        product = tensor.detach() * tensor.grad
        sums = (product.sum(others) if others else product).double().cpu()
        total += sums[torch.from_numpy(group.positions(name, axis))].sum(dim=1)
    return total


def score_taylor(group: ChannelGroup, model: nn.Module, reduction: Reduction = "mean") -> Tensor:
    """Score channels by the squared first-order change of the loss when they leave, from the gradients that are there.

    Paper: Molchanov et al. 2019, arXiv:1906.10771: a gate of value 1 on the channel, after a batch normalisation where
    there is one; importance is the squared product of gate and gradient. Deviation: a channel with several gates (a
    residual stage) is scored by ``reduction`` over them.

    Args:
        group: The group.
        model: The model, with gradients of one backward pass.
        reduction: How several gates are combined.

    Shape:
        Returns (group.size,), float64 on the CPU.

    Raises:
        ConfigError: No gate of the group has a gradient.
    """
    seen = [gate for gate in gates(group, model) if fetch(model, gate[0][0]).grad is not None]
    if not seen:
        raise ConfigError(
            f"{gates(group, model)[0][0][0]} has no gradient, which Taylor scores need: run a backward pass first."
        )
    return combine([gate_effect(gate, group, model) ** 2 for gate in seen], reduction)


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

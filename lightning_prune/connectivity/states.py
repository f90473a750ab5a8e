"""Two states of one network, the points on the line between them, and the network put back as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError, MaskMismatchError
from lightning_prune.masks import MaskSet
from lightning_prune.prunable import canonical_name, close_names

Masks = MaskSet | tuple[MaskSet, MaskSet]


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters and persistent buffers, by canonical name; shared ones under each of their names."""
    state = model.state_dict(keep_vars=True)
    return {canonical_name(name): value for name, value in state.items() if isinstance(value, Tensor)}


def read_state(model: nn.Module, state: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """A copy of ``state`` in the types and on the devices of the model's tensors, by canonical name.

    Args:
        model: The network.
        state: What its ``state_dict()`` gives.
        what: Name of the argument, for the message.

    Raises:
        ConfigError: A state of another network.
    """
    if isinstance(state.get("state_dict"), Mapping):
        raise ConfigError(f"{what} is a whole checkpoint; give its 'state_dict'.")
    own = state_tensors(model)
    given = {canonical_name(name): value for name, value in state.items() if isinstance(value, Tensor)}
    missing, unknown = [n for n in own if n not in given], [n for n in given if n not in own]
    wrong = [n for n in own if n in given and own[n].shape != given[n].shape]
    where = f"{what} is no state of this {type(model).__name__}"
    if missing:
        raise ConfigError(f"{where}: it has no {missing[0]!r}{close_names(missing[0], given)}")
    if unknown:
        raise ConfigError(f"{where}, which has no {unknown[0]!r}{close_names(unknown[0], own)}")
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"{where}: {name!r} has shape {tuple(given[name].shape)}, the network's has {tuple(own[name].shape)}."
        )
    return {name: given[name].detach().to(tensor, copy=True) for name, tensor in own.items()}


class Line:
    """The states ``alpha * a + (1 - alpha) * b`` of a network.

    Equal entries stay what they are, and both ends are met exactly. Tensors that are not floating (counters, indices)
    are never averaged: a point has those of its nearer end.

    Args:
        model: The network; not changed.
        state_a: The end at ``alpha = 1``.
        state_b: The end at ``alpha = 0``.

    Raises:
        ConfigError: A state of another network.
    """

    def __init__(self, model: nn.Module, state_a: Mapping[str, Any], state_b: Mapping[str, Any]) -> None:
        self.model = model
        self.a = read_state(model, state_a, "state_a")
        self.b = read_state(model, state_b, "state_b")
        self._own = state_tensors(model)

    def point(self, alpha: float) -> dict[str, Tensor]:
        """The state at ``alpha``, by canonical name."""
        found = {}
        for name, a in self.a.items():
            if a.is_floating_point() or a.is_complex():
                found[name] = torch.lerp(self.b[name], a, alpha)
            else:
                found[name] = a if alpha >= 0.5 else self.b[name]
        return found

    def current(self) -> dict[str, Tensor]:
        """A copy of the network's present state, by canonical name."""
        return {name: tensor.detach().clone() for name, tensor in self._own.items()}

    @torch.no_grad()
    def move_to(self, alpha: float) -> None:
        """Set the network to the state at ``alpha``, in place."""
        for name, value in self.point(alpha).items():
            self._own[name].copy_(value)


def check_masks(line: Line, masks: Masks | None, differing: str) -> None:
    """See that both ends lie in their subnetwork, and whether it is one subnetwork.

    Args:
        line: The two ends.
        masks: Of both ends, or of ``a`` and of ``b``.
        differing: ``"error"`` refuses masks that differ; ``"union"`` allows them: points then have the weights that
            either end has.

    Raises:
        MaskMismatchError: Masks that differ, belong to another network, or do not hold in their state.
    """
    if masks is None:
        return
    pair = masks if isinstance(masks, tuple) else (masks, masks)
    for of, mask_set, state in zip("ab", pair, (line.a, line.b), strict=True):
        for name, mask in mask_set.items():
            if name not in state or state[name].shape != mask.shape:
                shape = tuple(state[name].shape) if name in state else "no such parameter"
                raise MaskMismatchError(
                    f"the masks of state_{of} belong to another network: the mask of {name!r} has shape "
                    f"{tuple(mask.shape)}, the network's: {shape}."
                )
            value, mask = state[name], mask.to(state[name].device)
            fill = mask_set.fills.get(name, torch.zeros(())).to(value)
            pruned = torch.where(mask, value, fill)
            if not torch.equal(pruned, value):
                raise MaskMismatchError(
                    f"state_{of} does not lie in its subnetwork: {int((pruned != value).sum())} pruned entries of "
                    f"{name!r} are not at their pruned value. Give the state that was trained under these masks."
                )
    if differing == "error" and pair[0] != pair[1]:
        raise MaskMismatchError(
            "the two ends have different masks, so the line between them leaves both subnetworks. Compare copies of "
            "one ticket, or allow it with differing_masks='union' (points then have the weights that either end has)."
        )


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Give the model back bit for bit: parameters, buffers, and the mode of every module; in eval mode meanwhile."""
    tensors = [*model.parameters(), *model.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        for module, training in modes:
            module.training = training

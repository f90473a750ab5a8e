"""Mask actions: what kept weights start from and what pruned weights hold, from initial and trained weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError, MaskMismatchError, SelectionError
from lightning_prune.masks import MaskSet
from lightning_prune.prunable import canonical_name, close_names

_RESCALING = "_rescaling"


def _permuted(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """The same values in another order."""
    flat = values.reshape(-1)
    device = generator.device if generator is not None else "cpu"
    order = torch.randperm(flat.numel(), generator=generator, device=device)
    return flat[order.to(flat.device)].reshape(values.shape)


def _reshuffled(values: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
    """Kept values change places among themselves."""
    return values.masked_scatter(mask, _permuted(values[mask], generator))


def _signed_constant(initial: Tensor) -> Tensor:
    return torch.sign(initial) * initial.std(correction=0)


_Kept = Callable[[Tensor, Tensor, torch.Generator | None], Tensor]
_KEPT: dict[str, _Kept] = {
    "rewind": lambda wi, mask, g: wi.clone(),
    "random_reinit": lambda wi, mask, g: _permuted(wi, g),
    "random_reshuffle": _reshuffled,
    "signed_reinit": lambda wi, mask, g: torch.sign(wi) * _permuted(wi.abs(), g),
    "signed_reshuffle": lambda wi, mask, g: torch.sign(wi) * _reshuffled(wi.abs(), mask, g),
    "signed_constant": lambda wi, mask, g: _signed_constant(wi),
    "rand_signed_constant": lambda wi, mask, g: _permuted(_signed_constant(wi), g),
}

MASK1_ACTIONS: tuple[str, ...] = (*_KEPT, *(name + _RESCALING for name in _KEPT))
"""Every action on kept weights."""
MASK0_ACTIONS: tuple[str, ...] = (
    "zero",
    "freeze_init",
    "freeze_init_zero_mask",
    "freeze_init_zero_all",
    "freeze_init_zero_rev",
    "freeze_init_zero_reshuffle",
)
"""Every action on pruned weights."""


def mask_weights(
    initial: Tensor,
    mask: Tensor,
    final: Tensor | None = None,
    *,
    mask1: str = "rewind",
    mask0: str = "zero",
    generator: torch.Generator | None = None,
) -> Tensor:
    """One weight tensor under a mask: what its kept entries start from, what its pruned entries hold.

    With ``wi`` the initial and ``wf`` the final (trained) weights, kept entries (mask-1 actions) start from:

    =========================  =====================================================================================
    ``rewind``                 ``wi``
    ``random_reinit``          ``wi`` of a random other entry of the tensor: all its values change places
    ``random_reshuffle``       the same, with values of kept entries only
    ``signed_reinit``          ``random_reinit`` of magnitudes; each entry has its own initial sign
    ``signed_reshuffle``       ``random_reshuffle`` of magnitudes; each entry has its own initial sign
    ``signed_constant``        ``sign(wi) * s`` with ``s`` the (population) standard deviation of the tensor's ``wi``
    ``rand_signed_constant``   values of ``signed_constant`` of a random other entry of the tensor
    ``..._rescaling``          any of these times ``entries / kept entries`` of the tensor
    =========================  =====================================================================================

    Pruned entries (mask-0 actions) hold:

    ==============================  ================================================================================
    ``zero``                        0
    ``freeze_init``                 ``wi``
    ``freeze_init_zero_mask``       0 where training shrank the magnitude (``|wi| > |wf|``), else ``wi``
    ``freeze_init_zero_all``        the same, and kept entries that shrank start from 0, whatever their action
    ``freeze_init_zero_rev``        ``wi`` where training shrank the magnitude, else 0
    ``freeze_init_zero_reshuffle``  as many zeros as ``freeze_init_zero_mask`` has, at random pruned entries: a control
    ==============================  ================================================================================

    Paper: Zhou et al. 2019, arXiv:1905.01067, sections 3 and 4. As in the authors' code, re-initialisation permutes
    and does not draw anew, and an equal magnitude counts as not shrunk. Deviation: a round starts from the network's
    first values, where that code starts from the previous round's values.

    Args:
        initial: Weights at the start of training, floating.
        mask: ``True`` = kept, boolean.
        final: Trained weights; only the ``freeze_init_zero_...`` actions need them.
        mask1: A name in :data:`MASK1_ACTIONS`.
        mask0: A name in :data:`MASK0_ACTIONS`.
        generator: Source of permutations, mask-1 before mask-0; the same state gives the same weights. Default:
            torch's own.

    Shape:
        All tensors, and the result: the weight's shape; the result has the dtype and device of ``initial``.

    Raises:
        ConfigError: An unknown action, or one that needs ``final``.
        SelectionError: Shapes that differ, a mask that is not boolean.

    Example:
        >>> mask_weights(torch.tensor([3.0, -1.0]), torch.tensor([True, False]), mask1="rewind_rescaling")
        tensor([6., 0.])
    """
    _check(initial, mask, final, mask1, mask0)
    with torch.no_grad():
        mask = mask.to(initial.device)
        weights = _KEPT[mask1.removesuffix(_RESCALING)](initial.detach(), mask, generator)
        if mask1.endswith(_RESCALING):
            weights = weights * (mask.numel() / max(1, int(mask.sum())))
        shrank = torch.zeros_like(mask) if final is None else initial.abs() > final.to(initial.device).abs()
        if mask0 == "freeze_init_zero_all":
            weights = weights.masked_fill(shrank, 0)
        return torch.where(mask, weights, _pruned(mask0, initial.detach(), mask, shrank, generator))


def _pruned(action: str, initial: Tensor, mask: Tensor, shrank: Tensor, generator: torch.Generator | None) -> Tensor:
    if action == "zero":
        return torch.zeros_like(initial)
    if action == "freeze_init":
        return initial
    if action == "freeze_init_zero_rev":
        return initial.masked_fill(~shrank, 0)
    if action == "freeze_init_zero_reshuffle":
        shrank = _reshuffled(shrank, ~mask, generator)
    return initial.masked_fill(shrank, 0)


def _check(initial: Tensor, mask: Tensor, final: Tensor | None, mask1: str, mask0: str) -> None:
    check_actions(mask1, mask0)
    if final is None and mask0.startswith("freeze_init_zero"):
        raise ConfigError(f"mask0={mask0!r} compares initial and trained weights; pass final=<trained weights>.")
    if mask.dtype != torch.bool:
        raise SelectionError(f"the mask must be a boolean tensor (True = kept), got {mask.dtype}; use `mask != 0`.")
    shapes = {"initial": initial, "mask": mask} | ({} if final is None else {"final": final})
    if len({tensor.shape for tensor in shapes.values()}) > 1:
        found = {name: tuple(tensor.shape) for name, tensor in shapes.items()}
        raise SelectionError(f"initial and final weights and the mask must have one shape, got {found}.")


def check_actions(mask1: str, mask0: str) -> None:
    """Refuse unknown actions.

    Raises:
        ConfigError: ``mask1`` or ``mask0`` is not in :data:`MASK1_ACTIONS` or :data:`MASK0_ACTIONS`.
    """
    for name, value, known in (("mask1", mask1, MASK1_ACTIONS), ("mask0", mask0, MASK0_ACTIONS)):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is no action{close_names(str(value), known)}")


@dataclass(frozen=True)
class Supermask:
    """Masks, with fills where pruned entries are not 0, and the weights of an untrained network under them.

    Args:
        masks: The masks; pruned entries hold 0 or their fill.
        weights: Whole weight tensors by name, kept and pruned entries.
    """

    masks: MaskSet
    weights: Mapping[str, Tensor]

    def apply_(self, module: nn.Module) -> None:
        """Write the weights into ``module``'s parameters, in place; other parameters stay.

        Raises:
            MaskMismatchError: A parameter is missing or has another shape.
        """
        self.masks.apply_(module)  # checks names and shapes before anything is written
        parameters = {canonical_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
        with torch.no_grad():
            for name, weight in self.weights.items():
                parameters[name].copy_(weight)


def supermask(
    masks: MaskSet,
    initial: Mapping[str, Tensor],
    final: Mapping[str, Tensor] | None = None,
    *,
    mask1: str = "rewind",
    mask0: str = "zero",
    generator: torch.Generator | None = None,
) -> Supermask:
    """Take :func:`mask_weights`' actions on every tensor that has a mask.

    Args:
        masks: The masks; fills of theirs are replaced by what ``mask0`` gives.
        initial: Initial weights by name; names without a mask are passed over.
        final: Trained weights by name, for the actions that need them.
        mask1: Action on kept weights.
        mask0: Action on pruned weights.
        generator: Source of permutations, tensor after tensor in the order of ``masks``.

    Raises:
        ConfigError: An unknown action, or one that needs ``final``.
        MaskMismatchError: No weights for a mask.
        SelectionError: Weights and mask differ in shape.

    Example:
        >>> masks = MaskSet({"w": torch.tensor([True, False])})
        >>> found = supermask(masks, {"w": torch.tensor([3.0, -1.0])}, mask0="freeze_init")
        >>> found.weights["w"], found.masks.fills["w"]
        (tensor([ 3., -1.]), tensor([ 0., -1.]))
    """
    check_actions(mask1, mask0)
    initial = {canonical_name(name): tensor for name, tensor in initial.items()}
    trained = {canonical_name(name): tensor for name, tensor in (final or {}).items()}
    weights = {}
    for name, mask in masks.items():
        if name not in initial or (final is not None and name not in trained):
            raise MaskMismatchError(f"{name!r} has a mask but no weights{close_names(name, initial)}")
        weights[name] = mask_weights(
            initial[name], mask, trained.get(name), mask1=mask1, mask0=mask0, generator=generator
        )
    return Supermask(MaskSet(masks, None if mask0 == "zero" else weights), weights)

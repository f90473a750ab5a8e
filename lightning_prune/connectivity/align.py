"""Alignment: put the channels of one network into the order of another's, without changing what it computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.channels import ChannelGroup, trace_channels
from lightning_prune.channels.equality import TOLERANCE, relative_error
from lightning_prune.channels.symmetries import find_symmetries, permute, run_with
from lightning_prune.connectivity.states import read_state, state_tensors
from lightning_prune.errors import ConfigError, EqualityError
from lightning_prune.masks import MaskSet
from lightning_prune.prunable import canonical_name
from lightning_prune.wrappers import bare, uncompiled

_MAX_SWEEPS = 100
_LEAST_GAIN = 1e-9  # of the squared norm: less is rounding


@dataclass(frozen=True)
class Alignment:
    """One network with its channels in the order that matches another.

    Attributes:
        state: The permuted state; computes what the given one computes.
        orders: For each group which channel came to each place: ``{name of the group: (size,) of integers}``.
        similarity: Cosine between the parameters of both networks that any group has: (before, after).
        error: Largest change of an output by the permutation, over the output's scale.
    """

    state: dict[str, Tensor]
    orders: dict[str, np.ndarray]
    similarity: tuple[float, float]
    error: float
    _groups: list[ChannelGroup] = field(default_factory=list, repr=False)
    _aliases: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def moved(self) -> int:
        """How many channels came to another place."""
        return sum(int((order != np.arange(len(order))).sum()) for order in self.orders.values())

    def permute(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that belong to the given network, such as masks or gradients, in the new order."""
        return _permute_all(tensors, self._aliases, self._groups, list(self.orders.values()))

    def permute_masks(self, masks: MaskSet) -> MaskSet:
        """Masks of the given network in the new order."""
        return MaskSet(self.permute(masks), self.permute(masks.fills))


def align_states(
    model: nn.Module,
    state_a: Mapping[str, Any],
    state_b: Mapping[str, Any],
    example_inputs: Any,
    seed: int = 0,
) -> Alignment:
    """Permute the channels of ``b`` to match ``a``, by weight matching.

    The permutations allowed are those under which the architecture computes the same, found by tracing it and tried
    (:func:`find_symmetries`); attention heads change places whole. Among them the sum of products of both networks'
    weights is raised, one group at a time, the others held (a linear assignment), until no group improves it. This
    is done from two starting points, the given order, and one that follows the groups from the inputs on, each matched
    by the weights whose other axes are matched already; the better result is taken. That ``b`` computes the same
    as before is checked on its own weights before anything is returned.

    Paper: Ainsworth et al. 2023, arXiv:2209.04836, section 3.2. Deviations: the permutations come from a trace instead
    of a specification written for each architecture; the second starting point.

    Args:
        model: The network, as it computes; its own weights do not matter.
        state_a: The ``state_dict`` to match.
        state_b: The ``state_dict`` to permute.
        example_inputs: As for :func:`trace_channels`.
        seed: Of the order in which groups are matched.

    Returns:
        The permuted state, and what was permuted.

    Raises:
        ConfigError: A state of another network.
        EqualityError: The permuted network does not compute what it did.
        TraceError: The model cannot be followed.
    """
    a, b = read_state(model, state_a, "state_a"), read_state(model, state_b, "state_b")
    graph = trace_channels(model, example_inputs, approximate=True)
    groups = find_symmetries(graph)
    aliases = _first_names(graph.model)
    parameters = {canonical_name(name) for name, _ in bare(model).named_parameters()}
    members = {name for group in groups for name, _, _ in group.members if name in parameters}
    matching = _Matching(groups, {n: a[n].double() for n in members}, {n: b[n].double() for n in members}, seed)
    identity = [np.arange(group.size) for group in groups]
    found = [matching.improve(start) for start in (identity, matching.follow())]
    orders = max(found, key=matching.objective)
    similarity = matching.cosine(identity), matching.cosine(orders)
    state = _permute_all(b, aliases, groups, orders)
    error = _check_equal(graph.model, b, state, example_inputs)
    named = {f"{index}: {group.name}": order for index, (group, order) in enumerate(zip(groups, orders, strict=True))}
    return Alignment(state, named, similarity, error, groups, aliases)


class _Matching:
    """Weight matching of two networks under given groups."""

    def __init__(self, groups: Sequence[ChannelGroup], a: dict[str, Tensor], b: dict[str, Tensor], seed: int) -> None:
        self.groups, self.a, self.b = groups, a, b
        self.random = np.random.default_rng(seed)
        self.scale = max(sum(float(t.square().sum()) for t in a.values()), 1e-300)

    def objective(self, orders: Sequence[np.ndarray]) -> float:
        """The sum of products of both networks' weights, with ``b`` in these orders."""
        permuted = permute(self.b, self.groups, orders)
        return sum(float((a * permuted[name]).sum()) for name, a in self.a.items())

    def cosine(self, orders: Sequence[np.ndarray]) -> float:
        """The same as a cosine."""
        norm = sum(float(t.square().sum()) for t in self.b.values())
        return self.objective(orders) / max((self.scale * norm) ** 0.5, 1e-300)

    def improve(self, orders: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Match one group after the other until none improves the objective."""
        orders = list(orders)
        for _ in range(_MAX_SWEEPS):
            improved = False
            for g in self.random.permutation(len(self.groups)):
                improved |= self._match(int(g), orders, set(self.a))
            if not improved:
                break
        return orders

    def follow(self) -> list[np.ndarray]:
        """Match the groups one by one, each by the weights that no unmatched group permutes otherwise."""
        orders = [np.arange(group.size) for group in self.groups]
        axes: dict[str, set[int]] = {name: set() for name in self.a}
        for g, group in enumerate(self.groups):
            for name, _, _ in group.members:
                axes.get(name, set()).add(g)
        left = set(range(len(self.groups)))
        while left:
            evidence = {g: {n for n, own in axes.items() if g in own and not (own & left) - {g}} for g in left}
            g = max(sorted(left), key=lambda g: sum(self.a[n].numel() for n in evidence[g]) / self.groups[g].size)
            names = evidence[g] or {n for n, own in axes.items() if g in own}
            self._match(g, orders, names, always=True)
            left.remove(g)
        return orders

    def _match(self, g: int, orders: list[np.ndarray], names: set[str], always: bool = False) -> bool:
        """Match one group by some of its weights; whether that raised the objective."""
        from scipy.optimize import linear_sum_assignment

        group = self.groups[g]
        own = sorted({name for name, _, _ in group.members} & names)
        now = permute({name: self.b[name] for name in own}, self.groups, orders)
        products = torch.zeros(group.size, group.size, dtype=torch.float64)
        for name, axis, _ in group.members:
            if name in now:
                table = torch.from_numpy(group.positions(name, axis))
                products += (_rows(self.a[name], axis, table) @ _rows(now[name], axis, table).T).cpu()
        _, columns = linear_sum_assignment(products.numpy(), maximize=True)
        after = permute(now, [group], [columns])
        gain = sum(float((self.a[name] * (after[name] - now[name])).sum()) for name in own)
        if not always and gain <= _LEAST_GAIN * self.scale:
            return False
        orders[g] = orders[g][columns]
        return True


def _rows(tensor: Tensor, axis: int, table: Tensor) -> Tensor:
    """All entries of each channel: (size, entries)."""
    chosen = tensor.movedim(axis, 0)[table.to(tensor.device)]
    return chosen.reshape(len(table), -1)


def _first_names(model: nn.Module) -> dict[str, str]:
    """For each name of a state the name under which groups know the tensor: of a shared one, the first."""
    with uncompiled(model):
        first: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            first.setdefault(id(tensor), name)
        return {name: first[id(tensor)] for name, tensor in state_tensors(model).items()}


def _permute_all(
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    groups: Sequence[ChannelGroup],
    orders: Sequence[np.ndarray],
) -> dict[str, Tensor]:
    """Permute tensors given by any of their names."""
    by_first = {aliases.get(canonical_name(name), name): tensor for name, tensor in tensors.items()}
    permuted = permute(by_first, groups, orders)
    return {name: permuted[aliases.get(canonical_name(name), name)] for name in tensors}


def _check_equal(model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], example_inputs: Any) -> float:
    """The relative change of outputs; float64 unless the forward code insists on single precision.

    Raises:
        EqualityError: More than rounding.
    """
    with uncompiled(model):
        names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        for dtype in (torch.float64, torch.float32):
            states = [
                {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items() if n in names}
                for state in (before, after)
            ]
            try:
                outputs = [run_with(model, state, example_inputs, dtype) for state in states]
                break
            except RuntimeError:
                if dtype == torch.float32:
                    raise
    # all 0, as under a fresh network's zero output layer, shows nothing; random weights were tried before
    silent = not any(bool(out.any()) for pair in outputs for out in pair)
    error = 0.0 if silent else relative_error(*outputs)
    if not error <= TOLERANCE[dtype]:
        raise EqualityError(
            f"the permuted network's outputs differ by {error:.3g} of their scale, allowed is {TOLERANCE[dtype]:.0e}: "
            "its forward code depends on the order of channels in a way that the trace did not show."
        )
    return error


def example_inputs_of(model: nn.Module, given: Any) -> Any:
    """The example inputs that were given, or the model's own (``example_input_array``).

    Raises:
        ConfigError: Neither.
    """
    found = getattr(model, "example_input_array", None) if given is None else given
    if found is None:
        raise ConfigError("align=True traces the network: give example_inputs, such as the inputs of one batch.")
    return found

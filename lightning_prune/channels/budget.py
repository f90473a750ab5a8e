"""Budgets, and the search for how many channels of each group stay."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_prune.channels.groups import ChannelGroup
from lightning_prune.channels.labels import FIXED
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.errors import BudgetError, ConfigError

LEVELS = 64


@dataclass(frozen=True)
class Budget:
    """How much of a network is kept: exactly one fraction, of the original, in (0, 1].

    A budget is met from below: the cost is at most the fraction, and taking the last channel (or rounding step) back
    would exceed it. Latency alone is met within 5 % to either side, as measured.

    Args:
        channels: Fraction of the prunable channels; the channel of a group counts once.
        params: Fraction of all parameters of the model.
        macs: Fraction of the multiply-adds of convolutions and matrix products at the example inputs.
        latency: Fraction of the time that a forward pass takes with the example inputs (their batch size), on the
            device where the model is: candidates are built and timed by turns with the original.

    Raises:
        ConfigError: None or several are given, or one lies outside (0, 1].
    """

    channels: float | None = None
    params: float | None = None
    macs: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise ConfigError(
                f"Budget takes exactly one of channels=, params=, macs=, latency= (the fraction kept); got "
                f"{sorted(given) or 'none'}."
            )
        ((name, value),) = given.items()
        if not 0 < value <= 1:
            raise ConfigError(f"Budget({name}={value}): the fraction kept must lie in (0, 1].")

    @property
    def what(self) -> str:
        """Which cost is limited: ``"channels"``, ``"params"``, ``"macs"`` or ``"latency"``."""
        return next(k for k, v in vars(self).items() if v is not None)

    @property
    def fraction(self) -> float:
        """The fraction kept."""
        return float(getattr(self, self.what))


class CostModel:
    """Channels, parameters and MACs of a traced model as functions of how many channels of each group stay."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.sizes = np.array([g.size for g in graph.groups], dtype=np.int64)
        self._params: tuple[np.ndarray, ...] | None = None
        self._macs: tuple[np.ndarray, ...] | None = None

    def channels(self, kept: np.ndarray) -> int:
        """Channels that stay, each group's channel counted once."""
        return int(kept.sum())

    def params(self, kept: np.ndarray) -> int:
        """Parameters of the whole model (buffers do not count)."""
        if self._params is None:
            self._params = self._param_tables()
        fixed, matrix, owner, rest, constant = self._params
        counts = fixed + matrix @ kept
        sizes = rest.copy()
        np.multiply.at(sizes, owner, counts)
        return round(float(sizes.sum() + constant[0]))

    def macs(self, kept: np.ndarray) -> int:
        """Multiply-adds of the recorded convolutions and matrix products (bias additions are none)."""
        if self._macs is None:
            self._macs = self._mac_tables()
        fixed, matrix, owner, constants = self._macs
        sizes = constants.copy()
        np.multiply.at(sizes, owner, fixed + matrix @ kept)
        return round(float(sizes.sum()))

    def _param_tables(self) -> tuple[np.ndarray, ...]:
        graph = self.graph
        by_slot: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for g, group in enumerate(graph.groups):
            for name, axis, entries in group.members:
                by_slot.setdefault((name, axis), []).append((g, entries))
        fixed: list[float] = []
        rows: list[np.ndarray] = []
        owner: list[int] = []
        rest: list[float] = []
        names: dict[str, int] = {}
        constant = 0
        for name, parameter in graph.model.named_parameters():
            axes = [a for a in range(parameter.dim()) if (name, a) in by_slot]
            if not axes:
                constant += parameter.numel()
                continue
            names[name] = len(rest)
            size = 1
            for axis, n in enumerate(parameter.shape):
                if axis not in axes:
                    size *= n
                    continue
                row = np.zeros(len(self.sizes))
                for g, entries in by_slot[name, axis]:
                    row[g] = entries
                rows.append(row)
                fixed.append(n - float(row @ self.sizes))
                owner.append(names[name])
            rest.append(float(size))
        matrix = np.array(rows).reshape(len(rows), len(self.sizes))
        return np.array(fixed), matrix, np.array(owner, dtype=int), np.array(rest), np.array([constant])

    def _mac_tables(self) -> tuple[np.ndarray, ...]:
        grouping = self.graph.grouping
        fixed, rows, owner, constants = [], [], [], []
        for p, product in enumerate(self.graph.labels.products):
            constants.append(float(product.constant))
            for array in product.arrays:
                group = np.where(array == FIXED, -1, grouping.group_of[grouping.component[array]])
                row = np.bincount(group[group >= 0], minlength=len(self.sizes)) / np.maximum(self.sizes, 1)
                rows.append(row)
                fixed.append(float((group < 0).sum()))
                owner.append(p)
        matrix = np.array(rows).reshape(len(rows), len(self.sizes))
        return np.array(fixed), matrix, np.array(owner, dtype=int), np.array(constants)

    def cost(self, what: str, kept: np.ndarray) -> int:
        """One of the three by name."""
        return {"channels": self.channels, "params": self.params, "macs": self.macs}[what](kept)


class Family:
    """Groups whose widths are bound to each other by balance demands; one integer program for each level."""

    def __init__(self, graph: ChannelGraph, members: Sequence[int], min_channels: int) -> None:
        self.members = np.array(members)
        self.sizes = np.array([graph.groups[g].size for g in members], dtype=float)
        rows, targets, floors, floor_values = [], [], [], []
        for balance in graph.grouping.balances:
            part = balance.matrix[:, self.members]
            if not part.any():
                continue
            kinds = np.unique(np.column_stack([part, balance.fixed]), axis=0)
            part, fixed = kinds[:, :-1], kinds[:, -1]
            rows.append(part[1:] - part[:1])
            targets.append(fixed[0] - fixed[1:])
            floors.append(part[:1])
            floor_values.append(max(min_channels, 1) - fixed[:1])
        axes: dict[tuple[str, int], dict[int, int]] = {}
        for i, g in enumerate(members):
            for name, axis, entries in graph.groups[g].members:
                axes.setdefault((name, axis), {})[i] = entries
        for held in {tuple(sorted(a.items())) for a in axes.values()}:
            row = np.zeros(len(members))
            for i, entries in held:
                row[i] = entries
            floors.append(row[None])
            floor_values.append(np.array([float(min(max(min_channels, 1), row @ self.sizes))]))
        self.equal, self.target = np.concatenate(rows), np.concatenate(targets)
        self.floor, self.floor_value = np.concatenate(floors), np.concatenate(floor_values)
        self._states: dict[int, np.ndarray] = {LEVELS: self.sizes.astype(int)}

    def state(self, level: int) -> np.ndarray:
        """Channels kept of each member, as near to ``level / LEVELS`` of each as balance allows."""
        if level not in self._states:
            self._states[level] = self._solve(level / LEVELS)
        return self._states[level]

    def _solve(self, fraction: float) -> np.ndarray:
        even = np.maximum(np.floor(fraction * self.sizes), 1)
        if np.array_equal(self.equal @ even, self.target) and (self.floor @ even >= self.floor_value).all():
            return even.astype(int)  # rows of the same kind: nothing to solve
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix, hstack, identity, vstack

        n = len(self.members)
        wanted = fraction * self.sizes
        eye, none = identity(n, format="csr"), csr_matrix((len(self.equal), n))
        distance = vstack([hstack([eye, -eye]), hstack([-eye, -eye])])
        result = milp(
            np.concatenate([np.zeros(n), np.ones(n)]),
            constraints=[
                LinearConstraint(hstack([csr_matrix(self.equal), none]), self.target, self.target),
                LinearConstraint(
                    hstack([csr_matrix(self.floor), csr_matrix((len(self.floor), n))]), self.floor_value, np.inf
                ),
                LinearConstraint(distance, -np.inf, np.concatenate([wanted, -wanted])),
            ],
            integrality=np.concatenate([np.ones(n), np.zeros(n)]),
            bounds=Bounds(np.zeros(2 * n), np.concatenate([self.sizes, np.full(n, np.inf)])),
            options={"time_limit": 5.0, "mip_rel_gap": 0.02},
        )
        if result.x is None:
            return self.sizes.astype(int)
        return np.rint(result.x[:n]).astype(int)


def families(graph: ChannelGraph) -> list[list[int]]:
    """Groups bound to each other by balance, as lists of group numbers."""
    parent = list(range(len(graph.groups)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for balance in graph.grouping.balances:
        involved = np.flatnonzero(balance.matrix.any(axis=0))
        for g in involved[1:]:
            parent[root(int(g))] = root(int(involved[0]))
    found: dict[int, list[int]] = {}
    for g, group in enumerate(graph.groups):
        if group.tied:
            found.setdefault(root(g), []).append(g)
    return list(found.values())


def allowed_widths(group: ChannelGroup, round_to: int, min_channels: int) -> list[int]:
    """Widths that a group may have, from the widest: its own, and the multiples of ``round_to`` below it.

    Rounding counts what a layer really has: a group whose channel takes several places (grouped convolution) is rounded
    by the places it takes.
    """
    entries = max((n for name, axis, n in group.members if (name, axis) in group.makers), default=1)
    step = round_to // int(np.gcd(round_to, entries))
    low = max(min_channels, 1)
    widths = [n for n in range(group.size - group.size % step, 0, -step) if low <= n < group.size]
    return [group.size, *widths]


class _Removals:
    """All removals in one order: the first ``n`` of them leave a width to every group.

    A unit is a group, or groups bound to each other. It starts in state 0, at full width, and each removal puts one
    unit into its next state.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        sizes: np.ndarray,
        round_to: int,
        min_channels: int,
        ranked: Sequence[np.ndarray] | None,
        max_fraction: float,
    ) -> None:
        self.sizes = sizes
        self.families = [Family(graph, members, min_channels) for members in families(graph)]
        bound = {int(g) for family in self.families for g in family.members}
        self.groups = [g for g in range(len(graph.groups)) if g not in bound]
        low = np.maximum(min_channels, np.ceil(sizes * (1 - max_fraction) - 1e-9)).astype(int)
        self.widths = [np.array(allowed_widths(graph.groups[g], round_to, int(low[g]))) for g in self.groups]
        keys = []
        for g, widths in zip(self.groups, self.widths, strict=True):
            if ranked is None:
                keys.append(-widths[:-1] / sizes[g])
            else:
                keys.append(ranked[g][sizes[g] - widths[1:] - 1])
        steps = np.arange(1, min(LEVELS - 1, int(LEVELS * max_fraction)) + 1)
        for family in self.families:
            if ranked is None:
                keys.append(-(LEVELS - steps + 1) / LEVELS)
            else:
                pool = np.sort(np.concatenate([ranked[g] for g in family.members]))
                keys.append(pool[np.maximum(len(pool) * steps // LEVELS, 1) - 1])
        units = np.repeat(np.arange(len(keys)), [len(k) for k in keys])
        states = np.concatenate([np.arange(1, len(k) + 1) for k in keys])
        order = np.lexsort((states, units, np.concatenate(keys)))
        self.units, self.states = units[order], states[order]

    def __len__(self) -> int:
        return len(self.units)

    def kept(self, count: int) -> np.ndarray:
        """Channels that each group keeps after the first ``count`` removals."""
        reached = np.zeros(len(self.groups) + len(self.families), dtype=np.int64)
        np.maximum.at(reached, self.units[:count], self.states[:count])
        kept = self.sizes.copy()
        for g, widths, state in zip(self.groups, self.widths, reached, strict=False):
            kept[g] = widths[state]
        for family, state in zip(self.families, reached[len(self.groups) :], strict=True):
            kept[family.members] = family.state(LEVELS - int(state))
        return kept


def search(
    graph: ChannelGraph,
    budget: Budget,
    costs: CostModel,
    round_to: int,
    min_channels: int,
    ranked: Sequence[np.ndarray] | None,
    max_fraction: float = 1.0,
) -> np.ndarray:
    """Find how many channels of each group stay.

    Removals are put in one order and the shortest prefix that meets the budget is taken (bisection).

    Args:
        graph: The traced model.
        budget: What to meet.
        costs: Its cost model.
        round_to: Widths are multiples of this.
        min_channels: No group gets narrower.
        ranked: Each group's channel scores in ascending order: removals go by score over all groups. None: every group
            loses the same fraction.
        max_fraction: At most this fraction of a group leaves.

    Returns:
        Channels kept, for each group.

    Raises:
        BudgetError: Even the narrowest network costs more.
    """
    removals = _Removals(graph, costs.sizes, round_to, min_channels, ranked, max_fraction)
    full = costs.cost(budget.what, costs.sizes)
    limit = budget.fraction * full
    low, high = 0, len(removals)
    while low < high:
        middle = (low + high) // 2
        if costs.cost(budget.what, removals.kept(middle)) <= limit:
            high = middle
        else:
            low = middle + 1
    found = removals.kept(low)
    if costs.cost(budget.what, found) > limit:
        raise BudgetError(
            f"Budget({budget.what}={budget.fraction}) cannot be met: with every group at its narrowest "
            f"{costs.cost(budget.what, found) / max(full, 1):.4f} of the {budget.what} stay. Raise the budget, or "
            "lower min_channels, round_to or what else holds widths (max_layer_fraction)."
        )
    return found

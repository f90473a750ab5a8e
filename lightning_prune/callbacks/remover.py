"""Removing channels inside a fit: when, in what, and what goes along; subclasses say by which scores."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.callbacks.company import (
    compare_ranks,
    decided_once,
    require_whole_network,
    rewinding_point,
    together,
)
from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.examples import early_inputs, find_module, inputs_of
from lightning_prune.callbacks.kinds import KINDS, Kind
from lightning_prune.callbacks.plans import forget_plans, keep_plans, write_plans
from lightning_prune.callbacks.pruner import RoundPruner
from lightning_prune.callbacks.removal import check_copies, check_optimizers_of, remove
from lightning_prune.callbacks.rounds import RoundSchedule
from lightning_prune.callbacks.validation import validate_quietly
from lightning_prune.channels.alignment import AUTO, RoundTo
from lightning_prune.channels.budget import Budget
from lightning_prune.channels.compact import verify
from lightning_prune.channels.passes import budgets_of_passes, rest_of
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.planning import plan_removal
from lightning_prune.channels.surgery import check_optimizers
from lightning_prune.channels.trace import ChannelGraph, trace_channels
from lightning_prune.compact_files import save_compact
from lightning_prune.errors import ConfigError, NoEffectWarning
from lightning_prune.prunable import matching
from lightning_prune.resume import undisturbed
from lightning_prune.scores import score_quantiles
from lightning_prune.times import TrainTime
from lightning_prune.wrappers import bare, uncompiled

_WHOLE_LATENCY = 10**6  # the original's latency is counted in millionths of itself: clocks drift from cut to cut
COMPACT_NAME = "compact.safetensors"


class ChannelRemover(RoundPruner):
    """A callback that removes channels, or blocks, at chosen moments of a fit: base of every pruner of channels.

    A subclass says what is worth keeping: :meth:`score`; it may also say which groups stay (:meth:`hold`) and how
    widths follow from scores (:meth:`plan`).

    Args:
        budget: What is kept of the original network; one for all passes, or a list.
        at: When; one time, or a list.
        round_to: Widths become multiples of this. Default: 1; ``"auto"`` with a latency budget.
        min_channels: Least width of a group.
        exclude: Layers whose channels stay.
        module: Name of the submodule to prune.
        example_inputs: For the trace.
        approximate: Let channels that LayerNorm averages over leave too.
        round_length: ``T`` where it should differ from the Trainer's.
        monitor: Metric shown and recorded per round.
        mode: ``"max"`` or ``"min"``.
        dirpath: Folder of the record.
        validate_cuts: Validate right after each cut too, before training goes on.
        verbose: Print one line after each round.
    """

    granularity = "channel"

    def __init__(
        self,
        budget: Budget | Sequence[Budget],
        at: str | Sequence[str],
        round_to: RoundTo | None = None,
        min_channels: int = 1,
        exclude: Sequence[str] = (),
        module: str | None = None,
        example_inputs: Any = None,
        approximate: bool = False,
        round_length: str | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        dirpath: str | Path | None = None,
        validate_cuts: bool = False,
        verbose: bool = True,
    ) -> None:
        self.at = [TrainTime.parse(time, "at") for time in ([at] if isinstance(at, str | TrainTime) else at)]
        if not self.at:
            raise ConfigError("at=[]: give the moment of at least one cut, such as '50%'.")
        super().__init__(len(self.at), round_length, monitor, mode, dirpath, verbose)
        self.budgets = budgets_of_passes(budget, len(self.at))
        if isinstance(exclude, str):
            raise ConfigError(f"exclude={exclude!r}: expected a list of names; write exclude=[{exclude!r}].")
        check_count("min_channels", min_channels)
        if round_to is None:
            round_to = AUTO if self.budgets[-1].what == "latency" else 1
        if isinstance(round_to, int):
            check_count("round_to", round_to)
        self.round_to, self.min_channels, self.exclude = round_to, min_channels, tuple(exclude)
        self.module, self.example_inputs, self.approximate = module, example_inputs, approximate
        self.validate_cuts = validate_cuts
        self.reset()

    def reset(self) -> None:
        """Forget what an earlier fit has left."""
        self._name = ""  # of the module that is cut
        self._inputs: Any = None
        self._waits = False  # a cut is due, and only the next batch will tell what the network takes
        self._costs: dict[str, tuple[int, int]] | None = None  # (now, of the original)
        self._groups: dict[str, tuple[int, int]] = {}  # (now, of the original), by name
        self._digest = ""
        self._frozen: list[dict[str, Any]] = []
        self._last_scores: dict[str, Tensor] = {}  # by group

    # -------------------------------------------------------- what subclasses say

    @abstractmethod
    def score(self, trainer: pl.Trainer, pl_module: pl.LightningModule, graph: ChannelGraph) -> dict[str, Tensor]:
        """Score every group at a cut; called on every process, and may reduce over them.

        Returns:
            ``{group name: (size,) tensor}``, higher = kept.
        """

    def hold(self, graph: ChannelGraph) -> None:
        """Keep groups whole that this method cannot judge, in place; after every trace."""

    def plan(self, graph: ChannelGraph, scores: dict[str, Tensor], budget: Budget) -> RemovalPlan:
        """Choose what leaves; called on one process.

        Args:
            graph: The network as it is now.
            scores: What :meth:`score` gave.
            budget: Fraction of what the network is *now* that is kept.
        """
        return plan_removal(graph, budget, scores, self.round_to, self.min_channels)

    def check_budget(self, graph: ChannelGraph, budget: Budget) -> None:
        """See, before anything is trained, that the last budget can be met.

        Raises:
            BudgetError: It cannot.
        """
        plan_removal(graph, budget, None, self.round_to, self.min_channels)

    # ------------------------------------------------------------------- set up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let checkpoints hold plans, and loading one carry them out, in every stage."""
        super().setup(trainer, pl_module, stage)
        keep_plans(pl_module)

    def make_schedule(self, trainer: pl.Trainer) -> RoundSchedule:
        """Rounds end where cuts are asked for."""
        self.reset()
        require_whole_network(trainer, "so channels cannot leave during a fit")
        return RoundSchedule(self.rounds, self.round_length, rewinding_point(trainer), self.at)

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Trace the network before anything is trained, so that what cannot work is refused now."""
        check_optimizers_of(trainer)
        self._name = find_module(pl_module, self.module)
        self._inputs = early_inputs(self.example_inputs, trainer, pl_module, self._target(pl_module))
        if self._inputs is not None:
            self._survey(trainer, pl_module)

    @property
    def _kind(self) -> Kind:
        return KINDS[self.granularity]

    def _rest(self, budget: Budget) -> Budget:
        """A budget of the original network as one of what is left."""
        assert self._costs is not None
        return rest_of(budget, self._costs[self._kind.unit if budget.what == "channels" else budget.what])

    def _target(self, pl_module: pl.LightningModule) -> nn.Module:
        return bare(pl_module.get_submodule(self._name))

    def _inputs_of(self, batch: Any, pl_module: pl.LightningModule) -> Any:
        return inputs_of(batch, self._target(pl_module))

    def _survey(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that every budget can be met, and what the original costs."""

        def look() -> ChannelGraph:
            graph = self.trace(trainer, pl_module)
            check_copies(pl_module, graph)
            if not self._kind.sizes(graph) and self._running.round == 0:
                raise ConfigError(self._kind.nothing(graph))
            if self._costs is None:
                self._costs = {what: (cost, cost) for what, cost in self._kind.costs(graph).items()}
                if self.budgets[-1].what == "latency":
                    self._costs["latency"] = (_WHOLE_LATENCY, _WHOLE_LATENCY)
                self._groups = {name: (size, size) for name, size in self._kind.sizes(graph).items()}
                self._frozen = self._kind.frozen(graph)
            # whether a latency can be met is measured at the cut: it takes many forward passes
            if self._running.round < self.rounds and self.budgets[-1].what != "latency":
                self.check_budget(graph, self._rest(self.budgets[-1]))
            return graph

        together(look)

    def trace(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> ChannelGraph:
        """Trace the network as it is now, with what must stay whole."""
        with undisturbed(trainer.strategy.root_device):
            graph = trace_channels(self._target(pl_module), self._inputs, approximate=self.approximate)
        names = [name for name, _ in graph.model.named_parameters()]
        prefix = f"{self._name}."
        for pattern in self.exclude:
            chosen = set(matching(pattern.removeprefix(prefix), names, "exclude"))
            self._kind.hold(graph, chosen, f"excluded by {pattern!r}")
        self.hold(graph)
        return graph

    # ---------------------------------------------------------------- in rounds

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut, if one is due."""
        if self._inputs is not None:
            super().on_train_epoch_start(trainer, pl_module)
        else:
            self._running.on_train_epoch_start(trainer)
            self._waits = self._running.is_over(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Cut, if one is due between two steps of an epoch."""
        if self._inputs is None:
            self._inputs = self._inputs_of(batch, pl_module)
            self._survey(trainer, pl_module)
        if self._waits and self._running.rewound is not None and self._running.rewound.batch:
            raise ConfigError(
                "a round begins inside an epoch, and this data set gives no example before its first batch: give "
                "example_inputs, or set self.example_input_array on the LightningModule."
            )
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._waits or self._running.is_due(trainer):
            self._waits = False
            self._next_round(trainer, pl_module)

    def decide(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> RemovalPlan:
        """Trace, score, plan and check: the plan is made once and is the same on every process."""
        device = trainer.strategy.root_device

        def look() -> tuple[ChannelGraph, dict[str, Tensor]]:
            graph = self.trace(trainer, pl_module)
            return graph, self.score(trainer, pl_module, graph)

        def choose() -> dict[str, Any]:
            plan = self.plan(graph, scores, self._rest(self.budgets[self._running.round]))
            check_optimizers(plan, graph.model, trainer.optimizers)
            if plan.removes:
                with uncompiled(graph.model):
                    verify(graph.model, plan, self._inputs)
            return plan.to_json()

        with undisturbed(device):
            graph, scores = together(look)
            self._last_scores = scores
            plan = RemovalPlan.from_json(decided_once(choose))
        compare_ranks(plan.digest(), "removal plans")
        return plan

    def quantiles(self) -> dict[str, tuple[float, ...]]:
        """Of each group's channels."""
        return {name: score_quantiles(scores) for name, scores in self._last_scores.items()}

    def cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, decision: RemovalPlan) -> PruneEvent:
        """Shrink the network, its optimizers, copies and wrappers."""
        assert self._costs is not None
        if not decision.removes:
            rank_zero_warn(
                f"the cut before round {self._running.round} removes nothing: the network costs no more than its "
                f"budget, {self.budgets[self._running.round - 1]}.",
                category=NoEffectWarning,
            )
        leftover = remove(trainer, pl_module, self._name, decision)
        removed = self._costs[self._kind.unit][0] - decision.costs[self._kind.unit][1]
        costs = {w: (decision.costs[w][1], whole) for w, (_, whole) in self._costs.items() if w != "latency"}
        if "latency" in decision.costs:
            (before, after), (now, whole) = decision.costs["latency"], self._costs["latency"]
            costs["latency"] = (round(now * after / before), whole)
        self._costs = costs
        for group in decision.groups:
            self._groups[group["name"]] = (group["kept"], self._groups.get(group["name"], (0, group["size"]))[1])
        self._digest = hashlib.sha256(f"{self._digest}{decision.digest()}".encode()).hexdigest()
        return PruneEvent(
            self._running.round,
            trainer.global_step,
            None,
            removed,
            self._running.rewound,
            decision,
            self._name,
            dict(self._costs),
            staying=leftover.staying,
            renamed=leftover.renamed,
        )

    def measure_start(self, trainer: pl.Trainer) -> dict[str, float]:
        """Validation metrics of the compact network before it is trained, if asked for."""
        return validate_quietly(trainer) if self.validate_cuts else {}

    def counts(self) -> dict[str, Any]:
        """Channels or blocks, parameters and MACs kept."""
        costs = self._costs or dict.fromkeys((self._kind.unit, "params", "macs"), (0, 0))
        kept, total = costs[self._kind.unit]
        return {
            "kept": kept,
            "total": total,
            "digest": self._digest,
            "per_layer": dict(self._groups),
            "unit": self._kind.unit,
            "costs": dict(costs),
        }

    def frozen(self) -> list[dict[str, Any]]:
        """Channels of the original network that may not leave."""
        return self._frozen

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the compact network."""
        super().on_fit_end(trainer, pl_module)
        if self.folder is not None and trainer.is_global_zero and self._digest:
            save_compact(self._target(pl_module), self.folder / COMPACT_NAME)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the module its own checkpoint hooks back."""
        super().teardown(trainer, pl_module, stage)
        forget_plans(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave trainer and module as they were, but for what was cut."""
        super().on_exception(trainer, pl_module, exception)
        forget_plans(pl_module)

    # -------------------------------------------------------------------- state

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the plans into the checkpoint, also after the fit."""
        write_plans(checkpoint, pl_module)

    def hyper_parameters(self) -> dict[str, Any]:
        """What the user gave."""
        return {
            "budgets": [{budget.what: budget.fraction} for budget in self.budgets],
            "at": [str(time) for time in self.at],
            "round_to": self.round_to if isinstance(self.round_to, int | str) else str(self.round_to),
            "min_channels": self.min_channels,
            "exclude": list(self.exclude),
            "module": self.module,
            "approximate": self.approximate,
            "validate_cuts": self.validate_cuts,
            "round_length": None if self.round_length is None else str(self.round_length),
        }

    def own_state(self) -> dict[str, Any]:
        """Costs and group sizes so far; the plans are kept with the weights."""
        return {
            "costs": None if self._costs is None else {what: list(pair) for what, pair in self._costs.items()},
            "groups": {name: list(pair) for name, pair in self._groups.items()},
            "digest": self._digest,
            "frozen": [dict(axis) for axis in self._frozen],
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take up :meth:`own_state`."""
        costs = state["costs"]
        self._costs = None if costs is None else {what: (now, whole) for what, (now, whole) in costs.items()}
        self._groups = {name: (now, whole) for name, (now, whole) in state["groups"].items()}
        self._digest = state["digest"]
        self._frozen = [dict(axis) for axis in state.get("frozen", [])]


def check_count(name: str, value: Any) -> None:
    """See that an argument is a count.

    Raises:
        ConfigError: It is no integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}: expected an integer of at least 1.")

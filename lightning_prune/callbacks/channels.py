"""Removing channels inside a fit: cuts at chosen moments, in the network and the optimizer that train."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks.company import compare_ranks, decided_once, rewinding_point, together
from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.examples import early_inputs, find_module, inputs_of
from lightning_prune.callbacks.plans import forget_plans, keep_plans, write_plans
from lightning_prune.callbacks.pruner import RoundPruner
from lightning_prune.callbacks.removal import check_copies, check_optimizers_of, check_strategy, remove
from lightning_prune.callbacks.rounds import RoundSchedule
from lightning_prune.channels.alignment import RoundTo
from lightning_prune.channels.budget import Budget, CostModel, budgets_of_passes, rest_of
from lightning_prune.channels.compact import verify
from lightning_prune.channels.criteria import (
    COMPARABLE,
    Criterion,
    TaylorAverage,
    check_criterion,
    relative,
    weight_scores,
    without_scale,
)
from lightning_prune.channels.groups import ChannelGroup
from lightning_prune.channels.plan import RemovalPlan, plan_removal
from lightning_prune.channels.scores import Reduction, fetch, score_random
from lightning_prune.channels.surgery import check_optimizers
from lightning_prune.channels.trace import ChannelGraph, trace_channels
from lightning_prune.compact_files import save_compact
from lightning_prune.errors import ConfigError, NoEffectWarning
from lightning_prune.prunable import matching
from lightning_prune.resume import undisturbed
from lightning_prune.times import TrainTime
from lightning_prune.wrappers import bare, uncompiled

COSTS = ("channels", "params", "macs")


class ChannelPruner(RoundPruner):
    """Remove channels for real while training: ``at`` one moment or several, down to a budget, in one ``fit``.

    A cut traces the network, scores its channel groups, plans, checks that the compact network computes what its masked
    parent does (:func:`compact`), and shrinks the very parameters that train: the optimizer goes on with its state
    sliced, averaged copies shrink along, DDP's wrapper and compiled code are built anew. The schedule goes on; with
    :class:`LRRewind` beside it every cut is followed by a training from its rewinding point to the end, and with
    :class:`WeightRewind` the surviving channels get their early weights back.

    ``T`` is the Trainer's ``max_epochs``/``max_steps`` and ``at`` lies within it. Without a rewinder the fit has length
    ``T``. With rewinding point ``k`` it has ``at[0] + (at[1] - k) + ... + (T - k)``: for cuts at ``"100%"`` that is
    ``T + passes * (T - k)``.

    Acts in: ``on_train_epoch_start``, or ``on_train_batch_start`` where a cut falls inside an epoch, so validation,
    checkpoints and the record see the trained network before the cut; ``on_before_optimizer_step`` for ``"taylor"``.
    Changes in place: parameters, buffers, module attributes, gradients, optimizer state. ModelCheckpoint keeps its best
    per round; EarlyStopping brings the next cut forward instead of ending the fit.

    Checkpoints hold the plans and are loaded by ``fit``, ``validate``, ``test`` and ``predict`` into a fresh module of
    the original width with this callback among the trainer's, or without a Trainer by :func:`load_compact_checkpoint`.
    At the end ``compact.safetensors`` in the run folder holds the network; :func:`load_compact` reads it.

    Args:
        criterion: Which channels are worth most. ``"l1"``, ``"l2"``: norm of the filter. ``"taylor"``: first-order
            effect on the loss, see :class:`TaylorAverage`. ``"bn_scale"``: absolute BatchNorm scale; groups without one
            stay whole. ``"fpgm"``: distance from the layer's other filters. ``"random"``: the control. Or a function of
            a :class:`ChannelGroup` and the traced module that gives one score a channel, higher = kept.
        budget: What is kept of the original network, whatever the number of passes. With several passes they go down to
            it geometrically (pass ``i`` of ``n`` keeps ``budget ** (i / n)``), or give a list, one a pass.
        at: When: ``"2ep"``, ``"500st"``, ``"50%"`` of T, or a list of times, one a pass.
        scope: ``"layer"``: every group keeps the same fraction. ``"global"``: scores of all groups compete; those of
            ``"l1"``, ``"l2"`` and ``"fpgm"`` as multiples of their group's mean.
        reduction: How scores of several layers that make one channel (a residual stage) are combined: ``"mean"`` or
            ``"max"``.
        round_to: Widths become multiples of this; ``"auto"``: what suits the device; see :func:`plan_removal`.
        min_channels: Least width of a group, at least 1.
        exclude: Layers whose channels stay, by name or pattern (``"network.stem"``, ``"*.downsample"``).
        module: Name of the submodule to prune. Default: the LightningModule if it defines ``forward``, else its only
            child with parameters.
        example_inputs: For the trace: a tuple of arguments, a dict of keyword arguments, or the one argument of
            ``forward``. Default: ``example_input_array``, else two samples of the training data.
        approximate: Let channels that LayerNorm averages over leave too; see :func:`trace_channels`.
        taylor_steps: Over how many optimizer steps before a cut ``"taylor"`` averages. Where the cut's step is not
            known beforehand (EarlyStopping, data without a length) it is the epoch that ends with the cut.
        round_length: ``T`` where it should differ from the Trainer's.
        monitor: Validation metric shown and recorded per round. Default: what ModelCheckpoint or EarlyStopping watches.
        mode: ``"max"`` or ``"min"``, for ``monitor``.
        dirpath: Folder of ``record.json``, ``rounds.csv`` and ``compact.safetensors``. Default: the run folder; without
            a logger none.
        seed: Seeds ``"random"``.
        verbose: Print one line after each round.

    State saved: plans, position, record, generators, data position, running Taylor sums.

    Raises:
        ConfigError: An argument out of range; in ``setup`` and ``on_fit_start``: callbacks, a strategy, an optimizer or
            times that cannot work; nothing that can leave.
        TraceError: The network cannot be run with the example inputs.
        BudgetError: The budget cannot be met.
        EqualityError: The compact network would not compute the same; nothing was changed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_prune import Budget, ChannelPruner
        >>> prune = ChannelPruner("l2", Budget(macs=0.5), at="50%")
        >>> trainer = Trainer(max_epochs=30, callbacks=[prune], logger=False, enable_checkpointing=False)

    Limits:
        One device or DDP. LBFGS and optimizers that shard their state are refused. Copies of the network that the
        module keeps itself do not shrink (a warning names them).
    """

    def __init__(
        self,
        criterion: Criterion,
        budget: Budget | Sequence[Budget],
        at: str | Sequence[str],
        scope: str = "layer",
        reduction: Reduction = "mean",
        round_to: RoundTo = 1,
        min_channels: int = 1,
        exclude: Sequence[str] = (),
        module: str | None = None,
        example_inputs: Any = None,
        approximate: bool = False,
        taylor_steps: int = 100,
        round_length: str | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        dirpath: str | Path | None = None,
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        check_criterion(criterion, reduction)
        self.at = [TrainTime.parse(time, "at") for time in ([at] if isinstance(at, str | TrainTime) else at)]
        if not self.at:
            raise ConfigError("at=[]: give the moment of at least one cut, such as '50%'.")
        super().__init__(len(self.at), round_length, monitor, mode, dirpath, verbose)
        self.budgets = budgets_of_passes(budget, len(self.at))
        if scope not in ("layer", "global"):
            raise ConfigError(f"scope={scope!r} is unknown; choose 'layer' or 'global'.")
        if isinstance(exclude, str):
            raise ConfigError(f"exclude={exclude!r}: expected a list of names; write exclude=[{exclude!r}].")
        whole = [("min_channels", min_channels), ("taylor_steps", taylor_steps)]
        for name, value in [*whole, *([("round_to", round_to)] if isinstance(round_to, int) else [])]:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: expected an integer of at least 1.")
        self.criterion, self.scope, self.reduction = criterion, scope, reduction
        self.round_to, self.min_channels, self.exclude = round_to, min_channels, tuple(exclude)
        self.module, self.example_inputs, self.approximate = module, example_inputs, approximate
        self.taylor_steps, self.seed = taylor_steps, seed
        self._reset()

    def _reset(self) -> None:
        self._name = ""  # of the module that is cut
        self._inputs: Any = None
        self._waits = False  # a cut is due, and only the next batch will tell what the network takes
        self._costs: dict[str, tuple[int, int]] | None = None  # (now, of the original)
        self._groups: dict[str, tuple[int, int]] = {}  # (now, of the original), by name
        self._digest = ""
        self._taylor: TaylorAverage | None = None
        self._taylor_state: dict[str, Any] | None = None

    # ------------------------------------------------- what other criteria override

    def score(self, trainer: pl.Trainer, pl_module: pl.LightningModule, graph: ChannelGraph) -> dict[str, Tensor]:
        """Score every group at a cut; called on every process, and may reduce over them.

        Returns:
            ``{group name: (size,) tensor}``, higher = kept.
        """
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(self.seed * 1000 + self._running.round + 1)
            return {group.name: score_random(group, generator) for group in graph.groups}
        if self.criterion == "taylor":
            return self._average(graph).scores()
        scores = weight_scores(self.criterion, graph, self.reduction)
        named = isinstance(self.criterion, str) and self.criterion not in COMPARABLE
        return relative(scores) if named and self.scope == "global" else scores

    def plan(self, graph: ChannelGraph, scores: dict[str, Tensor], budget: Budget) -> RemovalPlan:
        """Choose what leaves; called on one process.

        Args:
            graph: The network as it is now.
            scores: What :meth:`score` gave.
            budget: Fraction of what the network is *now* that is kept.
        """
        return plan_removal(graph, budget, scores, self.round_to, self.min_channels, self.scope)

    # ------------------------------------------------------------------- set up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let checkpoints hold plans, and loading one carry them out, in every stage."""
        super().setup(trainer, pl_module, stage)
        keep_plans(pl_module)

    def make_schedule(self, trainer: pl.Trainer) -> RoundSchedule:
        """Rounds end where cuts are asked for."""
        self._reset()
        check_strategy(trainer)
        return RoundSchedule(self.rounds, self.round_length, rewinding_point(trainer), self.at)

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Trace the network before anything is trained, so that what cannot work is refused now."""
        check_optimizers_of(trainer)
        self._name = find_module(pl_module, self.module)
        self._inputs = early_inputs(self.example_inputs, trainer, pl_module, self._target(pl_module))
        if self._inputs is not None:
            self._survey(trainer, pl_module)

    def _target(self, pl_module: pl.LightningModule) -> nn.Module:
        return bare(pl_module.get_submodule(self._name))

    def _inputs_of(self, batch: Any, pl_module: pl.LightningModule) -> Any:
        return inputs_of(batch, self._target(pl_module))

    def _survey(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that every budget can be met, and what the original costs."""

        def look() -> ChannelGraph:
            graph = self.trace(trainer, pl_module)
            check_copies(pl_module, graph)
            if not graph.groups:
                raise ConfigError(
                    f"no channel of {type(graph.model).__name__} can leave. trace_channels(...).explain() says why."
                )
            if self._costs is None:
                costs = CostModel(graph)
                whole = {what: costs.cost(what, costs.sizes) for what in COSTS}
                self._costs = {what: (cost, cost) for what, cost in whole.items()}
                self._groups = {group.name: (group.size, group.size) for group in graph.groups}
            if self._running.round < self.rounds:
                last = rest_of(self.budgets[-1], self._costs[self.budgets[-1].what])
                plan_removal(graph, last, None, self.round_to, self.min_channels)
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
            made_there = [g for g in graph.groups if any(n in chosen for n, _ in _shaping(g, graph.model))]
            graph.keep_whole(made_there, f"excluded by {pattern!r}")
        if self.criterion == "bn_scale":
            graph.keep_whole(without_scale(graph), "no BatchNorm scale judges it")
        return graph

    # ---------------------------------------------------------------- in rounds

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut, if one is due."""
        if self._inputs is not None:
            super().on_train_epoch_start(trainer, pl_module)
        else:
            self._running.on_train_epoch_start(trainer)
            self._waits = self._running.is_over(trainer)
        left = self._running.steps_left(trainer)
        if left is None or left > self.taylor_steps:
            self._taylor = self._taylor_state = None

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

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the step's gradients, for ``"taylor"``."""
        if self.criterion != "taylor" or self._running.round == self.rounds or not self._near_cut(trainer):
            return
        average = self._taylor or self._average(self.trace(trainer, pl_module))
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        average.add(parameters, scaler.get_scale() if scaled else 1.0)

    def _average(self, graph: ChannelGraph) -> TaylorAverage:
        if self._taylor is None:
            self._taylor = TaylorAverage(graph.model, graph.groups, self.reduction)
            if self._taylor_state is not None:
                self._taylor.load_state_dict(self._taylor_state)
                self._taylor_state = None
        return self._taylor

    def _near_cut(self, trainer: pl.Trainer) -> bool:
        left = self._running.steps_left(trainer)
        stoppers = any(isinstance(c, EarlyStopping) for c in trainer.callbacks)  # type: ignore[attr-defined]
        return left is None or stoppers or left <= self.taylor_steps

    def decide(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> RemovalPlan:
        """Trace, score, plan and check: the plan is made once and is the same on every process."""
        device = trainer.strategy.root_device

        def look() -> tuple[ChannelGraph, dict[str, Tensor]]:
            graph = self.trace(trainer, pl_module)
            return graph, self.score(trainer, pl_module, graph)

        def choose() -> dict[str, Any]:
            assert self._costs is not None
            wanted = self.budgets[self._running.round]
            plan = self.plan(graph, scores, rest_of(wanted, self._costs[wanted.what]))
            check_optimizers(plan, graph.model, trainer.optimizers)
            if plan.keep:
                with uncompiled(graph.model):
                    verify(graph.model, plan, self._inputs)
            return plan.to_json()

        with undisturbed(device):
            graph, scores = together(look)
            plan = RemovalPlan.from_json(decided_once(choose))
        compare_ranks(plan.digest(), "removal plans")
        return plan

    def cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, decision: RemovalPlan) -> PruneEvent:
        """Shrink the network, its optimizers, copies and wrappers."""
        assert self._costs is not None
        if not decision.keep:
            rank_zero_warn(
                f"the cut before round {self._running.round} removes nothing: the network costs no more than its "
                f"budget, {self.budgets[self._running.round - 1]}.",
                category=NoEffectWarning,
            )
        remove(trainer, pl_module, self._name, decision)
        removed = self._costs["channels"][0] - decision.costs["channels"][1]
        self._costs = {what: (decision.costs[what][1], self._costs[what][1]) for what in COSTS}
        for group in decision.groups:
            self._groups[group["name"]] = (group["kept"], self._groups.get(group["name"], (0, group["size"]))[1])
        self._digest = hashlib.sha256(f"{self._digest}{decision.digest()}".encode()).hexdigest()
        self._taylor = self._taylor_state = None
        return PruneEvent(
            self._running.round,
            trainer.global_step,
            None,
            removed,
            self._running.rewound,
            decision,
            self._name,
            dict(self._costs),
        )

    def counts(self) -> dict[str, Any]:
        """Channels, parameters and MACs kept."""
        costs = self._costs or dict.fromkeys(COSTS, (0, 0))
        kept, total = costs["channels"]
        return {
            "kept": kept,
            "total": total,
            "digest": self._digest,
            "per_layer": dict(self._groups),
            "unit": "channels",
            "costs": dict(costs),
        }

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the compact network."""
        super().on_fit_end(trainer, pl_module)
        if self.folder is not None and trainer.is_global_zero and self._digest:
            save_compact(self._target(pl_module), self.folder / "compact.safetensors")

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
        named = self.criterion if isinstance(self.criterion, str) else getattr(self.criterion, "__name__", "custom")
        return {
            "criterion": named,
            "budgets": [{budget.what: budget.fraction} for budget in self.budgets],
            "at": [str(time) for time in self.at],
            "scope": self.scope,
            "reduction": self.reduction,
            "round_to": self.round_to if isinstance(self.round_to, int | str) else str(self.round_to),
            "min_channels": self.min_channels,
            "exclude": list(self.exclude),
            "module": self.module,
            "approximate": self.approximate,
            "taylor_steps": self.taylor_steps,
            "round_length": None if self.round_length is None else str(self.round_length),
            "seed": self.seed,
        }

    def own_state(self) -> dict[str, Any]:
        """Costs and group sizes so far, and running Taylor sums; the plans are kept with the weights."""
        return {
            "costs": None if self._costs is None else {what: list(pair) for what, pair in self._costs.items()},
            "groups": {name: list(pair) for name, pair in self._groups.items()},
            "digest": self._digest,
            "taylor": self._taylor_state if self._taylor is None else self._taylor.state_dict(),
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take up :meth:`own_state`."""
        costs = state["costs"]
        self._costs = None if costs is None else {what: (now, whole) for what, (now, whole) in costs.items()}
        self._groups = {name: (now, whole) for name, (now, whole) in state["groups"].items()}
        self._digest = state["digest"]
        self._taylor_state = state["taylor"]


def _shaping(group: ChannelGroup, model: nn.Module) -> list[tuple[str, int]]:
    """The (name, axis) pairs that make a group's channels or go with them one to one, not those that read them."""
    along = [(name, axis) for name, axis, _ in group.members if fetch(model, name).dim() == 1]
    return [*group.makers, *along]

"""Channels, or whole residual blocks, leave during a fit by a criterion's scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.callbacks.company import loss_scale
from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.kinds import KINDS
from lightning_prune.callbacks.remover import ChannelRemover, check_count
from lightning_prune.channels.alignment import RoundTo
from lightning_prune.channels.block_scores import (
    BlockTaylor,
    batch_norm_scales_of,
    block_scores,
    check_block_criterion,
)
from lightning_prune.channels.blocks import find_blocks
from lightning_prune.channels.budget import Budget
from lightning_prune.channels.criteria import (
    COMPARABLE,
    Criterion,
    TaylorAverage,
    check_criterion,
    relative,
    weight_scores,
    without_scale,
)
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.planning import plan_removal
from lightning_prune.channels.scores import Reduction, score_random
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.errors import ConfigError


class ChannelPruner(ChannelRemover):
    """Remove channels, or residual blocks, while training: ``at`` one moment or several, down to a budget, in one fit.

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
        criterion: Which channels are worth most; for blocks see below. ``"l1"``, ``"l2"``: norm of the filter.
            ``"taylor"``: first-order effect on the loss, see :class:`TaylorAverage`. ``"bn_scale"``: absolute BatchNorm
            scale; groups without one stay whole. ``"fpgm"``: distance from the layer's other filters. ``"random"``: the
            control. Or a function of a :class:`ChannelGroup` and the traced module that gives one score a channel,
            higher = kept.
        budget: What is kept of the original network, whatever the number of passes. With several passes they go down to
            it geometrically (pass ``i`` of ``n`` keeps ``budget ** (i / n)``), or give a list, one a pass.
        at: When: ``"2ep"``, ``"500st"``, ``"50%"`` of T, or a list of times, one a pass.
        scope: ``"layer"``: every group keeps the same fraction. ``"global"``: scores of all groups compete; those of
            ``"l1"``, ``"l2"`` and ``"fpgm"`` as multiples of their group's mean.
        reduction: How scores of several layers that make one channel (a residual stage) are combined: ``"mean"`` or
            ``"max"``.
        round_to: Widths become multiples of this; ``"auto"``: what suits the device; see :func:`plan_removal`. Default:
            1; ``"auto"`` with a latency budget.
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
        validate_cuts: Validate right after each cut too, before training goes on: the record then says what the cut
            itself cost (``start_metrics``). The module's validation runs once more a cut, unheard by other callbacks.
        seed: Seeds ``"random"``.
        verbose: Print one line after each round.
        granularity: ``"channel"``, or ``"block"``, which leaves ``scope``, ``reduction``, ``round_to``,
            ``min_channels`` and ``approximate`` without a meaning: they must be left out.

    Blocks: with ``granularity="block"`` those that :func:`find_blocks` lists leave, whose shortcut is the identity; in
    a transformer layer attention and MLP each for itself. Their modules are replaced by placeholders, their parameters
    leave the optimizers with their state, and a parameter group stays, if empty. A module's code and
    ``configure_optimizers`` must do without the parameters that left, since a resumed run builds its optimizers over
    what is left. ``Budget(channels=x)`` keeps x of these blocks. The lowest scores leave until the budget is met; it
    is missed, downwards, by less than the last block's cost. A block is scored as a whole: ``"l1"``, ``"l2"``: mean
    norm of its filters, see :func:`score_filters`. ``"taylor"``: squared first-order effect on the loss of all its
    parameters together, see :class:`BlockTaylor`. ``"bn_scale"``: mean absolute scale of its BatchNorms; blocks without
    one stay. ``"branch"``: norm of the branch over that of what it is added to, on the example inputs, which should be
    data, see :func:`score_blocks`. ``"random"``: the control. Or a function of a :class:`Block` and the traced module
    that gives a number. ``"fpgm"`` is not there.

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
        round_to: RoundTo | None = None,
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
        validate_cuts: bool = False,
        seed: int = 0,
        verbose: bool = True,
        granularity: str = "channel",
    ) -> None:
        if granularity not in KINDS:
            raise ConfigError(f"granularity={granularity!r}: expected 'channel' or 'block'.")
        if granularity == "block":
            check_block_criterion(criterion)
            given = (scope, reduction, round_to, min_channels, approximate)
            if given != ("layer", "mean", None, 1, False):
                raise ConfigError(
                    "scope, reduction, round_to, min_channels and approximate are for channels; leave them out with "
                    "granularity='block'."
                )
        else:
            check_criterion(criterion, reduction)
        if scope not in ("layer", "global"):
            raise ConfigError(f"scope={scope!r} is unknown; choose 'layer' or 'global'.")
        check_count("taylor_steps", taylor_steps)
        super().__init__(
            budget,
            at,
            round_to,
            min_channels,
            exclude,
            module,
            example_inputs,
            approximate,
            round_length,
            monitor,
            mode,
            dirpath,
            validate_cuts,
            verbose,
        )
        self.criterion, self.scope, self.reduction = criterion, scope, reduction
        self.taylor_steps, self.seed, self.granularity = taylor_steps, seed, granularity

    def reset(self) -> None:
        """Forget what an earlier fit has left."""
        super().reset()
        self._taylor: TaylorAverage | BlockTaylor | None = None
        self._taylor_state: dict[str, Any] | None = None

    def score(self, trainer: pl.Trainer, pl_module: pl.LightningModule, graph: ChannelGraph) -> dict[str, Tensor]:
        """Score every group, or block, by the criterion."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + self._running.round + 1)
        if self.criterion == "taylor":
            return self._average(graph).scores()
        if self.granularity == "block":
            return block_scores(self.criterion, graph, find_blocks(graph).removable, generator)
        if self.criterion == "random":
            return {group.name: score_random(group, generator) for group in graph.groups}
        scores = weight_scores(self.criterion, graph, self.reduction)
        named = isinstance(self.criterion, str) and self.criterion not in COMPARABLE
        return relative(scores) if named and self.scope == "global" else scores

    def hold(self, graph: ChannelGraph) -> None:
        """Keep groups, or blocks, without a BatchNorm scale whole, for ``"bn_scale"``."""
        if self.criterion != "bn_scale":
            return
        if self.granularity == "block":
            found = find_blocks(graph)
            lacking = [b for b in found.removable if not batch_norm_scales_of(graph.model, b)]
            found.keep_whole(lacking, "no BatchNorm scale judges it")
        else:
            graph.keep_whole(without_scale(graph), "no BatchNorm scale judges it")

    def plan(self, graph: ChannelGraph, scores: dict[str, Tensor], budget: Budget) -> RemovalPlan:
        """Choose what leaves: blocks, or channels, in each group alike or by all scores together."""
        return plan_removal(graph, budget, scores, self.round_to, self.min_channels, self.scope, self.granularity)

    def check_budget(self, graph: ChannelGraph, budget: Budget) -> None:
        """See, before anything is trained, that the last budget can be met.

        Raises:
            BudgetError: It cannot.
        """
        if self.granularity == "block":
            plan_removal(graph, budget, dict.fromkeys(self._kind.sizes(graph), 0.0), granularity="block")
        else:
            super().check_budget(graph, budget)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut, if one is due; where its step is not known, Taylor sums begin anew with the epoch."""
        super().on_train_epoch_start(trainer, pl_module)
        left = self._running.steps_left(trainer)
        if left is None or left > self.taylor_steps:
            self._taylor = self._taylor_state = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the step's gradients, for ``"taylor"``."""
        if self.criterion != "taylor" or self._running.round == self.rounds or not self._near_cut(trainer):
            return
        average = self._taylor or self._average(self.trace(trainer, pl_module))
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        average.add(parameters, loss_scale(trainer, optimizer))

    def _average(self, graph: ChannelGraph) -> TaylorAverage | BlockTaylor:
        if self._taylor is None:
            if self.granularity == "block":
                self._taylor = BlockTaylor(graph.model, find_blocks(graph).removable)
            else:
                self._taylor = TaylorAverage(graph.model, graph.groups, self.reduction)
            if self._taylor_state is not None:
                self._taylor.load_state_dict(self._taylor_state)
                self._taylor_state = None
        return self._taylor

    def _near_cut(self, trainer: pl.Trainer) -> bool:
        left = self._running.steps_left(trainer)
        stoppers = any(isinstance(c, EarlyStopping) for c in trainer.callbacks)  # type: ignore[attr-defined]
        return left is None or stoppers or left <= self.taylor_steps

    def cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, decision: RemovalPlan) -> PruneEvent:
        """Shrink the network; Taylor sums begin anew."""
        self._taylor = self._taylor_state = None
        return super().cut(trainer, pl_module, decision)

    def hyper_parameters(self) -> dict[str, Any]:
        """What the user gave."""
        named = self.criterion if isinstance(self.criterion, str) else getattr(self.criterion, "__name__", "custom")
        return super().hyper_parameters() | {
            "criterion": named,
            "scope": self.scope,
            "reduction": self.reduction,
            "taylor_steps": self.taylor_steps,
            "seed": self.seed,
            "granularity": self.granularity,
        }

    def own_state(self) -> dict[str, Any]:
        """Costs, group sizes and running Taylor sums."""
        running = self._taylor_state if self._taylor is None else self._taylor.state_dict()
        return super().own_state() | {"taylor": running}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take up :meth:`own_state`."""
        super().load_own_state(state)
        self._taylor_state = state["taylor"]

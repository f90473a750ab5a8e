"""Network slimming's cuts: channels with the smallest BatchNorm scales leave, by one threshold for the network."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.logs import log_numbers
from lightning_prune.callbacks.remover import ChannelRemover
from lightning_prune.callbacks.rounds import RoundSchedule
from lightning_prune.callbacks.slimming import SlimmingRegularizer
from lightning_prune.channels.budget import Budget
from lightning_prune.channels.criteria import check_criterion, without_scale
from lightning_prune.channels.gates import gated_groups
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.planning import plan_removal, plan_widths
from lightning_prune.channels.scores import Reduction, batch_norm_scales, score_batch_norm
from lightning_prune.channels.slimming import count_near_zero, scale_norm_correlation
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.counting import RULES, Competition
from lightning_prune.errors import BudgetError, ConfigError, SelectionError


class SlimmingPruner(ChannelRemover):
    """Remove the channels with the smallest BatchNorm scales, over the whole network, down to a budget.

    The cut of network slimming: absolute scales of all prunable channels compete, no layer goes below
    ``min_channels``, and none loses more than ``max_layer_fraction`` in one pass. With :class:`SlimmingRegularizer`
    beside it the fit is the whole method: sparsity training, removal, fine-tuning, in one pass or several. When, in
    place and resumed as :class:`ChannelPruner` says.

    What is counted: each channel that can leave counts once. Where several BatchNorms scale one channel (a residual
    stage), ``reduction`` of their absolute scales is its score; a sum would favour long stages. In a plain network
    (VGG) these are the paper's scales, one for one. Channels that no BatchNorm scales
    stay, unless ``SlimmingRegularizer(gates=True)`` stands beside this callback: then their gates are their scales.

    Paper: Liu et al. 2017, arXiv:1708.06519, sections 3 and 4.5. Deviations: a budget is met exactly from below and may
    be in parameters or MACs; ``counting="network_slimming"`` is the authors' threshold instead, by which ``int(p * n) +
    1`` of ``n`` channels leave, and all that tie. Layers cannot be emptied. Residual widths, which the authors leave
    whole, are pruned too unless ``exclude`` names them. The shift of a removed channel is dropped, as by the authors.

    Warns at the cut where scales have not separated: fewer lie near zero (below 1 % of the largest) than a tenth of the
    channels that leave. Logs ``prune/scales_near_zero`` (before the cut) and ``prune/scale_norm_correlation``, the mean
    over groups of the rank correlation between scale and L2 norm of the filters.

    Args:
        budget: What is kept of the original network; see :class:`ChannelPruner`. ``Budget(channels=0.3)`` is the
            paper's "70 % pruned".
        at: When: ``"2ep"``, ``"500st"``, ``"50%"`` of T, or a list of times, one a pass.
        counting: ``"exact"``, or ``"network_slimming"``: the authors' threshold at each pass, with the fraction that
            its budget is of the pass before; needs a budget in channels. Floor and cap may then keep more.
        max_layer_fraction: Largest fraction of a group that leaves in one pass, in (0, 1]; 0.5 in the paper's section
            4.5.
        min_channels: Least width of a group.
        reduction: ``"mean"`` or ``"max"`` over BatchNorms of one channel.
        options: ``round_to``, ``exclude``, ``module``, ``example_inputs``, ``approximate``, ``round_length``,
            ``monitor``, ``mode``, ``dirpath`` and ``verbose``, as for :class:`ChannelPruner`.

    State saved: as :class:`ChannelPruner`.

    Raises:
        ConfigError: An argument out of range; no group of the network passes a BatchNorm with a scale.
        BudgetError: The budget cannot be met within floor and cap.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_prune import Budget, LRRewind, SlimmingPruner, SlimmingRegularizer
        >>> prune = SlimmingPruner(Budget(channels=0.3), at="100%")
        >>> callbacks = [prune, SlimmingRegularizer(1e-4), LRRewind("0st")]
        >>> trainer = Trainer(max_epochs=160, callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        budget: Budget | Sequence[Budget],
        at: str | Sequence[str],
        counting: Literal["exact", "network_slimming"] = "exact",
        max_layer_fraction: float = 1.0,
        min_channels: int = 1,
        reduction: Reduction = "mean",
        **options: Any,
    ) -> None:
        super().__init__(budget, at, min_channels=min_channels, **options)
        check_criterion("bn_scale", reduction)
        if counting not in ("exact", "network_slimming"):
            raise ConfigError(f"counting={counting!r} is unknown; choose 'exact' or 'network_slimming'.")
        if isinstance(max_layer_fraction, bool) or not 0 < max_layer_fraction <= 1:
            raise ConfigError(f"max_layer_fraction={max_layer_fraction!r} must lie in (0, 1].")
        if counting != "exact" and (self.budgets[0].what != "channels" or self.round_to != 1):
            raise ConfigError(
                f"counting={counting!r} is a threshold over channels: give Budget(channels=...) and no round_to."
            )
        self.counting, self.max_layer_fraction, self.reduction = counting, max_layer_fraction, reduction
        self._regularizer: SlimmingRegularizer | None = None
        self.correlation: dict[str, float] = {}
        self._near_zero = (0, 0)

    def hold(self, graph: ChannelGraph) -> None:
        """Keep groups whole that neither a BatchNorm scales nor a gate."""
        if self._regularizer is None:
            graph.keep_whole(without_scale(graph), "no BatchNorm scale judges it")
            return
        gated = {group.name for group in gated_groups(graph.groups, graph.model)}
        lacking = [g for g in graph.groups if g.name not in gated and not batch_norm_scales(g, graph.model)]
        graph.keep_whole(lacking, "neither a BatchNorm scale nor a gate judges it")

    def make_schedule(self, trainer: pl.Trainer) -> RoundSchedule:
        """Look for gates beside this callback."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = [c for c in callbacks if isinstance(c, SlimmingRegularizer) and c.with_gates]
        self._regularizer = found[0] if found else None
        return super().make_schedule(trainer)

    def score(self, trainer: pl.Trainer, pl_module: pl.LightningModule, graph: ChannelGraph) -> dict[str, Tensor]:
        """Absolute BatchNorm scales, and gates; see what they look like."""
        if self._regularizer is not None:  # it may stand after this callback, and the first batch comes to both
            self._regularizer.see(trainer, self._inputs)
        gates = self._regularizer.gates if self._regularizer is not None else None
        scores = {}
        for group in graph.groups:
            if gates is not None and group.name in gates.values:
                scores[group.name] = gates.values[group.name].double().cpu()
            elif batch_norm_scales(group, graph.model):
                scores[group.name] = score_batch_norm(group, graph.model, self.reduction)
            else:  # one channel, which stays
                scores[group.name] = torch.ones(group.size, dtype=torch.float64)
        self._near_zero = count_near_zero(scores)
        self.correlation = scale_norm_correlation(scores, graph.groups, graph.model)
        return scores

    def check_budget(self, graph: ChannelGraph, budget: Budget) -> None:
        """See that the budget can be met; the authors' threshold asks for none."""
        if self.counting == "exact":
            super().check_budget(graph, budget)

    def plan(self, graph: ChannelGraph, scores: dict[str, Tensor], budget: Budget) -> RemovalPlan:
        """Take the smallest, and say so if they are not small."""
        if self.counting == "exact":
            plan = plan_removal(
                graph,
                budget,
                scores,
                self.round_to,
                self.min_channels,
                "global",
                max_layer_fraction=self.max_layer_fraction,
            )
        else:
            plan = plan_widths(graph, self._widths(scores), scores)
        self._warn_if_not_separated(plan)
        return plan

    def _widths(self, scores: dict[str, Tensor]) -> dict[str, int]:
        """Channels strictly above the authors' threshold, within floor and cap."""
        passed = self._running.round
        before = self.budgets[passed - 1].fraction if passed else 1.0
        fraction = round(1 - self.budgets[passed].fraction / before, 12)  # 1 - 0.3 is meant to be 0.7
        pool = torch.cat(list(scores.values())).sort().values
        try:
            count = RULES["network_slimming"].count(Competition(lambda: pool, len(pool), len(pool), 0), fraction)
        except SelectionError as error:
            raise BudgetError(f"{self.budgets[passed]} at pass {passed + 1}: {error}") from error
        threshold = pool[count - 1]
        widths = {}
        for name, score in scores.items():
            floor = max(self.min_channels, int(np.ceil(len(score) * (1 - self.max_layer_fraction) - 1e-9)))
            widths[name] = min(len(score), max(floor, int((score > threshold).sum())))
        return widths

    def _warn_if_not_separated(self, plan: RemovalPlan) -> None:
        leaving = sum(group["size"] - group["kept"] for group in plan.groups)
        near, count = self._near_zero
        if near * 10 < leaving:
            rank_zero_warn(
                f"the scales have not separated: {leaving} of {count} channels leave, but only {near} scales lie below "
                "1 % of the largest, so channels that matter leave. Train longer with SlimmingRegularizer, give it a "
                "greater strength or more learning rate, or keep more (budget)."
            )

    def cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, decision: RemovalPlan) -> PruneEvent:
        """Shrink the network; log what the scales looked like."""
        event = super().cut(trainer, pl_module, decision)
        near, count = self._near_zero
        numbers = {"prune/scales_near_zero": near / max(count, 1)}
        if self.correlation:
            numbers["prune/scale_norm_correlation"] = float(np.mean(list(self.correlation.values())))
        log_numbers(trainer, numbers)
        return event

    def hyper_parameters(self) -> dict[str, Any]:
        """What the user gave."""
        return super().hyper_parameters() | {
            "counting": self.counting,
            "max_layer_fraction": self.max_layer_fraction,
            "reduction": self.reduction,
        }

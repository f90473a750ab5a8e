"""HRank's cuts: channels whose feature maps have low rank leave."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_prune.callbacks.events import PruneEvent, send_scoring
from lightning_prune.callbacks.image_batches import check_images, share, training_batches
from lightning_prune.callbacks.remover import ChannelRemover, check_count
from lightning_prune.channels.budget import Budget
from lightning_prune.channels.criteria import relative
from lightning_prune.channels.feature_maps import RankSums, sum_ranks
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.planning import plan_removal, plan_widths
from lightning_prune.channels.rates import parse_rates, rank_scores, rates_of_layers, widths_by_rates
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.errors import ConfigError
from lightning_prune.files import write_json

RANKS_NAME = "ranks.json"


class HRankPruner(ChannelRemover):
    """Remove the channels whose feature maps have the lowest mean rank over training images.

    At a cut, ``images`` training images run through the network in eval mode, and the rank of every map after
    activation is taken in one pass for all layers (:func:`feature_ranks`). How much of each layer leaves is said by
    ``rates``, or follows from ``budget``. When, in place and resumed as :class:`ChannelPruner` says.

    Ranks of different layers are never compared: a rank is bounded by the size of its map. A budget takes the same
    fraction of every layer (``scope="layer"``), or lets scores compete as multiples of their layer's mean
    (``scope="global"``). Of channels with equal ranks the later leaves first.

    Where the ranks of a layer carry no order (they differ by less than 1 % of the largest possible rank, which is usual
    after SiLU, GELU and linear bottlenecks; maps of 1 or 2 pixels; no 2d convolution), a warning names it and the L2
    norm of its filters decides. A stage whose channels several convolutions make is scored by the mean of their ranks,
    each over the largest possible, and loses the mean of their rates.

    The mean ranks of every layer, and which channels of it stayed, are written to ``ranks.json`` in the run folder.

    Images: where the data set can be indexed, drawn by ``seed`` without disturbing the fit; else the first ones of the
    loader. With several processes each measures its share and the sums are added up.

    Paper: Lin et al. 2020 (HRank), arXiv:2002.10179. ``layerwise=True`` is its schedule: ranks are measured once and
    every cut takes the next layers; one cut for all is HRankPlus, with which BatchNorm goes along. Deviations: channels
    leave for real, so a residual stage loses one set; the authors mask each convolution for itself, reload the best
    checkpoint before each layer and build a new optimizer for it.

    Args:
        budget: What is kept of the original network; see :class:`ChannelPruner`. Leave it out with ``rates``.
        at: When: ``"2ep"``, ``"500st"``, ``"50%"`` of T, or a list of times, one a pass.
        images: Training images, over all processes. 640 as in the authors' code; their paper says 500.
        rates: Fraction that leaves of each 2d convolution in the order in which they run: ``"[0.95]+[0.5]*6"``, a list,
            or ``{layer or pattern: rate}`` (others 0). Not with several passes, unless ``layerwise``.
        counting: Of rates. ``"hrank"``: ``int(rate * n)`` leave; ``"hrankplus"``: ``int(n * (1 - rate))`` stay.
        layerwise: Each pass takes the next part of the groups, in the order of the network, and leaves the others
            whole; as many parts as times in ``at``. Needs ``rates``.
        scope: ``"layer"`` or ``"global"``, for a budget.
        min_channels: Least width of a group.
        seed: Of the choice of images and of their augmentation.
        options: ``round_to``, ``exclude``, ``module``, ``example_inputs``, ``approximate``, ``round_length``,
            ``monitor``, ``mode``, ``dirpath`` and ``verbose``, as for :class:`ChannelPruner`.

    State saved: as :class:`ChannelPruner`, and the ranks; with ``layerwise`` the scores.

    Raises:
        ConfigError: An argument out of range; rates that do not fit the network or would empty a layer; more images
            than there are.
        BudgetError: The budget cannot be met.
        TraceError: A network that chooses its path by values.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_prune import Budget, HRankPruner, LRRewind
        >>> prune = HRankPruner(Budget(macs=0.5), at="100%", images=640)
        >>> trainer = Trainer(max_epochs=150, callbacks=[prune, LRRewind("0st")], logger=False)
    """

    def __init__(
        self,
        budget: Budget | Sequence[Budget] | None = None,
        at: str | Sequence[str] = "100%",
        images: int = 640,
        rates: str | list[float] | dict[str, float] | None = None,
        counting: Literal["hrank", "hrankplus"] = "hrank",
        layerwise: bool = False,
        scope: Literal["layer", "global"] = "layer",
        min_channels: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if (budget is None) == (rates is None):
            raise ConfigError("HRankPruner takes either a budget or rates; got " + ("both." if rates else "neither."))
        super().__init__(Budget(channels=1.0) if budget is None else budget, at, min_channels=min_channels, **options)
        check_count("images", images)
        if counting not in ("hrank", "hrankplus"):
            raise ConfigError(f"counting={counting!r} is unknown; choose 'hrank' or 'hrankplus'.")
        if scope not in ("layer", "global"):
            raise ConfigError(f"scope={scope!r} is unknown; choose 'layer' or 'global'.")
        if layerwise and rates is None:
            raise ConfigError("layerwise=True cuts some layers at each pass, so it needs rates; a budget is for all.")
        if rates is not None and len(self.at) > 1 and not layerwise:
            raise ConfigError(
                f"rates say what leaves in one cut, at has {len(self.at)}: give one time, or layerwise=True."
            )
        if rates is not None and self.round_to != 1:
            raise ConfigError("rates say widths themselves; leave out round_to.")
        self.rates: list[float] | dict[str, float] | None = None if rates is None else parse_rates(rates)
        self.images, self.counting, self.layerwise, self.scope, self.seed = images, counting, layerwise, scope, seed

    def reset(self) -> None:
        """Forget what an earlier fit has left."""
        super().reset()
        self.weak: dict[str, str] = {}
        self._scores: dict[str, Tensor] | None = None  # of all layers, kept for later passes
        self._ranks: dict[str, Any] | None = None  # measured for the cut that comes
        self._ranks_of_cuts: list[dict[str, Any]] = []

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that the images are there; trace."""
        check_images(self.images, trainer)
        super().begin(trainer, pl_module)

    def check_budget(self, graph: ChannelGraph, budget: Budget) -> None:
        """See that the budget can be met, or that the rates fit the network."""
        if self.rates is None:
            super().check_budget(graph, budget)
            return
        widths_by_rates(graph, rates_of_layers(graph, self.rates), self.counting)
        if self.layerwise and len(self.at) > len(self._groups):
            raise ConfigError(
                f"layerwise=True with {len(self.at)} cuts, but only {len(self._groups)} groups of channels can leave; "
                "give no more times than that."
            )

    def score(self, trainer: pl.Trainer, pl_module: pl.LightningModule, graph: ChannelGraph) -> dict[str, Tensor]:
        """Measure ranks and add them up over processes; with ``layerwise`` only at the first cut."""
        if self._scores is not None:
            return {group.name: self._scores[group.name][: group.size] for group in graph.groups}
        batches = training_batches(trainer, pl_module, graph.model, self.images, self.seed)
        ranks = _over_processes(sum_ranks(graph, batches, share(self.images, trainer)), trainer)
        send_scoring(trainer, pl_module, ranks.images)
        scores, self.weak = rank_scores(graph, ranks)
        self._ranks = _content(ranks)
        if self.weak:
            rank_zero_warn(
                "feature ranks carry no order in these layers, so the L2 norm of their filters decides: "
                + "; ".join(f"{name}: {why}" for name, why in self.weak.items())
                + "."
            )
        if self.layerwise:
            self._scores = scores
        return scores

    def plan(self, graph: ChannelGraph, scores: dict[str, Tensor], budget: Budget) -> RemovalPlan:
        """Take the lowest, as many as rates or budget say."""
        if self.rates is None:
            values = relative(scores) if self.scope == "global" else scores
            return plan_removal(graph, budget, values, self.round_to, self.min_channels, self.scope)
        widths = widths_by_rates(graph, rates_of_layers(graph, self.rates), self.counting, self.min_channels)
        if self.layerwise:
            turn = np.array_split(list(self._groups), len(self.at))[self._running.round]
            widths = {name: width for name, width in widths.items() if name in turn}
        return plan_widths(graph, widths, scores)

    def cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, decision: RemovalPlan) -> PruneEvent:
        """Shrink the network; write down its ranks."""
        event = super().cut(trainer, pl_module, decision)
        if self._ranks is not None:
            self._ranks_of_cuts.append({"round": event.round, **self._ranks})
            self._ranks = None
        for name, layer in self._ranks_of_cuts[-1]["layers"].items():
            kept = decision.keep.get(f"{name}.weight", {}).get(0)
            if kept is not None:
                layer["kept"] = list(kept)
        if self.folder is not None and trainer.is_global_zero:
            content = {"format": "lightning_prune.ranks", "version": 1, "cuts": self._ranks_of_cuts}
            write_json(self.folder / RANKS_NAME, content)
        return event

    def hyper_parameters(self) -> dict[str, Any]:
        """What the user gave."""
        return super().hyper_parameters() | {
            "images": self.images,
            "rates": self.rates,
            "counting": self.counting,
            "layerwise": self.layerwise,
            "scope": self.scope,
            "seed": self.seed,
        }

    def own_state(self) -> dict[str, Any]:
        """Costs and group sizes so far, and scores that later passes need."""
        return super().own_state() | {"scores": self._scores, "ranks": copy.deepcopy(self._ranks_of_cuts)}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take up :meth:`own_state`."""
        super().load_own_state(dict(state))
        self._scores = state["scores"]
        self._ranks_of_cuts = copy.deepcopy(state.get("ranks", []))


def _content(ranks: RankSums) -> dict[str, Any]:
    """Ranks as JSON content: by convolution the channels' mean ranks and the largest possible; all kept as yet."""
    means = ranks.means()
    layers = {name: {"ranks": mean.tolist(), "limit": ranks.limits[name], "kept": None} for name, mean in means.items()}
    return {"images": ranks.images, "layers": layers}


def _over_processes(ranks: RankSums, trainer: pl.Trainer) -> RankSums:
    """Add up sums and numbers of images over processes: whole numbers, so the order does not matter."""
    if trainer.world_size == 1:
        return ranks
    names = list(ranks.sums)
    device = trainer.strategy.root_device
    joined = torch.cat([*(ranks.sums[name].to(device) for name in names), torch.tensor([ranks.images], device=device)])
    torch.distributed.all_reduce(joined)
    parts = joined[:-1].split([len(ranks.sums[name]) for name in names])
    return RankSums(dict(zip(names, parts, strict=True)), ranks.limits, int(joined[-1]))

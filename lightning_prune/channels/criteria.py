"""Criteria by name: how a channel's worth is judged, from weights alone or from what a training saw of gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.channels.groups import ChannelGroup
from lightning_prune.channels.scores import (
    Reduction,
    batch_norm_scales,
    combine,
    fetch,
    gate_effect,
    gates,
    score_batch_norm,
    score_geometric_median,
    score_norms,
)
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.errors import ConfigError, ResumeError
from lightning_prune.prunable import close_names

Criterion = str | Callable[[ChannelGroup, nn.Module], Tensor]

WEIGHT_CRITERIA: Mapping[str, Callable[..., Tensor]] = {
    "l1": partial(score_norms, p=1.0),
    "l2": partial(score_norms, p=2.0),
    "fpgm": score_geometric_median,
    "bn_scale": score_batch_norm,
}
CRITERIA = (*WEIGHT_CRITERIA, "taylor", "random")
COMPARABLE = ("taylor", "bn_scale", "random")
"""Criteria whose scores mean the same in every layer; the others grow with a layer's size and initialisation."""


def relative(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each group's scores over their mean, so that groups of different scale can compete. A group of zeros stays so."""
    return {name: score / score.mean().clamp_min(torch.finfo(score.dtype).tiny) for name, score in scores.items()}


def without_scale(graph: ChannelGraph) -> list[ChannelGroup]:
    """The groups that ``"bn_scale"`` cannot judge: no BatchNorm with a scale lies on them.

    Raises:
        ConfigError: None has one.
    """
    lacking = [group for group in graph.groups if not batch_norm_scales(group, graph.model)]
    if graph.groups and len(lacking) == len(graph.groups):
        raise ConfigError(
            f"criterion 'bn_scale': no group of this {type(graph.model).__name__} passes a BatchNorm with a scale. Use "
            "another criterion ('l2', 'taylor')."
        )
    return lacking


class TaylorAverage:
    """Averages the squared first-order effect of each channel on the loss over optimizer steps.

    Of one step: the square of the loss's derivative by a factor on the channel, ``(sum of weight * gradient)**2`` over
    the affine map where the factor acts (:func:`gates`), which equals ``(sum of activation * gradient)**2`` there.

    Paper: Molchanov et al. 2019, arXiv:1906.10771, first-order importance of gates, averaged over mini-batches.
    Deviations: with gradient accumulation or several processes the gradient is the mean over all that enters a step,
    so the square is taken of that mean; several gates on one channel are combined by ``reduction``.

    Args:
        model: The traced model.
        groups: Its groups.
        reduction: ``"mean"`` or ``"max"``.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], reduction: Reduction = "mean") -> None:
        self._model, self._reduction = model, reduction
        self._groups = {group.name: (group, gates(group, model)) for group in groups}
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._steps: dict[tuple[str, str], int] = {}

    @torch.no_grad()
    def add(self, parameters: Iterable[nn.Parameter], scale: float = 1.0) -> None:
        """Take a step's gradients. A step whose gradients are not finite, which a scaler skips, does not count.

        Args:
            parameters: What this step moves; gates that are not among them, or have no gradient, are passed over.
            scale: What the gradients were multiplied with (mixed precision).
        """
        moved = {id(p) for p in parameters if p.grad is not None}
        for group, found in self._groups.values():
            for gate in found:
                if id(fetch(self._model, gate[0][0])) not in moved:
                    continue
                effect = (gate_effect(gate, group, self._model) / scale) ** 2
                if bool(torch.isfinite(effect).all()):
                    key = (group.name, gate[0][0])
                    self._sums[key] = self._sums[key] + effect if key in self._sums else effect
                    self._steps[key] = self._steps.get(key, 0) + 1

    def scores(self) -> dict[str, Tensor]:
        """The average by group.

        Raises:
            ConfigError: A group of which no gradient was seen.
        """
        scores = {}
        for name, (_, found) in self._groups.items():
            seen = [key for gate in found if (key := (name, gate[0][0])) in self._sums]
            if not seen:
                raise ConfigError(
                    f"criterion 'taylor': no gradient of {found[0][0][0]} was seen before the cut. Frozen layers: "
                    "leave their channels out with exclude. Manual optimisation: step the optimizers of "
                    "self.optimizers(), so that on_before_optimizer_step is reached."
                )
            scores[name] = combine([self._sums[key] / self._steps[key] for key in seen], self._reduction)
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts, as lists of names, integers and tensors."""
        return {"sums": [[*key, self._steps[key], value] for key, value in self._sums.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the sums of a checkpoint.

        Raises:
            ResumeError: They are of another network.
        """
        known = {(name, gate[0][0]) for name, (_, found) in self._groups.items() for gate in found}
        saved = {(group, gate): (steps, value) for group, gate, steps, value in state["sums"]}
        if odd := sorted(saved.keys() - known):
            raise ResumeError(
                f"the checkpoint's Taylor scores name {odd[0][1]} of group {odd[0][0]}, which this network does not "
                "have. Resume with the same network."
            )
        self._sums = {key: value for key, (_, value) in saved.items()}
        self._steps = {key: steps for key, (steps, _) in saved.items()}


def check_criterion(criterion: Any, reduction: Any) -> None:
    """See that a criterion and the rule for coupled layers are known.

    Raises:
        ConfigError: They are not.
    """
    if not callable(criterion) and criterion not in CRITERIA:
        raise ConfigError(
            f"criterion={criterion!r} is unknown{close_names(str(criterion), CRITERIA)} A function of a group and the "
            "model is taken too."
        )
    if reduction not in ("mean", "max"):
        raise ConfigError(
            f"reduction={reduction!r} is unknown; choose 'mean' or 'max' over the layers that make one channel."
        )


def weight_scores(criterion: Criterion, graph: ChannelGraph, reduction: Reduction) -> dict[str, Tensor]:
    """Scores by a criterion that needs nothing but the weights, or by the user's function, for every group.

    Shape:
        Each (group.size,).
    """
    if callable(criterion):
        return {group.name: criterion(group, graph.model) for group in graph.groups}
    function = WEIGHT_CRITERIA[criterion]
    return {group.name: function(group, graph.model, reduction=reduction) for group in graph.groups}

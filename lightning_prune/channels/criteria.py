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
    score_batch_norm,
    score_geometric_median,
    score_norms,
)
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.errors import ConfigError, ResumeError

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
    """Averages the first-order effect of each channel on the loss over optimizer steps.

    Of one step, for one layer that makes the channel: ``(sum_s g_s * w_s)**2`` over the weights ``w`` of its filter
    with gradients ``g``: the squared change of the loss, to first order, when the filter leaves. Averaged over steps;
    several layers of one channel are combined by ``reduction``.

    Paper: Molchanov et al. 2019, arXiv:1906.10771, section 3.1, the joint first-order importance of a set of
    parameters, averaged over mini-batches. Deviation: with gradient accumulation or several processes the gradient is
    the mean over all that enters a step, so the square is taken of that mean.

    Args:
        model: The traced model.
        groups: Its groups.
        reduction: How several layers that make one channel are combined: ``"mean"`` or ``"max"``.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], reduction: Reduction = "mean") -> None:
        self._reduction = reduction
        self._groups = {group.name: list(group.makers) for group in groups}
        self._places = {
            (group.name, name, axis): torch.from_numpy(group.positions(name, axis))
            for group in groups
            for name, axis in group.makers
        }
        self._weights = {name: fetch(model, name) for _, name, _ in self._places}
        self._sums: dict[tuple[str, str, int], Tensor] = {}
        self._steps: dict[str, int] = dict.fromkeys(self._weights, 0)

    @torch.no_grad()
    def add(self, parameters: Iterable[nn.Parameter], scale: float = 1.0) -> None:
        """Take a step's gradients. A step whose gradients are not finite, which a scaler skips, does not count.

        Args:
            parameters: What this step moves; weights that are not among them, or have no gradient, are passed over.
            scale: What the gradients were multiplied with (mixed precision).
        """
        moved = {id(p) for p in parameters}
        effects: dict[tuple[str, int], Tensor] = {}
        for key, places in self._places.items():
            _, name, axis = key
            weight = self._weights[name]
            if weight.grad is None or id(weight) not in moved:
                continue
            if (name, axis) not in effects:
                others = [a for a in range(weight.dim()) if a != axis]
                product = weight * weight.grad
                effects[name, axis] = (product.sum(others) if others else product).double().cpu() / scale
            effect = effects[name, axis][places].sum(dim=1) ** 2
            if bool(torch.isfinite(effect).all()):
                self._sums[key] = self._sums[key] + effect if key in self._sums else effect
        for name, _ in effects:
            if all(bool(torch.isfinite(e).all()) for (other, _), e in effects.items() if other == name):
                self._steps[name] += 1

    def scores(self) -> dict[str, Tensor]:
        """The average by group.

        Raises:
            ConfigError: A group of which no gradient was seen.
        """
        found = {}
        for group, makers in self._groups.items():
            seen = [(group, *maker) for maker in makers if (group, *maker) in self._sums]
            if not seen:
                raise ConfigError(
                    f"criterion 'taylor': no gradient of {makers[0][0]} was seen before the cut. Frozen layers: "
                    "leave their channels out with exclude. Manual optimisation: step the optimizers of "
                    "self.optimizers(), so that on_before_optimizer_step is reached."
                )
            found[group] = combine([self._sums[key] / self._steps[key[1]] for key in seen], self._reduction)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts, as lists, integers and tensors."""
        return {"sums": [[*key, value] for key, value in self._sums.items()], "steps": dict(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the sums of a checkpoint.

        Raises:
            ResumeError: They are of another network.
        """
        sums = {(group, name, axis): value for group, name, axis, value in state["sums"]}
        if not sums.keys() <= self._places.keys():
            raise ResumeError(
                f"the checkpoint's Taylor scores name {sorted(sums.keys() - self._places.keys())[0]}, which this "
                "network does not have. Resume with the same network."
            )
        self._sums, self._steps = sums, dict(state["steps"])


def check_criterion(criterion: Any, reduction: Any) -> None:
    """See that a criterion and the rule for coupled layers are known.

    Raises:
        ConfigError: They are not.
    """
    from lightning_prune.prunable import close_names

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

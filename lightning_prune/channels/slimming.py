"""Network slimming without a Trainer: the penalty on channel scales, its two updates, and what the scales tell."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.channels.groups import ChannelGroup
from lightning_prune.channels.scores import batch_norm_scales, score_norms

NEAR_ZERO = 0.01
"""A scale counts as near zero below this fraction of the network's largest."""


def batch_norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable scales of every BatchNorm (1d, 2d, 3d, synchronised) by name, each parameter once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or not isinstance(module.weight, nn.Parameter):
            continue
        if module.weight.requires_grad and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[f"{name}.weight" if name else "weight"] = module.weight
    return found


def couple(groups: Sequence[ChannelGroup], model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Number the scales so that those of one channel, in however many BatchNorms, share a number.

    Args:
        groups: Groups of the traced model.
        model: The model.
        names: Of the scales; one that belongs to no group gets a number of its own.

    Returns:
        ``{name: (C,) int64}``, numbers from 0 over all names.
    """
    sizes = {name: model.get_parameter(name).numel() for name in names}
    numbers: dict[str, Tensor] = {}
    count = 0
    for name, size in sizes.items():
        numbers[name] = torch.arange(count, count + size)
        count += size
    for group in groups:
        for name, axis in batch_norm_scales(group, model):
            if name in numbers:
                positions = torch.from_numpy(group.positions(name, axis))
                numbers[name][positions] = torch.arange(count, count + group.size)[:, None]
        count += group.size
    _, dense = torch.unique(torch.cat(list(numbers.values())), return_inverse=True)
    return dict(zip(names, dense.split(list(sizes.values())), strict=True))


class Clusters:
    """Which scales belong together, and how many each cluster has: counted once.

    Args:
        numbers: A number for each scale, from 0.

    Shape:
        numbers: (scales,).
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.roots = torch.bincount(numbers).float().sqrt()

    @classmethod
    def of(cls, clusters: "Tensor | Clusters") -> "Clusters":
        """From numbers, or as it is."""
        return clusters if isinstance(clusters, Clusters) else cls(clusters)

    def norms(self, values: Tensor) -> Tensor:
        """The norm of each cluster's values."""
        return torch.zeros_like(self.roots, dtype=values.dtype).index_add_(0, self.numbers, values.square()).sqrt()


def penalty(scales: Sequence[Tensor], clusters: Tensor | Clusters | None = None) -> Tensor:
    """The penalty of network slimming: ``sum_c sqrt(n_c) * ||scales of cluster c||_2``.

    Without ``clusters`` every scale is one: the L1 norm. With them, scales that belong to one channel fall together;
    ``sqrt(n_c)`` makes the two equal where the scales of a channel are.

    Paper: Liu et al. 2017, arXiv:1708.06519, Eq. 1 (L1); the norm over several layers is the group lasso (Yuan and Lin
    2006), which the paper does not use.

    Args:
        scales: The scales.
        clusters: A number for each scale, all tensors of ``scales`` in one row, as :func:`couple` gives them.

    Shape:
        scales: each (C,). clusters: (sum of C,). Returns ().
    """
    if clusters is None:
        return torch.stack([scale.abs().sum() for scale in scales]).sum()
    groups = Clusters.of(clusters)
    return (groups.roots * groups.norms(torch.cat([scale.flatten() for scale in scales]))).sum()


def add_subgradient_(scales: Sequence[Tensor], strength: float, clusters: Tensor | Clusters | None = None) -> None:
    """Add ``strength`` times the sub-gradient of :func:`penalty` to the scales' gradients, in place; 0 where it is 0.

    Args:
        scales: Scales; with ``clusters`` each has a gradient, without them those that have none are passed over.
        strength: Factor, at least 0.
        clusters: See :func:`penalty`.
    """
    if clusters is None and scales and not scales[0].is_cuda:  # where operations on lists go one by one too
        for scale in scales:
            if (gradient := scale.grad) is not None:
                gradient.add_(scale.detach().sign(), alpha=strength)
        return
    pairs = [(scale, scale.grad) for scale in scales if scale.grad is not None]
    gradients = [gradient for _, gradient in pairs]
    values = [scale.detach() for scale, _ in pairs]  # a guard such as no_grad would take as long as all the rest
    directions: Sequence[Tensor]
    if clusters is None:
        directions = torch._foreach_sign(values)
    else:
        groups = Clusters.of(clusters)
        flat = torch.cat([value.flatten() for value in values])
        # 0 / tiny is 0: no direction where all scales of a cluster are 0
        factor = groups.roots / groups.norms(flat).clamp_min(torch.finfo(flat.dtype).tiny)
        directions = (flat * factor[groups.numbers]).split([value.numel() for value in values])
    torch._foreach_add_(gradients, list(directions), alpha=strength)


@torch.no_grad()
def soft_threshold_(
    scales: Sequence[Tensor], thresholds: Sequence[float], clusters: Tensor | Clusters | None = None
) -> None:
    """Move scales towards 0 by a threshold, and to exactly 0 where they are below it: the proximal map of the penalty.

    A cluster shrinks by ``sqrt(n_c)`` times its largest threshold in norm, in its own direction.

    Args:
        scales: The scales, changed in place.
        thresholds: One a tensor, at least 0: learning rate times strength.
        clusters: See :func:`penalty`.
    """
    if clusters is None:
        for scale, threshold in zip(scales, thresholds, strict=True):
            scale.copy_(torch.nn.functional.softshrink(scale, threshold))
        return
    sizes = [scale.numel() for scale in scales]
    flat = torch.cat([scale.flatten() for scale in scales])
    groups = Clusters.of(clusters)
    each = torch.cat([flat.new_full((n,), t) for n, t in zip(sizes, thresholds, strict=True)])
    norms = groups.norms(flat)
    step = torch.zeros_like(norms).scatter_reduce_(0, groups.numbers, each, "amax") * groups.roots
    factor = (1 - step / norms.clamp_min(torch.finfo(flat.dtype).tiny)).clamp_min(0)
    for scale, new in zip(scales, (flat * factor[groups.numbers]).split(sizes), strict=True):
        scale.copy_(new)


def count_near_zero(scores: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many scores lie below 1 % of the largest of all, and how many there are."""
    pool = torch.cat(list(scores.values()))
    return int((pool < NEAR_ZERO * pool.max()).sum()), len(pool)


def scale_norm_correlation(
    scores: Mapping[str, Tensor], groups: Sequence[ChannelGroup], model: nn.Module
) -> dict[str, float]:
    """Rank correlation, by group, of channel scores with the L2 norm of the filters that make the channel.

    Pruning surveys expect a large scale to go with a large filter. BatchNorm makes the layer before it invariant to
    its filters' scale, so it need not.

    Args:
        scores: Scores by group name.
        groups: The groups.
        model: The model.

    Returns:
        Spearman's coefficient, in [-1, 1]; groups of one channel, or with all scores or norms equal, are left out.
    """
    found = {}
    for group in groups:
        ranks = torch.stack([_ranks(scores[group.name]), _ranks(score_norms(group, model, reduction="mean"))])
        if group.size > 1 and bool((ranks.std(dim=1) > 0).all()):
            found[group.name] = float(torch.corrcoef(ranks)[0, 1])
    return found


def _ranks(values: Tensor) -> Tensor:
    """Place of each value in ascending order; equal values share the mean of theirs."""
    _, place, counts = torch.unique(values.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]

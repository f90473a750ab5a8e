"""Edge-popup: the weights of the highest scores pass, and every score learns what its weight would have done."""

from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import SelectionError
from lightning_prune.learned.counts import count_kept
from lightning_prune.learned.scratch import pieces
from lightning_prune.learned.threshold import Threshold
from lightning_prune.selection import select


class _Popup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor, kept: int, search: Threshold) -> Tensor:
        ctx.save_for_backward(scores, weight)
        ctx.scratch = search.scratch
        return _pass(scores, weight, kept, search)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, weight = ctx.saved_tensors
        given = grads[0].contiguous()
        result = torch.empty_like(given)
        for out, grad, frozen, score in pieces(result, given, weight, scores):
            signs = torch.sign(score, out=ctx.scratch.like(score, 0))
            torch.mul(grad, frozen, out=out).mul_(signs)
        return result, None, None, None


def _pass(scores: Tensor, weight: Tensor, kept: int, search: Threshold) -> Tensor:
    """``weight`` where its score is among the ``kept`` of largest magnitude, else 0."""
    bound, exact = search(scores, kept)
    if not exact:  # of equal scores the later position leaves first
        masks = select({"scores": scores.abs()}, remove=scores.numel() - kept)
        return weight * masks["scores"]
    passed = torch.empty_like(weight)
    for out, frozen, score in pieces(passed, weight, scores):
        magnitudes = torch.abs(score, out=search.scratch.like(score, 0))
        torch.mul(torch.ge(magnitudes, bound, out=magnitudes), frozen, out=out)
    return passed


def popup_weight(weight: Tensor, scores: Tensor, density: float, search: Threshold | None = None) -> Tensor:
    """The weight that a layer computes with: only the ``round(density * entries)`` of largest ``|score|`` pass.

    The gradient passes straight through the mask to every score, whether its weight passes or not:
    ``dL/dscore = sign(score) * weight * dL/d(result)``. None goes to ``weight``, which stays as it is.

    Paper: Ramanujan et al. 2020, arXiv:1911.13299, section 3. Deviations: the count is ``round(density * entries)``,
    half to even (the authors keep ``entries - int((1 - density) * entries)``), and of equal scores the later position
    leaves first; the boundary is found without sorting.

    Args:
        weight: Frozen weights, floating.
        scores: Trainable; of the weight's shape and dtype.
        density: Fraction to keep, in (0, 1].
        search: Makes repeated calls on slowly moving scores fast. The result is the same.

    Raises:
        ConfigError: ``density`` out of range.
        SelectionError: Shapes or dtypes that differ, NaN among the scores, or a density that keeps nothing.

    Example:
        >>> popup_weight(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.1, -3.0, 2.0, -0.5]), density=0.5)
        tensor([0., 2., 3., 0.])
    """
    check_alike(weight, scores)
    kept = count_kept(density, scores.numel())
    return _Popup.apply(scores.contiguous(), weight.detach().contiguous(), kept, search or Threshold())


def check_alike(weight: Tensor, scores: Tensor) -> None:
    """Refuse scores that are not one for each weight.

    Raises:
        SelectionError: Shapes or dtypes differ.
    """
    if weight.shape != scores.shape or weight.dtype != scores.dtype:
        raise SelectionError(
            f"there must be one score for each weight, of its type: weight {tuple(weight.shape)} of {weight.dtype}, "
            f"scores {tuple(scores.shape)} of {scores.dtype}."
        )

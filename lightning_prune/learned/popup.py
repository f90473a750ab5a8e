"""Edge-popup: the weights of the highest scores pass, and every score learns what its weight would have done."""

from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import SelectionError
from lightning_prune.learned import fused
from lightning_prune.learned.counts import count_kept
from lightning_prune.learned.top import TopMask


class Passing:
    """Which weights of one tensor pass: what it remembers makes calls on slowly moving scores fast."""

    def __init__(self) -> None:
        self._top = TopMask()

    def __call__(self, scores: Tensor, weight: Tensor, kept: int) -> Tensor:
        """``weight`` where its score is among the ``kept`` of largest magnitude, else 0.

        Args:
            scores: Contiguous, outside of any graph.
            weight: Outside of any graph.
            kept: From 1 to the number of scores.
        """
        found = self._top.update(scores, kept)
        if isinstance(found, Tensor):
            return torch.where(found, weight, 0)
        weight = weight.contiguous()
        result = torch.ops.aten.hardshrink_backward(weight, scores, found.below)  # in one pass
        if len(found.also):
            also = torch.from_numpy(found.also)
            result.view(-1)[also] = weight.view(-1)[also]
        return result


_with_sign = torch.ops.aten.leaky_relu_backward.default  # values, negative where the scores are not positive
_with_sign_in_place = torch.ops.aten.leaky_relu_backward.grad_input


class _Popup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor, kept: int, passing: Passing) -> Tensor:
        ctx.save_for_backward(scores, weight)
        return passing(scores, weight, kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, weight = ctx.saved_tensors
        if not torch.is_grad_enabled() and fused.usable(grads[0], weight, scores):
            out = torch.empty_like(weight)
            fused.times_sign(out, grads[0], weight, scores)
            return out, None, None, None
        out = torch.mul(grads[0], weight)
        if torch.is_grad_enabled():
            return _with_sign(out, scores, -1.0, False), None, None, None
        return _with_sign_in_place(out, scores, -1.0, False, grad_input=out), None, None, None


def popup_weight(weight: Tensor, scores: Tensor, density: float, passing: Passing | None = None) -> Tensor:
    """The weight that a layer computes with: only the ``round(density * entries)`` of largest ``|score|`` pass.

    The gradient passes straight through the mask to every score, whether its weight passes or not:
    ``dL/dscore = sign(score) * weight * dL/d(result)``. None goes to ``weight``, which stays as it is.

    Paper: Ramanujan et al. 2020, arXiv:1911.13299, section 3. Deviations: the count is ``round(density * entries)``,
    half to even (the authors keep ``entries - int((1 - density) * entries)``), and of equal scores the later position
    leaves first; a score of exactly 0 learns as a negative one does (there: not at all); the boundary is found without
    sorting.

    Args:
        weight: Frozen weights, floating.
        scores: Trainable; of the weight's shape and dtype.
        density: Fraction to keep, in (0, 1].
        passing: Makes repeated calls fast.

    Raises:
        ConfigError: ``density`` out of range.
        SelectionError: Shapes or dtypes that differ, NaN among the scores, or a density that keeps nothing.

    Example:
        >>> popup_weight(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.1, -3.0, 2.0, -0.5]), density=0.5)
        tensor([0., 2., 3., 0.])
    """
    check_alike(weight, scores)
    return pass_top(weight, scores, count_kept(density, scores.numel()), passing or Passing())


def pass_top(weight: Tensor, scores: Tensor, kept: int, passing: Passing) -> Tensor:
    """:func:`popup_weight` of arguments that were checked before, by count."""
    return _Popup.apply(scores.contiguous(), weight, kept, passing)


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

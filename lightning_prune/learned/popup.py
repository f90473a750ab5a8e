"""Edge-popup: the weights of the highest scores pass, and every score learns what its weight would have done."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_prune.errors import SelectionError
from lightning_prune.learned import fused
from lightning_prune.learned.counts import count_kept
from lightning_prune.learned.top import TopMask


class Passing:
    """Which weights of one tensor pass, and the result of the last call: makes calls on slowly moving scores fast."""

    def __init__(self) -> None:
        self._top = TopMask()
        self._result: Tensor | None = None
        self._made_of: tuple[int, ...] = ()

    def __call__(self, scores: Tensor, weight: Tensor, kept: int) -> Tensor:
        """``weight`` where its score is among the ``kept`` of largest magnitude, else 0.

        The result is the last call's tensor, changed in place where the mask has changed: like a parameter, of which a
        graph that is still needed must not be older than a step. Autograd sees the change.

        Args:
            scores: Contiguous, outside of any graph.
            weight: Outside of any graph.
            kept: From 1 to the number of scores.
        """
        if torch.is_inference_mode_enabled():  # what is made there cannot be trained with later
            with torch.inference_mode(False), torch.no_grad():
                return self(scores, weight, kept)
        found = self._top.update(scores, kept)
        if isinstance(found, Tensor):
            self._result = torch.where(found, weight.contiguous(), 0)
        elif self._result is None or self._made_of != _versions(weight, self._result):
            self._result = torch.where(self._top.mask(weight.shape), weight.contiguous(), 0)
        elif len(found[0]):
            changed, passes = found
            values = weight.contiguous().view(-1).numpy()[changed]
            self._result.view(-1).numpy()[changed] = np.where(passes, values, 0)
            increment_version(self._result)
        self._made_of = _versions(weight, self._result)
        return self._result.detach()


def _versions(weight: Tensor, result: Tensor) -> tuple[int, ...]:
    """Changes when someone else has written to either."""
    return weight.data_ptr(), weight._version, result._version


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
        return torch.mul(grads[0], weight).mul_(torch.sign(scores)), None, None, None


def popup_weight(weight: Tensor, scores: Tensor, density: float, passing: Passing | None = None) -> Tensor:
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
        passing: Makes repeated calls fast; see :meth:`Passing.__call__` on the tensor that these return.

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

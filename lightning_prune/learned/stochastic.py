"""Stochastic supermasks: each weight passes with a probability that is learned."""

import math
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

from lightning_prune.errors import ConfigError, SelectionError
from lightning_prune.learned import fused
from lightning_prune.learned.counts import check_density
from lightning_prune.learned.pieces import pieces
from lightning_prune.learned.popup import check_alike

_LEVELS = 2**16


class _Words(ISeedSequence):
    """What a generator starts from, as given."""

    def __init__(self, *words: int) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.array(self._words[:n_words], dtype)


class Levels:
    """Independent whole numbers, uniform from -32768 to 32767, as a function of four numbers.

    SFC64, seeded by three words that these make: nothing is remembered between draws, so a draw can be repeated on
    another process or after a restart, and the global generators are left alone. Sixteen bits a number cost less than a
    tenth of ``torch.bernoulli``. On a device other than the CPU a generator there is seeded by the same four numbers:
    it gives the same on every such device of one kind, and others than on a CPU.

    Args:
        seed: Of the whole, at least 0.
        draw: Number of the draw, at least 0.
        tensor: Number of the tensor that it is for, at least 0.
        purpose: Keeps draws of different kinds apart, from 0 to 7.
        device: Where the numbers are needed.
    """

    def __init__(self, seed: int, draw: int, tensor: int, purpose: int, device: torch.device) -> None:
        self._bits = np.random.SFC64(_Words(seed, draw, 8 * tensor + purpose))  # type: ignore[arg-type]
        self._generator: torch.Generator | None = None
        if device.type != "cpu":
            self._generator = torch.Generator(device).manual_seed(int(self._bits.random_raw() >> 1))

    def next(self, count: int) -> Tensor:
        """The next ``count`` numbers, int16; all but the last call ask for a multiple of 4."""
        if self._generator is None:
            return torch.from_numpy(self._bits.random_raw(-(-count // 4)).view(np.int16)[:count])
        half = _LEVELS // 2
        device = self._generator.device
        return torch.randint(-half, half, (count,), generator=self._generator, dtype=torch.int16, device=device)


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, weight: Tensor, levels: Levels, rescale: bool) -> Tensor:
        passed, kept = torch.empty_like(weight), 0
        probabilities = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for out, frozen, probability, logit in pieces(passed, weight, probabilities, logits):
            torch.sigmoid(logit, out=probability)
            kept += _pass(out, frozen, probability, levels.next(out.numel()))
        if kept == 0:
            raise SelectionError(
                f"a layer of {weight.numel()} weights sampled none of them (their mean probability is "
                f"{float(probabilities.mean()):.2g}), so nothing passes it. Choose a higher density or start, "
                "or exclude the layer."
            )
        ctx.kept, ctx.rescale = kept, rescale
        if rescale:
            passed.mul_(weight.numel() / kept)
        ctx.save_for_backward(probabilities, weight, *([passed] if rescale else []))
        return passed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, weight, *rest = ctx.saved_tensors
        given = grads[0].contiguous()
        if ctx.rescale:  # the factor entries / sum(mask) depends on every entry
            factor = weight.numel() / ctx.kept
            through_sum = torch.dot(given.view(-1), rest[0].view(-1)).div_(-ctx.kept)
        result = torch.empty_like(given)
        for out, grad, frozen, probability in pieces(result, given, weight, probabilities):
            if ctx.rescale:
                torch.addcmul(through_sum, grad, frozen, value=factor, out=out)
            else:
                torch.mul(grad, frozen, out=out)
            torch.ops.aten.sigmoid_backward.grad_input(out, probability, grad_input=out)
        return result, None, None, None


_OVER = 0.5 + 0.5 / _LEVELS


def _pass(out: Tensor, weight: Tensor, probability: Tensor, level: Tensor) -> int:
    """Write ``weight`` where a probability exceeds its level, else 0; how many do.

    Args:
        out: Flat.
        weight: Of its shape.
        probability: Of its shape.
        level: In units of 2**-16, from -32768 on.
    """
    if fused.usable(out, weight, probability):
        return fused.pass_over(out, weight, probability, level, 1 / _LEVELS, _OVER)
    level = level.to(probability.dtype)
    distance = torch.sub(probability, level, alpha=1 / _LEVELS, out=level)
    if distance.device.type == "cpu":
        count = int(np.count_nonzero(distance.numpy() > _OVER))
    else:
        count = int(torch.count_nonzero(distance > _OVER))
    if weight.dtype == distance.dtype:  # in one pass
        torch.ops.aten.threshold_backward.grad_input(weight, distance, _OVER, grad_input=out)
    else:
        out.copy_(torch.where(distance > _OVER, weight, 0))
    return count


def sampled_weight(
    weight: Tensor,
    logits: Tensor,
    levels: Levels,
    *,
    rescale: bool = False,
) -> Tensor:
    """The weight that a layer computes with: each entry passes with probability ``sigmoid(logit)``, else it is 0.

    The gradient passes straight through the draw: ``dL/dlogit = p (1 - p) * weight * dL/d(result)``. With ``rescale``
    (dynamic weight rescaling) the result is multiplied by ``entries / sum(mask)``, and the gradient follows that sum
    too. None goes to ``weight``, which stays as it is.

    Paper: Zhou et al. 2019, arXiv:1905.01067, section 5. Deviations: probabilities are rounded to multiples of 2**-16;
    a layer that samples no weight is an error (the authors' code divides by zero there).

    Args:
        weight: Frozen weights, floating.
        logits: Trainable; of the weight's shape and dtype.
        levels: The random numbers of this draw.
        rescale: Multiply by ``entries / sum(mask)``.

    Raises:
        SelectionError: No weight was sampled; shapes or dtypes that differ.

    Example:
        >>> weight, logits = torch.ones(1000), torch.zeros(1000)
        >>> drawn = sampled_weight(weight, logits, Levels(0, 0, 0, 0, weight.device))
        >>> 400 < int(drawn.sum()) < 600
        True
    """
    check_alike(weight, logits)
    return _Sampled.apply(logits.contiguous(), weight.detach().contiguous(), levels, rescale)


def shift_logits_(logits: Tensor, density: float, tolerance: float = 1e-3) -> None:
    """Add one number to all logits, in place, so that their mean probability is ``density``.

    Newton's method within a bracket; where they are right already, one pass over the logits.

    Args:
        logits: Of one tensor.
        density: Expected fraction that is sampled, in (0, 1).
        tolerance: Of the mean probability, relative to ``density``, above 0.

    Raises:
        ConfigError: ``density`` out of range.
        SelectionError: Logits that are not finite.
    """
    check_stochastic_density(density)
    with torch.no_grad():
        flat = logits.detach()
        shift, total = 0.0, flat.numel()
        low = high = None
        for _ in range(100):
            probabilities = torch.sigmoid(flat - shift if shift else flat)
            mean = float(probabilities.mean())
            if math.isnan(mean):
                raise SelectionError("the logits of a mask hold NaN: lower the learning rate.")
            if abs(mean - density) <= tolerance * density:
                break
            if low is None or high is None:  # the mean falls as the shift grows
                middle = math.log(density / (1 - density))
                ends = torch.aminmax(flat)
                low, high = float(ends.min) - middle, float(ends.max) - middle
            low, high = (shift, high) if mean > density else (low, shift)
            slope = float((probabilities * (1 - probabilities)).sum()) / total
            shift += (mean - density) / slope if slope > 0 else math.inf
            if not low < shift < high:
                shift = (low + high) / 2
        if shift:
            logits.sub_(shift)


def check_stochastic_density(density: float) -> float:
    """Refuse densities that no sampling with learned probabilities has.

    Raises:
        ConfigError: ``density`` is no number in (0, 1].
    """
    check_density(density)
    if density == 1:
        raise ConfigError("density=1: every weight would pass with certainty, and no mask could be learned.")
    return density

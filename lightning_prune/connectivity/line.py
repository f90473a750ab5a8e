"""Linear mode connectivity: the error along the straight line between two networks."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.connectivity.align import Alignment, align_states, example_inputs_of
from lightning_prune.connectivity.batch_norm import check_batches, recalibrate, tracked_norms
from lightning_prune.connectivity.error_rate import ErrorRate
from lightning_prune.connectivity.states import Line, Masks, check_masks, put_back
from lightning_prune.errors import ConfigError, NoEffectWarning
from lightning_prune.progress import progress

ErrorFunction = Callable[[nn.Module], float | Mapping[str, float]]


@dataclass(frozen=True)
class LinearPath:
    """Errors along the line ``alpha * a + (1 - alpha) * b``.

    Attributes:
        alphas: Places on the line, evenly spaced from 0 (``b``) to 1 (``a``), both included.
        errors: ``{split: one error for each place}``.
        alignment: How ``b`` was permuted; None if it was not.

    Example:
        >>> path = LinearPath((0.0, 0.5, 1.0), {"test": (0.1, 0.4, 0.2)})
        >>> round(path.barrier, 3), round(path.heights_above_line["test"], 3)
        (0.25, 0.25)
    """

    alphas: tuple[float, ...]
    errors: Mapping[str, tuple[float, ...]]
    alignment: Alignment | None = None

    @property
    def barriers(self) -> dict[str, float]:
        """By split: the largest error on the line minus the mean of the ends' errors (Frankle et al., section 2)."""
        return {split: max(line) - (line[0] + line[-1]) / 2 for split, line in self.errors.items()}

    @property
    def barrier(self) -> float:
        """:attr:`barriers` of the split ``"test"`` where there is one, else of the first."""
        return self.barriers["test" if "test" in self.errors else next(iter(self.errors))]

    @property
    def heights_above_line(self) -> dict[str, float]:
        """By split: the largest excess over the straight line between the two ends' errors, at least 0.

        Paper: Entezari et al. 2022, arXiv:2110.06296. At most the other barrier where the ends are
        equally good; it does not count the better end's advantage.
        """
        return {
            split: max(e - (a * line[-1] + (1 - a) * line[0]) for a, e in zip(self.alphas, line, strict=True))
            for split, line in self.errors.items()
        }

    def to_json(self) -> dict[str, Any]:
        """The path and what follows from it, as JSON content."""
        return {
            "alphas": list(self.alphas),
            "errors": {split: list(line) for split, line in self.errors.items()},
            "barriers": self.barriers,
            "heights_above_line": self.heights_above_line,
        }


def linear_mode_connectivity(
    model: nn.Module,
    state_a: Mapping[str, Any],
    state_b: Mapping[str, Any],
    error: ErrorFunction,
    points: int = 30,
    batch_norm: str = "interpolate",
    batches: Iterable[Any] | None = None,
    masks: Masks | None = None,
    differing_masks: str = "error",
    align: bool = False,
    example_inputs: Any = None,
) -> LinearPath:
    """Measure the error along the line between two networks.

    ``E(alpha)`` is the error of ``alpha * a + (1 - alpha) * b``; the barrier is ``max E - (E(0) + E(1)) / 2``. The
    model is moved along the line in place and is, afterwards or after an error, what it was, bit for bit.

    Paper: Frankle et al. 2020, arXiv:1912.05671, section 2. It uses 30 places and calls two networks connected when the
    barrier stays under 2 points; whether its 30 places include the ends is not stated: here they do.

    Args:
        model: The network; its own weights do not matter.
        state_a: A ``state_dict`` of it: the end at ``alpha = 1``.
        state_b: The end at ``alpha = 0``.
        error: What to measure: takes the model (in eval mode, on its device) and returns a number, or ``{split:
            number}``; such as :class:`ErrorRate`. Must give the same number for the same weights.
        points: Places on the line, at least 2. Default 30 (paper).
        batch_norm: ``"interpolate"``: running means and variances are interpolated like weights. ``"recalibrate"``:
            they are estimated anew on ``batches`` at every place, the ends included. Interpolated variances are those
            of neither network and raise the barrier.
        batches: For ``"recalibrate"``: inputs, as :func:`recalibrate` takes them; iterable again and again.
        masks: Masks of both ends, or (masks of a, masks of b). They are checked: pruned entries must be at their pruned
            value, so that every point lies in the subnetwork.
        differing_masks: ``"error"`` refuses masks that differ; ``"union"``: points have the weights that either end
            has.
        align: First permute the channels of ``b`` (and of its masks) to match those of ``a``: :func:`align_states`.
        example_inputs: For ``align``: inputs to trace the network with. Default: its ``example_input_array``.

    Returns:
        Places, errors and barriers. Integer buffers of a point are those of its nearer end.

    Raises:
        ConfigError: A state of another network, an unknown option, too few points, or an error that is no number.
        MaskMismatchError: Masks that differ or do not hold.
        EqualityError: With ``align``: the permuted network does not compute what it did.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> one, two = ({"weight": torch.tensor([[w]])} for w in (1.0, -1.0))
        >>> linear_mode_connectivity(net, one, two, lambda n: 1 - n.weight.item() ** 2, points=3).barrier
        1.0
    """
    _check_options(model, points, batch_norm, batches, differing_masks)
    alignment = None
    if align:
        alignment = align_states(model, state_a, state_b, example_inputs_of(model, example_inputs))
        state_b = alignment.state
        if masks is not None:
            of_a, of_b = masks if isinstance(masks, tuple) else (masks, masks)
            masks = of_a, alignment.permute_masks(of_b)
    line = Line(model, state_a, state_b)
    check_masks(line, masks, differing_masks)
    alphas = tuple(index / (points - 1) for index in range(points))
    with put_back(model), torch.no_grad():
        found = _errors(line, alphas, error, batches if batch_norm == "recalibrate" else None)
    splits = {split: tuple(at[split] for at in found) for split in found[0]}
    return LinearPath(alphas, splits, alignment)


def _check_options(model: nn.Module, points: int, batch_norm: str, batches: Any, differing_masks: str) -> None:
    """Refuse options out of range; warn where estimating statistics anew changes nothing.

    Raises:
        ConfigError: Out of range.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ConfigError(f"points={points!r}: expected how many places on the line to evaluate, at least 2.")
    if batch_norm not in ("interpolate", "recalibrate"):
        raise ConfigError(f"batch_norm={batch_norm!r} is unknown; choose 'interpolate' or 'recalibrate'.")
    if differing_masks not in ("error", "union"):
        raise ConfigError(f"differing_masks={differing_masks!r} is unknown; choose 'error' or 'union'.")
    if batch_norm == "recalibrate":
        check_batches(batches)
        if not tracked_norms(model):
            warnings.warn(
                f"batch_norm='recalibrate' changes nothing: {type(model).__name__} has no running statistics.",
                NoEffectWarning,
                stacklevel=3,
            )


def _errors(
    line: Line, alphas: tuple[float, ...], error: ErrorFunction, batches: Iterable[Any] | None
) -> list[dict[str, float]]:
    """The errors at each place, one split like the other."""
    together = error.points_per_pass if isinstance(error, ErrorRate) else 1
    found: list[dict[str, float]] = []
    with progress("errors along the line, places", len(alphas)) as bar:
        for start in range(0, len(alphas), together):
            here = alphas[start : start + together]
            found += _errors_at(line, here, error, batches, together > 1)
            bar.advance(len(here))
    if any(at.keys() != found[0].keys() for at in found):
        raise ConfigError("error() gave other splits at one place of the line than at another.")
    return found


def _errors_at(
    line: Line, alphas: tuple[float, ...], error: ErrorFunction, batches: Iterable[Any] | None, together: bool
) -> list[dict[str, float]]:
    """The errors at some places; ``together``: the data is read once for all of them."""
    found: list[dict[str, float]] = []
    states = []
    for alpha in alphas:
        line.move_to(alpha)
        if batches is not None:
            recalibrate(line.model, batches)
        if together:
            states.append(line.current())
        else:
            found.append(numbers(error(line.model), f"alpha={alpha:.3f}"))
    if states:
        assert isinstance(error, ErrorRate)
        found = error.of_states(line.model, states)
    return found


def numbers(given: Any, where: str) -> dict[str, float]:
    """What the user's function returned, as plain numbers by split.

    Raises:
        ConfigError: No numbers, or NaN.
    """
    named = given if isinstance(given, Mapping) else {"error": given}
    try:
        found = {str(split): float(value) for split, value in named.items()}
    except (TypeError, ValueError) as reason:
        raise ConfigError(f"error() must return a number or {{split: number}}, got {given!r:.100}.") from reason
    if not found or any(value != value for value in found.values()):
        raise ConfigError(f"error() gave {given!r:.100} at {where}: no maximum can be taken over that.")
    return found

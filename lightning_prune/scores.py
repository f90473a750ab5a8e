"""Element scores: how much each weight matters, by criterion. Higher = kept."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from lightning_prune.errors import ConfigError, SelectionError
from lightning_prune.prunable import canonical_name, close_names
from lightning_prune.sharding import local

_Inputs = dict[str, Tensor]


def _abs_final(t: _Inputs) -> Tensor:
    return t["final"].abs()


def _increase(t: _Inputs) -> Tensor:
    return t["final"].abs() - t["initial"].abs()


def _same_sign(t: _Inputs) -> Tensor:
    return torch.sign(t["final"]) == torch.sign(t["initial"])


def _both(first: Tensor, second: Tensor, mask: Tensor | None) -> Tensor:
    """The lower of an entry's two quantiles among the kept entries: it is above q exactly if both are."""
    return torch.minimum(_quantiles(first, mask), _quantiles(second, mask))


def _quantiles(values: Tensor, mask: Tensor | None) -> Tensor:
    candidates = values.reshape(-1) if mask is None else values[mask]
    ordered = torch.sort(candidates).values
    return torch.searchsorted(ordered, values.contiguous()).to(torch.float64) / max(1, ordered.numel())


# criterion -> what it needs, its score, and (for those with a gate) which entries pass the gate
_SCORES: dict[str, tuple[tuple[str, ...], Callable[[_Inputs], Tensor]]] = {
    "large_final": (("final",), _abs_final),
    "small_final": (("final",), lambda t: -t["final"].abs()),
    "large_init": (("initial",), lambda t: t["initial"].abs()),
    "small_init": (("initial",), lambda t: -t["initial"].abs()),
    "large_init_large_final": (
        ("initial", "final"),
        lambda t: _both(t["initial"].abs(), t["final"].abs(), t.get("mask")),
    ),
    "small_init_small_final": (
        ("initial", "final"),
        lambda t: _both(-t["initial"].abs(), -t["final"].abs(), t.get("mask")),
    ),
    "magnitude_increase": (("initial", "final"), _increase),
    "movement": (("initial", "final"), lambda t: (t["final"] - t["initial"]).abs()),
    "large_final_same_sign": (("initial", "final"), _abs_final),
    "large_final_diff_sign": (("initial", "final"), _abs_final),
    "magnitude_increase_same_sign": (("initial", "final"), _increase),
    "magnitude_increase_diff_sign": (("initial", "final"), _increase),
    "snip": (("initial", "grad"), lambda t: (t["grad"] * t["initial"]).abs()),
    "grad": (("grad",), lambda t: t["grad"].abs()),
}

CRITERIA: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: needs for name, (needs, _) in _SCORES.items()} | {"random": ()}
)
"""Every criterion of :func:`score_weights`, with the arguments that it needs."""


def score_weights(
    criterion: str,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    *,
    grad: Tensor | None = None,
    generator: torch.Generator | None = None,
    gated: str = "last",
    mask: Tensor | None = None,
) -> Tensor:
    """Score each entry of one weight tensor; the higher, the longer it is kept.

    With ``wi`` the initial and ``wf`` the final (trained) weights:

    ====================================  ===========================================================================
    ``large_final``, ``small_final``      ``|wf|``, ``-|wf|``
    ``large_init``, ``small_init``        ``|wi|``, ``-|wi|``
    ``large_init_large_final``            the lower of the two quantiles that ``|wi|`` and ``|wf|`` reach in the tensor
    ``small_init_small_final``            the same of ``-|wi|`` and ``-|wf|``
    ``magnitude_increase``                ``|wf| - |wi|``
    ``movement``                          ``|wf - wi|``
    ``large_final_same_sign``             ``|wf|``, gated: only where the sign stayed
    ``large_final_diff_sign``             ``|wf|``, gated: only where the sign changed
    ``magnitude_increase_same_sign``      ``|wf| - |wi|``, gated: only where the sign stayed
    ``magnitude_increase_diff_sign``      ``|wf| - |wi|``, gated: only where the sign changed
    ``random``                            uniform in [0, 1), drawn from ``generator``
    ``snip``                              ``|grad * wi|``, ``grad`` the loss gradient at the initial weights
    ``grad``                              ``|grad|``
    ====================================  ===========================================================================

    Paper: Zhou et al. 2019, arXiv:1905.01067, section 2 (snip: Lee et al. 2019, arXiv:1810.02340). Deviations: a gated
    entry scores ``-inf`` and leaves before any other, where the authors' code gives it 0, which outranks a negative
    ``magnitude_increase`` (``gated="zero"`` does that too). ``large_init_large_final`` is the intersection of their
    code, which keeps what lies above the same quantile of both magnitudes, as one number instead of a search for the
    quantile; the paper writes it as a minimum of scaled magnitudes. ``random`` follows the generator.

    Args:
        criterion: A name in :data:`CRITERIA`.
        initial: Weights at the start of training (or at the rewinding point). Only where the criterion needs them.
        final: Trained weights. Only where the criterion needs them.
        grad: Gradient of the loss at the initial weights, for ``snip`` and ``grad``.
        generator: Source of ``random``; the same generator state gives the same scores. Default: torch's own.
        gated: ``"last"``: entries that fail a gate score ``-inf``. ``"zero"``: they score 0, as in the authors' code.
        mask: Entries still kept (``True``); quantiles are taken among these. Only the two ``init_..._final`` criteria
            read it. Default: ``None``, all entries.

    Shape:
        All tensors, and the result: the weight's shape. The result has the weights' dtype and device; ``random`` and
        the criteria with quantiles give float64.

    Returns:
        The scores; no gradient flows through them.

    Raises:
        ConfigError: An unknown criterion or ``gated``, or a tensor missing that the criterion needs.
        SelectionError: Tensors of different shapes.

    Example:
        >>> score_weights("magnitude_increase", torch.tensor([1.0, -2.0]), torch.tensor([1.5, 0.5]))
        tensor([ 0.5000, -1.5000])
    """
    if gated not in ("last", "zero"):
        raise ConfigError(f"gated={gated!r} is unknown; choose 'last' or 'zero'.")
    inputs = _checked_inputs(criterion, {"initial": initial, "final": final, "grad": grad, "mask": mask})
    if criterion == "random":
        like = next(iter(inputs.values()))
        device = generator.device if generator is not None else torch.device("cpu")
        return torch.rand(like.shape, generator=generator, dtype=torch.float64, device=device).to(like.device)
    with torch.no_grad():
        scores = _SCORES[criterion][1](inputs)
        if criterion.endswith(("_same_sign", "_diff_sign")):
            passes = _same_sign(inputs) == criterion.endswith("_same_sign")
            scores = scores.masked_fill(~passes, float("-inf") if gated == "last" else 0.0)
    return scores


def _checked_inputs(criterion: str, given: Mapping[str, Tensor | None]) -> _Inputs:
    if criterion not in CRITERIA:
        raise ConfigError(f"criterion {criterion!r} is unknown{close_names(str(criterion), CRITERIA)}")
    inputs = {name: tensor.detach() for name, tensor in given.items() if tensor is not None}
    missing = [name for name in CRITERIA[criterion] if name not in inputs]
    if missing:
        raise ConfigError(f"criterion {criterion!r} needs {' and '.join(missing)}; pass {missing[0]}=<tensor>.")
    if not inputs:
        raise ConfigError(f"criterion {criterion!r} needs initial or final weights, for their shape.")
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    if len(set(shapes.values())) > 1:
        raise SelectionError(f"criterion {criterion!r}: the tensors must have one shape, got {shapes}.")
    return inputs


class MagnitudeScores(Mapping[str, Tensor]):
    """The scores ``|w|`` of parameters, computed when asked for: no copy of all scores exists at any time.

    Args:
        parameters: Parameters (or other tensors) by name.

    Example:
        >>> scores = MagnitudeScores({"weight": torch.tensor([-1.0, 2.0])})
        >>> scores["weight"]
        tensor([1., 2.])
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = {canonical_name(name): parameter for name, parameter in parameters.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._parameters[name].detach().abs()

    def like(self, name: str) -> Tensor:
        """A tensor of the shape, type and layout of a tensor's scores, which need not be computed for that."""
        parameter = self._parameters[name]
        return self[name] if parameter.is_complex() else parameter

    def parts(self) -> "MagnitudeScores":
        """Of this process's parts of the parameters; of plain ones the whole."""
        return MagnitudeScores({name: local(parameter) for name, parameter in self._parameters.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


QUANTILES = ("min", "q1", "median", "q3", "max")


def score_quantiles(scores: Tensor, within: Tensor | None = None) -> tuple[float, ...]:
    """Least, lower quartile, median, upper quartile and greatest of scores, each a score that occurs.

    Of ``n`` ordered scores the quantile ``q`` is the one at ``floor(q (n - 1))``, counted from 0. NaN is greater than
    any number.

    Args:
        scores: Of any shape.
        within: Boolean, of the same shape: which entries count. Default: all.

    Returns:
        Five numbers, in the order of :data:`QUANTILES`; none if no entry counts.
    """
    values = scores.detach().to("cpu", torch.float32).numpy().reshape(-1)
    if within is not None:
        values = values[within.cpu().numpy().reshape(-1)]
    if not values.size:
        return ()
    places = [int(q * (values.size - 1)) for q in (0, 0.25, 0.5, 0.75, 1)]
    ordered = np.partition(values, sorted(set(places)))
    return tuple(float(ordered[place]) for place in places)

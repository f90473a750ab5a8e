"""Weights that are computed from frozen ones and trainable scores: put into the layers of a module and taken out again.

A layer becomes an instance of a subclass of its own class, in which the weight's attribute is computed. It stays the
same object: hooks, names and ``state_dict`` keys are those of the plain layer.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError

Compute = Callable[[Tensor, Tensor, bool], Tensor]


def scores_name(key: str) -> str:
    """The name under which a layer holds the scores of its parameter ``key``."""
    return f"{key}_scores"


class _WithScores:
    """Mixed into a layer's class. ``_computed`` has, for each weight's attribute, how it is computed."""

    _computed: dict[str, Compute]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for key in self._computed:
            del destination[prefix + scores_name(key)]
            destination[prefix + key] = final_weight(self, key)  # type: ignore[arg-type]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        raise ConfigError(
            f"weights were to be loaded into {prefix.rstrip('.')!r} while masks are learned there: they are frozen. "
            "Load them before the fit, or after it."
        )


@cache
def _kind(cls: type, keys: tuple[str, ...]) -> type:
    def attribute(key: str) -> property:
        return property(lambda self: _compute(self, key))

    members: dict[str, Any] = {key: attribute(key) for key in keys}
    return type(cls.__name__, (_WithScores, cls), members | {"__module__": cls.__module__, "_plain": cls})


@torch.compiler.disable
def _compute(layer: Any, key: str) -> Tensor:
    parameters = layer._parameters
    return layer._computed[key](parameters[key], parameters[scores_name(key)], layer.training)


def final_weight(layer: nn.Module, key: str) -> Tensor:
    """The weight that a layer computes with in evaluation, outside of any graph."""
    parameters = layer._parameters
    compute: Compute = layer.__dict__["_computed"][key]
    frozen, scores = parameters[key], parameters[scores_name(key)]
    assert frozen is not None
    assert scores is not None
    with torch.no_grad():
        return compute(frozen, scores, False).detach().clone()


def put_in(layer: nn.Module, key: str, scores: nn.Parameter, compute: Compute) -> None:
    """Let ``layer.<key>`` be what ``compute(frozen, scores, training)`` gives.

    Args:
        layer: Has the parameter ``key``, which is frozen.
        key: Name of the attribute.
        scores: Trainable; registered with the layer.
        compute: The weight from the two, in training or in evaluation.

    Raises:
        ConfigError: The name of the scores is taken.
    """
    if hasattr(layer, scores_name(key)):
        raise ConfigError(
            f"{type(layer).__name__} has an attribute {scores_name(key)!r} already, where scores would go."
        )
    layer.register_parameter(scores_name(key), scores)
    computed: dict[str, Compute] = layer.__dict__.get("_computed", {})
    plain: type = getattr(type(layer), "_plain", type(layer))
    layer.__dict__["_computed"] = computed | {key: compute}
    layer.__class__ = _kind(plain, tuple(layer.__dict__["_computed"]))


def take_out(layers: Sequence[nn.Module]) -> None:
    """Make layers plain again; their parameters hold what they computed with in evaluation."""
    weights = [(layer, key, final_weight(layer, key)) for layer in layers for key in layer.__dict__["_computed"]]
    for layer in layers:
        layer.__class__ = type(layer)._plain  # type: ignore[attr-defined]
        del layer.__dict__["_computed"]
    for layer, key, weight in weights:  # all were computed before the first is written: a parameter may be shared
        del layer._parameters[scores_name(key)]
        parameter = layer._parameters[key]
        assert parameter is not None
        with torch.no_grad():
            parameter.copy_(weight)

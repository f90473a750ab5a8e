"""The table of rules: one function for each operation whose effect on channels is known."""

from collections.abc import Callable
from typing import Any, TypeVar

from lightning_prune.channels.labels import Labels, span
from lightning_prune.channels.recording import Op, Value

Rule = Callable[[Labels, Op], None]
RULES: dict[str, Rule] = {}
_R = TypeVar("_R", bound=Rule)


def rule(*names: str) -> Callable[[_R], _R]:
    """Register a function as the rule of these operations (ATen names without overload)."""

    def register(function: _R) -> _R:
        for name in names:
            RULES[name] = function
        return function

    return register


def argument(op: Op, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name."""
    return op.args[position] if len(op.args) > position else op.kwargs.get(name, default)


def tensor(op: Op, position: int) -> Value:
    """A positional argument that is a tensor."""
    value = op.args[position]
    assert isinstance(value, Value)
    return value


def axes_of(item: Any, ndim: int) -> list[int]:
    """Normalise a ``dim`` argument: None and an empty list mean every axis."""
    if item is None or item == []:
        return list(range(ndim))
    axes = item if isinstance(item, (list, tuple)) else [item]
    return [int(a) % ndim if ndim else 0 for a in axes]


def thin(labels: Labels, op: Op) -> bool:
    """Whether the operation is one of attention that is thinned; its operands then carry labels along the width alone.

    Every head loses the same places, so the labels of all heads are made one.
    """
    if op.module not in labels.thinned:
        return False
    for value in op.tensors()[:3]:
        rows = len(value.shape) - 2
        value.factors = [
            labels.collapse(f, [a for a in span(f) if a < rows]) if len(span(f)) > 1 else f
            for f in labels.factors(value)
        ]
    return True

"""Record what one forward pass of a model does, as a list of tensor operations."""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.errors import TraceError
from lightning_prune.running import call_model, evaluation, following, map_tensors, named_tensors, output_tensors

MAX_OPERATIONS = 200_000


class Value:
    """One tensor of a recording: its shape, what it is called if it belongs to the model, and its channel labels.

    Attributes:
        shape: Sizes.
        name: Name of the parameter or buffer that it is, or None.
        factors: Label arrays, one for each independent set of axes that carries channels; each has as many axes as the
            tensor, of size 1 where the labels do not vary.
        wild: Axes along which the tensor is constant because a factory or ``expand`` made it so: it follows any size.
        weight: Whether it was computed from parameters and constants only.
        buffer: Whether it is a buffer of the model.
    """

    __slots__ = ("buffer", "factors", "name", "shape", "weight", "wild")

    def __init__(self, shape: tuple[int, ...], name: str | None = None, buffer: bool = False) -> None:
        self.shape = shape
        self.name = name
        self.factors: list[np.ndarray] | None = None
        self.wild: frozenset[int] = frozenset()
        self.weight = name is not None
        self.buffer = buffer


@dataclass(slots=True)
class Op:
    """One recorded operation.

    Attributes:
        name: ATen name without overload, such as ``"convolution"``; with its namespace if that is not ``aten``.
        args: Positional arguments, tensors replaced by their :class:`Value`.
        kwargs: Keyword arguments, likewise.
        outs: The tensors it returned.
        module: Name of the innermost module that was running ("" is the model itself).
        intent: Name and arguments (without tensors) of the Python-level torch function it came from, or None.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[Value]
    module: str
    intent: tuple[str, tuple[Any, ...]] | None

    def tensors(self) -> list[Value]:
        """Every tensor among the arguments, in order."""
        found: list[Value] = []
        _collect(self.args, found)
        _collect(tuple(self.kwargs.values()), found)
        return found

    def where(self) -> str:
        """Name the operation and its place, for messages."""
        return f"{self.name} in {self.module or 'the model'}"


@dataclass
class Recording:
    """The operations of one pass, and the values that the model returned."""

    ops: list[Op] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    result: Any = None
    leaves: dict[str, Value] = field(default_factory=dict)
    known: Callable[[Tensor], Value | None] = lambda _: None  # what a tensor is called, while the pass runs


def _collect(items: Any, found: list[Value]) -> None:
    for item in items:
        if isinstance(item, Value):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            _collect(item, found)


_MARK = "_lightning_prune_value"


class _Recorder(TorchDispatchMode):
    """Records operations. Parameters and buffers are told by identity, other tensors by a mark on them.

    Not by identity, which is used again once a tensor dies; and keeping every tensor alive would take the memory of
    all activations at once, which costs more time than the recording itself.
    """

    def __init__(self, leaves: dict[int, Value], state: "_State", ops: list[Op]) -> None:
        super().__init__()
        self.leaves = leaves
        self.ops = ops
        self.state = state
        self.names: dict[Any, str] = {}
        self.marked: list[weakref.ref[Tensor]] = []

    def known(self, tensor: Tensor) -> Value | None:
        """What a tensor is called, if this pass has met it."""
        value = self.leaves.get(id(tensor))
        if value is None:
            owner, value = getattr(tensor, _MARK, (None, None))
            if owner is not self.state:  # a tensor that the model has kept from an earlier pass
                return None
        return value

    def value(self, tensor: Tensor) -> Value:
        value = self.known(tensor)
        if value is None:
            value = Value(tuple(tensor.shape))
            setattr(tensor, _MARK, (self.state, value))
            self.marked.append(weakref.ref(tensor))
        return value

    def remove_marks(self) -> None:
        """From tensors that are still alive: results, and what the model keeps."""
        for reference in self.marked:
            tensor = reference()
            if tensor is not None and hasattr(tensor, _MARK):
                delattr(tensor, _MARK)

    def convert(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self.value(item)
        if isinstance(item, (list, tuple)):
            return [self.convert(i) for i in item]
        return item

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # The arguments are converted first: an operation that resizes in place would hide what it was given.
        recorded_args = tuple([self.convert(a) for a in args])
        recorded_kwargs = {k: self.convert(v) for k, v in kwargs.items()} if kwargs else kwargs
        name = self.names.get(func)
        if name is None:
            name = func._schema.name.removeprefix("aten::")
            self.names[func] = name
        try:
            out = func(*args, **kwargs)
        except Exception:  # kept, so that what it would have read is known
            self.ops.append(Op(f"{name} (failed)", recorded_args, recorded_kwargs, [], self.state.modules[-1], None))
            raise
        outs: list[Value] = []
        if isinstance(out, Tensor):
            outs.append(self.value(out))
        else:
            _collect([self.convert(out)], outs)
        state = self.state
        self.ops.append(Op(name, recorded_args, recorded_kwargs, outs, state.modules[-1], state.intent))
        if len(self.ops) > MAX_OPERATIONS:
            raise TraceError(
                f"the forward pass ran more than {MAX_OPERATIONS} tensor operations; expected a bounded graph. Give "
                "smaller or shorter example inputs."
            )
        return out


class _Intents(TorchFunctionMode):
    """Notes which Python-level function an operation came from: ``flatten`` and ``view`` are one ATen operation."""

    def __init__(self, state: "_State") -> None:
        super().__init__()
        self.state = state

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outer = self.state.intent
        plain = tuple(a for a in args if not isinstance(a, Tensor))
        self.state.intent = (getattr(func, "__name__", str(func)), plain + tuple((kwargs or {}).values()))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.state.intent = outer


class _State:
    def __init__(self) -> None:
        self.modules = [""]
        self.intent: tuple[str, tuple[Any, ...]] | None = None


def record(
    model: nn.Module,
    example_inputs: Any,
    *,
    grad: bool = False,
    training: bool = False,
    into: Recording | None = None,
) -> Recording:
    """Run the model once and record its tensor operations. Only the path that ran is seen.

    Args:
        model: The model; its modes and flags come back as they were.
        example_inputs: See :func:`call_model`; cloned, since models may change their inputs in place.
        grad: Whether the pass is differentiable.
        training: See :func:`evaluation`.
        into: Filled as the pass goes on, so that it holds what ran before an error.

    Raises:
        TraceError: Too many operations.
    """
    recording = into or Recording()
    leaves: dict[int, Value] = {}
    by_name = recording.leaves
    for name, tensor in named_tensors(model):
        if id(tensor) not in leaves:
            is_buffer = not isinstance(tensor, nn.Parameter)
            leaves[id(tensor)] = by_name[name] = Value(tuple(tensor.shape), name, is_buffer)
    state = _State()
    recorder = _Recorder(leaves, state, recording.ops)
    recording.known = recorder.known
    inputs = map_tensors(torch.clone, example_inputs)
    with ExitStack() as stack:
        state.modules = stack.enter_context(following(model))
        stack.enter_context(evaluation(model, grad=grad, training=training))
        stack.enter_context(recorder)
        stack.enter_context(_Intents(state))
        stack.callback(recorder.remove_marks)
        recording.result = call_model(model, inputs)
        results = [recorder.known(tensor) for tensor in output_tensors(recording.result)]
    recording.outputs = [value for value in results if value is not None]
    return recording

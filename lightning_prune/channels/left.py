"""Blocks that have left: what stands in their place, and a parent in which their branches contribute nothing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.errors import EqualityError, MaskMismatchError, PruneError

if TYPE_CHECKING:
    from lightning_prune.channels.plan import RemovalPlan

_ADDS = ("add", "add_")


class Left(nn.Module):
    """Stands where a module has left, and holds no tensors.

    Plain attributes of the module (numbers, flags) stay readable and its own parameters read as None, for code that
    looks at them from outside.

    Args:
        module: What has left.
        kind: ``"identity"`` gives back its first argument, ``"zero"`` zeros like it.
        arity: 0: that tensor is returned; n: a tuple of it and n - 1 times None.
        probe: Added to the result, so that a check can see whether outputs depend on it.
    """

    def __init__(self, module: nn.Module, kind: str, arity: int = 0, probe: Tensor | None = None) -> None:
        super().__init__()
        for key, value in vars(module).items():
            if key != "training" and isinstance(value, (bool, int, float, str, tuple, type(None))):
                setattr(self, key, value)
        for key in module._parameters:
            self.register_parameter(key, None)
        for key in module._buffers:
            self.register_buffer(key, None)
        self.training = module.training
        self.left_as, self.left_arity, self.left_probe = kind, arity, probe

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take any arguments; give back the first, or zeros like it."""
        x = args[0] if args else next(iter(kwargs.values()))
        out = x if self.left_as == "identity" else torch.zeros_like(x)
        if self.left_probe is not None:
            out = out + self.left_probe
        return (out, *[None] * (self.left_arity - 1)) if self.left_arity else out

    def extra_repr(self) -> str:
        """What is printed of it."""
        return self.left_as


def _put(
    model: nn.Module, left: Sequence[Mapping[str, Any]], probes: Mapping[str, Tensor]
) -> list[tuple[dict[str, Any], str, Any]]:
    """Put placeholders wherever the modules are held; return what undoes it."""
    fresh: dict[int, Left] = {}
    undo: list[tuple[dict[str, Any], str, Any]] = []
    for entry in left:
        for name, (kind, arity) in entry["parts"].items():
            module = model.get_submodule(name)
            probe = None if kind == "identity" and name != entry["module"] else probes.get(entry["block"])
            fresh[id(module)] = Left(module, kind, arity, probe)
        within = model.get_submodule(entry["module"])
        if isinstance(within, nn.TransformerEncoderLayer):  # its fused path asks for all parameters; this turns it off
            undo.append((vars(within), "activation_relu_or_gelu", within.activation_relu_or_gelu))
            within.activation_relu_or_gelu = 0
    for holder in list(model.modules()):
        for key, child in list(holder._modules.items()):
            if child is not None and id(child) in fresh:
                undo.append((holder._modules, key, child))
                holder._modules[key] = fresh[id(child)]
    return undo


def parts_of(left: Iterable[Mapping[str, Any]]) -> dict[str, Sequence[Any]]:
    """The modules that leave with some blocks: name -> (kind, arity) of what stands there afterwards."""
    return {name: part for entry in left for name, part in entry["parts"].items()}


@contextmanager
def left_out(
    model: nn.Module, left: Sequence[Mapping[str, Any]], dtype: torch.dtype | None = None
) -> Iterator[dict[str, Tensor]]:
    """Run the model without these blocks; afterwards every module is back in its place.

    Args:
        model: The model.
        left: Entries of a plan.
        dtype: Type of probes, if there shall be any.

    Yields:
        One probe for each block, by a description: a zero that is added to what stands for it.
    """
    probes: dict[str, Tensor] = {}
    if dtype is not None:
        for entry in left:
            devices = [p.device for name in entry["parts"] for p in model.get_submodule(name).parameters()]
            device = devices[0] if devices else None
            probes[entry["block"]] = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
    undo = _put(model, left, probes)
    try:
        yield {f"block {name}": probe for name, probe in probes.items()}
    finally:
        for table, key, held in reversed(undo):
            table[key] = held


class AddsOf(TorchDispatchMode):
    """Sees the additions of two tensors of one shape within some modules, by their number in a call of the module.

    Args:
        model: The model.
        left: Entries of a plan; their ``adds`` are met.
    """

    def __init__(self, model: nn.Module, left: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.model = model
        self.places: dict[str, dict[int, tuple[str, int]]] = {}
        for entry in left:
            own = self.places.setdefault(entry["module"], {})
            own.update({int(number): (entry["block"], int(operand)) for number, operand in entry["adds"]})
        self.running: list[list[Any]] = []
        self.met: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator["AddsOf"]:
        """Follow the calls of the modules while the mode is on."""
        with ExitStack() as stack:
            for name in self.places:
                module = self.model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(lambda *_, n=name: self.enter(n)).remove)
                stack.callback(module.register_forward_hook(lambda *_: self.leave(), always_call=True).remove)
            stack.enter_context(self)
            yield self

    def enter(self, name: str) -> None:
        """A call of a module begins."""
        self.running.append([self.places[name], 0])

    def leave(self) -> None:
        """It ends."""
        if self.running:
            self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if self.running and is_plain_add(name, args):
            for frame in self.running:
                block, operand = frame[0].get(frame[1], (None, 0))
                frame[1] += 1
                if block is not None:
                    self.met.add(block)
                    args = self.change(block, operand, args, name == "add_")
        return func(*args, **kwargs)

    def change(self, block: str, operand: int, args: tuple[Any, ...], in_place: bool) -> tuple[Any, ...]:
        """What the addition gets in the place of its arguments."""
        raise NotImplementedError


def is_plain_add(name: str, args: Sequence[Any]) -> bool:
    """Whether an operation adds two tensors (or recorded values) of one shape."""
    if name not in _ADDS or len(args) < 2:
        return False
    first, second = (getattr(a, "shape", None) for a in args[:2])
    return first is not None and second is not None and len(first) > 0 and tuple(first) == tuple(second)


class _Silent(AddsOf):
    """Branches contribute nothing: zeros stand in their place at the addition."""

    def change(self, block: str, operand: int, args: tuple[Any, ...], in_place: bool) -> tuple[Any, ...]:
        branch = args[operand]
        nothing = branch.zero_() if in_place and operand == 0 else torch.zeros_like(branch)
        return (nothing, *args[1:]) if operand == 0 else (args[0], nothing, *args[2:])


def silent(model: nn.Module, left: Sequence[Mapping[str, Any]]) -> AddsOf:
    """A mode in which the branches of these blocks contribute nothing."""
    return _Silent(model, left)


@contextmanager
def silenced(model: nn.Module, plan: "RemovalPlan") -> Iterator[None]:
    """Run the masked parent of a plan of blocks.

    Raises:
        EqualityError: A branch that the plan names was not met.
    """
    if not plan.left:
        yield
        return
    with silent(model, plan.left).watching() as mode:
        yield
    missed = [entry["block"] for entry in plan.left if entry["block"] not in mode.met]
    if missed:
        raise EqualityError(f"the addition that ends block {missed[0]} did not run with these inputs.")


def leaving_tensors(model: nn.Module, plan: "RemovalPlan") -> dict[str, Tensor]:
    """Parameters and buffers that only the blocks of a plan hold, by first name."""
    if not plan.left:
        return {}
    every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with left_out(model, plan.left):
        stay = {id(t) for t in (*model.parameters(), *model.buffers())}
    return {name: tensor for name, tensor in every.items() if id(tensor) not in stay}


def check_parts(model: nn.Module, plan: "RemovalPlan") -> None:
    """Refuse a model that lacks a block, or from which it left already.

    Raises:
        MaskMismatchError: Says which.
    """
    modules = dict(model.named_modules())
    for name in [*parts_of(plan.left), *(entry["module"] for entry in plan.left)]:
        if name not in modules or isinstance(modules[name], Left):
            raise MaskMismatchError(
                f"the plan takes out module {name!r}, which this {type(model).__name__} does not have; give a fresh "
                "model of the architecture that the plan was made for (was the plan carried out already?)."
            )


def check_holders(model: nn.Module, plan: "RemovalPlan", optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers from which the parameters of a block cannot be taken.

    Raises:
        PruneError: An optimizer that keeps parameters, or state over all of them together, outside its parameter
            groups and its state by parameter.
    """
    gone = {id(t): n for n, t in leaving_tensors(model, plan).items()}
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in gone]
        if not held:
            continue
        known = {id(group["params"]) for group in optimizer.param_groups} | {
            id(getattr(optimizer, key)) for key in ("param_groups", "state", "defaults")
        }
        keeping = [k for k, value in vars(optimizer).items() if id(value) not in known and _holds(value, gone)]
        if keeping or (isinstance(optimizer, LBFGS) and optimizer.state):
            where = f"in {keeping[0]!r}" if keeping else "as one vector"
            raise PruneError(
                f"{type(optimizer).__name__} keeps {gone[id(held[0])]} {where} besides its parameter groups, so the "
                "parameters of a block cannot be taken from it; build the optimizer after the block has left."
            )


def _holds(item: Any, gone: Mapping[int, str], depth: int = 3) -> bool:
    if isinstance(item, Tensor):
        return id(item) in gone
    if depth and isinstance(item, dict):
        return any(_holds(i, gone, depth - 1) for pair in item.items() for i in pair)
    return bool(depth) and isinstance(item, (list, tuple, set)) and any(_holds(i, gone, depth - 1) for i in item)


def take_out(model: nn.Module, plan: "RemovalPlan", optimizers: Iterable[Optimizer]) -> None:
    """Take blocks out for good: modules are replaced, their parameters leave the optimizers with their state.

    A parameter group that loses all its parameters stays, empty, since schedulers count groups.
    """
    if not plan.left:
        return
    gone = {id(t) for t in leaving_tensors(model, plan).values()}
    _put(model, plan.left, {})
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in gone:
                    optimizer.state.pop(parameter, None)
            group["params"][:] = [p for p in group["params"] if id(p) not in gone]

"""Find residual blocks in a recording: an addition of a value and a function of it, within one module."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_prune.channels.left import Left, is_plain_add
from lightning_prune.channels.recording import Recording, record

# What may stand between the addition and the end of a block: identities on some inputs, as the check will tell.
_MAYBE_IDENTITY = {"relu", "relu_", "relu6", "relu6_", "hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min",
                   "clamp_min_", "clone", "contiguous", "alias", "detach", "dropout", "native_dropout"}  # fmt: skip
Node = tuple[int, int]
"""A value as some operation left it: number of the operation (-1: none did), identity of the value."""


BlockScores = Mapping[str, float] | Callable[["Block", nn.Module], float]


@dataclass(eq=False)
class Call:
    """One call of a module: operations ``start`` to ``end - 1``, first tensor argument, tensor returned.

    ``arity`` is 0 if the tensor was returned bare, n if as the first of a tuple of n whose others are None.
    """

    module: str
    start: int
    end: int = -1
    given: Node | None = None
    returned: Node | None = None
    arity: int = 0
    children: list["Call"] = field(default_factory=list)


@dataclass(eq=False)
class Block:
    """A part of a model that can leave whole, since what it does is added to what it was given.

    Attributes:
        name: Of the module that leaves; where a branch of several modules leaves, of the one with most parameters.
        module: The module within which the addition is.
        adds: Its additions: (number among those of a call of the module, operand that is the branch).
        parts: Modules that leave: name -> (kind, arity) of what stands there afterwards.
        options: Other such parts, to be tried.
        ops: Numbers of the operations that then do not run.
        whole: Whether the module itself leaves, with everything in it.
        macs: Multiply-adds of these operations at the traced inputs.
    """

    name: str
    module: str
    adds: list[tuple[int, int]]
    parts: dict[str, tuple[str, int]]
    ops: set[int] = field(repr=False)
    whole: bool
    options: list[dict[str, tuple[str, int]]] = field(default_factory=list, repr=False)
    macs: int = 0

    def entry(self) -> dict[str, Any]:
        """The block as an entry of a plan."""
        parts = {name: list(part) for name, part in self.parts.items()}
        return {"block": self.name, "module": self.module, "adds": [list(a) for a in self.adds], "parts": parts}


@contextmanager
def _calls(model: nn.Module, recording: Recording) -> Iterator[Call]:
    """Note which operations run in which call of a module."""
    names = {id(module): name for name, module in model.named_modules()}
    root = Call("the pass", 0)
    running = [root]

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) not in names:  # made on the fly
            running.append(running[-1])
            return
        call = Call(names[id(module)], len(recording.ops))
        call.given = _node(recording, next((a for a in args if isinstance(a, Tensor)), None))
        running[-1].children.append(call)
        running.append(call)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = running.pop()
        if id(module) not in names:
            return
        call.end = len(recording.ops)
        if isinstance(output, tuple) and output and all(o is None for o in output[1:]):
            output, call.arity = output[0], len(output)
        call.returned = _node(recording, output)

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield root


def _node(recording: Recording, tensor: Any) -> Node | None:
    value = recording.known(tensor) if isinstance(tensor, Tensor) else None
    if value is None:
        return None
    ops = recording.ops
    made = next((i for i in reversed(range(len(ops))) if any(value is out for out in ops[i].outs)), -1)
    return made, id(value)


class Residuals:
    """The additions of a recorded pass that end residual blocks, and the blocks that could leave.

    Args:
        model: The model.
        example_inputs: As for :func:`trace_channels`.

    Attributes:
        recording: The pass.
        ops: Its operations.
        candidates: Blocks, as the pass shows them; whether they may leave is for a trial to tell.
        staying: Residual additions of which nothing can leave: name and reason.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model = model
        recording = Recording()
        with _calls(model, recording) as root:
            record(model, example_inputs, into=recording)
        self.recording, self.ops = recording, recording.ops
        placeholders = {name for name, module in model.named_modules() if isinstance(module, Left)}
        self.zeros = {i for i, op in enumerate(self.ops) if op.module in placeholders}  # in the place of what has left
        self.reads: list[list[Node]] = []
        self.writes: list[list[Node]] = []
        self.readers: dict[Node, list[int]] = {}
        self._number_values()
        self.calls = [call for top in root.children for call in _walk(top)]
        self.by_module: dict[str, list[Call]] = {}
        for call in self.calls:
            self.by_module.setdefault(call.module, []).append(call)
        outputs = {id(value) for value in recording.outputs}
        self.final = {node for nodes in self.writes for node in nodes if node[1] in outputs}
        self.staying: list[tuple[str, str]] = []
        self.candidates = self._find()

    def _number_values(self) -> None:
        last: dict[int, int] = {}
        for i, op in enumerate(self.ops):
            nodes = [(last.get(id(v), -1), id(v)) for v in op.tensors()]
            self.reads.append(nodes)
            for node in nodes:
                self.readers.setdefault(node, []).append(i)
            for value in op.outs:
                last[id(value)] = i
            self.writes.append([(i, id(value)) for value in op.outs])

    def _find(self) -> list[Block]:
        wholes = {}
        for module, calls in self.by_module.items():
            block = self._whole(module, calls)
            if block is not None:
                wholes[module] = block
        inner = {m for m in wholes if any(o != m and o.startswith(m + ".") for o in wholes)}
        branches: dict[str, list[Block]] = {}
        for call in self.calls:
            for number, operand, index in self._own_residuals(call):
                found = self._branch(call, number, operand, index)
                if isinstance(found, Block):
                    branches.setdefault(call.module, []).append(found)
                elif call.module not in wholes:
                    self.staying.append((call.module or type(self.model).__name__, found))
        blocks: list[Block] = []
        for module, block in wholes.items():
            if module not in inner:  # a module of blocks leaves block by block
                blocks.append(block)
        return blocks + [b for own in branches.values() for b in own]

    def _adds(self, call: Call) -> list[int]:
        return [i for i in range(call.start, call.end) if is_plain_add(self.ops[i].name, self.ops[i].args)]

    def _whole(self, module: str, calls: list[Call]) -> Block | None:
        """The module as a block: from its first argument to its result the way leads through additions only."""
        found: set[tuple[tuple[int, int], ...]] = set()
        ops: set[int] = set()
        for call in calls:
            if not module or call.given is None or call.returned is None or call.arity:
                return None
            adds = self._path(call)
            if not adds:
                return None
            found.add(tuple(adds))
            ops.update(range(call.start, call.end))
        if len(found) != 1:
            return None
        return Block(module, module, list(found.pop()), {module: ("identity", 0)}, ops, True)

    def _path(self, call: Call) -> list[tuple[int, int]]:
        assert call.given is not None
        through, derived = {call.given}, {call.given}
        numbers = {i: n for n, i in enumerate(self._adds(call))}
        adds: dict[Node, list[tuple[int, int]]] = {call.given: []}
        for i in range(call.start, call.end):
            op, reads = self.ops[i], self.reads[i]
            if not derived.intersection(reads):
                continue
            derived.update(self.writes[i])
            if i in numbers:
                first, second = reads[:2]
                if (first in through) != (second in through) and first in derived and second in derived:
                    operand = 1 if first in through else 0
                    if self._has_left(call, i, operand):  # the other branches keep the names they had beside it
                        return []
                    through.update(self.writes[i])
                    before = adds[first if operand else second]
                    adds.update({node: [*before, (numbers[i], operand)] for node in self.writes[i]})
            elif op.name in _MAYBE_IDENTITY and reads[0] in through and op.outs[0].shape == op.args[0].shape:
                through.add(self.writes[i][0])
                adds[self.writes[i][0]] = adds[reads[0]]
        return adds.get(call.returned, []) if call.returned is not None else []

    def _own_residuals(self, call: Call) -> Iterable[tuple[int, int, int]]:
        """Residual additions that run in a call itself, not in a module within: number, operand, operation."""
        inside = {i for child in call.children for i in range(child.start, child.end)}
        for number, i in enumerate(self._adds(call)):
            if i in inside:
                continue
            for operand in (1, 0):
                skip, branch = self.reads[i][1 - operand], self.reads[i][operand]
                if skip in self._slice(call, branch)[1]:
                    if not self._has_left(call, i, operand):
                        yield number, operand, i
                    break

    def _has_left(self, call: Call, index: int, operand: int) -> bool:
        """Whether the branch of an addition has left already: zeros stand in its place."""
        skip, branch = self.reads[index][1 - operand], self.reads[index][operand]
        return any(i in self.zeros and i > skip[0] for i in self._slice(call, branch)[0])

    def _slice(self, call: Call, node: Node) -> tuple[set[int], set[Node]]:
        """Operations of a call from which a value was made, and the values that they read."""
        ops: set[int] = set()
        met: set[Node] = set()
        stack = [node]
        while stack:
            made = stack.pop()[0]
            if made < call.start or made in ops:
                continue
            ops.add(made)
            met.update(self.reads[made])
            stack += self.reads[made]
        return ops, met

    def _branch(self, call: Call, number: int, operand: int, index: int) -> Block | str:
        """The branch that an addition adds, or why it cannot leave."""
        skip, branch = self.reads[index][1 - operand], self.reads[index][operand]
        ops = {i for i in self._slice(call, branch)[0] if i > skip[0]} | {index}
        if len(self.by_module[call.module]) > 1:
            return "the module runs more than once"
        parts = self._exclusive(call, ops)
        counts = Counter(part.module for part in parts)
        parts = [p for p in parts if counts[p.module] == len(self.by_module[p.module]) and p.module]
        parts = [p for n, p in enumerate(parts) if p.module not in {q.module for q in parts[:n]}]
        if not parts:
            return "no module is used for its branch alone"
        gone = {i for p in parts for c in self.by_module[p.module] for i in range(c.start, c.end)}
        size = {p.module: sum(t.numel() for t in self.model.get_submodule(p.module).parameters()) for p in parts}
        block = Block(max(size, key=lambda m: size[m]), call.module, [(number, operand)], {}, gone, False)
        # Zeros where a result goes on to what stays: at the last such place, or at each.
        ends = [p for p in parts if any(r not in gone for r in self.readers.get(p.returned, ()))]  # type: ignore[arg-type]
        for zeros in ([parts[-1]], ends):
            kinds = {p.module: ("zero" if p in zeros else "identity", p.arity) for p in parts}
            if kinds not in block.options:
                block.options.append(kinds)
        return block

    def _exclusive(self, call: Call, ops: set[int]) -> list[Call]:
        """Calls within a call that serve some operations alone, the outermost ones."""
        found = []
        for child in call.children:
            own = range(child.start, child.end)
            if not ops.intersection(own):
                continue
            outside = {r for i in own for node in self.writes[i] for r in self.readers.get(node, ()) if r not in own}
            lost = any(node in self.final for i in own for node in self.writes[i])
            if outside <= ops and not lost:
                found.append(child)
            else:
                found += self._exclusive(child, ops)
        return found


def _walk(call: Call) -> Iterator[Call]:
    yield call
    for child in call.children:
        yield from _walk(child)

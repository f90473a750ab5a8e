"""Plans by which whole residual blocks leave: which can, what they are worth, which do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.channels.block_scores import resolve_blocks
from lightning_prune.channels.budget import Budget, CostModel
from lightning_prune.channels.equality import check_inputs, default_dtype, random_tensors
from lightning_prune.channels.labels import Labels
from lightning_prune.channels.left import leaving_tensors, left_out, silent
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.recording import Recording
from lightning_prune.channels.residual import Block, BlockScores, Residuals
from lightning_prune.channels.sight import Sight
from lightning_prune.channels.surgery import substituted
from lightning_prune.channels.trace import ChannelGraph, propagate
from lightning_prune.errors import BudgetError, ConfigError, TraceError
from lightning_prune.running import call_model, evaluation, map_tensors, output_tensors
from lightning_prune.wrappers import uncompiled


@dataclass
class Blocks:
    """The residual blocks of a model.

    Attributes:
        removable: Blocks that can leave, in the order in which they run.
        staying: Name and reason of residual additions that cannot.
        macs: Multiply-adds of the whole model at the traced inputs.
    """

    removable: list[Block]
    staying: list[tuple[str, str]]
    macs: int = 0

    def keep_whole(self, blocks: Iterable[Block], reason: str) -> None:
        """Let blocks stay: no plan over the same graph takes them out; ``explain()`` gives the reason.

        Args:
            blocks: Some of ``removable``.
            reason: Why.
        """
        chosen = {id(block) for block in blocks}
        self.staying += [(block.name, reason) for block in self.removable if id(block) in chosen]
        self.removable = [block for block in self.removable if id(block) not in chosen]

    def explain(self) -> str:
        """Describe both as text."""
        lines = [f"{len(self.removable)} residual blocks that can leave"]
        for block in self.removable:
            rest = "" if block.whole else f" (a branch of {block.module or 'the model'}: {', '.join(block.parts)})"
            lines.append(f"  {block.name}{rest}")
        lines.append(f"{len(self.staying)} residual additions that stay")
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.staying])


def find_blocks(graph: ChannelGraph) -> Blocks:
    """Find the residual blocks of a model that can leave whole.

    A block is an addition of a value and a function of that value, within one module, found in a recorded pass; names
    of classes play no part. Where the way from a module's first argument to its result leads through such additions
    alone, the module can be left out; where a module holds several (attention and MLP of a transformer layer), or does
    more than that, the branch of one addition can be, if modules serve it alone. Each is tried on stand-in random
    weights: the module without the branch must give exactly what it gives when the branch contributes nothing. That
    refuses a ReLU after the addition unless its input is never negative, and a LayerNorm after it.

    Args:
        graph: The traced model; what is found is kept with it, and given again at the next call.

    Returns:
        Blocks that can leave, and additions that stay, with the reason. No two blocks lie within each other; the
        smaller ones are offered.
    """
    if isinstance(graph.blocks, Blocks):
        return graph.blocks
    model = graph.model
    with uncompiled(model):
        residuals = Residuals(model, graph.example_inputs)
        staying = list(residuals.staying)  # the first reason given for a module counts
        usable = _choose(_tried(model, graph.example_inputs, residuals.candidates, staying))
        usable = _together(model, graph.example_inputs, usable, staying)
    macs = _macs(residuals.recording)
    for block in usable:
        block.macs = sum(macs.get(id(residuals.ops[i]), 0) for i in block.ops)
    usable.sort(key=lambda block: min(block.ops))
    left = {block.module for block in usable}
    reasons: dict[str, str] = {}
    for name, why in staying:
        if name not in left:
            reasons.setdefault(name, why)
    graph.blocks = Blocks(usable, list(reasons.items()), sum(macs.values()))
    return graph.blocks


def _macs(recording: Recording) -> dict[int, int]:
    """Multiply-adds of each operation, by identity."""
    found: dict[int, int] = {}
    for product in propagate([recording], Labels()).products:
        size = product.constant * int(np.prod([array.size for array in product.arrays]))
        found[id(product.op)] = found.get(id(product.op), 0) + size
    return found


def _tried(model: nn.Module, example_inputs: Any, blocks: list[Block], staying: list[tuple[str, str]]) -> list[Block]:
    """Blocks whose module, alone and on random weights, does without the branch what it does when that is zero."""
    verdicts: dict[int, str] = {}
    busy: list[bool] = []
    by_module: dict[str, list[Block]] = {}
    for block in blocks:
        by_module.setdefault(block.module, []).append(block)

    def judge(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if busy:
            return
        busy.append(True)
        try:
            for block in by_module[name]:
                verdict = _try(model, block, args, kwargs)
                verdicts[id(block)] = verdicts.get(id(block)) or verdict
        finally:
            busy.pop()

    dtype = torch.float32
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, n=name: judge(n, args, kwargs), with_kwargs=True
        )
        for name in by_module
    ]
    try:
        with substituted(model, random_tensors(model, dtype, 0)), default_dtype(dtype), evaluation(model):
            call_model(model, check_inputs(example_inputs, dtype, 0))
    except RuntimeError as error:
        raise TraceError(f"{type(model).__name__} does not run on random weights in float32 ({error}).") from error
    finally:
        for handle in handles:
            handle.remove()
    refused = [block for block in blocks if verdicts.get(id(block), "it did not run")]
    staying += [(block.module or type(model).__name__, verdicts[id(block)]) for block in refused]
    return [block for block in blocks if block not in refused]


def _try(model: nn.Module, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a block cannot leave, judged by one call of its module; empty if it can. Settles what stands for it."""
    verdict = ""
    for parts in block.options or [block.parts]:
        verdict = _try_parts(model, replace(block, parts=parts), args, kwargs)
        if not verdict:
            block.parts, block.options = parts, []
            break
    return verdict


def _try_parts(model: nn.Module, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    module = model.get_submodule(block.module)
    left = [block.entry()]

    def run() -> Any:
        return module.forward(*map_tensors(torch.clone, args), **map_tensors(torch.clone, kwargs))

    mode = silent(model, left)
    mode.enter(block.module)
    with mode:
        want = output_tensors(run())
    try:
        if block.whole:
            got = output_tensors(args[0])
        else:
            with left_out(model, left):
                got = output_tensors(run())
                torch.backends.mha.set_fastpath_enabled(True)
                run()
    except Exception as error:
        return f"the code does not run without its branch ({type(error).__name__}: {str(error)[:120]})"
    finally:
        torch.backends.mha.set_fastpath_enabled(False)
    alike = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(want, got, strict=False)]
    if len(want) != len(got) or not all(alike):
        after = "what follows the addition changes its input" if block.whole else "the code needs more than its result"
        return f"it is no identity without its branch: {after}"
    return ""


def _choose(blocks: list[Block]) -> list[Block]:
    """Of blocks that overlap the smaller ones, but whole modules before a part of their branches."""
    wholes = {block.module: block for block in blocks if block.whole}
    chosen = []
    for block in blocks:
        if block.whole:
            own = [b for b in blocks if not b.whole and b.module == block.module]
            if len(own) < len(block.adds) or len(block.adds) == 1:
                chosen.append(block)
            continue
        whole = wholes.get(block.module)
        if whole is None or (
            len(whole.adds) > 1 and sum(not b.whole and b.module == block.module for b in blocks) >= len(whole.adds)
        ):
            chosen.append(block)
    return [b for b in chosen if not any(o is not b and _within(o, b) for o in chosen)]


def _within(inner: Block, outer: Block) -> bool:
    places = [inner.module, *inner.parts]
    return any(p == part or p.startswith(part + ".") for part in outer.parts for p in places)


def _together(
    model: nn.Module, example_inputs: Any, blocks: list[Block], staying: list[tuple[str, str]]
) -> list[Block]:
    """Blocks without which the model runs, also where code outside of them looks at them."""
    if not blocks or _runs(model, example_inputs, blocks) is None:
        return blocks
    left = []
    for block in blocks:
        error = _runs(model, example_inputs, [block])
        if error is None:
            left.append(block)
        else:
            staying.append((block.module, f"the model does not run without it ({error})"))
    return left


def _runs(model: nn.Module, example_inputs: Any, blocks: Sequence[Block]) -> str | None:
    with left_out(model, [block.entry() for block in blocks]), evaluation(model):
        torch.backends.mha.set_fastpath_enabled(True)
        try:
            call_model(model, map_tensors(torch.clone, example_inputs))
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:120]}"
    return None


class BlockCosts:
    """What a model costs without some of its blocks.

    Args:
        graph: The traced model.
        found: Its blocks.

    Attributes:
        before: ``"channels"`` (those that could leave), ``"params"``, ``"macs"`` and ``"blocks"`` with all of them.
    """

    def __init__(self, graph: ChannelGraph, found: Blocks) -> None:
        self.blocks = blocks = found.removable
        costs = CostModel(graph)
        self.before = {what: costs.cost(what, costs.sizes) for what in ("channels", "params")}
        self.before |= {"macs": found.macs, "blocks": len(blocks)}
        self.gone = []
        parameters = dict(graph.model.named_parameters())
        for block in blocks:
            tensors = leaving_tensors(graph.model, RemovalPlan({}, {}, left=[block.entry()]))
            self.gone.append({name: t.numel() for name, t in tensors.items() if name in parameters})
        self.groups = graph.groups

    def after(self, leaving: Sequence[int]) -> dict[str, int]:
        """Costs without these blocks."""
        gone = {name: size for b in leaving for name, size in self.gone[b].items()}
        channels = sum(g.size for g in self.groups if g.makers and all(name in gone for name, _ in g.makers))
        return {
            "channels": self.before["channels"] - channels,
            "params": self.before["params"] - sum(gone.values()),
            "macs": self.before["macs"] - sum(self.blocks[b].macs for b in leaving),
            "blocks": len(self.blocks) - len(leaving),
        }


def plan_blocks(graph: ChannelGraph, budget: Budget, scores: BlockScores | None = None) -> RemovalPlan:
    """Choose which residual blocks leave.

    Args:
        graph: The traced model.
        budget: ``channels=`` is the fraction of the removable blocks that stays, ``params=`` and ``macs=`` the fraction
            of the whole model's. Blocks leave from the lowest score on until it is met. One stays, whatever its score,
            if outputs would not depend on the inputs any more without it and those that left before it, as those of a
            class token without any attention: :class:`Sight`.
        scores: ``{block name: number}`` or a function of a block and the model; higher is kept, of equals the earlier.
            None: :func:`score_blocks`.

    Returns:
        The plan, with ``costs`` for ``"blocks"`` too.

    Raises:
        BudgetError: Without all of its blocks that can leave together the model still costs more.
        ConfigError: No block can leave (and the budget asks for it), or scores that do not fit.
    """
    found = find_blocks(graph)
    blocks = found.removable
    if not blocks and budget.fraction < 1:
        raise ConfigError(f"no residual block of this model can leave. {found.explain()}")
    with uncompiled(graph.model):
        values = resolve_blocks(graph, blocks, scores)
        costs = BlockCosts(graph, found)
        order = sorted(range(len(blocks)), key=lambda b: (values[b], -b))
        leaving = _leaving(graph, budget, costs, order)
        plan = RemovalPlan({}, {}, left=[blocks[b].entry() for b in leaving])
        gone: dict[str, Tensor] = leaving_tensors(graph.model, plan)
    plan.shapes = {name: list(tensor.shape) for name, tensor in gone.items()}
    plan.groups = [{"name": b.name, "size": 1, "kept": int(i not in leaving)} for i, b in enumerate(blocks)]
    after = costs.after(leaving)
    plan.costs = {what: (before, after[what]) for what, before in costs.before.items()}
    return plan


def _leaving(graph: ChannelGraph, budget: Budget, costs: BlockCosts, order: Sequence[int]) -> list[int]:
    """Which blocks leave, ascending: the first of ``order`` that outputs can do without, until the budget is met."""
    what = "blocks" if budget.what == "channels" else budget.what
    limit = budget.fraction * costs.before[what]

    def met(leaving: Sequence[int]) -> bool:
        return costs.after(leaving)[what] <= limit

    count = next((n for n in range(len(order) + 1) if met(order[:n])), None)
    leaving, needed = list(order[:count]), list[int]()
    sight = Sight(graph.model, graph.example_inputs) if leaving else None
    if sight is not None and sight.lost(costs.blocks[b] for b in leaving):
        leaving, count = [], None
        for b in order:
            if sight.lost(costs.blocks[other] for other in [*leaving, b]):
                needed.append(b)
                continue
            leaving.append(b)
            if met(leaving):
                count = len(leaving)
                break
    if count is None:
        least = costs.after(leaving)[what] / max(1, costs.before[what])
        names = ", ".join(costs.blocks[b].name for b in needed)
        blinding = f", and without {names} too the outputs would not depend on the inputs" if needed else ""
        without = f"without {len(leaving) if needed else 'all'} of its {len(order)} removable blocks"
        raise BudgetError(
            f"Budget({budget.what}={budget.fraction}) cannot be met: {without} {least:.4f} of the {what} stay"
            f"{blinding}. Raise the budget, or remove channels too."
        )
    return sorted(leaving)

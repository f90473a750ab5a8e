"""Scores of residual blocks: one number for each, higher is kept."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.channels.left import AddsOf, leaving_tensors
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.residual import Block, BlockScores
from lightning_prune.channels.trace import ChannelGraph
from lightning_prune.errors import ConfigError, ResumeError
from lightning_prune.prunable import close_names
from lightning_prune.running import call_model, evaluation, map_tensors
from lightning_prune.wrappers import uncompiled

BLOCK_CRITERIA = ("branch", "l1", "l2", "bn_scale", "taylor", "random")


class _Measured(AddsOf):
    """Sums the norm of each branch over the norm of what it is added to."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        super().__init__(model, [block.entry() for block in blocks])
        self.sums = {block.name: 0.0 for block in blocks}

    def change(self, block: str, operand: int, args: tuple[Any, ...], in_place: bool) -> tuple[Any, ...]:
        branch, skip = args[operand].detach().double(), args[1 - operand].detach().double()
        scale = float(skip.norm())
        self.sums[block] += float(branch.norm()) / scale if scale else float("inf") if branch.any() else 0.0
        return args


def score_blocks(graph: ChannelGraph, blocks: Sequence[Block]) -> dict[str, float]:
    """Score blocks by how much they change what passes through them, on the model's own weights and example inputs.

    Rule: the norm of the branch over the norm of the value it is added to, over the whole batch, summed over the
    block's additions. 0 where removal changes nothing. The example inputs should be data: on noise the scores say
    little.

    Args:
        graph: The traced model.
        blocks: Its blocks.

    Returns:
        A score at least 0 for each block, by name.
    """
    model = graph.model
    with uncompiled(model), evaluation(model), _Measured(model, blocks).watching() as mode:
        call_model(model, map_tensors(torch.clone, graph.example_inputs))
    assert isinstance(mode, _Measured)
    return mode.sums


def resolve_blocks(graph: ChannelGraph, blocks: Sequence[Block], scores: BlockScores | None) -> np.ndarray:
    """One number a block from what the user gave.

    Raises:
        ConfigError: Missing, or not a number.
    """
    if scores is None:
        found = score_blocks(graph, blocks)
    elif callable(scores):
        found = {block.name: float(scores(block, graph.model)) for block in blocks}
    else:
        missing = [block.name for block in blocks if block.name not in scores]
        if missing:
            raise ConfigError(f"scores has no entry for block {missing[0]!r}; expected one number for each block.")
        found = {block.name: float(scores[block.name]) for block in blocks}
    values = np.array([found[block.name] for block in blocks])
    if np.isnan(values).any():
        raise ConfigError("scores of blocks are not all numbers; check the model, its inputs and the criterion.")
    return values


def parameters_of(model: nn.Module, block: Block) -> dict[str, nn.Parameter]:
    """The parameters that leave with a block, by name."""
    gone = leaving_tensors(model, RemovalPlan({}, {}, left=[block.entry()]))
    return {name: tensor for name, tensor in gone.items() if isinstance(tensor, nn.Parameter)}


def batch_norm_scales_of(model: nn.Module, block: Block) -> list[Tensor]:
    """The scales of the BatchNorms that leave with a block."""
    norms = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    own = parameters_of(model, block)
    return [p for name, p in own.items() if name.endswith("weight") and name.rpartition(".")[0] in norms]


def check_block_criterion(criterion: Any) -> None:
    """See that a criterion can judge blocks.

    Raises:
        ConfigError: It cannot.
    """
    if criterion == "fpgm":
        raise ConfigError("criterion 'fpgm' compares the filters of one layer, and says nothing of blocks.")
    if not callable(criterion) and criterion not in BLOCK_CRITERIA:
        raise ConfigError(
            f"criterion={criterion!r} is unknown{close_names(str(criterion), BLOCK_CRITERIA)} A function of a block "
            "and the model is taken too."
        )


def score_filters(model: nn.Module, block: Block, p: float) -> float:
    """Score a block by the mean norm of its filters, those of all its weight matrices and kernels together.

    The norm of a filter of n entries is ``(mean of |w|**p) ** (1 / p) * sqrt(n)``: the L2 norm, and the L1 norm over
    ``sqrt(n)``, so that layers of different fan-in, as they are initialised, compare.

    Args:
        model: The model.
        block: The block.
        p: Order of the norm, > 0.

    Raises:
        ConfigError: The block has no weights.
    """
    norms = []
    for weight in parameters_of(model, block).values():
        if weight.dim() > 1 and weight.numel() > len(weight):  # else a scale, a shift, or one number a channel
            rows = weight.detach().flatten(1).double()
            norms.append((rows.abs() ** p).mean(1) ** (1 / p) * rows.shape[1] ** 0.5)
    if not norms:
        raise ConfigError(f"block {block.name} has no weights, so no norm judges it; use criterion 'branch'.")
    return float(torch.cat([norm.cpu() for norm in norms]).mean())


def block_scores(
    criterion: Any, graph: ChannelGraph, blocks: Sequence[Block], generator: torch.Generator
) -> dict[str, Tensor]:
    """Scores by a criterion that needs no gradients, or by the user's function, for every block.

    Args:
        criterion: ``"branch"``: :func:`score_blocks`. ``"l1"``, ``"l2"``: :func:`score_filters`. ``"bn_scale"``: the
            mean absolute scale of the block's BatchNorms. ``"random"``. Or a function of a block and the model.
        graph: The traced model.
        blocks: Its blocks.
        generator: For ``"random"``.

    Shape:
        Each (1,).
    """
    model = graph.model
    if criterion == "branch":
        found = score_blocks(graph, blocks)
    elif criterion in ("l1", "l2"):
        found = {block.name: score_filters(model, block, float(criterion[1])) for block in blocks}
    elif criterion == "bn_scale":
        scales = {
            b.name: torch.cat([s.detach().abs().flatten() for s in batch_norm_scales_of(model, b)]) for b in blocks
        }
        found = {name: float(scale.double().mean()) for name, scale in scales.items()}
    elif criterion == "random":
        places = torch.randperm(len(blocks), generator=generator).tolist()
        found = {block.name: float(place) for block, place in zip(blocks, places, strict=True)}
    else:
        found = {block.name: float(criterion(block, model)) for block in blocks}
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in found.items()}


class BlockTaylor:
    """Averages the squared first-order effect of each block on the loss over optimizer steps.

    Of one step: ``(sum of weight * gradient)**2`` over all parameters that leave with the block, which is the square of
    the loss's derivative by one factor on all of them. Where a BatchNorm follows each layer, weights before it do not
    count, and the last scale and shift make it the derivative by a factor on the branch.

    Paper: Molchanov et al. 2019, arXiv:1906.10771, the first-order importance of a set of parameters that leave
    together, averaged over mini-batches; the paper's sets are filters. Deviation: with gradient accumulation or several
    processes the gradient is the mean over all that enters a step, so the square is taken of that mean.

    Args:
        model: The traced model.
        blocks: Its blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._parameters = {block.name: list(parameters_of(model, block).values()) for block in blocks}
        self._sums = dict.fromkeys(self._parameters, 0.0)
        self._steps = dict.fromkeys(self._parameters, 0)

    @torch.no_grad()
    def add(self, parameters: Iterable[nn.Parameter], scale: float = 1.0) -> None:
        """Take a step's gradients. A step whose gradients are not finite, which a scaler skips, does not count.

        Args:
            parameters: What this step moves; others, and those without a gradient, are passed over.
            scale: What the gradients were multiplied with (mixed precision).
        """
        moved = {id(p) for p in parameters if p.grad is not None}
        products = {
            name: [(p * p.grad).sum(dtype=torch.float64) for p in own if id(p) in moved]  # type: ignore[operator]
            for name, own in self._parameters.items()
        }
        seen = [name for name, own in products.items() if own]
        if not seen:
            return
        effects = torch.stack([torch.stack(products[name]).sum() for name in seen]).cpu()  # one wait a step
        for name, effect in zip(seen, (effects / scale).square().tolist(), strict=True):
            if np.isfinite(effect):
                self._sums[name] += effect
                self._steps[name] += 1

    def scores(self) -> dict[str, Tensor]:
        """The average by block, each of shape (1,).

        Raises:
            ConfigError: A block of which no gradient was seen.
        """
        unseen = [name for name, steps in self._steps.items() if not steps]
        if unseen:
            raise ConfigError(
                f"criterion 'taylor': no gradient of block {unseen[0]} was seen before the cut. Frozen layers: leave "
                "their blocks out with exclude. Manual optimisation: step the optimizers of self.optimizers(), so that "
                "on_before_optimizer_step is reached."
            )
        means = {name: total / self._steps[name] for name, total in self._sums.items()}
        return {name: torch.tensor([mean], dtype=torch.float64) for name, mean in means.items()}

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts, as lists of names and numbers."""
        return {"blocks": [[name, self._steps[name], total] for name, total in self._sums.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the sums of a checkpoint.

        Raises:
            ResumeError: They are of another network.
        """
        saved = {name: (int(steps), float(total)) for name, steps, total in state["blocks"]}
        if saved.keys() != self._parameters.keys():
            odd = sorted(saved.keys() ^ self._parameters.keys())[0]
            raise ResumeError(
                f"the checkpoint's Taylor scores and this network do not agree about block {odd}. Resume with the same "
                "network."
            )
        self._steps = {name: steps for name, (steps, _) in saved.items()}
        self._sums = {name: total for name, (_, total) in saved.items()}

"""Whether outputs depend on inputs when residual blocks have left: a class token without attention sees nothing."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.channels.equality import check_inputs, default_dtype, random_tensors
from lightning_prune.channels.left import left_out
from lightning_prune.channels.residual import Block
from lightning_prune.channels.surgery import substituted
from lightning_prune.running import call_model, evaluation, map_tensors, output_tensors


class Sight:
    """Tells which blocks a model cannot all do without: outputs that changed with the inputs would be constant.

    Judged by two passes on random weights in float32, with other numbers in every floating input. A model whose inputs
    are all whole numbers is not judged.

    Args:
        model: The model, not compiled.
        example_inputs: As for :func:`trace_channels`.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model = model
        self._tensors = random_tensors(model, torch.float32, 0)
        self._inputs = [check_inputs(example_inputs, torch.float32, seed) for seed in (0, 1)]
        self._changed = self._changing([])

    def lost(self, blocks: Iterable[Block]) -> bool:
        """Whether some output that depends on the inputs no longer does without these blocks."""
        now = self._changing(blocks)
        return any(before and not after for before, after in zip(self._changed, now, strict=False))

    def _changing(self, blocks: Iterable[Block]) -> list[bool]:
        first, second = self._outputs(blocks)
        return [a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, second, strict=False)]

    def _outputs(self, blocks: Iterable[Block]) -> list[list[Tensor]]:
        with (
            substituted(self.model, self._tensors),
            default_dtype(torch.float32),
            left_out(self.model, [block.entry() for block in blocks]),
            evaluation(self.model),
        ):
            return [output_tensors(call_model(self.model, map_tensors(torch.clone, x))) for x in self._inputs]

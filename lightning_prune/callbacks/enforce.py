"""Keeps pruned entries at exactly zero during training, at the price of one pass over the gradients."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.masks import MaskSet
from lightning_prune.sharding import local, part_like

ENTRY_BY_ENTRY = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Rprop,
)
"""Optimizers that move each entry by its own gradient and state alone.

With zeros for both they leave a zero weight at zero, so masked weights need no pass; copies of a network in one of them
do as in one each.
"""
# Second moments: at a pruned entry they divide a zero, so any positive value will do, and 1 is kinder than 0: on some
# CPUs the square root of an exact 0 takes seven times as long as another (Adam's step of LeNet-300-100: 0.7 or 1.4 ms).
_DIVISORS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def zero_(tensor: Tensor, bits: Tensor) -> None:
    """Set entries of ``tensor`` to +0 where ``bits`` is 0, whatever they hold; entries where it is -1 keep every bit.

    A bitwise "and" on the float's bits costs what a multiplication costs (half of ``masked_fill_`` on a CPU), and
    unlike a multiplication leaves no -0, and no NaN where an infinity stood.

    Args:
        tensor: Any dtype of 1, 2, 4 or 8 bytes.
        bits: Same shape; an integer of the same width, 0 (pruned) or -1 (kept).
    """
    with torch.no_grad():
        tensor.detach().view(bits.dtype).bitwise_and_(bits)


def bits_like(mask: Tensor, tensor: Tensor) -> Tensor:
    """The form of ``mask`` that :func:`zero_` takes, in the memory layout of ``tensor``."""
    bits = torch.empty_like(tensor, dtype=_BITS[tensor.element_size()], requires_grad=False)
    return bits.copy_(mask).neg_()


class MaskEnforcer:
    """Holds the masks of a module's parameters on their device and applies them to gradients, weights and state.

    Of sharded parameters each process holds and masks its own part.
    """

    def __init__(self) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        self._bits: dict[str, Tensor] = {}
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self._gradients_masked = False
        self._state_is_new = False

    def attach(
        self, parameters: Mapping[str, nn.Parameter], optimizers: Iterable[Optimizer], *, every_step: bool, manual: bool
    ) -> None:
        """Watch ``optimizers``.

        Args:
            parameters: The prunable parameters by name.
            optimizers: Everything that steps them.
            every_step: Something may write gradients after they were masked: pass over the weights after every step.
            manual: Manual optimisation, where a plain ``loss.backward()`` reaches no hook of Lightning's: gradients are
                masked right before the step if they were not before.
        """
        self.detach()
        self._parameters = dict(parameters)
        self._optimizers = list(optimizers)
        for optimizer in self._optimizers:
            divides_by_zero = any(group.get("eps") == 0 for group in optimizer.param_groups)
            safe = type(optimizer) in ENTRY_BY_ENTRY and not divides_by_zero and not every_step
            self._handles.append(optimizer.register_step_post_hook(self._after_safe_step if safe else self._after_step))
            if manual:
                self._handles.append(optimizer.register_step_pre_hook(self._before_step))

    def detach(self) -> None:
        """Remove every hook and forget the masks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers, self._parameters, self._bits = [], [], {}, {}

    def set_masks(self, masks: MaskSet, *, resumed: bool = False) -> None:
        """Use ``masks`` from now on, and apply them to weights, gradients and optimizer state.

        Args:
            masks: The masks of the watched parameters.
            resumed: They come from a checkpoint, and with them an optimizer state that was cleared already.
        """
        self._bits = {}
        for name, (kept, total) in masks.kept_per_tensor().items():
            if kept < total:  # a tensor that lost nothing costs nothing
                mask = masks[name]
                parameter = self._parameters[name]
                self._bits[name] = bits_like(part_like(mask, parameter), local(parameter))
        self.mask_weights()
        self.mask_gradients()
        self._gradients_masked = False
        if resumed:
            return
        self.mask_optimizer_state()
        self._state_is_new = True  # an optimizer that has forgotten makes its state at the next step

    def mask_gradients(self) -> None:
        """Zero the gradients of pruned entries, so that they weigh in no norm and no moment."""
        for name, bits in self._bits.items():
            grad = self._parameters[name].grad
            if grad is not None:
                _zero_any(local(grad), bits)
        self._gradients_masked = True

    def mask_weights(self) -> None:
        """Zero the pruned entries themselves."""
        for name, bits in self._bits.items():
            _zero_any(local(self._parameters[name]), bits)

    def mask_optimizer_state(self) -> None:
        """Clear what optimizers remember of pruned entries: 0, and 1 where it divides that 0.

        LBFGS keeps flat directions over all entries: it forgets them.
        """
        for optimizer in self._optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.state.clear()
                continue
            for name, bits in self._bits.items():
                parameter = self._parameters[name]
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        part = local(value)
                        _zero_any(part, bits)
                        if key in _DIVISORS and type(optimizer) in ENTRY_BY_ENTRY:
                            part.masked_fill_(bits == 0, 1)

    def _before_step(self, *_: object) -> None:
        if not self._gradients_masked:
            self.mask_gradients()

    def _after_safe_step(self, *_: object) -> None:
        self._gradients_masked = False
        if self._state_is_new:
            self.mask_optimizer_state()
            self._state_is_new = False

    def _after_step(self, *_: object) -> None:
        self.mask_weights()
        self._gradients_masked = False


def _zero_any(tensor: Tensor, bits: Tensor) -> None:
    if tensor.element_size() == bits.element_size() and tensor.layout == torch.strided:
        zero_(tensor, bits)
    else:  # state kept in another precision than the weights
        with torch.no_grad():
            tensor.masked_fill_(bits == 0, 0)

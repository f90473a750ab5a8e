"""Learning-rate schedules that take the length of training from the Trainer, so that it is stated once."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from lightning_prune.errors import ConfigError


class Schedule(ABC):
    """A schedule whose length is that of one training.

    Given to :class:`ImageClassifier` instead of a scheduler; it is built when the Trainer's length is known.
    """

    @abstractmethod
    def build(self, optimizer: Optimizer, length: int) -> LRScheduler:
        """Build the scheduler.

        Args:
            optimizer: Whose rates it sets.
            length: Of one training, in steps of the scheduler (optimizer steps or epochs, as ``interval`` says).
        """


class Cosine(Schedule):
    """From the optimizer's rate down to ``final_lr`` along half a cosine (torch's ``CosineAnnealingLR``).

    Args:
        final_lr: Rate at the end of training, at least 0.
    """

    def __init__(self, final_lr: float = 0.0) -> None:
        if not final_lr >= 0:
            raise ConfigError(f"Cosine: final_lr={final_lr!r} must be at least 0.")
        self.final_lr = final_lr

    def build(self, optimizer: Optimizer, length: int) -> LRScheduler:
        """Build torch's scheduler with ``T_max=length``."""
        return CosineAnnealingLR(optimizer, T_max=length, eta_min=self.final_lr)


class OneCycle(Schedule):
    """Up to ``max_lr`` and down again, momentum the other way (torch's ``OneCycleLR``). Use ``interval="step"``.

    Args:
        max_lr: Highest rate, above 0.
        rise: Share of training spent rising, in (0, 1).
    """

    def __init__(self, max_lr: float, rise: float = 0.3) -> None:
        if not (max_lr > 0 and 0 < rise < 1):
            raise ConfigError(f"OneCycle: max_lr={max_lr!r} must be above 0 and rise={rise!r} in (0, 1).")
        self.max_lr, self.rise = max_lr, rise

    def build(self, optimizer: Optimizer, length: int) -> LRScheduler:
        """Build torch's scheduler with ``total_steps=length``."""
        return OneCycleLR(optimizer, max_lr=self.max_lr, total_steps=length, pct_start=self.rise)


class Drops(Schedule):
    """Multiply the rate by ``factor`` at given shares of training (torch's ``MultiStepLR``).

    Args:
        at: Shares of training, each in (0, 1), rising: ``[0.5, 0.75]``.
        factor: In (0, 1).
    """

    def __init__(self, at: Sequence[float], factor: float = 0.1) -> None:
        if not at or list(at) != sorted(set(at)) or not all(0 < share < 1 for share in at) or not 0 < factor < 1:
            raise ConfigError(
                f"Drops: at={list(at)!r} must be rising shares of training in (0, 1), such as [0.5, 0.75], and "
                f"factor={factor!r} in (0, 1)."
            )
        self.at, self.factor = tuple(at), factor

    def build(self, optimizer: Optimizer, length: int) -> LRScheduler:
        """Build torch's scheduler with milestones at the nearest steps."""
        return MultiStepLR(optimizer, [round(share * length) for share in self.at], gamma=self.factor)

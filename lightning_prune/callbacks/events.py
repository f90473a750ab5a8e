"""What a pruner tells the other callbacks, and how it is handed round."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_prune.masks import MaskSet

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(frozen=True)
class Position:
    """A place within one training.

    Args:
        epoch: Whole epochs completed.
        batch: Batches taken from the epoch that is under way.
        step: Optimizer steps completed (``trainer.global_step`` of the first round).
    """

    epoch: int
    batch: int
    step: int


@dataclass(frozen=True)
class PruneEvent:
    """One cut, as it is handed to every callback that defines ``on_prune(trainer, pl_module, event)``.

    When it arrives, ``masks`` are decided and the module still holds the trained weights; a rewinder replaces them.

    Args:
        round: The round that this event opens; the first cut opens round 1.
        step: ``trainer.global_step`` at the cut.
        masks: The masks from now on (``True`` = kept).
        removed: Entries removed by this cut.
        rewound_to: The rewinding point at which the round starts, or ``None``: it starts where the last one ended.
    """

    round: int
    step: int
    masks: MaskSet
    removed: int
    rewound_to: Position | None = None

    @property
    def density(self) -> float:
        """Kept entries over all entries of the prunable tensors, in [0, 1]."""
        return self.masks.density

    @property
    def sparsity(self) -> float:
        """Removed entries (in all rounds) over all entries of the prunable tensors, in [0, 1]."""
        return self.masks.sparsity


def listeners(trainer: "pl.Trainer", hook: str) -> list[Any]:
    """The callbacks of ``trainer`` that define ``hook``, in the order of their role.

    A callback's role is its ``prune_order``: weights are rewound (0) before the learning rate (1), a ticket is written
    (2) when both are, costs are taken (3) after that, and everyone else (10) sees the finished cut. Within a role the
    order of the trainer's list holds.
    """
    found = [callback for callback in trainer.callbacks if callable(getattr(callback, hook, None))]  # type: ignore[attr-defined]
    return sorted(found, key=lambda callback: getattr(callback, "prune_order", 10))


def send_prune_event(trainer: "pl.Trainer", pl_module: "pl.LightningModule", event: PruneEvent) -> None:
    """Hand ``event`` to every callback that listens, ordered by role."""
    for callback in listeners(trainer, "on_prune"):
        callback.on_prune(trainer, pl_module, event)


def send_rewinding_point(trainer: "pl.Trainer", pl_module: "pl.LightningModule", position: Position) -> None:
    """Tell every callback that defines ``on_rewinding_point`` that training has reached the rewinding point."""
    for callback in listeners(trainer, "on_rewinding_point"):
        callback.on_rewinding_point(trainer, pl_module, position)

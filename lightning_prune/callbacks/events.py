"""What a pruner tells the other callbacks, and how it is handed round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.surgery import take
from lightning_prune.counted import Counted
from lightning_prune.masks import MaskSet
from lightning_prune.prunable import canonical_name
from lightning_prune.record import RunRecord

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
class PruneEvent(Counted):
    """One cut, as it is handed to every callback that defines ``on_prune(trainer, pl_module, event)``.

    Either weights are masked or channels leave. When it arrives, ``masks`` are decided and the module still holds the
    trained weights; a rewinder replaces them. Channels of a ``plan`` have left the module, its optimizers and averaged
    copies already.

    Args:
        round: The round that this event opens; the first cut opens round 1.
        step: ``trainer.global_step`` at the cut.
        masks: The masks from now on (``True`` = kept); ``None`` where channels leave.
        removed: Entries (channels, blocks) removed by this cut.
        rewound_to: The rewinding point at which the round starts, or ``None``: it starts where the last one ended.
        plan: Which channels or blocks have left at this cut; ``None`` where weights are masked.
        module: Name of the submodule that ``plan`` is about; ``""``: the LightningModule itself.
        costs: With a plan: ``{"channels" | "params" | "macs": (now, of the dense network)}``; with one by which whole
            blocks leave ``"blocks"`` instead of channels.
        scores: ``{layer: (least, lower quartile, median, upper quartile, greatest)}`` of the scores that this cut was
            decided by, over what was left before it; empty unless a callback of the trainer has a true ``wants_scores``
            (and on other processes than the first).
        staying: Where parameters have left: for each optimizer the numbers, before the cut, of those that it still has.
        renamed: Parameters and buffers that have another name since their first holder left: new name -> old name.
    """

    round: int
    step: int
    masks: MaskSet | None
    removed: int
    rewound_to: Position | None = None
    plan: RemovalPlan | None = None
    module: str = ""
    costs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    staying: Sequence[Sequence[int]] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What is counted: ``"weights"``, ``"channels"`` or ``"blocks"``."""
        if self.masks is not None:
            return "weights"
        return "blocks" if "blocks" in self.costs else "channels"

    @property
    def kept(self) -> int:
        """Entries (channels, blocks) that are left, of the prunable ones."""
        return self.costs[self.unit][0] if self.masks is None else self.masks.kept

    @property
    def total(self) -> int:
        """Prunable entries (channels, blocks) of the dense network."""
        return self.costs[self.unit][1] if self.masks is None else self.masks.total

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """What the plan leaves of a copy of a parameter or buffer, or of state of its shape.

        Args:
            name: Its name in the LightningModule.
            tensor: Of the shape before the cut; one of another shape comes back as it is.
        """
        if self.plan is None:
            return tensor
        name = canonical_name(name)
        if self.module:
            name = name.removeprefix(canonical_name(self.module) + ".")
        axes = self.plan.keep.get(name)
        return take(tensor, axes) if axes and list(tensor.shape) == list(self.plan.shapes[name]) else tensor


def listeners(trainer: "pl.Trainer", hook: str) -> list[Any]:
    """The callbacks of ``trainer`` that define ``hook``, in the order of their role.

    A callback's role is its ``prune_order``: weights are rewound (0) before the learning rate (1), a ticket is written
    (2) when both are, costs are taken (3) after that, and everyone else (10) sees the finished cut. Within a role the
    order of the trainer's list holds.
    """
    found = [callback for callback in trainer.callbacks if callable(getattr(callback, hook, None))]  # type: ignore[attr-defined]
    return sorted(found, key=lambda callback: getattr(callback, "prune_order", 10))


def scores_wanted(trainer: "pl.Trainer") -> bool:
    """Whether this process should put quantiles of scores into the event: the first one's, where a callback asks."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return trainer.is_global_zero and any(getattr(callback, "wants_scores", False) for callback in callbacks)


def send_prune_event(trainer: "pl.Trainer", pl_module: "pl.LightningModule", event: PruneEvent) -> None:
    """Hand ``event`` to every callback that listens, ordered by role."""
    for callback in listeners(trainer, "on_prune"):
        callback.on_prune(trainer, pl_module, event)


def send_round_end(trainer: "pl.Trainer", pl_module: "pl.LightningModule", record: RunRecord) -> None:
    """Tell every callback that defines ``on_round_end`` that a row was added to the record, before the next cut."""
    for callback in listeners(trainer, "on_round_end"):
        callback.on_round_end(trainer, pl_module, record)


def send_scoring(trainer: "pl.Trainer", pl_module: "pl.LightningModule", examples: int) -> None:
    """Tell every callback that defines ``on_scoring`` that a pruner ran examples through the network to score it.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        examples: Forward passes of one example, of all processes together.
    """
    for callback in listeners(trainer, "on_scoring"):
        callback.on_scoring(trainer, pl_module, examples)


def send_costs(trainer: "pl.Trainer", row: dict[str, Any]) -> None:
    """Give a measurement of :class:`CostProfiler` to every callback that defines ``record_costs``."""
    for callback in listeners(trainer, "record_costs"):
        callback.record_costs(trainer, row)


def send_rewinding_point(trainer: "pl.Trainer", pl_module: "pl.LightningModule", position: Position) -> None:
    """Tell every callback that defines ``on_rewinding_point`` that training has reached the rewinding point."""
    for callback in listeners(trainer, "on_rewinding_point"):
        callback.on_rewinding_point(trainer, pl_module, position)

"""Moments within one training: where a round ends, in epochs and steps, and whether they can be reached."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, SequentialLR

from lightning_prune.callbacks.company import everyones
from lightning_prune.errors import ConfigError
from lightning_prune.times import TrainTime


@dataclass(frozen=True)
class Length:
    """The length of one training.

    Args:
        epochs: Epochs, the last one perhaps cut short; ``None`` where they do not end it.
        steps: Optimizer steps; 0 where that is not known.
        steps_per_epoch: ``None`` where that is not known.
        automatic: Whether Lightning steps the optimizers, so that steps can be counted beforehand.
        text: In words.
    """

    epochs: int | None
    steps: int
    steps_per_epoch: int | None
    automatic: bool
    text: str


def check_same_length(batches: float) -> None:
    """See that all processes have the same number of batches in an epoch.

    Lightning's loop exchanges a message at every batch, so a process with more of them would wait for ever, also within
    torch's ``Join``.

    Args:
        batches: Of this process.

    Raises:
        ConfigError: They have not.
    """
    numbers = everyones(batches)
    if len(set(numbers)) > 1:
        raise ConfigError(
            f"the processes have different numbers of batches in an epoch ({', '.join(map(str, numbers))}), and the "
            "longest would wait for the others for ever. Use a DistributedSampler, which evens the data out, or set "
            "Trainer(limit_train_batches=...) to the least."
        )


def place(end: TrainTime, total_steps: int, steps_per_epoch: int | None) -> tuple[int | None, int | None]:
    """A time within one training as epochs, and steps where it falls inside the last of them.

    Args:
        end: The time.
        total_steps: Length of the training.
        steps_per_epoch: ``None`` where steps cannot be told in epochs.

    Returns:
        Epochs, the last one perhaps cut short; steps, if it is. ``(None, steps)`` where epochs are not known.
    """
    if end.unit == "ep":
        return int(end.value), None
    steps = end.in_steps(total_steps)
    if steps_per_epoch is None:
        return None, steps
    full, rest = divmod(steps, steps_per_epoch)
    return full + (rest > 0), steps if rest else None


def check_ends(ends: Sequence[TrainTime], length: Length, rewind_to: TrainTime | None) -> None:
    """See that cuts lie within one training, in order, with training before and after each.

    Args:
        ends: When they come.
        length: Of the training.
        rewind_to: The rewinding point from which every round after a cut starts; ``None``: it goes on from there.

    Raises:
        ConfigError: They do not.
    """
    known = length.steps_per_epoch is not None or all(end.unit != "ep" for end in ends)
    before: TrainTime | None = None
    for end in ends:
        late, last = _against_end(end, length)
        if late or (last and rewind_to is None):
            raise ConfigError(
                f"at={end}: training ends after {length.text}, so nothing would be trained after this cut. Choose an "
                "earlier time, or put LRRewind beside the pruner, which trains on after each cut."
            )
        start = before if rewind_to is None else rewind_to
        if start is not None and known:
            first, second = (time.in_steps(length.steps, length.steps_per_epoch) for time in (start, end))
            if second <= first:
                said = f"the cut before it, at {start}" if rewind_to is None else f"the rewinding point, {start}"
                raise ConfigError(f"at={end} does not lie after {said}: no training in between. Choose a later time.")
        before = end


def _against_end(end: TrainTime, length: Length) -> tuple[bool, bool]:
    """Whether a time lies beyond the end of training, or at it, as far as that is known."""
    if end.unit == "%" and not length.steps:
        raise ConfigError(
            f"at={end}: the length of this training in steps is not known (the data has no length). Give the time in "
            "steps ('500st')."
        )
    if end.unit == "ep":
        return length.epochs is not None and end.value > length.epochs, end.value == length.epochs
    steps, counted = end.in_steps(length.steps), bool(length.steps) and length.automatic
    return counted and steps > length.steps, counted and steps == length.steps


def check_frequencies(trainer: pl.Trainer, lengths: Iterable[int]) -> None:
    """See that schedulers which step every few epochs step at the same places in each round.

    Args:
        trainer: The trainer.
        lengths: Of the rounds, in epochs.

    Raises:
        ConfigError: They would not.
    """
    for config in trainer.lr_scheduler_configs:
        odd = [epochs for epochs in lengths if epochs % config.frequency]
        if config.interval == "epoch" and odd:
            raise ConfigError(
                f"{type(config.scheduler).__name__} steps every {config.frequency} epochs, a round has {odd[0]}: it "
                "would step at other places in each round. Choose a length that divides."
            )


def check_schedule_length(trainer: pl.Trainer, total_steps: int, epochs: int | None) -> None:
    """Compare every schedule that has a length with that of one training.

    Raises:
        ConfigError: A schedule is longer than one training: its later part would never be reached in any round, which
            is what happens when it is built for the length of all rounds.
    """
    for config in trainer.lr_scheduler_configs:
        length = schedule_length(config.scheduler)
        expected = epochs if config.interval == "epoch" else total_steps
        if length is None or not expected:
            continue
        length *= config.frequency
        unit = "epochs" if config.interval == "epoch" else "steps"
        name = type(config.scheduler).__name__
        if length > expected:
            raise ConfigError(
                f"{name} is {length} {unit} long, one training {expected} {unit}: no round would reach its end. "
                "A pruner runs all rounds in one fit and the Trainer's max_epochs/max_steps is the length of *one* "
                f"training, so build the schedule for that ({expected}). LRRewind(check_length=False) allows it."
            )
        if expected - length > 1:
            rank_zero_warn(f"{name} is {length} {unit} long and one training {expected}: it ends before a round does.")


def schedule_length(scheduler: Any) -> int | None:
    """Length of a schedule in its own steps; ``None`` where it has none."""
    if isinstance(scheduler, OneCycleLR):
        return scheduler.total_steps
    if isinstance(scheduler, CosineAnnealingLR):
        return scheduler.T_max
    if isinstance(scheduler, SequentialLR):
        last = schedule_length(scheduler._schedulers[-1])
        return None if last is None else scheduler._milestones[-1] + last
    if isinstance(getattr(scheduler, "_schedulers", None), list | tuple):
        lengths = [n for n in map(schedule_length, scheduler._schedulers) if n is not None]
        return max(lengths, default=None)
    return None

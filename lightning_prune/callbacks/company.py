"""What stands beside a pruner in a trainer: what it may not, what the two agree on, what it does to gradients."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_prune.callbacks.rewind import LRRewind, WeightRewind
from lightning_prune.errors import ConfigError, PruneError
from lightning_prune.masks import MaskSet
from lightning_prune.times import TrainTime


def rewinding_point(trainer: pl.Trainer) -> TrainTime | None:
    """The point that the rewinders of ``trainer`` agree on; ``None`` without one.

    Raises:
        ConfigError: Callbacks that cannot work together.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if sum(getattr(callback, "sends_prune_events", False) for callback in callbacks) > 1:
        raise ConfigError("two pruners in one trainer would cut the same parameters at each other's back; keep one.")
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise ConfigError(
            "StochasticWeightAveraging changes the Trainer's length and schedules itself, as rounds do. "
            "Use lightning's WeightAveraging or EMAWeightAveraging instead; averaged copies stay sparse."
        )
    points: dict[type, TrainTime] = {}
    for kind in (WeightRewind, LRRewind):
        found = [callback for callback in callbacks if isinstance(callback, kind)]
        if len(found) > 1:
            raise ConfigError(f"{len(found)} {kind.__name__} callbacks would undo each other; keep one.")
        points.update((kind, callback.to) for callback in found)
    starts = {point if point.value else TrainTime.parse("0st") for point in points.values()}
    if len(starts) > 1:
        raise ConfigError(
            f"WeightRewind(to='{points[WeightRewind]}') and LRRewind(to='{points[LRRewind]}') differ: a round has "
            "one starting point. Give both the same time, in the same unit."
        )
    return starts.pop() if starts else None


def describe_rewinders(trainer: pl.Trainer) -> dict[str, Any]:
    """The rewinders of ``trainer`` with what they were given, for the record."""
    method: dict[str, Any] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightRewind | LRRewind):
            settings: dict[str, Any] = {"to": str(callback.to), "optimizer_state": callback.optimizer_state}
            if isinstance(callback, WeightRewind):
                settings |= {"reinit": callback.reinit, "seed": callback.seed}
            method[type(callback).__name__] = settings
    return method


def gradients_may_change(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether code of the user's sees gradients after they were masked and could write to them."""
    hooks = ("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
    if any(is_overridden(hook, pl_module) for hook in hooks):
        return True
    return any(
        is_overridden("on_before_optimizer_step", callback, parent=Callback)
        and not type(callback).__module__.startswith(("lightning_prune.", "lightning."))
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )


def compare_ranks(masks: MaskSet) -> None:
    """See that all processes go on with the same masks.

    Raises:
        PruneError: They differ.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    digests: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, masks.digest())
    if len(set(digests)) > 1:
        raise PruneError(
            f"processes chose different masks (digests {', '.join(d[:8] for d in digests)}): their weights have "
            "drifted apart. Check that the module draws no process's own random numbers into its weights."
        )

"""What stands beside a pruner in a trainer: what it may not, what the two agree on, what it does to gradients."""

from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_prune.callbacks.rewind import LRRewind, WeightRewind
from lightning_prune.errors import ConfigError, PruneError
from lightning_prune.masks import MaskSet
from lightning_prune.sharding import box_of, local
from lightning_prune.times import TrainTime

Result = TypeVar("Result")


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


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


def require_whole_network(trainer: pl.Trainer, consequence: str) -> None:
    """Refuse strategies under which a process may hold only parts of the network.

    Args:
        trainer: The trainer.
        consequence: What then does not work: ``"so ..."``.

    Raises:
        ConfigError: Neither one device nor DDP.
    """
    if not _holds_whole_network(trainer):
        raise ConfigError(
            f"{type(trainer.strategy).__name__} holds parameters in a form of its own, {consequence}. Use "
            "strategy='auto' on one device, or 'ddp'."
        )


def require_known_parts(trainer: pl.Trainer, consequence: str) -> None:
    """Refuse strategies under which nobody can tell which part of a parameter a process holds.

    Args:
        trainer: The trainer.
        consequence: What then does not work: ``"so ..."``.

    Raises:
        ConfigError: Neither one device, nor DDP, nor FSDP2 or tensor parallelism.
    """
    if not _holds_whole_network(trainer) and not isinstance(trainer.strategy, ModelParallelStrategy):
        raise ConfigError(
            f"{type(trainer.strategy).__name__} holds parameters in a form of its own, {consequence}. Use "
            "strategy='auto' on one device, 'ddp', or ModelParallelStrategy (FSDP2, tensor parallelism)."
        )


def _holds_whole_network(trainer: pl.Trainer) -> bool:
    strategy = trainer.strategy  # DeepSpeed's is a DDPStrategy by name only
    return isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)


def describe_company(trainer: pl.Trainer) -> dict[str, Any]:
    """What belongs to the method beside the pruner (rewinders, a regulariser), with its settings, for the record."""
    method: dict[str, Any] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightRewind | LRRewind):
            settings: dict[str, Any] = {"to": str(callback.to), "optimizer_state": callback.optimizer_state}
            if isinstance(callback, WeightRewind):
                settings |= {"reinit": callback.reinit, "seed": callback.seed}
            method[type(callback).__name__] = settings
        elif hasattr(callback, "hyper_parameters") and not getattr(callback, "sends_prune_events", False):
            method[type(callback).__name__] = callback.hyper_parameters()
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


def loss_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """What gradients are still multiplied with: fused optimizers unscale within their step."""
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaled else 1.0


def compare_ranks(digest: str, what: str = "masks") -> None:
    """See that all processes go on with the same masks, or plan.

    Args:
        digest: Of this process's.
        what: Of which, for the message.

    Raises:
        PruneError: They differ.
    """
    digests = everyones(digest)
    if len(set(digests)) > 1:
        raise PruneError(
            f"processes chose different {what} (digests {', '.join(d[:8] for d in digests)}): their weights have "
            "drifted apart. Check that the module draws no process's own random numbers into its weights."
        )


def compare_masks(masks: MaskSet) -> None:
    """See that all processes go on with the same masks; of sharded ones, those that hold the same part.

    Raises:
        PruneError: They differ.
    """
    if not masks.is_sharded:
        compare_ranks(masks.digest())
        return
    own = {(name, box_of(mask)): MaskSet({name: local(mask)}).digest() for name, mask in masks.items()}
    found: dict[Any, set[str]] = {}
    for held in everyones(own):
        for part, digest in held.items():
            found.setdefault(part, set()).add(digest[:8])
    for (name, _), digests in found.items():
        if len(digests) > 1:
            raise PruneError(
                f"processes that hold the same part of {name!r} chose different masks (digests "
                f"{', '.join(sorted(digests))}): their weights have drifted apart."
            )


def everyones(value: Any) -> list[Any]:
    """A value of each process, in the order of ranks; of the only one where there is no other."""
    if not _distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def together(function: Callable[[], Result]) -> Result:
    """Call ``function`` on every process; where it fails on one, no process goes on.

    Raises:
        PruneError: It failed on another process. On the one where it failed, its own error.
    """
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    messages = everyones(None if failure is None else str(failure))
    failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if failed and failure is None:
        raise PruneError(f"process {failed[0][0]} failed: {failed[0][1]}")
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def decided_once(function: Callable[[], Result], group: Any = None) -> Result:
    """Call ``function`` on process 0 and give every process what it returned, or its error.

    Args:
        function: Its result is pickled: plain content.
        group: Processes that wait, and how long; all of them, as long as the trainer's own, if left out.

    Raises:
        PruneError: It failed; on process 0 its own error.
    """
    if not _distributed():
        return function()
    outcome: list[Any] = [None, None]
    failure = None
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            failure, outcome[1] = error, str(error)
    torch.distributed.broadcast_object_list(outcome, src=0, group=group)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise PruneError(f"process 0 failed: {outcome[1]}")
    return outcome[0]

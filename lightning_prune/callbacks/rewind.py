"""Rewinding: what a round starts from. Weights (`WeightRewind`) and the learning-rate schedule (`LRRewind`)."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks.events import Position, PruneEvent
from lightning_prune.callbacks.shards import get_snapshot, put_snapshot
from lightning_prune.errors import ConfigError, ResumeError
from lightning_prune.sharding import any_sharded, local, reshard
from lightning_prune.times import TrainTime


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of ``module`` by name, non-persistent buffers too, each shared tensor once.

    Sharded parameters are given as such, also where FSDP2 holds the whole for a moment.
    """
    reshard(module)
    return dict(module.named_parameters()) | dict(module.named_buffers())


def reinitialize(module: nn.Module) -> None:
    """Draw every parameter anew by ``reset_parameters()``, as at construction; buffers with it.

    The outermost module that defines ``reset_parameters`` is asked and its children are not, so that a network with an
    initialisation of its own keeps it.

    Raises:
        ConfigError: A parameter that no ``reset_parameters`` reaches; the message names it.
    """
    reached: set[int] = set()

    def visit(part: nn.Module) -> None:
        if callable(getattr(part, "reset_parameters", None)):
            part.reset_parameters()  # type: ignore[operator]
            reached.update(id(p) for p in part.parameters())
            return
        for child in part.children():
            visit(child)

    with torch.no_grad():
        visit(module)
    missed = [name for name, p in module.named_parameters() if id(p) not in reached]
    if missed:
        raise ConfigError(
            f"random re-initialisation does not know how to draw {missed[0]!r}"
            + (f" and {len(missed) - 1} more" if len(missed) > 1 else "")
            + ": no module around it defines reset_parameters(). Define it on the network."
        )


class _Rewinder(Callback):
    """What both rewinders do: name their point, refuse to stand alone, know what a fresh optimizer remembers."""

    def __init__(self, to: str, optimizer_state: str, choices: tuple[str, ...]) -> None:
        if optimizer_state not in choices:
            raise ConfigError(
                f"optimizer_state={optimizer_state!r} is unknown; choose one of {', '.join(map(repr, choices))}."
            )
        self.to = TrainTime.parse(to, f"{type(self).__name__}(to)")
        self.optimizer_state = optimizer_state
        self._initial_optimizers: list[dict[str, Any]] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse to stand alone."""
        if stage == "fit":
            require_pruner(trainer, self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember what a fresh optimizer remembers (nothing, except for Adagrad), for ``"reset"``."""
        if self.optimizer_state == "reset":
            self._initial_optimizers = [_remembered(optimizer) for optimizer in trainer.optimizers]

    def _no_snapshot(self) -> ResumeError:
        return ResumeError(
            f"{type(self).__name__} has no snapshot of {self.to}: the checkpoint this run was resumed from was written "
            "without it, after the rewinding point. Resume from a checkpoint of a run with the same callbacks."
        )

    def _check_same_point(self, saved: str) -> None:
        if str(self.to) != saved:
            name = type(self).__name__
            raise ResumeError(
                f"the checkpoint was written with {name}(to='{saved}'), this run has {name}(to='{self.to}')."
            )


class WeightRewind(_Rewinder):
    """Set the surviving weights back to what they were at the rewinding point, at every prune event.

    Restores every parameter *and buffer* (BatchNorm statistics too) under the new mask. Captures them once, when
    training reaches ``to`` in round 0. Acts in: the prune event, before every other listener. Changes in place:
    parameters, buffers, optimizer state.

    Paper: Frankle & Carbin 2019, arXiv:1803.03635 (``to="0st"``); Frankle et al. 2019, arXiv:1903.01611 (later points).
    Deviation: the first round is not interrupted at the rewinding point (open_lth stops and starts anew there, with a
    fresh optimizer, so that even its dense round loses momentum once).

    Args:
        to: The rewinding point in one training: ``"2ep"``, ``"500st"``, ``"3%"``; ``"0st"`` is the initialisation.
        optimizer_state: What the optimizer remembers at the start of a round. ``"restore"`` (default): what it
            remembered at the rewinding point, as in Renda et al.; at ``"0st"`` that is nothing, as in the original
            lottery ticket. ``"reset"``: nothing, as open_lth does. ``"keep"``: what it remembered at the cut, masked.
        reinit: The control of the lottery ticket papers: keep the mask and draw the weights anew
            (:func:`reinitialize`) instead of restoring them.
        seed: Seeds the draws of ``reinit``; each round has its own.

    State saved: the snapshot (one copy of the weights, and of the optimizer state for ``"restore"``). Of sharded
    parameters each process keeps and saves its own part; see :mod:`lightning_prune.callbacks.shards`.

    Raises:
        ConfigError: A time that cannot be read, an unknown ``optimizer_state``; in ``setup``: no pruner beside it,
            ``reinit`` of sharded parameters.
        ResumeError: A checkpoint of another rewinding point, or whose parameters were sharded where this run's are not.

    Example:
        >>> from lightning_prune import IterativeMagnitudePruner, LRRewind, WeightRewind
        >>> callbacks = [IterativeMagnitudePruner(rounds=5), WeightRewind("3%"), LRRewind("3%")]
    """

    prune_order = 0

    def __init__(self, to: str = "0st", optimizer_state: str = "restore", reinit: bool = False, seed: int = 0) -> None:
        super().__init__(to, optimizer_state, ("restore", "reset", "keep"))
        self.reinit = reinit
        self.seed = seed
        self._snapshot: dict[str, Tensor] | None = None  # this process's parts
        self._optimizers: list[dict[str, Any]] | None = None
        self._sharded = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.reinit and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ConfigError(
                "WeightRewind(reinit=True) draws whole tensors, and ModelParallelStrategy shards them. Run this "
                "control on one device or with strategy='ddp'."
            )

    def on_rewinding_point(self, trainer: pl.Trainer, pl_module: pl.LightningModule, position: Position) -> None:
        """Take the snapshot."""
        if not self.reinit:
            state = named_state(pl_module)
            self._sharded = any_sharded(state.values())
            self._snapshot = {name: local(t).detach().to("cpu", copy=True) for name, t in state.items()}
        if self.optimizer_state == "restore":
            self._optimizers = [_remembered(optimizer) for optimizer in trainer.optimizers]

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        """Restore weights, buffers and optimizer state; the masks are applied to them, channels that left stay out."""
        if self._snapshot is not None and event.plan is not None:
            self._snapshot = remaining(self._snapshot, pl_module, event)
        for states in (self._optimizers, self._initial_optimizers):
            slice_remembered(states, trainer.optimizers, pl_module, event)
        if self.reinit:
            devices = [d for d in {p.device for p in pl_module.parameters()} if d.type == "cuda"]
            with torch.random.fork_rng(devices):
                torch.manual_seed(self.seed * 1000 + event.round)
                reinitialize(pl_module)
        else:
            if self._snapshot is None:
                raise self._no_snapshot()
            with torch.no_grad():
                for name, tensor in named_state(pl_module).items():
                    local(tensor).copy_(self._snapshot[name])
        if event.masks is not None:
            event.masks.apply_(pl_module)
        chosen = {"restore": self._optimizers, "reset": self._initial_optimizers, "keep": None}[self.optimizer_state]
        if chosen is not None:
            for optimizer, state in zip(trainer.optimizers, chosen, strict=True):
                _recall(optimizer, state)

    def state_dict(self) -> dict[str, Any]:
        """The snapshot, unless it is sharded."""
        if self._sharded:
            return {"to": str(self.to), "snapshot": None, "optimizers": None}
        return {"to": str(self.to), "snapshot": self._snapshot, "optimizers": self._optimizers}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add a sharded snapshot, part by part."""
        if self._sharded:
            own = checkpoint["callbacks"][self.state_key]
            own["sharded"] = put_snapshot(checkpoint, named_state(pl_module), self._snapshot, self._optimizers)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up this process's parts of a sharded snapshot."""
        saved = checkpoint["callbacks"].get(self.state_key, {})
        if trainer.state.fn != "fit" or not (saved.get("snapshot") or saved.get("sharded")):
            return
        own = named_state(pl_module)
        self._sharded = any_sharded(own.values())
        if self._sharded != ("sharded" in saved):
            then, now = ("sharded", "whole") if "sharded" in saved else ("whole", "sharded")
            raise ResumeError(
                f"the checkpoint's rewinding point is of {then} parameters, and this run's parameters are {now}. "
                "Resume with the strategy that it was written with."
            )
        if self._sharded:
            self._snapshot, self._optimizers = get_snapshot(trainer, own, saved["sharded"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the snapshot of a checkpoint."""
        self._check_same_point(state_dict["to"])
        if "sharded" not in state_dict:
            self._snapshot = state_dict["snapshot"]
            self._optimizers = state_dict["optimizers"]


class LRRewind(_Rewinder):
    """Set the learning-rate schedule back to where it was at the rewinding point, at every prune event.

    Restores the state of every scheduler and every field of every parameter group (learning rate, scheduled momentum
    and betas, counters of reduce-on-plateau), captured when training reaches ``to`` in round 0. Alone it is
    learning-rate rewinding: weights stay as trained. With :class:`WeightRewind` it replays the schedule for rewound
    weights. Without it the learning rate stays at the schedule's final value in every later round (fine-tuning).

    Acts in: the prune event, after :class:`WeightRewind`. Changes in place: schedulers, ``optimizer.param_groups``,
    and optimizer state where ``optimizer_state`` says so.

    Paper: Renda, Frankle & Carbin 2020, arXiv:2003.02389. Deviation: none; its code keeps the momentum of the end of
    training, which is the default here (``optimizer_state="keep"``).

    Args:
        to: The rewinding point in one training: ``"2ep"``, ``"500st"``, ``"3%"``; ``"0st"`` replays the whole schedule.
        optimizer_state: Without a :class:`WeightRewind` beside it (which owns this otherwise): ``"keep"`` (default) or
            ``"reset"``.
        check_length: Refuse schedules whose own length (``T_max``, ``total_steps``) is longer than one training.

    State saved: scheduler states and parameter-group fields of the rewinding point.

    Raises:
        ConfigError: A time that cannot be read; in ``setup``: no pruner beside it; in ``on_fit_start``: a schedule
            whose length is not one training's, or a reduce-on-plateau scheduler with a rewinding point inside an epoch.

    Limits:
        Under manual optimisation the module itself steps its schedulers; their state is restored all the same.
    """

    prune_order = 1

    def __init__(self, to: str = "0st", optimizer_state: str = "keep", check_length: bool = True) -> None:
        super().__init__(to, optimizer_state, ("keep", "reset"))
        self.check_length = check_length
        self._schedulers: list[dict[str, Any]] | None = None
        self._groups: list[list[dict[str, Any]]] | None = None

    def on_rewinding_point(self, trainer: pl.Trainer, pl_module: pl.LightningModule, position: Position) -> None:
        """Take the snapshot."""
        plateau = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
        if plateau and position.batch != 0:
            raise ConfigError(
                f"LRRewind(to='{self.to}') lies inside an epoch (batch {position.batch}), where a reduce-on-plateau "
                "scheduler has no state of its own: it follows metrics. Choose a point at the end of an epoch ('2ep')."
            )
        self._schedulers = [deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
        self._groups = [
            [{key: deepcopy(value) for key, value in group.items() if key != "params"} for group in o.param_groups]
            for o in trainer.optimizers
        ]

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        """Restore schedulers and parameter groups."""
        if self._schedulers is None or self._groups is None:
            raise self._no_snapshot()
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=True):
            config.scheduler.load_state_dict(deepcopy(state))
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                _restore_group(group, saved)
        slice_remembered(self._initial_optimizers, trainer.optimizers, pl_module, event)
        alone = not any(isinstance(callback, WeightRewind) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if alone and self._initial_optimizers is not None:
            for optimizer, state in zip(trainer.optimizers, self._initial_optimizers, strict=True):
                _recall(optimizer, state)

    def state_dict(self) -> dict[str, Any]:
        """The snapshot."""
        return {"to": str(self.to), "schedulers": self._schedulers, "groups": self._groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the snapshot of a checkpoint."""
        self._check_same_point(state_dict["to"])
        self._schedulers = state_dict["schedulers"]
        self._groups = state_dict["groups"]


def require_pruner(trainer: pl.Trainer, callback: Callback) -> None:
    """Refuse a listener in a trainer where nothing prunes.

    Raises:
        ConfigError: No callback of the trainer sends prune events.
    """
    if not any(getattr(other, "sends_prune_events", False) for other in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError(
            f"{type(callback).__name__} acts at prune events, and no pruner is among the trainer's callbacks. "
            "Add one (IterativeMagnitudePruner, ChannelPruner) or take it out."
        )


def _remembered(optimizer: Optimizer) -> dict[str, Any]:
    """A copy of the optimizer's state per parameter, by the parameter's number."""
    return deepcopy(optimizer.state_dict()["state"])


def _recall(optimizer: Optimizer, state: dict[Any, Any]) -> None:
    """Give the optimizer a remembered state; its parameter groups stay as they are."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": deepcopy(state), "param_groups": groups})


def remaining(snapshot: Mapping[str, Tensor], pl_module: nn.Module, event: PruneEvent) -> dict[str, Tensor]:
    """What is left of copies of parameters and buffers after a cut, by the names that these have now."""
    old = {name: event.renamed.get(name, name) for name in named_state(pl_module)}
    return {name: event.slice(before, snapshot[before]) for name, before in old.items()}


def slice_remembered(
    states: list[dict[Any, Any]] | None, optimizers: list[Optimizer], pl_module: nn.Module, event: PruneEvent
) -> None:
    """Take channels and parameters that have left out of what optimizers remembered, in place."""
    if states is None or event.plan is None:
        return
    for state, numbers in zip(states, event.staying, strict=False):
        held = {new: state[old] for new, old in enumerate(numbers) if old in state}
        state.clear()
        state.update(held)
    names = {id(p): name for name, p in pl_module.named_parameters()}
    for optimizer, state in zip(optimizers, states, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, values in state.items():
            name = names.get(id(parameters[number]), "")
            values.update({k: event.slice(name, v) for k, v in values.items() if isinstance(v, Tensor)})


def _restore_group(group: dict[str, Any], saved: dict[str, Any]) -> None:
    for key, value in saved.items():
        if isinstance(group.get(key), Tensor) and isinstance(value, Tensor):
            group[key].copy_(value)  # a learning rate held as a tensor is read by compiled steps: same object
        else:
            group[key] = deepcopy(value)

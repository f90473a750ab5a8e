"""Iterative magnitude pruning: all rounds of a lottery-ticket experiment in one fit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_prune.callbacks import monitors
from lightning_prune.callbacks.company import (
    compare_ranks,
    describe_rewinders,
    gradients_may_change,
    rewinding_point,
)
from lightning_prune.callbacks.enforce import MaskEnforcer
from lightning_prune.callbacks.events import PruneEvent, send_prune_event, send_rewinding_point
from lightning_prune.callbacks.folders import tries_out
from lightning_prune.callbacks.recorder import RoundRecorder
from lightning_prune.callbacks.rewind import LRRewind, WeightRewind, check_schedule_length
from lightning_prune.callbacks.rounds import RoundSchedule
from lightning_prune.callbacks.tickets import TicketWriter
from lightning_prune.checkpoint import load_ticket
from lightning_prune.counting import RULES
from lightning_prune.errors import ConfigError, MaskMismatchError, ResumeError
from lightning_prune.masks import MaskSet
from lightning_prune.prunable import close_names, matching, prunable_parameters
from lightning_prune.resume import ResumeState
from lightning_prune.scores import MagnitudeScores, score_weights
from lightning_prune.selection import select
from lightning_prune.times import TrainTime

CONTROLS = (None, "random_pruning")
_NEVER_STEPPED = 2**62


class IterativeMagnitudePruner(Callback):
    """Train, remove the smallest weights, train on: ``rounds`` times in one ``fit``.

    The Trainer's ``max_epochs``/``max_steps`` is the length ``T`` of *one* training; build schedules for that. The
    limit is raised to hold all rounds: ``T + rounds * (T - k)`` with the rewinding point ``k`` read from
    :class:`WeightRewind` and :class:`LRRewind` beside it, ``T + rounds * T`` without them. A cut happens at the start
    of the next round's first epoch, so validation, checkpoints and the record see the trained network before it.
    Each cut removes ``round(fraction * remaining)`` weights (half to even), exactly, those of smallest final magnitude;
    of equal ones the later in the network leaves first.

    Acts in: ``on_train_epoch_start`` (cut), ``on_after_backward`` (gradients of pruned entries are zeroed, so they
    weigh in no norm and no moment), after a step only where an optimizer could move a zero. Changes in place:
    weights, gradients, optimizer state. ``state_dict`` keys never change. ModelCheckpoint keeps its best per round and
    carries the round in its file names; EarlyStopping ends the round, not the fit.

    Paper: Frankle & Carbin 2019, arXiv:1803.03635, and, by the rewinders beside it, Frankle et al. 2019,
    arXiv:1903.01611 and Renda et al. 2020, arXiv:2003.02389. Deviations: counts are exact (the references remove one
    more, and all ties); pruned weights are held at zero by their gradients instead of being multiplied in the forward
    pass. ``counting`` brings the references' rules back.

    Args:
        fraction: Of the weights that remain, the part that each cut removes; in (0, 1). Default 0.2 (paper).
        rounds: Number of cuts, at least 1; the fit holds ``rounds + 1`` trainings.
        scope: ``"global"``: all weights compete; ``"layer"``: each tensor loses ``fraction`` of its own.
        exclude: Parameters (names, names of modules, or patterns such as ``"*.fc.weight"``) that are never pruned.
            Biases, normalisation and embeddings never are.
        include: Parameters to prune beside the default set, in the same form.
        rates: Tensors with a fraction of their own, by name or pattern, such as ``{"fc3.weight": 0.1}``: the paper
            prunes its output layer at half the rate.
        counting: ``"exact"``, or a reference's own rule by name; see :func:`select`.
        round_length: Length of one training (``"10ep"``, ``"5000st"``) where it should differ from the Trainer's.
        control: ``"random_pruning"``: each tensor loses as many weights as it would by magnitude, at random places.
        masks_from: Folder of an earlier run's tickets: its masks are used, round by round, instead of selected ones
            (with ``WeightRewind(reinit=True)`` the random re-initialisation control of the papers).
        monitor: Validation metric shown and recorded per round, and by which a round's best step is chosen. Default:
            what a ModelCheckpoint or EarlyStopping of the trainer watches.
        mode: ``"max"`` or ``"min"``, for ``monitor``. Default: as the callback watching it has it, else ``"max"``.
        dirpath: Folder of ``record.json`` and ``rounds.csv``. Default: the run folder; without a logger none.
        seed: Seeds the random control.
        verbose: Print one line after each round.

    State saved: masks (1 bit a weight), position, record, generators and data position.

    Raises:
        ConfigError: An argument out of range; in ``setup``: callbacks that cannot work together; in ``on_fit_start``:
            nothing to prune, a pattern that matches nothing, a rewinding point or a schedule that does not fit.
        SelectionError: Weights that are NaN at a cut.
        ResumeError: A checkpoint of another configuration, or one that was written without this callback.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_prune import IterativeMagnitudePruner, LRRewind, WeightRewind
        >>> callbacks = [IterativeMagnitudePruner(fraction=0.2, rounds=10), WeightRewind("3%"), LRRewind("3%")]
        >>> trainer = Trainer(max_epochs=30, callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    sends_prune_events = True

    def __init__(
        self,
        fraction: float = 0.2,
        rounds: int = 10,
        scope: str = "global",
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
        rates: Mapping[str, float] | None = None,
        counting: str = "exact",
        round_length: str | None = None,
        control: str | None = None,
        masks_from: str | Path | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        dirpath: str | Path | None = None,
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        _check_fraction("fraction", fraction)
        for pattern, rate in (rates or {}).items():
            _check_fraction(f"rates[{pattern!r}]", rate, zero=True)
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ConfigError(f"rounds={rounds!r}: expected the number of cuts, an integer of at least 1.")
        if scope not in ("global", "layer"):
            raise ConfigError(f"scope={scope!r} is unknown; choose 'global' or 'layer'.")
        if counting != "exact" and counting not in RULES:
            raise ConfigError(f"counting={counting!r} is unknown{close_names(str(counting), ['exact', *RULES])}")
        if control not in CONTROLS:
            raise ConfigError(f"control={control!r} is unknown; choose None or 'random_pruning'.")
        if mode not in (None, "min", "max"):
            raise ConfigError(f"mode={mode!r} is unknown; choose 'min' or 'max'.")
        for name, value in (("exclude", exclude), ("include", include)):
            if isinstance(value, str):
                raise ConfigError(f"{name}={value!r}: expected a list of names; write {name}=[{value!r}].")
        self.fraction, self.rounds, self.scope = fraction, rounds, scope
        self.exclude, self.include = tuple(exclude), tuple(include)
        self.rates = dict(rates or {})
        self.counting = counting
        self.round_length = None if round_length is None else TrainTime.parse(round_length, "round_length")
        if self.round_length is not None and self.round_length.unit == "%":
            raise ConfigError(
                f"round_length='{self.round_length}': a length is in epochs ('10ep') or steps ('5000st')."
            )
        self.control = control
        self.masks_from = None if masks_from is None else Path(masks_from)
        self.seed = seed
        self.masks: MaskSet | None = None
        """The masks in force: all kept in round 0; ``None`` before a fit."""
        self._recorder = RoundRecorder(monitor, mode, dirpath, verbose)
        self._enforcer = MaskEnforcer()
        self._resume = ResumeState()
        self._schedule: RoundSchedule | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._names: dict[int, str | None] = {}
        self._frequencies: list[int] | None = None
        self._loaded: dict[str, Any] | None = None

    # ------------------------------------------------------------------- set up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check what stands beside this callback, and let one training's length be the Trainer's limit."""
        if stage != "fit":
            return
        self._loaded, self.masks = None, None
        self._schedule = RoundSchedule(self.rounds, self.round_length, rewinding_point(trainer))
        self._schedule.prepare(trainer)
        self._resume.attach(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what to prune, read the length of one training, raise the limit to hold all rounds."""
        schedule = self._running
        self._parameters = prunable_parameters(pl_module, exclude=self.exclude, include=self.include)
        for pattern in self.rates:
            matching(pattern, self._parameters, "rates")
        schedule.start(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LRRewind) and callback.check_length and not tries_out(trainer):
                check_schedule_length(trainer, schedule.total_steps, schedule.epochs)
        self._check_frequencies(trainer)
        self._enforcer.attach(
            self._parameters,
            trainer.optimizers,
            every_step=gradients_may_change(trainer, pl_module),
            manual=not pl_module.automatic_optimization,
        )
        if self._loaded is None:
            self.masks = MaskSet({name: torch.ones_like(p, dtype=torch.bool) for name, p in self._parameters.items()})
        else:
            self._check_masks_fit()
        own = {"rounds": self.rounds} | self._hyper_parameters()
        self._recorder.start(
            trainer, {type(self).__name__: own} | describe_rewinders(trainer), resumed=self._loaded is not None
        )
        monitors.name_checkpoints(trainer, schedule.round, self._names)

    def _check_frequencies(self, trainer: pl.Trainer) -> None:
        epochs, rewound = self._running.epochs, self._running.rewinding_epoch
        for config in trainer.lr_scheduler_configs:
            if config.interval == "epoch" and config.frequency > 1 and epochs and (epochs - rewound) % config.frequency:
                raise ConfigError(
                    f"{type(config.scheduler).__name__} steps every {config.frequency} epochs, a round has "
                    f"{epochs - rewound}: it would step at other places in each round. Choose a length that divides."
                )

    def _check_masks_fit(self) -> None:
        assert self.masks is not None
        ours = {name: tuple(p.shape) for name, p in self._parameters.items()}
        theirs = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        if ours != theirs:
            odd = sorted(set(ours.items()) ^ set(theirs.items()))[0]
            raise ResumeError(
                f"the checkpoint's masks do not fit this network: {odd[0]!r} of shape {odd[1]} is on one side only. "
                "Resume with the same network, exclude and include."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a resume, put masks and generators back."""
        if trainer.global_step > 0 and self._loaded is None and self._running.round == 0:
            raise ResumeError(
                "the checkpoint was written without IterativeMagnitudePruner: it holds no masks and no position. Load "
                "its weights into the module before fit() instead of passing it as ckpt_path."
            )
        if self._loaded is not None:
            assert self.masks is not None
            self._enforcer.set_masks(self.masks.to(pl_module.device), resumed=True)
            self.masks = self.masks.to(pl_module.device)
            self._hold_schedules(trainer)
        self._running.on_train_start(trainer)

    @property
    def folder(self) -> Path | None:
        """The folder with this run's record, once a fit has begun; ``None`` where nothing is written."""
        return self._recorder.folder

    @property
    def _running(self) -> RoundSchedule:
        assert self._schedule is not None
        return self._schedule

    # ---------------------------------------------------------------- in rounds

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut, if a round has ended."""
        schedule = self._running
        schedule.on_train_epoch_start(trainer)
        if schedule.is_over(trainer):
            self._cut(trainer, pl_module)

    def _cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        schedule = self._running
        if schedule.rewind_to is not None and schedule.rewound is None:
            raise ConfigError(f"round 0 ended before its rewinding point, {schedule.rewind_to}; choose an earlier one.")
        assert self.masks is not None
        before = self.masks
        masks = self._choose(before, schedule.round + 1)
        compare_ranks(masks)
        self._recorder.end_round(trainer, schedule, before)
        schedule.next_round(trainer)
        self.masks = masks
        event = PruneEvent(schedule.round, trainer.global_step, masks, before.kept - masks.kept, schedule.rewound)
        self._hold_schedules(trainer)
        send_prune_event(trainer, pl_module, event)
        self._enforcer.set_masks(masks)
        rewound = any(isinstance(callback, WeightRewind) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        monitors.cut_averages(trainer, pl_module, masks, rewound)
        monitors.start_anew(trainer)
        monitors.name_checkpoints(trainer, schedule.round, self._names)
        self._recorder.begin_round(trainer, event, self._ticket_path(trainer, event.round))
        if schedule.rewound is not None and schedule.rewound.batch:
            self._resume.fast_forward_next_epoch(schedule.rewound.batch)

    def _choose(self, before: MaskSet, round: int) -> MaskSet:  # noqa: A002
        if self.masks_from is not None:
            return self._masks_of_ticket(before, round)
        by_density = self.counting != "exact" and RULES[self.counting].takes == "density"
        masks = select(
            MagnitudeScores(self._parameters),
            density=(1 - self.fraction) ** round if by_density else None,
            fraction=None if by_density else self.fraction,
            scope=self.scope,
            within=before,
            rates=self.rates or None,
            counting=self.counting,
        )
        if self.control == "random_pruning":
            generator = torch.Generator().manual_seed(self.seed * 1000 + round)
            scores: dict[str, Tensor] = {
                name: score_weights("random", None, p.detach().cpu(), generator=generator)
                for name, p in self._parameters.items()
            }
            remove = {name: int(before[name].sum() - masks[name].sum()) for name in masks}
            masks = select(scores, remove=remove, scope="layer", within=before.to("cpu")).to(
                next(iter(before.values())).device
            )
        return masks

    def _masks_of_ticket(self, before: MaskSet, round: int) -> MaskSet:  # noqa: A002
        assert self.masks_from is not None
        path = self.masks_from / f"round-{round:02d}.safetensors"
        if not path.exists() and (self.masks_from / "tickets").is_dir():
            path = self.masks_from / "tickets" / path.name
        masks = load_ticket(path).masks.to(next(iter(before.values())).device)
        if {n: m.shape for n, m in masks.items()} != {n: m.shape for n, m in before.items()}:
            raise MaskMismatchError(
                f"{path} holds masks of another network: {', '.join(sorted(masks))}; "
                f"expected {', '.join(sorted(before))}."
            )
        return masks

    def _ticket_path(self, trainer: pl.Trainer, round: int) -> Path | None:  # noqa: A002
        writers = [c for c in trainer.callbacks if isinstance(c, TicketWriter)]  # type: ignore[attr-defined]
        return writers[0].ticket_path(trainer, round) if writers else None

    def _hold_schedules(self, trainer: pl.Trainer) -> None:
        """Without :class:`LRRewind` schedules stay where round 0 left them (fine-tuning)."""
        if self._running.round > 0 and not any(isinstance(c, LRRewind) for c in trainer.callbacks):  # type: ignore[attr-defined]
            if self._frequencies is None:
                self._frequencies = [config.frequency for config in trainer.lr_scheduler_configs]
            for config in trainer.lr_scheduler_configs:
                config.frequency = _NEVER_STEPPED

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the rewinders when round 0 reaches their point."""
        position = self._running.at_rewinding_point(trainer, batch_idx)
        if position is not None:
            self._running.rewound = position
            send_rewinding_point(trainer, pl_module, position)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Zero the gradients of pruned entries."""
        self._enforcer.mask_gradients()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the epoch where a training given in steps ends."""
        self._running.on_train_batch_end(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get ready to take the metrics."""
        self._recorder.before_validation(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the metrics."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._recorder.take_metrics(trainer, self._running)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep an early stop from ending the fit."""
        if not trainer.enable_validation:
            self._recorder.take_metrics(trainer, self._running)
        self._running.on_train_epoch_end(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the last round."""
        assert self.masks is not None
        self._recorder.end_round(trainer, self._running, self.masks)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was."""
        self._release(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if stage == "fit":
            self._release(trainer)

    def _release(self, trainer: pl.Trainer) -> None:
        self._enforcer.detach()
        self._resume.detach()
        monitors.restore_names(trainer, self._names)
        self._names = {}
        if self._frequencies is not None:
            for config, frequency in zip(trainer.lr_scheduler_configs, self._frequencies, strict=False):
                config.frequency = frequency
            self._frequencies = None
        if self._schedule is not None:
            self._schedule.restore(trainer)

    # -------------------------------------------------------------------- state

    def _hyper_parameters(self) -> dict[str, Any]:
        return {
            "fraction": self.fraction,
            "scope": self.scope,
            "exclude": list(self.exclude),
            "include": list(self.include),
            "rates": dict(self.rates),
            "counting": self.counting,
            "round_length": None if self.round_length is None else str(self.round_length),
            "control": self.control,
            "masks_from": None if self.masks_from is None else str(self.masks_from),
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Masks, position, record, generators and data position."""
        return {
            "hyper_parameters": self._hyper_parameters(),
            "rounds": self.rounds,
            "masks": None if self.masks is None else self.masks.state_dict(),
            "schedule": self._running.state_dict(),
            "recorder": self._recorder.state_dict(),
            "resume": self._resume.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint stands; more rounds than it was written for are allowed."""
        ours = self._hyper_parameters()
        for key, saved in state_dict["hyper_parameters"].items():
            if ours.get(key) != saved:
                raise ResumeError(
                    f"the checkpoint was written with {key}={saved!r}, this run has {key}={ours.get(key)!r}. "
                    "Resume with the same settings, or start a new run."
                )
        if state_dict["schedule"]["round"] > self.rounds:
            raise ResumeError(
                f"the checkpoint is in round {state_dict['schedule']['round']}, this run has rounds={self.rounds}."
            )
        self._loaded = state_dict
        self.masks = MaskSet.from_state_dict(state_dict["masks"])
        self._running.load_state_dict(state_dict["schedule"])
        self._recorder.load_state_dict(state_dict["recorder"])
        self._resume.load_state_dict(state_dict["resume"])


def _check_fraction(name: str, value: Any, zero: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not (0 <= value < 1) or (value == 0 and not zero):
        low = "[0, 1)" if zero else "(0, 1)"
        raise ConfigError(
            f"{name}={value!r}: expected the fraction of the remaining weights that a cut removes, in {low}."
        )

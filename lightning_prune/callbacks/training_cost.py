"""What a training costs in multiply-adds, and training until a given cost is spent."""

import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_prune.callbacks.company import require_whole_network
from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.examples import early_inputs, find_module, inputs_of, to_batch
from lightning_prune.callbacks.folders import run_folder, tries_out
from lightning_prune.callbacks.logs import log_numbers
from lightning_prune.callbacks.moments import schedule_length
from lightning_prune.callbacks.pruner import RoundPruner
from lightning_prune.costs import count_costs
from lightning_prune.costs.latency import batch_length
from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.files import read_json, write_json
from lightning_prune.resume import undisturbed
from lightning_prune.wrappers import bare

FORMAT, VERSION = "lightning_prune training cost", 1
COST_NAME = "training_cost.json"
FORWARD, BACKWARD = 1, 2
"""Passes in units of a forward pass: a backward pass multiplies twice, for inputs and for weights."""


def read_training_cost(path: Path) -> dict[str, Any]:
    """What :class:`TrainingCost` has written.

    Raises:
        FileFormatError: The file is missing, damaged, or none of this version.
    """
    cost = read_json(path, "a training's cost")
    if not isinstance(cost, dict) or cost.get("format") != FORMAT or cost.get("version") != VERSION:
        raise FileFormatError(f"{path} is no training's cost of this version; {FORMAT!r}, version {VERSION}, expected.")
    return cost


class TrainingCost(Callback):
    """Count the multiply-adds that a training executes, and end it where a limit is reached.

    With one limit for all, methods are compared at equal cost: a network that became smaller gets more steps for it, a
    method of many rounds gets shorter rounds.

    A training example costs a forward pass and a backward pass of the network as it is at that moment, three times the
    forward multiply-adds that :func:`count_costs` finds; examples that a pruner runs through the network to score it
    (HRank's images) cost a forward pass. Masked weights count in full: they are multiplied. Validation, equality checks
    and latency measurements do not count: no method needs them.

    Acts in: ``on_train_start``, ``on_train_batch_start`` (the first, and after a cut), ``on_train_batch_end``, the
    prune event. With ``limit``: changes the length of every ``CosineAnnealingLR`` that counts steps to what is left,
    again after each cut (it goes on from the rate that it has and ends with the limit), and sets
    ``trainer.should_stop`` after the step that comes nearest to the limit, so that validation and checkpoints end the
    fit as usual. At the end ``training_cost.json`` in the run folder holds the figures; loggers get
    ``prune/training_macs``.

    Args:
        limit: Multiply-adds to be executed, all processes together; ``None``: the Trainer's own length. The Trainer's
            length must not be reached before.
        module: Name of the network within the LightningModule. Default: the LightningModule if it defines ``forward``,
            else its only child with parameters.
        example_inputs: A tuple of arguments, a dict of keyword arguments, or the one argument of ``forward``. Default:
            ``example_input_array``, else samples of the training data, else the first batch.

    State saved: multiply-adds and seconds so far.

    Raises:
        ConfigError: A limit out of range; with a limit: a pruner that starts rounds anew, whose lengths are its own; a
            schedule with a length that is no cosine over steps; batches without a length. A strategy that shards the
            network.
        MeasurementError: The network cannot be run with the example inputs.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_prune import TrainingCost
        >>> trainer = Trainer(max_epochs=90, callbacks=[TrainingCost()], logger=False, enable_checkpointing=False)

    Limits:
        One forward and one backward pass a batch are assumed: further passes of the user's own ``training_step`` (a
        teacher's, say) are not seen. On several processes all batches count as long as this process's.
    """

    def __init__(self, limit: float | None = None, module: str | None = None, example_inputs: Any = None) -> None:
        if limit is not None and not (0 < limit < math.inf):
            raise ConfigError(f"limit={limit!r}: expected a number of multiply-adds, more than 0, or None.")
        self.limit, self.module, self.example_inputs = limit, module, example_inputs
        self.macs = 0.0
        """Multiply-adds executed so far, all processes together."""
        self.steps = 0
        """Optimizer steps that they took."""
        self.seconds = 0.0
        """Seconds from the start of training to its end, validation included."""
        self.rows: list[tuple[int, float]] = []
        """``(step, forward multiply-adds an example)``: one for the start and one for every cut."""
        self._inputs: Any = None
        self._length = 0  # of the longest batch so far
        self._stale = False
        self._since: float | None = None

    # ------------------------------------------------------------------- set up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew; a checkpoint is loaded later."""
        if stage != "fit":
            return
        require_whole_network(trainer, "so its multiply-adds cannot be counted")
        self.macs, self.steps, self.seconds, self.rows = 0.0, 0, 0.0, []
        self._inputs, self._length, self._stale, self._since = None, 0, True, None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that the limit can be kept; count."""
        self._since = time.monotonic()
        if self.limit is not None:
            self._check_company(trainer)
        self._inputs = early_inputs(self.example_inputs, trainer, pl_module, self._target(pl_module))
        if self._inputs is not None:
            self._count(trainer, pl_module)

    def _check_company(self, trainer: pl.Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RoundPruner) and not callback.one_training:
                raise ConfigError(
                    f"TrainingCost(limit=...) beside {type(callback).__name__}, which runs rounds of a length of their "
                    "own: leave out the limit, and choose round_length so that all rounds together cost what they may."
                )
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            by_steps = config.interval == "step" and config.frequency == 1
            if schedule_length(scheduler) is not None and not (isinstance(scheduler, CosineAnnealingLR) and by_steps):
                raise ConfigError(
                    f"TrainingCost(limit=...) ends training by its cost, and cannot give {type(scheduler).__name__} "
                    f"(which steps every {config.frequency} {config.interval}) that length. Use CosineAnnealingLR with "
                    'interval="step", or a schedule without a length.'
                )

    def _target(self, pl_module: pl.LightningModule) -> nn.Module:
        return bare(pl_module.get_submodule(find_module(pl_module, self.module)))

    def _count(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with undisturbed(trainer.strategy.root_device), trainer.precision_plugin.forward_context():
            costs = count_costs(self._target(pl_module), self._inputs)
        each = costs.macs.total / (batch_length(self._inputs) or 1)
        if self.rows and self.rows[-1][0] == trainer.global_step:
            self.rows.pop()
        if not self.rows or self.rows[-1][1] != each:  # after a resume it is the one that was counted before
            self.rows.append((trainer.global_step, each))

    # ------------------------------------------------------------------ counting

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """At the first batch and after a cut: see how many steps are left."""
        self._length = max(self._length, self._examples(batch))
        if self._inputs is None:
            self._inputs = inputs_of(batch, self._target(pl_module))
            self._count(trainer, pl_module)
        if self._stale:
            self._stale = False
            self._fit_schedules(trainer)

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        """Count the network that is left."""
        if event.plan is not None and self._inputs is not None:
            self._count(trainer, pl_module)
            self._stale = self._length == 0
            if not self._stale:
                self._fit_schedules(trainer)

    def on_scoring(self, trainer: pl.Trainer, pl_module: pl.LightningModule, examples: int) -> None:
        """Add the examples that a pruner ran through the network to score it, all processes together."""
        if self._inputs is None:  # before the first batch, of a loader whose data cannot be indexed
            with undisturbed(trainer.strategy.root_device):
                batch = to_batch(next(iter(trainer.train_dataloader)), trainer, pl_module)  # type: ignore[arg-type]
            self._inputs = inputs_of(batch, self._target(pl_module))
            self._count(trainer, pl_module)
        if self.rows:
            self.macs += FORWARD * examples * self.rows[-1][1]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch; end the fit where the next step would lead further from the limit than this one."""
        self.macs += self._cost(trainer, self._examples(batch))
        stepped, self.steps = trainer.global_step != self.steps, trainer.global_step
        if self.limit is not None and stepped and self._steps_left(trainer) < 0.5:
            trainer.should_stop = True

    def _examples(self, batch: Any) -> int:
        length = batch_length(batch)
        if length is None:
            raise ConfigError(
                f"TrainingCost: a batch of type {type(batch).__name__} holds no tensor that tells its number of "
                "examples. Give batches of tensors, or leave TrainingCost out."
            )
        return length

    def _cost(self, trainer: pl.Trainer, examples: int) -> float:
        return (FORWARD + BACKWARD) * examples * trainer.world_size * self.rows[-1][1]

    def _steps_left(self, trainer: pl.Trainer) -> float:
        assert self.limit is not None
        step = self._cost(trainer, self._length) * trainer.accumulate_grad_batches
        return (self.limit - self.macs) / step

    def _fit_schedules(self, trainer: pl.Trainer) -> None:
        if self.limit is None:
            return
        steps = max(1, round(self._steps_left(trainer)))
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, CosineAnnealingLR):
                config.scheduler.T_max = config.scheduler.last_epoch + steps

    # ---------------------------------------------------------------------- end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the figures; say where the limit was not reached."""
        if self._since is not None:
            self.seconds, self._since = self.seconds + time.monotonic() - self._since, None
        if self.limit is not None and self._length and not tries_out(trainer) and self._steps_left(trainer) >= 1:
            rank_zero_warn(
                f"TrainingCost: training ended at {self.macs:.3g} multiply-adds, before its limit of {self.limit:.3g}: "
                "raise the Trainer's max_epochs or max_steps."
            )
        log_numbers(trainer, {"prune/training_macs": self.macs})
        folder = run_folder(trainer)
        if folder is not None and trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / COST_NAME, {"format": FORMAT, "version": VERSION} | self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON content."""
        return {
            "macs": self.macs,
            "limit": self.limit,
            "steps": self.steps,
            "seconds": self.seconds,
            "macs_per_example": [list(row) for row in self.rows],
        }

    # -------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Multiply-adds and seconds so far."""
        seconds = self.seconds + (0.0 if self._since is None else time.monotonic() - self._since)
        return self.to_json() | {"seconds": seconds, "length": self._length}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up."""
        self.macs, self.steps, self.seconds = state_dict["macs"], state_dict["steps"], state_dict["seconds"]
        self.rows, self._length = [(step, each) for step, each in state_dict["macs_per_example"]], state_dict["length"]

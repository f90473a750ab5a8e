"""Callbacks that cut one training into a trunk and branches, which differ only in their SGD noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DistributedSampler

from lightning_prune.callbacks.company import gradients_may_change
from lightning_prune.callbacks.enforce import MaskEnforcer
from lightning_prune.callbacks.rewind import named_state
from lightning_prune.checkpoint import load_ticket
from lightning_prune.errors import ConfigError
from lightning_prune.files import read_json, write_json
from lightning_prune.resume import ResumeState
from lightning_prune.resume.generators import reseed
from lightning_prune.times import TrainTime

STEPS = "steps.json"


class BranchPoints(Callback):
    """Write a checkpoint when training reaches each of some points, and stop at the last.

    Acts in: ``on_train_start`` (step 0) and ``on_train_batch_end``, right after the optimizer step that reaches the
    point, before any validation.

    Args:
        at: The points, in one training: ``"0st"``, ``"500st"``, ``"3%"``, ``"1ep"``.
        dirpath: The folder: ``<point>.ckpt`` each, and ``steps.json``, the optimizer step of each point.

    Attributes:
        steps: The optimizer step of each point, once training has begun.

    Raises:
        ConfigError: In ``on_train_start``: a point at or beyond the end of training.
    """

    def __init__(self, at: Sequence[TrainTime], dirpath: Path) -> None:
        self.at, self.dirpath = list(at), dirpath
        self.steps: dict[str, int] = {}

    def path(self, point: TrainTime | str) -> Path:
        """Where a point's checkpoint is."""
        return self.dirpath / f"{file_name(point)}.ckpt"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turn the points into steps; write that of step 0."""
        total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
        if total == float("inf"):
            raise ConfigError("the Trainer has no end: set max_epochs or max_steps, so that branches know theirs.")
        an_epoch = None if batches == float("inf") else -(-int(batches) // trainer.accumulate_grad_batches)
        self.steps = {str(point): point.in_steps(int(total), an_epoch) for point in self.at}
        late = {point: step for point, step in self.steps.items() if step >= total}
        if late:
            point, step = next(iter(late.items()))
            raise ConfigError(
                f"a branch at {point} (step {step}) has nothing to train: training is {total} steps long."
            )
        if trainer.is_global_zero:
            path = self.dirpath / STEPS
            earlier = read_json(path, "the steps of branch points") if path.exists() else {}
            write_json(path, earlier | self.steps)
        self._write(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the points of this step."""
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        for point, step in self.steps.items():
            if step == trainer.global_step and not self.path(point).exists():
                trainer.save_checkpoint(self.path(point))
        if trainer.global_step >= max(self.steps.values()):
            trainer.should_stop = True


class SGDNoise(Callback):
    """Go on from a trunk's checkpoint with random numbers of one's own; from one's own checkpoint exactly as before.

    Data order, augmentation and dropout follow from the seed. A branch that begins inside an epoch goes on at the same
    place of another order of that epoch. Two branches with the same seed are equal bit for bit on a CPU.

    Paper: Frankle et al. 2020, arXiv:1912.05671, section 2 ("different samples of SGD noise").

    Args:
        seed: Of the noise; ``None``: the trunk, whose random numbers are the run's own.

    State saved: the seed, and what :class:`ResumeState` saves.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.branched = False
        self._resume = ResumeState()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take over the position in the data."""
        if stage == "fit":
            self._resume.attach(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give samplers that draw their order from a seed of their own (several processes) this one."""
        combined = trainer.fit_loop._combined_loader
        for loader in combined.flattened if combined is not None else []:
            sampler = getattr(loader, "sampler", None)
            if isinstance(sampler, DistributedSampler) and self.seed is not None:
                sampler.seed = self.seed

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was."""
        self._resume.detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if stage == "fit":
            self._resume.detach()

    def state_dict(self) -> dict[str, Any]:
        """The seed, generators and position."""
        return {"seed": self.seed, "resume": self._resume.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as before, or branch off."""
        resume = state_dict["resume"]
        self.branched = self.seed is not None and state_dict["seed"] != self.seed
        if self.branched and resume:
            assert self.seed is not None
            resume = reseed(resume, self.seed)
        self._resume.load_state_dict(resume)


class TrainTicket(Callback):
    """Train a ticket: its weights where training begins, its masks throughout.

    Args:
        path: The ticket.

    State saved: whether the ticket's weights were loaded already.

    Raises:
        MaskMismatchError: A ticket of another network.
    """

    def __init__(self, path: Path) -> None:
        self.ticket = load_ticket(path)
        self.path = path
        self._begun = False
        self._enforcer = MaskEnforcer()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the weights, unless a checkpoint of this branch was; hold the masks from here on."""
        if not self._begun:
            self._compare(pl_module)
            self.ticket.apply_(pl_module)
        masks = self.ticket.masks.to(pl_module.device)
        parameters = {name: p for name, p in pl_module.named_parameters() if name in masks}
        self._enforcer.attach(
            parameters,
            trainer.optimizers,
            every_step=gradients_may_change(trainer, pl_module),
            manual=not pl_module.automatic_optimization,
        )
        self._enforcer.set_masks(masks, resumed=self._begun)
        self._begun = True

    def _compare(self, pl_module: pl.LightningModule) -> None:
        """Say so where the ticket's kept weights are not those of the trunk: it was made by another training."""
        own = named_state(pl_module)
        masks = self.ticket.masks
        for name, value in self.ticket.weights.items():
            trunk = own.get(name)
            if trunk is None or trunk.shape != value.shape:
                return  # apply_ says what is wrong
            kept = masks[name] if name in masks else torch.ones_like(value, dtype=torch.bool)
            if not torch.equal(value[kept], trunk.detach().cpu()[kept]):
                rank_zero_warn(
                    f"{self.path}: kept weights of {name} are not those that this recipe reaches at the branch point. "
                    "The ticket comes from another seed, recipe or initialisation; only its optimizer state is "
                    "then the trunk's."
                )
                return

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Zero the gradients of pruned entries."""
        self._enforcer.mask_gradients()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove every hook."""
        self._enforcer.detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove every hook."""
        if stage == "fit":
            self._enforcer.detach()

    def state_dict(self) -> dict[str, Any]:
        """Whether training of the ticket has begun."""
        return {"begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the weights of the checkpoint."""
        self._begun = state_dict["begun"]


def file_name(point: TrainTime | str) -> str:
    """A point in training as part of a file name."""
    return str(point).replace("%", "pct")

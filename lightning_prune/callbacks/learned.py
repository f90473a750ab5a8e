"""Train masks instead of weights, on any LightningModule, in one fit."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks import monitors
from lightning_prune.callbacks.claims import claim, give_up
from lightning_prune.callbacks.company import compare_ranks, describe_company, require_whole_network
from lightning_prune.callbacks.events import send_round_end
from lightning_prune.callbacks.folders import run_folder
from lightning_prune.callbacks.logs import add_companions
from lightning_prune.callbacks.recorder import RoundRecorder
from lightning_prune.callbacks.removal import without_wrapper
from lightning_prune.callbacks.resuming import check_checkpoint, require_same_settings, taking_up
from lightning_prune.callbacks.rewind import named_state
from lightning_prune.callbacks.rounds import RoundSchedule
from lightning_prune.callbacks.task import describe_task
from lightning_prune.checkpoint import Ticket, save_ticket
from lightning_prune.errors import ConfigError, ResumeError
from lightning_prune.learned import MaskLearner, MaskSettings
from lightning_prune.masks import MaskSet
from lightning_prune.prunable import canonical_name
from lightning_prune.record import RunRecord
from lightning_prune.resume import ResumeState, save_atomically

FILE_NAME = "supermask.safetensors"


class LearnedSupermask(Callback):
    """Leave all weights as they are and train which of them pass: a learned supermask.

    In the fit every masked layer computes with ``weight * mask``; the weight is frozen and a score behind each entry of
    the mask is trained, by the module's own loss, optimizers and schedules: scores take the weights' places in the
    optimizers' parameter groups. What has no mask is frozen too, unless ``train`` names it, and BatchNorm has no scale
    and shift (1 and 0). At the end the layers are plain again, with the masked weights in them; ``masks`` holds the
    result and ``supermask.safetensors`` in the run folder is a ticket: masks, and the frozen weights before masking.
    ``record.json`` and ``rounds.csv`` there are the run's record, with the result as its only row: what each layer
    keeps, and the metrics of the last validation.

    Acts in: ``on_fit_start`` (layers are changed in place; DDP's wrapper is built anew), ``on_train_batch_start`` (a
    new draw), after each optimizer step (holds the density), ``on_fit_end`` (layers are plain again). ``state_dict``
    keys never change: a checkpoint holds the network under the mask of its step and loads without this library. Logs
    ``prune/density`` at the end of each epoch.

    Papers: Ramanujan et al. 2020, arXiv:1911.13299 (``edge_popup``); Zhou et al. 2019, arXiv:1905.01067
    (``stochastic``). Deviations: :func:`lightning_prune.learned.popup_weight`,
    :func:`lightning_prune.learned.sampled_weight`; stochastic masks are drawn once a batch, not once a forward; a
    ``density`` holds their expected density by one shift of each tensor's logits after a step; biases stay at their
    initial values (the papers' networks have none, or zeros).

    Args:
        method: ``"edge_popup"`` or ``"stochastic"``.
        density: Fraction of each tensor's weights that the result keeps, ``round(density * entries)``, in (0, 1].
            ``None`` for stochastic masks: as the probabilities come out.
        init: What weights are frozen at: ``"keep"`` (as the module has them), ``"signed_constant"``,
            ``"kaiming_constant"``, ``"kaiming_normal"``; see :func:`lightning_prune.learned.frozen_weight`.
        scale_fan: Multiply the fan of the Kaiming initialisations by ``density``.
        rescale: Dynamic weight rescaling (stochastic): a layer's weights times entries / kept entries.
        start: First probability of stochastic masks without ``density``.
        samples: 0: validation and test within the fit see the mask of the result (edge-popup's, or the rounded one).
            ``n``: every batch goes through the module's step under ``n`` drawn masks, the same ``n`` in all batches, so
            that what is logged is the mean over ``n`` sampled networks. Stochastic only.
        exclude: Parameters that get no mask (names, names of modules, patterns).
        include: Parameters that get one beside the default set of :func:`prunable_parameters`.
        train: Parameters without a mask that go on being trained, such as ``["*.bias"]``.
        affine: Leave BatchNorm its scale and shift.
        dirpath: Folder of ticket and record. Default: the run folder; without a logger none.
        monitor: The metric by which the record tells the best step. Default: what a ModelCheckpoint or EarlyStopping of
            the trainer watches.
        mode: ``"max"`` or ``"min"``. Default: as that callback has it, else ``"max"``.
        seed: Seeds initialisations, first scores and draws; the global generators are left alone.

    State saved: frozen weights, scores, number of the draw, record, generators and data position.

    Raises:
        ConfigError: A value out of range; in ``setup``: a pruner, averaged weights or a sharding strategy beside it; in
            ``on_fit_start``: nothing to mask, a weight that no optimizer steps, an earlier run's ticket.
        SelectionError: A layer of which nothing is kept or sampled; scores that are NaN.
        ResumeError: A checkpoint written without this callback, with other settings, or with a damaged state.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_prune import LearnedSupermask
        >>> callbacks = [LearnedSupermask("edge_popup", density=0.3, init="kaiming_constant")]
        >>> trainer = Trainer(max_epochs=3, callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        method: str = "edge_popup",
        density: float | None = 0.5,
        init: str = "keep",
        scale_fan: bool = False,
        rescale: bool = False,
        start: float = 0.5,
        samples: int = 0,
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
        train: Sequence[str] = (),
        affine: bool = False,
        dirpath: str | Path | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        seed: int = 0,
    ) -> None:
        self.settings = MaskSettings(method, density, init, scale_fan, rescale, start, seed)
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
            raise ConfigError(f"samples={samples!r}: expected how many masks are drawn in evaluation, 0 or more.")
        if samples and method == "edge_popup":
            raise ConfigError(f"samples={samples}: edge_popup has one mask and draws none; leave samples out.")
        for name, value in (("exclude", exclude), ("include", include), ("train", train)):
            if isinstance(value, str):
                raise ConfigError(f"{name}={value!r}: expected a list of names; write {name}=[{value!r}].")
        self.samples, self.affine = samples, affine
        self.exclude, self.include, self.train = tuple(exclude), tuple(include), tuple(train)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.masks: MaskSet | None = None
        """The result, at the end of a fit."""
        self.recipe: str | None = None
        """The file that the run was configured with, for the record; the command line sets it."""
        self._recorder = RoundRecorder(monitor, mode, dirpath, verbose=False)
        self._whole = RoundSchedule(0, None, None)  # one round, as long as the fit
        self._resume = ResumeState()
        self._learner: MaskLearner | None = None
        self._loaded: dict[str, Any] | None = None
        self._state: dict[str, Any] = {}  # of the learner, when it is done
        self._sampled: list[str] = []  # steps of the module that run once for each drawn mask
        self._handles: list[RemovableHandle] = []
        self._fits = False
        self._save_as_before: Callable[[], None] | None = None

    # ------------------------------------------------------------------- set up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot stand beside this callback."""
        self._fits = stage == "fit"
        if not self._fits:
            return
        add_companions(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            name = type(callback).__name__
            if getattr(callback, "sends_prune_events", False):
                raise ConfigError(
                    f"{name} cuts weights that LearnedSupermask keeps frozen. Learn the mask first, then prune in a "
                    "fit of its own: the ticket holds the mask."
                )
            if isinstance(callback, StochasticWeightAveraging):
                raise ConfigError(
                    f"{name} averages weights, and a mask's scores have no meaningful mean; leave it out."
                )
        require_whole_network(trainer, "so no mask of a whole tensor can be learned")
        self.masks, self._loaded, self._state = None, None, {}
        self._resume.attach(trainer)
        self._save_as_before = save_atomically(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a file with changed bytes, and one that has no scores."""
        check_checkpoint(trainer)
        if self._fits and not checkpoint["callbacks"].get(self.state_key):
            raise ResumeError(
                "the checkpoint was written without LearnedSupermask, so there are no scores and no frozen weights in "
                "it. Load its weights into the module before fit() instead of passing it as ckpt_path."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze the weights, put scores in their place, and let the optimizers step those.

        An earlier run's ticket is not written over.
        """
        if monitors.averages(trainer):
            raise ConfigError(
                "an averaging callback copies the network, and scores have no meaningful mean; leave it out."
            )
        folder = self.dirpath or run_folder(trainer)
        if folder is not None:
            claim(trainer, folder, FILE_NAME)
        self._start_record(trainer, pl_module)
        with without_wrapper(trainer, pl_module):
            self._learner = MaskLearner(pl_module, self.settings, self.exclude, self.include, self.train, self.affine)
            if self._loaded is not None:
                with taking_up(type(self).__name__):
                    self._learner.load_state_dict(self._loaded)
                self._loaded = None
        self._learner.take_over(trainer.optimizers)
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]
        if self.samples:
            for name in ("validation_step", "test_step"):
                self._sample(pl_module, name)

    def _start_record(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own = {type(self).__name__: self.hyper_parameters() | {"samples": self.samples}}
        task = describe_task(trainer, pl_module, self.recipe)
        self._recorder.start(trainer, own | describe_company(trainer) | own, task, resumed=self._loaded is not None)

    @property
    def folder(self) -> Path | None:
        """The folder with this run's record, once a fit has begun; ``None`` where nothing is written."""
        return self._recorder.folder

    @property
    def record(self) -> RunRecord | None:
        """This run's record so far, once a fit has begun; its row is there when the fit has ended."""
        return self._recorder.record

    # ----------------------------------------------------------------- in a fit

    def _sample(self, pl_module: pl.LightningModule, name: str) -> None:
        """Let an evaluation step run once for each drawn mask."""
        step = getattr(pl_module, name)
        self._sampled.append(name)

        @functools.wraps(step)
        def sampled(*args: Any, **options: Any) -> Any:
            output = None
            assert self._learner is not None
            try:
                for number in range(self.samples):
                    self._learner.sample = number
                    output = step(*args, **options)
            finally:
                self._learner.sample = None
            return output

        setattr(pl_module, name, sampled)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A new draw."""
        assert self._learner is not None
        self._learner.draw += 1

    def _after_step(self, *_: Any) -> None:
        if self._learner is not None:
            self._learner.hold_density()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get ready to take the metrics."""
        self._recorder.before_validation(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the metrics."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._recorder.take_metrics(trainer, self._whole)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the density; see that all processes have the same masks."""
        assert self._learner is not None
        if not trainer.enable_validation:
            self._recorder.take_metrics(trainer, self._whole)
        masks = self._learner.masks
        compare_ranks(masks.digest())
        pl_module.log("prune/density", masks.density)
        if self.settings.method == "stochastic":
            pl_module.log("prune/expected_density", self._learner.expected_density)

    # ------------------------------------------------------------------- the end

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the module plain, write ticket and record."""
        if self._learner is None:
            return
        learner = self._learner
        masks = self.masks = self._finish(pl_module, learner)
        compare_ranks(masks.digest())
        ticket = None if self.folder is None else self.folder / FILE_NAME
        if ticket is not None and trainer.is_global_zero:
            self._write_ticket(trainer, pl_module, learner, masks, ticket)
        counts: dict[str, Any] = {"kept": masks.kept, "total": masks.total, "digest": masks.digest()}
        counts["per_layer"] = masks.kept_per_tensor()
        self._whole.stopped_early = bool(trainer.should_stop)
        if self._recorder.end_round(trainer, self._whole, counts, [], ticket):
            assert self.record is not None
            send_round_end(trainer, pl_module, self.record)

    def _write_ticket(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, learner: MaskLearner, masks: MaskSet, path: Path
    ) -> None:
        factors = learner.factors(masks)
        frozen = {name: weight * factors[name] for name, weight in self._state["frozen"].items()}
        weights = {name: frozen.get(canonical_name(name), t) for name, t in named_state(pl_module).items()}
        info: dict[str, Any] = self.hyper_parameters() | {
            "density": masks.density,
            "digest": masks.digest(),
            "step": trainer.global_step,
        }
        save_ticket(path, Ticket(masks, weights, info))

    def _finish(self, pl_module: pl.LightningModule, learner: MaskLearner) -> MaskSet:
        self._release(pl_module)
        self._learner, self._state = None, learner.state_dict()
        return learner.finish()

    def _release(self, pl_module: pl.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name in self._sampled:
            delattr(pl_module, name)
        self._sampled = []
        self._resume.detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Make the module plain."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the module plain, if it is not yet."""
        if stage == "fit":
            self._release(pl_module)
            if self._learner is not None:
                self._finish(pl_module, self._learner)
            give_up(trainer)
            if self._save_as_before is not None:
                self._save_as_before()
                self._save_as_before = None

    # -------------------------------------------------------------------- state

    def hyper_parameters(self) -> dict[str, Any]:
        """What the user gave, as JSON content."""
        return asdict(self.settings) | {
            "exclude": list(self.exclude),
            "include": list(self.include),
            "train": list(self.train),
            "affine": self.affine,
        }

    def state_dict(self) -> dict[str, Any]:
        """Frozen weights, scores, number of the draw, generators and data position; nothing before a fit."""
        learner = self._state if self._learner is None else self._learner.state_dict()
        if not learner:
            return {}
        return {
            "hyper_parameters": self.hyper_parameters(),
            "learner": learner,
            "recorder": self._recorder.state_dict(),
            "resume": self._resume.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint stands."""
        if not self._fits or not state_dict:  # a test or a prediction needs the weights only
            return
        with taking_up(type(self).__name__):
            require_same_settings(state_dict["hyper_parameters"], self.hyper_parameters())
            self._loaded = state_dict["learner"]
            self._recorder.load_state_dict(state_dict["recorder"])
            assert self.record is not None
            self.record.cut_to(0)  # a fit that goes on chooses its result anew
            self._resume.load_state_dict(state_dict["resume"])

"""How good the untrained network is under masks that training found."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.actions import check_actions, supermask
from lightning_prune.callbacks import monitors
from lightning_prune.callbacks.claims import claim
from lightning_prune.callbacks.company import require_whole_network
from lightning_prune.callbacks.events import PruneEvent
from lightning_prune.callbacks.folders import run_folder
from lightning_prune.callbacks.logs import log_numbers
from lightning_prune.callbacks.origins import Origins
from lightning_prune.callbacks.rewind import named_state, require_pruner
from lightning_prune.callbacks.validation import validate_quietly
from lightning_prune.errors import ConfigError
from lightning_prune.files import write_json
from lightning_prune.masks import MaskSet
from lightning_prune.prunable import canonical_name, close_names
from lightning_prune.scores import CRITERIA
from lightning_prune.selection import select

FILE_NAME = "supermasks.json"


class SupermaskScorer(Callback):
    """At each cut, validate the *untrained* network under a mask by each of several criteria.

    All criteria read the same initial and trained weights, so each costs one validation and no training. From every
    tensor as many entries leave as the pruner's cut takes, among those that were trained in the round; the pruner's own
    masks stay as they are. Parameters without a mask and buffers, BatchNorm statistics too, are those of the start.

    Acts in: ``on_train_start`` (keeps a copy of the network), the first optimizer step (its gradients, for ``snip`` and
    ``grad``), the prune event, before any rewinder. Changes nothing: weights, buffers, generators and metrics come
    back, callbacks and loggers do not hear of these validations. Results go to the loggers
    (``prune/supermask/<criterion>``; with other actions than the default, ``prune/supermask/<criterion>/<mask1>/
    <mask0>``), to ``rows`` and to ``supermasks.json`` in the run folder.

    Paper: Zhou et al. 2019, arXiv:1905.01067. Deviations: validation data instead of test data; gated entries leave
    first (``gated="zero"``: the authors' rule); ``snip`` and ``grad`` take the gradient of the first optimizer step.

    Args:
        criteria: Names in :data:`lightning_prune.scores.CRITERIA`.
        mask1: What kept weights start from; see :func:`mask_weights`.
        mask0: What pruned weights hold; see :func:`mask_weights`.
        monitor: The validation metric to log. Default: what a ModelCheckpoint or EarlyStopping of the trainer watches.
            ``rows`` have every metric.
        gated: What entries score that fail the gate of a ``..._sign`` criterion; see :func:`score_weights`.
        dirpath: Folder of ``supermasks.json``. Default: the run folder; without a logger none.
        seed: Seeds the criterion ``random`` and actions that permute, anew at each cut.

    State saved: initial weights and buffers, first gradients where needed, masks, measurements.

    Raises:
        ConfigError: An unknown criterion or action, no validation data, a metric that validation does not log, a pruner
            that removes channels, a strategy that shards parameters.
        ResumeError: A checkpoint without this callback's initial weights.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_prune import IterativeMagnitudePruner, SupermaskScorer, WeightRewind
        >>> scorer = SupermaskScorer(["large_final", "magnitude_increase"], mask1="signed_constant", monitor="val_acc")
        >>> callbacks = [IterativeMagnitudePruner(scope="layer"), WeightRewind("0st"), scorer]
        >>> trainer = Trainer(max_epochs=3, callbacks=callbacks, logger=False, enable_checkpointing=False)

    Limits:
        An untrained BatchNorm normalises by its initial statistics (0 and 1) in validation.
    """

    prune_order = -1

    def __init__(
        self,
        criteria: Sequence[str] = ("large_final",),
        mask1: str = "rewind",
        mask0: str = "zero",
        monitor: str | None = None,
        gated: str = "last",
        dirpath: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(criteria, str) or not criteria or len(set(criteria)) < len(criteria):
            raise ConfigError(f"criteria={criteria!r}: expected a list of different names, such as ['large_final'].")
        for criterion in criteria:
            if criterion not in CRITERIA:
                raise ConfigError(f"criterion {criterion!r} is unknown{close_names(str(criterion), CRITERIA)}")
        check_actions(mask1, mask0)
        if gated not in ("last", "zero"):
            raise ConfigError(f"gated={gated!r} is unknown; choose 'last' or 'zero'.")
        self.criteria, self.mask1, self.mask0 = tuple(criteria), mask1, mask0
        self.monitor, self.gated, self.seed = monitor, gated, seed
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.rows: list[dict[str, Any]] = []
        """One entry for each cut and criterion, as JSON content: ``round``, ``density``, ``criterion``, ``mask1``,
        ``mask0``, ``digest`` (of the mask), ``metrics``."""
        self._origins = Origins(self.criteria, type(self).__name__, whole=True)
        self._masks: MaskSet | None = None  # of the round under way; None: all kept

    @property
    def state_key(self) -> str:
        """Several scorers stand side by side, with other criteria or actions."""
        return self._generate_state_key(criteria=self.criteria, mask1=self.mask1, mask0=self.mask0)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage != "fit":
            return
        require_pruner(trainer, self)
        require_whole_network(trainer, "so initial weights cannot be written to it")
        self.rows, self._masks = [], None
        self._origins = Origins(self.criteria, type(self).__name__, whole=True)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hold the folder; an earlier run's file is not written over."""
        folder = self.dirpath or run_folder(trainer)
        if folder is not None:
            claim(trainer, folder, FILE_NAME)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the untrained network."""
        if not trainer.enable_validation:
            raise ConfigError("SupermaskScorer validates the untrained network, and there is no validation data.")
        if self._metric(trainer) is None:
            raise ConfigError("SupermaskScorer does not know which metric to log: give monitor='val_acc', for example.")
        self._origins.keep(named_state(pl_module), trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Keep the first step's gradients, where a criterion needs them."""
        self._origins.take_gradients(pl_module, trainer.global_step)

    def on_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: PruneEvent) -> None:
        """Score every criterion, from the trained weights that the module still holds."""
        if event.masks is None:
            raise ConfigError("SupermaskScorer scores masks of weights; this pruner removes channels.")
        trained = {name: t.detach().clone() for name, t in named_state(pl_module).items()}
        try:
            for criterion in self.criteria:
                self._score(trainer, pl_module, event, criterion, trained)
        finally:
            _write(pl_module, trained)
        self._masks = event.masks.to("cpu")
        folder = self.dirpath or run_folder(trainer)
        if folder is not None and trainer.is_global_zero:
            scorers = [c for c in trainer.callbacks if isinstance(c, SupermaskScorer)]  # type: ignore[attr-defined]
            rows = [row for scorer in scorers if (scorer.dirpath or folder) == folder for row in scorer.rows]
            write_json(folder / FILE_NAME, {"format": "lightning_prune.supermasks", "version": 1, "rows": rows})

    def _score(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        event: PruneEvent,
        criterion: str,
        trained: dict[str, Tensor],
    ) -> None:
        assert self._origins.initial is not None
        assert event.masks is not None
        generator = torch.Generator().manual_seed(self.seed * 1000 + event.round)
        initial = {canonical_name(name): t for name, t in self._origins.initial.items()}
        final = {canonical_name(name): t.cpu() for name, t in trained.items() if canonical_name(name) in event.masks}
        masks = self._choose(criterion, event.masks.to("cpu"), final, generator)
        found = supermask(masks, initial, final, mask1=self.mask1, mask0=self.mask0, generator=generator)
        _write(pl_module, self._origins.initial)
        found.apply_(pl_module)
        metrics = validate_quietly(trainer)
        monitor = self._metric(trainer)
        if monitor not in metrics:
            raise ConfigError(
                f"SupermaskScorer: the metric {monitor!r} was not logged in validation"
                + close_names(str(monitor), metrics)
            )
        plain = (self.mask1, self.mask0) == ("rewind", "zero")
        name = f"prune/supermask/{criterion}" + ("" if plain else f"/{self.mask1}/{self.mask0}")
        self.rows.append(
            {
                "round": event.round,
                "density": masks.density,
                "criterion": criterion,
                "mask1": self.mask1,
                "mask0": self.mask0,
                "digest": masks.digest(),
                "metrics": metrics,
            }
        )
        log_numbers(trainer, {name: metrics[monitor]})

    def _choose(
        self,
        criterion: str,
        wanted: MaskSet,
        final: dict[str, Tensor],
        generator: torch.Generator,
    ) -> MaskSet:
        """As many entries of each tensor as ``wanted`` keeps, among those that the round has trained."""
        before = self._masks or MaskSet.dense_like(wanted)
        scores = {
            name: self._origins.score(
                criterion, name, final[name], mask=before[name], generator=generator, gated=self.gated
            )
            for name in wanted
        }
        remove = {name: int(before[name].sum() - mask.sum()) for name, mask in wanted.items()}
        return select(scores, remove=remove, scope="layer", within=before)

    def _metric(self, trainer: pl.Trainer) -> str | None:
        watched = monitors.watched_metric(trainer)
        return self.monitor or (watched[0] if watched else None)

    def state_dict(self) -> dict[str, Any]:
        """The untrained network, first gradients, masks and measurements."""
        return {
            **self._origins.state_dict(),
            "masks": None if self._masks is None else self._masks.state_dict(),
            "rows": list(self.rows),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up; what was measured after the checkpoint is forgotten."""
        self._origins.load_state_dict(state_dict)
        masks = state_dict["masks"]
        self._masks = None if masks is None else MaskSet.from_state_dict(masks)
        self.rows = list(state_dict["rows"])


def _write(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    own = named_state(module)
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)

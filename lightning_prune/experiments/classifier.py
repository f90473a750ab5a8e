"""The training task of the experiments: image classification with cross-entropy."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.errors import ConfigError
from lightning_prune.experiments.schedules import Schedule

# These multiply the current rate, so they work beside a warm-up that multiplies too; others overwrite it.
_MULTIPLYING = (
    StepLR,
    MultiStepLR,
    ConstantLR,
    LinearLR,
    ExponentialLR,
    PolynomialLR,
    MultiplicativeLR,
    ReduceLROnPlateau,
)


class ImageClassifier(LightningModule):
    """Train a network to classify images with cross-entropy, and measure its loss and accuracy.

    Logged: ``train_loss`` (of the batch at every n-th step, n being the Trainer's ``log_every_n_steps``, and at an
    epoch's first), ``val_loss``,
    ``val_acc``, ``test_loss``, ``test_acc`` (means over all images). A second validation loader, if the data module
    gives one, is logged as ``watch_test_loss`` and ``watch_test_acc``: shown, and meant to choose nothing.

    Args:
        network: Images (N, C, H, W) to logits (N, num_classes).
        num_classes: Classes; must agree with the data module and with the network's outputs.
        optimizer: Parameters -> optimizer.
        scheduler: Optimizer -> scheduler of torch; or a :class:`Schedule`, which takes its length from the Trainer; or
            nothing: a constant rate.
        interval: Whether the scheduler counts epochs or optimizer steps.
        warmup_steps: Optimizer steps over which the rate first rises linearly: step i (from 0) uses
            (i + 1) / (warmup_steps + 1) of what the scheduler says. 0: none.
        monitor: Metric that a ``ReduceLROnPlateau`` scheduler watches.
        label_smoothing: In [0, 1), for the training loss only.
        log_train_acc: Also log the accuracy of the training batches whose loss is logged, as ``train_acc``.

    Shape:
        batch: images (N, C, H, W) and labels (N,) int64.

    Raises:
        ConfigError: A value out of range; a class count that the data module or the network's outputs contradict; a
            warm-up beside a scheduler that sets rates outright.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 10,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | Schedule | None = None,
        interval: Literal["epoch", "step"] = "epoch",
        warmup_steps: int = 0,
        monitor: str = "val_loss",
        label_smoothing: float = 0.0,
        log_train_acc: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigError(f"num_classes={num_classes!r}: a classifier needs at least 2 classes.")
        if interval not in ("epoch", "step"):
            raise ConfigError(f"interval={interval!r}: expected 'epoch' or 'step'.")
        if warmup_steps < 0:
            raise ConfigError(f"warmup_steps={warmup_steps!r}: expected a number of optimizer steps, at least 0.")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing={label_smoothing!r} must lie in [0, 1).")
        self.network, self.num_classes = network, num_classes
        self.optimizer, self.scheduler, self.interval = optimizer, scheduler, interval
        self.warmup_steps, self.monitor = warmup_steps, monitor
        self.label_smoothing, self.log_train_acc = label_smoothing, log_train_acc
        self._log_every = 1
        self.val_acc, self.watch_test_acc, self.test_acc = (
            MulticlassAccuracy(num_classes, average="micro", validate_args=False) for _ in range(3)
        )

    def setup(self, stage: str) -> None:
        """Compare the class count with that of the data module, where it has one."""
        found = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if isinstance(found, int) and found != self.num_classes:
            raise ConfigError(
                f"the data has {found} classes, ImageClassifier(num_classes={self.num_classes}): make them agree "
                "(and the network's outputs with them)."
            )

    def on_train_start(self) -> None:
        """Read how often to log."""
        self._log_every = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of a batch of images."""
        logits = self.network(images)
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise ConfigError(
                f"{type(self.network).__name__} gives outputs of shape {tuple(logits.shape)}; expected (N, "
                f"{self.num_classes}): set the network's number of classes to num_classes={self.num_classes}."
            )
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        # self.log costs as much as a tenth of a small network's step: not at every one
        if batch_idx == 0 or (self.global_step + 1) % self._log_every == 0:
            self.log("train_loss", loss, prog_bar=True)
            if self.log_train_acc:
                self.log("train_acc", (logits.argmax(1) == labels).float().mean(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss and accuracy on validation data (loader 0) or on the watched test data (loader 1)."""
        if dataloader_idx == 0:
            self._evaluate(batch, "val", self.val_acc)
        else:
            self._evaluate(batch, "watch_test", self.watch_test_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on test data."""
        self._evaluate(batch, "test", self.test_acc)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits (N, num_classes) of a batch: images, or images with labels."""
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def _evaluate(self, batch: tuple[Tensor, Tensor], name: str, accuracy: Metric) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        options: dict[str, Any] = {"on_epoch": True, "on_step": False, "add_dataloader_idx": False}
        self.log(f"{name}_loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True, **options)
        self.log(f"{name}_acc", accuracy, prog_bar=name != "watch_test", batch_size=len(labels), **options)

    def configure_optimizers(self) -> Any:
        """The optimizer, its scheduler, and the warm-up as a second scheduler that multiplies."""
        optimizer = self.optimizer(self.parameters())
        schedulers: list[dict[str, Any]] = []
        if self.scheduler is not None:
            main = self._build_scheduler(optimizer)
            schedulers.append({"scheduler": main, "interval": self.interval})
            if isinstance(main, ReduceLROnPlateau):
                schedulers[0]["monitor"] = self.monitor
        if self.warmup_steps > 0:
            if schedulers:
                self._check_multiplies(schedulers[0]["scheduler"])
            warmup = LinearLR(optimizer, start_factor=1 / (self.warmup_steps + 1), total_iters=self.warmup_steps)
            schedulers.append({"scheduler": warmup, "interval": "step", "name": "warmup"})
        return [optimizer], schedulers

    def _build_scheduler(self, optimizer: Optimizer) -> LRScheduler | ReduceLROnPlateau:
        if not isinstance(self.scheduler, Schedule):
            assert self.scheduler is not None
            return self.scheduler(optimizer)
        steps = self.trainer.estimated_stepping_batches
        if steps in (-1, float("inf")):
            raise ConfigError(
                f"{type(self.scheduler).__name__} takes its length from the Trainer, which has none: set max_epochs or "
                "max_steps."
            )
        if self.interval == "step":
            return self.scheduler.build(optimizer, int(steps))
        self.trainer.fit_loop.setup_data()  # with max_steps alone, Lightning has not asked for the data yet
        batches = self.trainer.num_training_batches
        if batches == float("inf"):
            raise ConfigError(
                f"{type(self.scheduler).__name__} by epochs: the training data has epochs of unknown length; use "
                "interval='step'."
            )
        epoch = -(-int(batches) // self.trainer.accumulate_grad_batches)
        return self.scheduler.build(optimizer, -(-int(steps) // epoch))

    def _check_multiplies(self, scheduler: LRScheduler | ReduceLROnPlateau) -> None:
        if isinstance(scheduler, _MULTIPLYING) or (isinstance(scheduler, CosineAnnealingLR) and scheduler.eta_min == 0):
            return
        raise ConfigError(
            f"warmup_steps={self.warmup_steps} beside {type(scheduler).__name__}: it sets the rate outright "
            "and would undo the warm-up. Put the warm-up into it, or use Drops, StepLR, MultiStepLR or Cosine with "
            "final_lr=0."
        )

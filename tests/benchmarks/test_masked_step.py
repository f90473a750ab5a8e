"""A training step with masks beside a dense one, in one process: what holding weights at zero costs."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torchvision.models import resnet18

from lightning_prune import IterativeMagnitudePruner, MaskSet, prunable_parameters
from lightning_prune.callbacks.enforce import MaskEnforcer
from lightning_prune.experiments import LeNet300100

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]


class Task(pl.LightningModule):
    def __init__(self, network: nn.Module, optimizer: Callable[[Any], Any]) -> None:
        super().__init__()
        self.network, self.optimizer = network, optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Steps(pl.Callback):
    """Seconds of each step, by epoch."""

    def __init__(self) -> None:
        self.seconds: dict[int, list[float]] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        if self._last:
            self.seconds.setdefault(trainer.current_epoch, []).append(now - self._last)
        self._last = now


def fit(task: Task, batches: list[Any], callbacks: list[Any], epochs: int) -> dict[int, list[float]]:
    steps = Steps()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*callbacks, steps],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, torch.utils.data.DataLoader(batches, batch_size=None))
    return steps.seconds


class Switch(pl.Callback):
    """Takes the masks away for every other step of the pruned round, so that a drifting machine cancels out."""

    def __init__(self, pruner: IterativeMagnitudePruner) -> None:
        self.enforcer = pruner._enforcer
        self.bits: dict[str, Tensor] = {}
        self.masked: list[float] = []
        self.dense: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.bits = self.bits or self.enforcer._bits
        self.enforcer._bits = self.bits if index % 2 else {}
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.bits:
            (self.masked if self.enforcer._bits else self.dense).append(time.perf_counter() - self._start)


def compare(
    network: Callable[[], nn.Module], optimizer: Any, batches: list[Any], repeats: int
) -> dict[str, list[float]]:
    """Median step of each arm, once a repeat: dense and masked by turns in one fit, Lightning's callback in its own."""
    medians: dict[str, list[float]] = {"dense": [], "ours": [], "ModelPruning": []}
    for _ in range(repeats):
        prune = IterativeMagnitudePruner(0.8, 1, verbose=False)
        switch = Switch(prune)
        fit(Task(network(), optimizer), batches, [prune, switch], 1)
        theirs = fit(Task(network(), optimizer), batches, [ModelPruning("l1_unstructured", amount=0.8)], 2)
        medians["dense"].append(statistics.median(switch.dense))
        medians["ours"].append(statistics.median(switch.masked))
        medians["ModelPruning"].append(
            statistics.median(theirs[1]) * medians["dense"][-1] / statistics.median(theirs[0])
        )
    return medians


def report(title: str, medians: dict[str, list[float]]) -> float:
    ratios = {}
    for arm in ("ours", "ModelPruning"):
        ratios[arm] = statistics.median(a / d for a, d in zip(medians[arm], medians["dense"], strict=True))
    dense = 1e3 * statistics.median(medians["dense"])
    print(
        f"\n{title}: dense step {dense:.2f} ms; ours x{ratios['ours']:.3f}, ModelPruning x{ratios['ModelPruning']:.3f}"
    )
    return ratios["ours"]


def test_resnet18(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    batches = [(torch.randn(16, 3, 64, 64), torch.randint(1000, (16,))) for _ in range(30)]
    medians = compare(resnet18, lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), batches, repeats=5)
    ratio = report(f"ResNet-18, 64x64, batch 16, 2 threads, torch {torch.__version__}", medians)
    assert ratio < 1.15


def test_lenet(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    batches = [(torch.randn(60, 1, 28, 28), torch.randint(10, (60,))) for _ in range(600)]
    medians = compare(LeNet300100, lambda p: torch.optim.Adam(p, 1.2e-3), batches, repeats=7)
    ratio = report(f"LeNet-300-100, batch 60, 2 threads, torch {torch.__version__}", medians)
    assert ratio < 1.15


def test_gradient_pass_against_masked_fill() -> None:
    """The pass itself, against the two plain ways to write it; identical results."""
    torch.set_num_threads(2)
    network = resnet18()
    parameters = prunable_parameters(network)
    masks = MaskSet({n: torch.rand_like(p) > 0.8 for n, p in parameters.items()})
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    enforcer = MaskEnforcer()
    enforcer.attach(parameters, [], every_step=False, manual=False)
    enforcer.set_masks(masks)
    pruned = {n: ~m for n, m in masks.items()}
    floats = {n: m.float() for n, m in masks.items()}

    def fill() -> None:
        for n, p in parameters.items():
            p.grad.masked_fill_(pruned[n], 0)

    def multiply() -> None:
        for n, p in parameters.items():
            p.grad.mul_(floats[n])

    taken: dict[str, list[float]] = {"ours": [], "masked_fill_": [], "mul_": []}
    for _ in range(30):
        for name, run in (("ours", enforcer.mask_gradients), ("masked_fill_", fill), ("mul_", multiply)):
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    line = ", ".join(f"{name} {1e3 * statistics.median(times):.2f} ms" for name, times in taken.items())
    print(f"\nResNet-18, 11.7 M gradients, 2 threads, torch {torch.__version__}: {line}")
    assert statistics.median(taken["ours"]) < 1.5 * statistics.median(taken["masked_fill_"])

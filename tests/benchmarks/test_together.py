"""Five copies of a network in one fit beside one network in a fit of its own: seconds a step, in one run by turns.

The environment variable ``THREADS`` sets torch's threads.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_prune.experiments import Copies, ImageClassifier, LeNet300100, TensorLoader, TogetherClassifier

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]
COPIES = 5


class Steps(pl.Callback):
    """Seconds from one batch's end to the next: loading, loop and all."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        now = time.perf_counter()
        if trainer.global_step > 10:
            self.seconds.append(now - self._last)
        self._last = now


def small_conv() -> nn.Module:
    """784 inputs, 8 and 16 channels, 9,098 parameters."""
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(784, 10))


def narrow() -> nn.Module:
    """A hidden layer of 32 on images of 8x8."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def seconds(folder: Path, module: pl.LightningModule, size: int, batch: int, steps: int) -> float:
    """The median of a fit's steps."""
    images = torch.randint(256, (2000, 1, size, size), dtype=torch.uint8)
    loader = TensorLoader(images, torch.randint(10, (2000,)), batch, shuffle=True, transform=lambda x: x.float() / 255)
    watch = Steps()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[watch], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, loader)
    return statistics.median(watch.seconds)


@pytest.mark.parametrize(
    ("build", "size", "batch", "steps"),
    [(LeNet300100, 28, 60, 60), (small_conv, 28, 60, 40), (narrow, 8, 32, 200)],
    ids=["LeNet-300-100", "small conv", "narrow"],
)
def test_five_copies_beside_one(
    tmp_path: Path, build: Callable[[], nn.Module], size: int, batch: int, steps: int
) -> None:
    torch.set_num_threads(int(os.environ.get("THREADS", torch.get_num_threads())))
    alone, together = [], []
    for _ in range(3):
        alone.append(seconds(tmp_path, ImageClassifier(build()), size, batch, steps))
        copies = Copies([build() for _ in range(COPIES)])
        together.append(seconds(tmp_path, TogetherClassifier(network=copies), size, batch, steps))
    ratios = sorted(COPIES * one / all_of_them for one, all_of_them in zip(alone, together, strict=True))
    print(
        f"\n{torch.get_num_threads()} thread(s): one {1e3 * min(alone):.2f} ms a step, {COPIES} one after the other "
        f"{1e3 * COPIES * min(alone):.2f} ms, together {1e3 * min(together):.2f} ms: {ratios[1]:.2f} x as fast "
        f"({ratios[0]:.2f} to {ratios[2]:.2f})"
    )
    assert ratios[0] > 0

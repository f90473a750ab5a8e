"""What sparsity training adds to a step: CPU time of the penalty and of the whole step, medians of the same fit."""

import statistics
import time
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import SlimmingRegularizer
from lightning_prune.experiments import MLP500300, ResNet20
from tests._helpers.models import ToyModule, trainer

pytestmark = pytest.mark.bench


class Clock(pl.Callback):
    """CPU time of each whole step, after the first two."""

    def __init__(self) -> None:
        self.start, self.seconds = 0.0, list[float]()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx > 1:
            self.seconds.append(time.process_time() - self.start)


class Timed(SlimmingRegularizer):
    """Notes the CPU time of its own work in each step, after the first two."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls, self.seconds = 0, list[float]()

    def _timed(self, work: Any, *args: Any) -> None:
        start = time.process_time()
        work(*args)
        self.calls += 1
        if self.calls > 2:
            self.seconds.append(time.process_time() - start)

    def on_before_optimizer_step(self, *args: Any) -> None:
        if self.update == "subgradient":
            self._timed(super().on_before_optimizer_step, *args)

    def _after_step(self, *args: Any) -> None:
        self._timed(super()._after_step, *args)


@pytest.mark.parametrize("update", ["subgradient", "proximal"])
@pytest.mark.parametrize("coupled", ["each", "group"])
@pytest.mark.parametrize(
    ("build", "shape", "batch", "steps"), [(ResNet20, (3, 32, 32), 64, 12), (MLP500300, (1, 28, 28), 256, 200)]
)
def test_the_penalty_is_a_small_part_of_a_step(
    tmp_path: Any,
    build: type[nn.Module],
    shape: tuple[int, ...],
    batch: int,
    steps: int,
    coupled: Any,
    update: Any,
) -> None:
    data = TensorDataset(torch.randn(steps * batch, *shape), torch.randint(10, (steps * batch,)))
    penalise, clock = Timed(1e-4, update, coupled), Clock()
    module = ToyModule(build(), lambda m: SGD(m.parameters(), 0.01, momentum=0.9))
    options = {"max_epochs": 1, "limit_val_batches": 0, "logger": False}
    trainer(tmp_path, [clock, penalise], **options).fit(module, DataLoader(data, batch), DataLoader(data, batch))
    ours, whole = statistics.median(penalise.seconds), statistics.median(clock.seconds)
    print(
        f"\n{build.__name__}, batch {batch}, {update}, {coupled}: {ours * 1e3:.3f} ms of {whole * 1e3:.1f} ms a step: "
        f"{100 * ours / whole:.2f} %"
    )
    assert 0 < ours < 0.01 * whole

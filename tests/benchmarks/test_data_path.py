"""What our data path and task cost: LeNet-300-100, batches of 60, beside a plain loop and beside Lightning alone.

Times are of the processor, on one thread, the median of many steps: other programs on the machine count little.
"""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from lightning_prune.experiments import ImageClassifier, LeNet300100, TensorLoader
from lightning_prune.experiments.data import CropFlip, Pixels

pytestmark = [
    pytest.mark.bench,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated", "ignore:.*have no `val_dataloader`"),
]

STEPS, BATCH, REPEATS = 150, 60, 10
Batch = tuple[Tensor, Tensor]


def adam(parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=1.2e-3)


class Indexed:
    """The plainest way to batches: float images in memory, indexed in a random order."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __iter__(self) -> Iterator[Batch]:
        for part in torch.randperm(len(self.labels))[: STEPS * BATCH].split(BATCH):
            yield self.images[part], self.labels[part]

    def __len__(self) -> int:
        return STEPS


class Bare(LightningModule):
    """Lightning alone: nothing logged, nothing checked."""

    def __init__(self) -> None:
        super().__init__()
        self.network = LeNet300100()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Adam:
        return adam(self.parameters())


class Clock(Callback):
    """The times at which batches ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.process_time())


def fit(module: LightningModule, batches: Indexed | TensorLoader) -> list[float]:
    clock = Clock()
    parts = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, limit_val_batches=0, callbacks=[clock], enable_model_summary=False, **parts)
    trainer.fit(module, batches)
    return clock.times


def plain_loop(batches: Indexed) -> list[float]:
    network = LeNet300100()
    optimizer = adam(network.parameters())
    times = []
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        times.append(time.process_time())
    return times


def test_lenet_on_mnist_sized_data() -> None:
    pixels = torch.randint(256, (50_000, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(10, (50_000,))
    plain = Indexed(pixels / 255, labels)

    def ours() -> TensorLoader:
        loader = TensorLoader(pixels, labels, BATCH, shuffle=True, transform=Pixels())
        loader.sampler = torch.utils.data.RandomSampler(range(len(labels)), num_samples=STEPS * BATCH)  # type: ignore[arg-type]
        return loader

    base = "Lightning, indexed tensors"
    ways: dict[str, Callable[[], list[float]]] = {
        "plain loop, indexed tensors": lambda: plain_loop(plain),
        base: lambda: fit(Bare(), plain),
        "Lightning, our loader": lambda: fit(Bare(), ours()),
        "our task, our loader": lambda: fit(ImageClassifier(LeNet300100(), optimizer=adam), ours()),
    }
    steps: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, way in ways.items():
            times = way()
            assert len(times) == STEPS
            if repeat > 0:  # the first is the warm-up
                steps[name] += [end - start for start, end in pairwise(times)]
    print()
    for name, seconds in steps.items():
        print(f"{name:28} {1 / median(seconds):4.0f} steps a second, x{median(seconds) / median(steps[base]):.3f}")
    for name, way in {"indexed tensors": plain, "our loader": ours()}.items():
        start = time.process_time()
        fetched = sum(1 for _ in way)
        print(f"fetching alone, {name}: {(time.process_time() - start) / fetched * 1e6:.0f} us a batch")
    assert median(steps["our task, our loader"]) <= 1.05 * median(steps[base])


def test_cifar_augmentation() -> None:
    images = torch.randint(256, (128, 3, 32, 32), dtype=torch.uint8)
    ways = {
        "scale": Pixels((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        "crop, flip, scale": CropFlip(4, then=Pixels((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))),
    }
    print()
    for name, way in ways.items():
        times = []
        for _ in range(50):
            start = time.process_time()
            way(images)
            times.append(time.process_time() - start)
        print(f"{name:20} {median(times) * 1e3:.2f} ms a batch of 128")
        assert median(times) < 0.010  # a ResNet-20 step on such a batch takes over 100 ms on one core

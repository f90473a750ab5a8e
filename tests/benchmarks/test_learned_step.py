"""A training step that learns masks beside a dense one, by turns in one process, and what its parts replace."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.experiments import Conv4, LeNet300100
from lightning_prune.learned import Levels, MaskLearner, MaskSettings, TopMask

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

# Processor time of this thread: on a machine that others use too, what a step costs and not how long it waits.
clock = time.thread_time

ARMS = {
    "edge_popup": MaskSettings("edge_popup", 0.5),
    "stochastic": MaskSettings("stochastic", None),
    "stochastic, rescaled": MaskSettings("stochastic", None, rescale=True),
    "stochastic at a density": MaskSettings("stochastic", 0.5),
}
Step = Callable[[], Any]


def dense(network: nn.Module, images: Tensor, labels: Tensor) -> Step:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def learned(network: nn.Module, settings: MaskSettings, images: Tensor, labels: Tensor) -> Step:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    learner = MaskLearner(network, settings)
    learner.take_over([optimizer])

    def step() -> None:
        learner.draw += 1
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        learner.hold_density()

    return step


def by_turns(steps: dict[str, Step], warm: int, rounds: int) -> dict[str, float]:
    """Median seconds of each step, one of each in turn."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warm + rounds):
        for name, step in steps.items():
            start = clock()
            step()
            if number >= warm:
                taken[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def compare(
    network: Callable[[], nn.Module], shape: tuple[int, ...], arms: dict[str, MaskSettings], warm: int, rounds: int
) -> dict[str, float]:
    """Each arm's step over the dense one."""
    torch.set_num_threads(1)
    images, labels = torch.randn(shape), torch.randint(10, shape[:1])
    steps = {"dense": dense(network(), images, labels)}
    steps |= {name: learned(network(), settings, images, labels) for name, settings in arms.items()}
    taken = by_turns(steps, warm, rounds)
    ratios = {name: seconds / taken["dense"] for name, seconds in taken.items()}
    line = ", ".join(f"{name} x{ratio:.2f}" for name, ratio in ratios.items())
    print(f"\n{network.__name__}, batch {shape[0]}, 1 thread, torch {torch.__version__}: ", end="")
    print(f"dense step {1e3 * taken['dense']:.2f} ms of processor time; {line}")
    return ratios


def test_lenet() -> None:
    ratios = compare(LeNet300100, (60, 1, 28, 28), ARMS, 50, 400)
    assert ratios["edge_popup"] <= 1.5
    assert ratios["stochastic"] <= 2
    assert ratios["stochastic, rescaled"] <= 2


def test_conv4() -> None:
    arms = {name: ARMS[name] for name in ("edge_popup", "stochastic, rescaled")}
    ratios = compare(Conv4, (128, 3, 32, 32), arms, 1, 5)
    assert max(ratios.values()) <= 1.3


def test_parts() -> None:
    """The random bits of LeNet's first layer against ``torch.bernoulli``, its boundary against a sort."""
    torch.set_num_threads(1)
    scores, drift = torch.randn(300, 784), 1e-4 * torch.randn(300, 784)
    search = TopMask()

    def boundary() -> None:
        scores.add_(drift)
        search.update(scores, scores.numel() // 2)

    probabilities = torch.sigmoid(scores)
    taken = by_turns(
        {
            "bernoulli": lambda: torch.bernoulli(probabilities),
            "our bits": lambda: Levels(0, 1, 0, 0, scores.device).next(scores.numel()),
            "sort": lambda: scores.abs().view(-1).sort(),
            "kthvalue": lambda: scores.abs().view(-1).kthvalue(scores.numel() // 2),
            "our boundary": boundary,
        },
        5,
        60,
    )
    print("\n235,200 weights: " + ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in taken.items()))
    assert taken["our bits"] < taken["bernoulli"] / 3
    assert taken["our boundary"] < taken["kthvalue"] / 2
    assert taken["our boundary"] < taken["sort"] / 10

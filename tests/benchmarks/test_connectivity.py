"""What a line costs beside plain evaluations, and when many points at once pay."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_prune.connectivity import ErrorRate, linear_mode_connectivity
from lightning_prune.experiments import LeNet300100, ResNet20

NETWORKS = {"LeNet-300-100": (LeNet300100, (1, 28, 28), 10_000), "ResNet-20": (ResNet20, (3, 32, 32), 200)}


def prepared(name: str) -> tuple[nn.Module, list[dict[str, Tensor]], list[tuple[Tensor, Tensor]]]:
    build, shape, images = NETWORKS[name]
    batches = [(torch.randn(200, *shape), torch.randint(10, (200,))) for _ in range(images // 200)]
    return build().eval(), [build().state_dict() for _ in range(2)], batches


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@pytest.mark.bench
@pytest.mark.parametrize("name", NETWORKS)
def test_thirty_points_cost_thirty_evaluations_and_five_per_cent(name: str) -> None:
    """Once by turns with plain evaluations, once as the processor time outside the evaluations that a line makes."""
    net, ends, batches = prepared(name)
    rate, inside = ErrorRate(batches), [0.0]

    def timed(model: nn.Module) -> dict[str, float]:
        begin = time.process_time()
        found = rate(model)
        inside[0] += time.process_time() - begin
        return found

    def line() -> object:
        return linear_mode_connectivity(net, *ends, timed)

    def plain() -> object:
        return [rate(net) for _ in range(30)]

    rate(net)
    pairs, outside = [], []
    for _ in range(3):
        taken = seconds(plain)
        inside[0], begin = 0.0, time.process_time()
        pairs.append((taken, seconds(line)))
        outside.append((time.process_time() - begin) / inside[0])
    ratio, own = sorted(b / a for a, b in pairs)[1], sorted(outside)[1]
    print(f"{name}: 30 evaluations {min(a for a, _ in pairs):.2f} s, a line {ratio:.3f} x by turns, {own:.3f} x inside")
    assert own < 1.05
    assert ratio < 1.15  # by the clock, on a machine that others use


@pytest.mark.bench
@pytest.mark.parametrize("name", NETWORKS)
def test_points_at_once(name: str) -> None:
    net, ends, batches = prepared(name)
    one = ErrorRate(batches)
    others = {
        "10 a pass": ErrorRate(batches, points_per_pass=10),
        "10 a pass, vectorized": ErrorRate(batches, points_per_pass=10, vectorize=True),
    }
    for rate in (one, *others.values()):
        linear_mode_connectivity(net, *ends, rate, points=2)
    for what, rate in others.items():
        pairs = [
            tuple(seconds(lambda r=r: linear_mode_connectivity(net, *ends, r, points=10)) for r in (one, rate))
            for _ in range(3)
        ]
        ratio = sorted(b / a for a, b in pairs)[1]
        print(f"{name}, data in memory, {what}: {ratio:.2f} x one point a pass")
        assert ratio > 0


class Slow(Dataset):
    """Images that take a millisecond each to read."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(0.001)
        return torch.randn(1, 28, 28), index % 10


@pytest.mark.bench
def test_points_at_once_pay_where_reading_is_slow() -> None:
    net, ends, _ = prepared("LeNet-300-100")
    loader = DataLoader(Slow(), 200)
    taken = {
        what: seconds(lambda r=rate: linear_mode_connectivity(net, *ends, r, points=10))
        for what, rate in {
            "one a pass": ErrorRate(loader, keep_bytes=0),
            "ten a pass": ErrorRate(loader, keep_bytes=0, points_per_pass=10),
            "held in memory": ErrorRate(loader),
        }.items()
    }
    print("LeNet-300-100, 1 ms an image to read: " + ", ".join(f"{what} {s:.2f} s" for what, s in taken.items()))
    assert taken["ten a pass"] < taken["one a pass"] / 3
    assert taken["held in memory"] < taken["one a pass"] / 3

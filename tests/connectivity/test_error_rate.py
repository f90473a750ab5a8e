"""Error rates against NumPy, and many points at once against one after the other."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ConfigError
from lightning_prune.connectivity import ErrorRate, linear_mode_connectivity
from lightning_prune.experiments import ResNet20

BATCHES = [(torch.randn(20, 6), torch.randint(3, (20,))), (torch.randn(7, 6), torch.randint(3, (7,)))]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()


def by_hand(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        wrong = np.concatenate([np.argmax(net(x).numpy(), axis=1) != y.numpy() for x, y in batches])
    return float(wrong.mean())


def test_the_error_is_the_fraction_of_wrong_examples() -> None:
    net = network()
    assert ErrorRate({"a": BATCHES, "b": BATCHES[:1]})(net) == {
        "a": by_hand(net, BATCHES),
        "b": by_hand(net, BATCHES[:1]),
    }
    assert 0 < by_hand(net, BATCHES) < 1


class Loader:
    """Counts how often it was read; new noise every time."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.read += 1
        for x, y in BATCHES:
            yield x + torch.randn_like(x), y


@pytest.mark.parametrize(("keep", "points", "read"), [(2**20, 1, 1), (0, 1, 6), (0, 3, 2), (0, 4, 2), (500, 6, 1)])
def test_data_is_read_as_often_as_stated(keep: int, points: int, read: int) -> None:
    loader = Loader()
    net = network()
    states = network().state_dict(), network().state_dict()
    linear_mode_connectivity(net, *states, ErrorRate(loader, keep, points), points=6)
    assert loader.read == read


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("batch_norm", ["interpolate", "recalibrate"])
def test_many_points_at_once_give_what_one_after_the_other_gives(vectorize: bool, batch_norm: str) -> None:
    net, ends = ResNet20(width=0.25).eval(), []
    for seed in range(2):
        torch.manual_seed(seed)
        end = ResNet20(width=0.25).train()
        end(torch.randn(8, 3, 32, 32))
        ends.append(end.state_dict())
    data = [(torch.randn(30, 3, 32, 32), torch.randint(10, (30,)))]
    options = {"points": 5, "batch_norm": batch_norm, "batches": [data[0][0]]}
    one = linear_mode_connectivity(net, *ends, ErrorRate(data), **options)
    many = linear_mode_connectivity(net, *ends, ErrorRate(data, points_per_pass=3, vectorize=vectorize), **options)
    assert one == many
    assert len(set(one.errors["error"])) > 1


def test_inputs_may_be_several() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x + y)

    net, (x, labels) = Two(), BATCHES[0]
    expected = by_hand(net.linear, [(2 * x, labels)])
    for inputs in ((x, x), {"x": x, "y": x}):
        rate = ErrorRate([(inputs, labels)], points_per_pass=2)
        assert rate(net)["error"] == pytest.approx(expected)
        assert linear_mode_connectivity(net, net.state_dict(), net.state_dict(), rate, points=2).errors["error"] == (
            pytest.approx((expected, expected))
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"splits": {}}, "splits is empty"),
        ({"splits": iter(BATCHES)}, "iterator"),
        ({"splits": BATCHES, "points_per_pass": 0}, "points_per_pass=0"),
    ],
)
def test_what_cannot_work_is_named(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ErrorRate(**given)


def test_an_empty_split_is_named() -> None:
    with pytest.raises(ConfigError, match="split 'test' has no examples"):
        ErrorRate({"test": []})(network())

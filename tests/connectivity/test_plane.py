"""Errors on a plane against a bowl over coordinates worked out by hand."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ConfigError
from lightning_prune.connectivity import ErrorPlane, error_plane

A, B, C = ([0.0, 0.0, 1.0], [2.0, 0.0, 1.0], [1.0, 3.0, 1.0])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 1, bias=False), nn.BatchNorm1d(1, affine=False)).double()


def state(weight: list[float], variance: float = 1.0, seen: int = 0) -> dict[str, Tensor]:
    net = network()
    net[0].weight.data = torch.tensor([weight]).double()
    net[1].running_var.fill_(variance)
    net[1].num_batches_tracked.fill_(seen)
    return net.state_dict()


def bowl(model: nn.Module) -> float:
    return float(model[0].weight.detach().square().sum())


def test_places_and_errors_are_those_of_geometry() -> None:
    plane = error_plane(network(), state(A), state(B), state(C), bowl, points=4, margin=0.5)
    np.testing.assert_allclose(plane.places, [(0, 0), (2, 0), (1, 3)], atol=1e-12)
    np.testing.assert_allclose(plane.xs, np.linspace(-1, 3, 4))
    np.testing.assert_allclose(plane.ys, np.linspace(-1.5, 4.5, 4))
    expected = np.array([[x**2 + y**2 + 1 for x in plane.xs] for y in plane.ys])
    np.testing.assert_allclose(plane.errors["error"], expected)
    assert plane.corners["error"] == (1.0, 5.0, 11.0)


def test_statistics_stay_possible_and_counters_whole() -> None:
    net, seen = network(), []

    def look(model: Any) -> float:
        seen.append((float(model[1].running_var), int(model[1].num_batches_tracked)))
        return 0.0

    before = [t.clone() for t in net.state_dict().values()]
    error_plane(net, state(A, 1.0, 10), state(B, 0.0, 20), state(C, 0.0, 30), look, points=5, margin=1.0)
    assert min(variance for variance, _ in seen) == 0.0
    assert max(variance for variance, _ in seen) > 1.0
    assert {count for _, count in seen} == {10, 20, 30}
    assert seen[-3:] == [(1.0, 10), (0.0, 20), (0.0, 30)]
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))

    x = torch.randn(64, 3).double()
    seen.clear()
    error_plane(net, state(A), state(B), state(C), look, points=2, batches=[x])
    for (variance, _), weight in zip(seen[-3:], (A, B, C), strict=True):
        assert variance == pytest.approx(float((x @ torch.tensor(weight).double()).var()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_c": state([1.0, 0.0, 1.0])}, "on one line"),
        ({"state_b": state(A)}, "on one line"),
        ({"points": 1}, "points=1"),
        ({"margin": -1.0}, r"margin=-1\.0"),
        ({"state_b": {}}, "state_b is no state"),
        ({"batches": iter([])}, "iterator"),
        ({"error": lambda model: float("nan")}, "no maximum"),
    ],
)
def test_what_cannot_work_is_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"state_a": state(A), "state_b": state(B), "state_c": state(C), "error": bowl}
    with pytest.raises(ConfigError, match=message):
        error_plane(network(), **(given | change))


def test_a_plane_comes_back_from_json() -> None:
    plane = error_plane(network(), state(A), state(B), state(C), bowl, points=3)
    content = json.loads(json.dumps(plane.to_json()))
    assert ErrorPlane.from_json(content) == plane
    error = content["errors"]["error"]
    changes: list[dict[str, Any]] = [
        {"xs": content["xs"][:2]},
        {"xs": content["xs"][::-1]},
        {"errors": {"error": [*error[:2], [1, 2]]}},
        {"errors": {}},
        {"corners": {}},
        {"ys": [0.0, 1.0, float("nan")]},
        {"places": [[0, 0]]},
    ]
    for change in changes:
        with pytest.raises(ValueError, match=r"belong together|not finite|unpack"):
            ErrorPlane.from_json(content | change)

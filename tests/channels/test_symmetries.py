"""Channels that may change places: found, tried, and permuted against matrices written by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.channels import trace_channels
from lightning_prune.channels.symmetries import find_symmetries, permute
from lightning_prune.experiments import ResNet20
from tests.channels.networks import Net, conv


def symmetric(model: nn.Module, x: Tensor) -> dict[str, int]:
    return {group.name: group.size for group in find_symmetries(trace_channels(model.eval(), x, approximate=True))}


def test_hidden_layers_are_permuted_as_matrices_would() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    groups = find_symmetries(trace_channels(net, torch.rand(2, 3).double()))
    assert [group.size for group in groups] == [5, 4]
    first, second = np.array([2, 0, 1, 4, 3]), np.array([3, 1, 0, 2])
    p, q = (torch.eye(len(order)).double()[order] for order in (first, second))
    state = permute(dict(net.state_dict()), groups, [first, second])
    torch.testing.assert_close(state["0.weight"], p @ net[0].weight.data)
    torch.testing.assert_close(state["2.weight"], q @ net[2].weight.data @ p.T)
    torch.testing.assert_close(state["2.bias"], q @ net[2].bias.data)
    torch.testing.assert_close(state["4.weight"], net[4].weight.data @ q.T)
    assert state["4.bias"] is net.state_dict()["4.bias"] or torch.equal(state["4.bias"], net[4].bias.data)
    x = torch.rand(6, 3).double()
    torch.testing.assert_close(torch.func.functional_call(net, state, (x,)), net(x), rtol=1e-12, atol=1e-12)


def test_channels_beside_padding_change_places_though_they_may_not_leave() -> None:
    """Option A shortcuts add zero channels: what is added to zeros has an order of its own."""
    net = ResNet20(width=0.5)
    found = symmetric(net, torch.rand(1, 3, 32, 32))
    removable = {group.name for group in trace_channels(net, torch.rand(1, 3, 32, 32)).groups}
    assert {name: size for name, size in found.items() if name not in removable} == {
        "layer2.0.conv2": 8,
        "layer3.0.conv2": 16,
    }


def test_a_normalised_stream_changes_places() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    assert sorted(symmetric(net, torch.rand(2, 3)).values()) == [6, 8]


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda n, x: n.b(F.relu(n.a(x))), {"a": 8}),
        (lambda n, x: n.b(F.relu(n.a(x)) * torch.arange(8.0, dtype=x.dtype)[:, None, None]), {}),  # an order of its own
        (lambda n, x: n.b(F.relu(n.a(x)).cumsum(1)), {}),
        (lambda n, x: n.b(F.relu(n.a(x)) * 0), {}),  # nothing to see
    ],
)
def test_only_what_was_seen_to_change_nothing_is_symmetric(forward: object, expected: dict[str, int]) -> None:
    assert symmetric(Net(forward, a=conv(3, 8), b=conv(8, 4)), torch.rand(1, 3, 6, 6)) == expected  # type: ignore[arg-type]


def test_outputs_and_inputs_keep_their_order() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    groups = find_symmetries(trace_channels(net, torch.rand(2, 4)))
    assert [group.members for group in groups] == [[("0.weight", 0, 1), ("0.bias", 0, 1), ("2.weight", 1, 1)]]


class Scaled(nn.Module):
    """Channels with a scale in a buffer that a state dict does not hold."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("scale", torch.rand(6), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x) * self.scale))


def test_what_a_state_does_not_hold_keeps_its_channels_in_place() -> None:
    assert symmetric(Scaled(persistent=True), torch.rand(2, 3)) == {"a": 6}
    assert symmetric(Scaled(persistent=False), torch.rand(2, 3)) == {}

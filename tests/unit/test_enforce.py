"""Masks on gradients, weights and optimizer state."""

import copy

import pytest
import torch
from torch import nn

from lightning_prune import MaskSet
from lightning_prune.callbacks.enforce import MaskEnforcer, bits_like, zero_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_pruned_entries_become_plus_zero_whatever_they_hold(dtype: torch.dtype) -> None:
    tensor = torch.tensor([1.5, -2.0, float("nan"), float("inf"), -0.0, -float("inf")], dtype=dtype)
    mask = torch.tensor([True, False, False, False, False, True])
    zero_(tensor, bits_like(mask, tensor))
    assert tensor.tolist() == [1.5, 0, 0, 0, 0, -float("inf")]
    assert not torch.signbit(tensor[1:5]).any()


def test_layouts_follow_the_tensor() -> None:
    tensor = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    mask = torch.rand(2, 3, 4, 4) > 0.5
    bits = bits_like(mask, tensor)
    assert bits.stride() == tensor.stride()
    expected = tensor.masked_fill(~mask, 0)
    zero_(tensor, bits)
    assert torch.equal(tensor, expected)


def enforced(optimizer: torch.optim.Optimizer, net: nn.Linear, mask: torch.Tensor) -> MaskEnforcer:
    enforcer = MaskEnforcer()
    enforcer.attach({"weight": net.weight}, [optimizer], every_step=False, manual=False)
    enforcer.set_masks(MaskSet({"weight": mask}))
    return enforcer


def step(net: nn.Linear, optimizer: torch.optim.Optimizer, enforcer: MaskEnforcer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    net(x).square().sum().backward()
    enforcer.mask_gradients()
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam])
def test_divisors_of_pruned_entries_are_no_zeros_and_change_no_weight(kind: type[torch.optim.Optimizer]) -> None:
    net, mask = nn.Linear(6, 5), torch.rand(5, 6) > 0.5
    plain = copy.deepcopy(net)
    with torch.no_grad():
        plain.weight[~mask] = 0
    ours, theirs = kind(net.parameters(), lr=0.05), kind(plain.parameters(), lr=0.05)
    enforcer = enforced(ours, net, mask)
    for _ in range(5):
        x = torch.randn(8, 6)
        step(net, ours, enforcer, x)
        theirs.zero_grad()
        plain(x).square().sum().backward()
        plain.weight.grad[~mask] = 0
        theirs.step()
    assert torch.equal(net.weight, plain.weight)
    divisors = [v for k, v in ours.state[net.weight].items() if k in ("exp_avg_sq", "square_avg", "sum")]
    assert divisors
    assert all((value[~mask] > 0.5).all() for value in divisors if kind is not torch.optim.RMSprop)
    assert all((value[~mask] > 0).all() for value in divisors)


def test_a_resumed_state_is_left_alone() -> None:
    net, mask = nn.Linear(6, 5), torch.rand(5, 6) > 0.5
    optimizer = torch.optim.Adam(net.parameters())
    enforcer = enforced(optimizer, net, mask)
    for _ in range(3):
        step(net, optimizer, enforcer, torch.randn(8, 6))
    before = optimizer.state[net.weight]["exp_avg_sq"].clone()
    assert (before[~mask] < 1).all()
    enforcer.set_masks(MaskSet({"weight": mask}), resumed=True)
    assert torch.equal(optimizer.state[net.weight]["exp_avg_sq"], before)


def test_detach_leaves_nothing_behind() -> None:
    net = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    enforcer = enforced(optimizer, net, torch.rand(5, 6) > 0.5)
    enforcer.detach()
    net(torch.randn(8, 6)).sum().backward()
    optimizer.step()
    assert (net.weight != 0).all()

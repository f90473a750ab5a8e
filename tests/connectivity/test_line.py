"""Errors along a line against a bowl whose errors are known, and states rebuilt by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ConfigError, MaskMismatchError, MaskSet, NoEffectWarning
from lightning_prune.connectivity import LinearPath, linear_mode_connectivity

State = dict[str, Tensor]


class Counted(nn.Module):
    """A weight, BatchNorm with its counter, a buffer of integers, and a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.linear.weight
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.norm(self.linear(x[:, self.index])))


def trained(seed: int) -> State:
    torch.manual_seed(seed)
    net = Counted()
    for _ in range(seed + 1):
        net(torch.randn(8, 4))
    net.index.copy_(torch.randperm(4))
    return {name: value.clone() for name, value in net.state_dict().items()}


def contents(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in (*model.parameters(), *model.buffers())]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def weight_sum(model: nn.Module) -> float:
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


def test_the_same_network_twice_has_no_barrier_at_all() -> None:
    state, net = trained(3), Counted()
    path = linear_mode_connectivity(net, state, dict(state), weight_sum)
    assert len(path.alphas) == 30
    assert (path.barrier, path.heights_above_line) == (0.0, {"error": 0.0})
    assert len(set(path.errors["error"])) == 1


def test_a_quadratic_bowl_has_the_barrier_that_algebra_gives() -> None:
    """1 - |w|^2 between unit vectors at an angle of 120 degrees: 0 at the ends, 3/4 in the middle."""
    net = nn.Linear(2, 1, bias=False).double()
    a, b = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[-0.5, 0.75**0.5]]).double()
    path = linear_mode_connectivity(
        net, {"weight": a}, {"weight": b}, lambda n: 1 - float((n.weight.detach() ** 2).sum()), points=31
    )
    by_hand = [1 - float(((t * a + (1 - t) * b) ** 2).sum()) for t in np.linspace(0, 1, 31)]
    np.testing.assert_allclose(path.errors["error"], by_hand, atol=1e-12)
    assert path.barrier == pytest.approx(0.75)
    np.testing.assert_allclose(path.alphas, np.linspace(0, 1, 31), rtol=1e-15)


def test_the_two_barriers_differ_where_the_ends_do() -> None:
    path = LinearPath((0.0, 0.5, 1.0), {"train": (0.1, 0.2, 0.5), "test": (0.2, 0.9, 0.6)})
    assert path.barriers == pytest.approx({"train": 0.5 - 0.3, "test": 0.9 - 0.4})
    assert path.heights_above_line == pytest.approx({"train": 0.0, "test": 0.5})
    assert path.barrier == path.barriers["test"]
    assert LinearPath((0.0, 1.0), {"train": (0.0, 0.0)}).barrier == 0.0


def test_swapping_the_ends_turns_the_line_round() -> None:
    a, b, net = trained(1), trained(2), Counted().double()
    there = linear_mode_connectivity(net, a, b, weight_sum, points=7)
    back = linear_mode_connectivity(net, b, a, weight_sum, points=7)
    np.testing.assert_allclose(there.errors["error"], back.errors["error"][::-1], rtol=1e-12)
    assert there.barrier == pytest.approx(back.barrier, abs=1e-9)


def test_ends_are_met_exactly_and_integers_are_copied() -> None:
    a, b, net = trained(1), trained(5), Counted()
    seen: list[State] = []

    def look(model: nn.Module) -> float:
        assert not model.training
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return 0.0

    linear_mode_connectivity(net, a, b, look, points=4)
    for end, state in ((seen[0], b), (seen[-1], a)):
        assert all(torch.equal(end[name], state[name]) for name in state)
    for point, near, alpha in ((seen[1], b, 1 / 3), (seen[2], a, 2 / 3)):
        assert torch.equal(point["index"], near["index"])
        assert int(point["norm.num_batches_tracked"]) == int(near["norm.num_batches_tracked"])
        for name in ("linear.weight", "norm.running_var", "tied.bias"):
            torch.testing.assert_close(point[name], alpha * a[name] + (1 - alpha) * b[name])


@pytest.mark.parametrize("broken", [False, True])
def test_the_network_is_put_back_bit_for_bit(broken: bool) -> None:
    net = Counted()
    net.norm.eval()  # a mode of its own
    net.linear.bias.data[0] = float("nan")
    before, modes = contents(net), [m.training for m in net.modules()]

    def error(model: nn.Module) -> float:
        model.scratch.fill_(1)
        if broken:
            raise ZeroDivisionError
        return 1.0

    if broken:
        with pytest.raises(ZeroDivisionError):
            linear_mode_connectivity(net, trained(1), trained(2), error)
    else:
        linear_mode_connectivity(net, trained(1), trained(2), error)
    after = contents(net)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, after, strict=True))
    assert [m.training for m in net.modules()] == modes
    assert all(p.requires_grad for p in net.parameters())


def test_a_compiled_network_takes_plain_states() -> None:
    net = torch.compile(Counted(), backend="eager")
    plain, compiled = trained(1), {f"_orig_mod.{name}": value for name, value in trained(2).items()}
    path = linear_mode_connectivity(net, plain, compiled, weight_sum, points=2)
    assert path.errors == linear_mode_connectivity(Counted(), plain, trained(2), weight_sum, points=2).errors


def masked(seed: int, masks: MaskSet) -> State:
    net = Counted()
    net.load_state_dict(trained(seed))
    masks.apply_(net)
    return net.state_dict()


def test_a_line_between_copies_of_a_ticket_stays_in_its_subnetwork() -> None:
    masks = MaskSet({"linear.weight": torch.rand(4, 4) > 0.5})
    outside = ~masks["linear.weight"]

    def strays(model: nn.Module) -> float:
        return float(model.linear.weight.detach()[outside].count_nonzero())

    path = linear_mode_connectivity(Counted(), masked(1, masks), masked(2, masks), strays, masks=masks)
    assert outside.any()
    assert max(path.errors["error"]) == 0.0


def test_masks_that_differ_are_refused_unless_asked_for() -> None:
    one = MaskSet({"linear.weight": torch.arange(16).view(4, 4) < 8})
    two = MaskSet({"linear.weight": torch.arange(16).view(4, 4) >= 4})
    ends = masked(1, one), masked(2, two)
    with pytest.raises(MaskMismatchError, match="leaves both subnetworks"):
        linear_mode_connectivity(Counted(), *ends, weight_sum, masks=(one, two))

    def used(model: nn.Module) -> float:
        return float(model.linear.weight.detach().count_nonzero())

    path = linear_mode_connectivity(Counted(), *ends, used, points=3, masks=(one, two), differing_masks="union")
    assert path.errors["error"] == (12.0, 16.0, 8.0)


def test_a_state_outside_its_mask_is_refused() -> None:
    masks = MaskSet({"linear.weight": torch.eye(4) > 0})
    with pytest.raises(MaskMismatchError, match="state_b does not lie in its subnetwork: 12 pruned"):
        linear_mode_connectivity(Counted(), masked(1, masks), trained(2), weight_sum, masks=masks)
    filled = MaskSet(dict(masks), {"linear.weight": torch.full((4, 4), 0.5)})
    path = linear_mode_connectivity(
        Counted(), masked(1, filled), masked(2, filled), lambda n: n.linear.weight[0, 1].item(), masks=filled
    )
    assert set(path.errors["error"]) == {0.5}
    for foreign in (MaskSet({"other": torch.ones(2) > 0}), MaskSet({"linear.weight": torch.ones(2) > 0})):
        with pytest.raises(MaskMismatchError, match="belong to another network"):
            linear_mode_connectivity(Counted(), trained(1), trained(1), weight_sum, masks=foreign)


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"state_a": without(trained(1), "linear.bias")},
            "no state of this Counted: it has no 'linear.bias'",
        ),
        ({"state_b": trained(1) | {"liner.bias": torch.zeros(4)}}, "which has no 'liner.bias'; did you mean"),
        ({"state_b": trained(1) | {"norm.weight": torch.zeros(5)}}, r"shape \(5,\), the network's has \(4,\)"),
        ({"state_a": {"state_dict": trained(1)}}, "whole checkpoint"),
        ({"points": 1}, "points=1"),
        ({"points": True}, "points=True"),
        ({"batch_norm": "reset"}, "batch_norm='reset'"),
        ({"differing_masks": "intersection"}, "differing_masks="),
        ({"batch_norm": "recalibrate"}, "needs batches"),
        ({"batch_norm": "recalibrate", "batches": iter([torch.zeros(2, 4)])}, "iterator"),
        ({"batch_norm": "recalibrate", "batches": []}, "no batch"),
        ({"error": lambda model: None}, "must return a number"),
        ({"error": lambda model: {}}, "no maximum"),
        ({"error": lambda model: float("nan")}, r"at alpha=0\.000"),
        ({"error": lambda model: {str(float(model.linear.bias[0])): 1.0}}, "other splits"),
    ],
)
def test_what_cannot_work_is_named(change: dict[str, Any], message: str) -> None:
    given = {"state_a": trained(1), "state_b": trained(2), "error": weight_sum} | change
    net = Counted()
    before = contents(net)
    with pytest.raises(ConfigError, match=message):
        linear_mode_connectivity(net, **given)
    assert equal(before, contents(net))


def test_statistics_are_estimated_anew_at_every_point() -> None:
    batches = [torch.randn(16, 4), torch.randn(16, 4) + 1]
    a, b, net = trained(1), trained(2), Counted()
    seen: list[State] = []

    def look(model: nn.Module) -> float:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return 0.0

    linear_mode_connectivity(net, a, b, look, points=3, batch_norm="recalibrate", batches=batches)
    for point in seen:
        hidden = [x[:, point["index"]] @ point["linear.weight"].T + point["linear.bias"] for x in batches]
        mean, var = (torch.stack([f(h, dim=0) for h in hidden]).mean(0) for f in (torch.mean, torch.var))
        torch.testing.assert_close(point["norm.running_mean"], mean)
        torch.testing.assert_close(point["norm.running_var"], var)
    assert not torch.equal(seen[1]["norm.running_var"], (a["norm.running_var"] + b["norm.running_var"]) / 2)


def test_recalibration_without_statistics_warns() -> None:
    net = nn.Linear(2, 2)
    with pytest.warns(NoEffectWarning, match="no running statistics"):
        path = linear_mode_connectivity(
            net, net.state_dict(), net.state_dict(), weight_sum, batch_norm="recalibrate", batches=[torch.zeros(1, 2)]
        )
    assert path.barrier == 0

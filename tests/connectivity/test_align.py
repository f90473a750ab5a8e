"""Networks whose channels were shuffled are put in order again; small matchings against every permutation."""

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ConfigError, EqualityError, MaskSet, linear_mode_connectivity
from lightning_prune.channels import trace_channels
from lightning_prune.channels.symmetries import find_symmetries, permute
from lightning_prune.connectivity import align, align_states
from lightning_prune.experiments import VGG16BN, LeNet300100, ResNet20

State = dict[str, Tensor]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, 24), stack, nn.Flatten(), nn.Linear(24 * 5, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet-300-100": (LeNet300100, (1, 28, 28)),
    "ResNet-20": (ResNet20, (3, 32, 32)),
    "VGG-16": (lambda: VGG16BN(width=0.25), (3, 32, 32)),
    "Transformer": (encoder, (5, 6)),
}


def lively(net: nn.Module, x: Tensor) -> nn.Module:
    """With statistics, scales and shifts that differ from channel to channel."""
    net.train()
    for p in net.parameters():
        p.data += 0.1 * torch.rand_like(p)
    with torch.no_grad():
        net(x)
    return net.eval()


def shuffled(net: nn.Module, x: Tensor) -> State:
    groups = find_symmetries(trace_channels(net, x[:1], approximate=True))
    rng = np.random.default_rng(5)
    return permute(
        {n: t.clone() for n, t in net.state_dict().items()}, groups, [rng.permutation(g.size) for g in groups]
    )


def outputs(net: nn.Module, state: State, x: Tensor) -> Tensor:
    state = {n: t.double() if t.is_floating_point() else t for n, t in state.items()}
    return torch.func.functional_call(net, state, (x.double(),)).detach()


@pytest.mark.parametrize("name", CASES)
def test_a_shuffled_copy_is_put_in_order(name: str) -> None:
    build, shape = CASES[name]
    x = torch.rand(24, *shape)
    net = lively(build(), x)
    state = {n: t.clone() for n, t in net.state_dict().items()}
    other = shuffled(net, x)
    torch.testing.assert_close(outputs(net, other, x), outputs(net, state, x), rtol=1e-9, atol=1e-9)
    reference = net(x).detach()

    def distance(model: nn.Module) -> float:
        return float((model(x) - reference).abs().max() / reference.abs().max())

    apart = linear_mode_connectivity(net, state, other, distance, points=3)
    aligned = linear_mode_connectivity(net, state, other, distance, points=3, align=True, example_inputs=x[:2])

    assert apart.alignment is None
    assert apart.barrier > 1e-3
    assert aligned.barrier == 0
    assert aligned.alignment is not None
    assert aligned.alignment.moved > 100 if name != "Transformer" else aligned.alignment.moved > 20
    assert aligned.alignment.similarity[1] == pytest.approx(1)
    assert aligned.alignment.error < 1e-9
    for key, value in state.items():
        torch.testing.assert_close(aligned.alignment.state[key], value, rtol=0, atol=0)


def test_two_trained_networks_come_closer_and_compute_the_same() -> None:
    """A network of its own seed: less of a barrier, never another function."""
    x = torch.randn(256, 10)
    labels = (x[:, :3].abs().sum(1) > 2.4).long()

    def train(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 2))
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(200):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), labels).backward()
            optimizer.step()
        return net

    one, two = train(0), train(1)
    found = align_states(one, one.state_dict(), two.state_dict(), x)
    assert found.similarity[1] > found.similarity[0] + 0.1
    torch.testing.assert_close(outputs(one, found.state, x), outputs(one, two.state_dict(), x))

    def loss(model: nn.Module) -> float:
        return float(nn.functional.cross_entropy(model(x), labels))

    before, after = (
        linear_mode_connectivity(one, one.state_dict(), two.state_dict(), loss, align=a, example_inputs=x).barrier
        for a in (False, True)
    )
    assert after < before


@pytest.mark.parametrize("seed", range(5))
def test_one_group_is_matched_as_well_as_any_permutation(seed: int) -> None:
    torch.manual_seed(seed)
    one, two = (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(2))
    found = align_states(one, one.state_dict(), two.state_dict(), torch.rand(1, 3)).state

    def closeness(state: State) -> float:
        return sum(float((value.double() * state[name].double()).sum()) for name, value in one.state_dict().items())

    def by_hand(order: list[int]) -> State:
        state = dict(two.state_dict())
        return state | {n: state[n][order] for n in ("0.weight", "0.bias")} | {"2.weight": state["2.weight"][:, order]}

    assert closeness(found) == pytest.approx(max(closeness(by_hand(list(o))) for o in permutations(range(5))))


class Tied(nn.Module):
    """One weight under two names; its axes are of one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        return self.out(h + self.down(torch.relu(self.up(h))))


def test_shared_weights_stay_shared() -> None:
    net = Tied()
    state, tokens = {n: t.clone() for n, t in net.state_dict().items()}, torch.arange(9)[None]
    groups = find_symmetries(trace_channels(net, tokens))
    assert sorted(group.size for group in groups) == [6, 12]
    other = permute(dict(state), groups, [np.roll(np.arange(g.size), 2) for g in groups])
    other["out.weight"] = other["embed.weight"]
    found = align_states(net, state, other, tokens).state
    assert torch.equal(found["out.weight"], found["embed.weight"])
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert not torch.equal(other["up.weight"], state["up.weight"])


def test_masks_go_along() -> None:
    net = LeNet300100()
    masks = MaskSet({"fc1.weight": torch.rand(300, 784) > 0.5, "fc3.weight": torch.rand(10, 100) > 0.5})
    masks.apply_(net)
    state, x = {n: t.clone() for n, t in net.state_dict().items()}, torch.rand(4, 1, 28, 28)
    other = shuffled(net, x)
    shuffled_masks = MaskSet({name: other[name] != 0 for name in masks})
    assert shuffled_masks != masks

    def error(model: nn.Module) -> float:
        return float((model.fc1.weight == 0).sum())

    path = linear_mode_connectivity(
        net, state, other, error, points=3, masks=(masks, shuffled_masks), align=True, example_inputs=x
    )
    assert set(path.errors["error"]) == {float((~masks["fc1.weight"]).sum())}


def test_align_needs_inputs_to_trace() -> None:
    net = LeNet300100()
    with pytest.raises(ConfigError, match="give example_inputs"):
        linear_mode_connectivity(net, net.state_dict(), net.state_dict(), lambda m: 0.0, align=True)
    net.example_input_array = torch.rand(1, 1, 28, 28)
    path = linear_mode_connectivity(net, net.state_dict(), net.state_dict(), lambda m: 0.0, points=2, align=True)
    assert path.alignment is not None
    assert path.alignment.moved == 0


def test_a_permutation_that_changes_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = nn.Linear(3, 4), nn.Linear(3, 4)
    two.weight.data, two.bias.data = one.weight.data.roll(1, 0), one.bias.data.roll(1)
    wrong = trace_channels(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.rand(1, 3)).groups[0]
    wrong.members = [("weight", 0, 1), ("bias", 0, 1)]
    wrong._slots = {("weight", 0): np.arange(4)[:, None], ("bias", 0): np.arange(4)[:, None]}
    monkeypatch.setattr(align, "find_symmetries", lambda graph: [wrong])
    with pytest.raises(EqualityError, match="depends on the order"):
        align_states(one, one.state_dict(), two.state_dict(), torch.rand(2, 3))

"""Gates where no BatchNorm is: the same as factors that autograd sees, and slimming of hidden units and heads."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lightning_prune import (
    Budget,
    ConfigError,
    LRRewind,
    ResumeError,
    SlimmingPruner,
    SlimmingRegularizer,
    load_compact,
    trace_channels,
)
from lightning_prune.channels.gates import Gates, gated_groups
from tests._helpers.models import ToyModule, loaders, toy_network, trainer


class Tokens(nn.Module):
    """Attention and an MLP on four tokens, residual, with LayerNorm: what can leave are heads and hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 16)
        self.norm_a, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm_b, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.view(-1, 4, 3))
        a = self.norm_a(h)
        h = h + self.attention(a, a, a, need_weights=False)[0]
        h = h + self.fc2(F.gelu(self.fc1(self.norm_b(h))))
        return self.head(h.mean(1))


def test_a_fit_equals_factors_that_autograd_sees(tmp_path: Any) -> None:
    ours = ToyModule(toy_network(norm=False), lambda m: SGD(m.parameters(), 0.1, momentum=0.9))
    theirs = copy.deepcopy(ours.network)
    penalise = SlimmingRegularizer(0.2, gates=True)
    trainer(tmp_path, [penalise], max_epochs=2).fit(ours, *loaders())
    optimizer = SGD(theirs.parameters(), 0.1, momentum=0.9)
    gate = torch.ones(16)
    for _ in range(2):
        for x, y in loaders()[0]:
            factor = torch.ones(16, requires_grad=True)  # relative to the gate, which the weights hold
            optimizer.zero_grad()
            F.cross_entropy(theirs[3](theirs[1](theirs[0](x)) * factor), y).backward()
            optimizer.step()
            with torch.no_grad():
                new = (gate - 0.1 * factor.grad / gate.clamp_min(1e-38) - 0.1 * 0.2).clamp_min(0)
                new = torch.where(gate > 0, new, 0)
                theirs[3].weight *= torch.where(gate > 0, new / gate, 0)
                gate = new
    assert torch.allclose(penalise.state_dict()["gates"]["0"], gate, atol=1e-6)
    for a, b in zip(ours.network.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert 0 < (gate == 0).sum() < 16 or gate.min() < 0.6


def test_the_effect_is_the_derivative_by_a_factor_on_heads() -> None:
    torch.manual_seed(0)
    model, x = Tokens(), torch.randn(5, 12)
    groups = gated_groups(trace_channels(model, x).groups, model)
    assert {group.name: group.size for group in groups} == {"attention": 4, "fc1": 24}
    gates = Gates(groups, model)
    model(x).square().sum().backward()
    gates.take_gradients(model.parameters())
    heads, step = gates._effects["attention"], 1e-3
    with torch.no_grad():
        for head in range(4):
            weight = model.attention.out_proj.weight
            columns, losses = weight[:, 4 * head : 4 * head + 4].clone(), []
            for sign in (1, -1):
                weight[:, 4 * head : 4 * head + 4] = columns * (1 + sign * step)
                losses.append(float(model(x).double().square().sum()))
            weight[:, 4 * head : 4 * head + 4] = columns
            assert float(heads[head]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=2e-2, abs=1e-2)


@pytest.mark.filterwarnings("ignore:the scales have not separated")
@pytest.mark.parametrize("update", ["subgradient", "proximal"])
def test_heads_and_hidden_units_are_slimmed(tmp_path: Any, update: Any) -> None:
    torch.manual_seed(0)
    network = Tokens()
    keys = list(network.state_dict())
    widths: list[tuple[int, int]] = []

    class Seen(SlimmingRegularizer):
        def on_prune(self, trainer: Any, pl_module: Any, event: Any) -> None:
            before = {name: value.clone() for name, value in self.gates.values.items()}
            super().on_prune(trainer, pl_module, event)
            for name, value in self.gates.values.items():  # the largest stay
                assert torch.equal(value.sort().values, before[name].sort().values[-len(value) :])
            widths.append((network.attention.num_heads, network.fc1.out_features))

    prune = SlimmingPruner(Budget(channels=0.6), ["6ep", "6ep"], verbose=False)
    callbacks = [prune, Seen(1.0, update, gates=True), LRRewind("0st")]
    module = ToyModule(network, lambda m: Adam(m.parameters(), 0.01))
    trainer(tmp_path, callbacks, max_epochs=6).fit(module, *loaders())
    assert len(widths) == 2
    assert widths[1][0] * 1 + widths[1][1] == 16  # of 4 + 24
    assert widths[1][1] < 24
    assert list(network.state_dict()) == keys
    fresh = Tokens()
    load_compact(fresh, prune.folder / "compact.safetensors")
    x = torch.randn(3, 12)
    assert torch.allclose(fresh.eval()(x), network.eval()(x), atol=1e-6)


def test_gates_are_saved_and_fit_their_network() -> None:
    model = toy_network(norm=False)
    groups = gated_groups(trace_channels(model, torch.zeros(2, 12)).groups, model)
    gates, other = Gates(groups, model), Gates(groups, model)
    gates.values["0"] = torch.rand(16)
    other.load_state_dict(gates.state_dict())
    assert torch.equal(other.values["0"], gates.values["0"])
    with pytest.raises(ResumeError, match="gates are of another network"):
        other.load_state_dict({"0": torch.rand(15)})


def test_networks_that_nothing_can_scale(tmp_path: Any) -> None:
    module = ToyModule(nn.Sequential(nn.Linear(12, 3)), lambda m: SGD(m.parameters(), 0.1))
    with pytest.raises(ConfigError, match="neither a BatchNorm nor layers that gates could act on"):
        trainer(tmp_path, [SlimmingRegularizer(gates=True)], max_epochs=1).fit(module, *loaders())

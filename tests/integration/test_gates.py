"""Gates where no BatchNorm is: the same as factors that autograd sees, and slimming of hidden units and heads."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam
from torchvision.models import VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

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
from tests._helpers.channels import images
from tests._helpers.models import ToyModule, loaders, toy_network, trainer
from tests._helpers.resuming import Case, Net, check_moved, check_resumed
from tests._helpers.resuming import fit as resuming_fit
from tests.integration.test_resume_fits import per_step


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


# ------------------------------------------------------------- torchvision's networks


class Colour(nn.Module):
    """(N, 1, 6, 6), or (N, 5) as an image of products, to (N, 3, 8, 8)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = F.pad(x[:, None, :, None] * x[:, None, None, :], (0, 1, 0, 1))
        return F.pad(x, (1, 1, 1, 1)).expand(-1, 3, -1, -1)


def vit(classes: int = 3, dropout: float = 0.0, heads: int = 4) -> nn.Module:
    return VisionTransformer(8, 4, 2, heads, 16, 24, dropout=dropout, num_classes=classes)


def convnext(classes: int = 3, dropout: float = 0.0) -> nn.Module:
    return ConvNeXt([CNBlockConfig(8, None, 2)], stochastic_depth_prob=dropout, layer_scale=0.5, num_classes=classes)


READERS: dict[Any, dict[str, tuple[str, int]]] = {
    vit: {
        f"encoder.layers.encoder_layer_{i}.{maker}": (f"encoder.layers.encoder_layer_{i}.{reader}", columns)
        for i in range(2)
        for maker, reader, columns in (
            ("self_attention", "self_attention.out_proj.weight", 4),
            ("mlp.0", "mlp.3.weight", 1),
        )
    },
    convnext: {f"features.1.{i}.block.3": (f"features.1.{i}.block.5.weight", 1) for i in range(2)},
}
"""By group: the weight that reads its channels, and in how many columns each."""


@pytest.mark.parametrize("build", [vit, convnext])
def test_gates_of_a_transformer_and_a_convnext_equal_factors_that_autograd_sees(tmp_path: Any, build: Any) -> None:
    torch.manual_seed(0)
    ours = ToyModule(nn.Sequential(Colour(), build().double()), lambda m: SGD(m.parameters(), 0.05, momentum=0.9))
    theirs, readers = copy.deepcopy(ours.network[1]), READERS[build]
    penalise = SlimmingRegularizer(2.0, gates=True)
    trainer(tmp_path, [penalise], max_epochs=1, precision="64-true").fit(ours, *images())
    optimizer = SGD(theirs.parameters(), 0.05, momentum=0.9)
    parameters = dict(theirs.named_parameters())
    gates = {name: torch.ones(parameters[r].shape[1] // n, dtype=torch.double) for name, (r, n) in readers.items()}
    for x, y in images()[0]:
        factors = {name: torch.ones_like(gate, requires_grad=True) for name, gate in gates.items()}
        scaled = {
            reader: parameters[reader] * factors[name].repeat_interleave(columns)
            for name, (reader, columns) in readers.items()
        }
        optimizer.zero_grad()
        F.cross_entropy(functional_call(theirs, parameters | scaled, Colour()(x.double())), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, (reader, columns) in readers.items():
                gate = gates[name]
                moved = (gate - 0.05 * factors[name].grad / gate.clamp_min(1e-300) - 0.05 * 2.0).clamp_min(0)
                new = torch.where(gate > 0, moved, 0)
                ratio = torch.where(gate > 0, new / gate, 0)
                parameters[reader] *= ratio.repeat_interleave(columns)
                gates[name] = new
    found = {name.removeprefix("1."): value for name, value in penalise.state_dict()["gates"].items()}
    assert found.keys() == gates.keys()
    for name, gate in gates.items():
        assert torch.allclose(found[name].double(), gate, atol=1e-5), name
        assert gate.max() < 0.9
    for (name, a), b in zip(ours.network[1].named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


@pytest.mark.filterwarnings("ignore:the scales have not separated")
@pytest.mark.parametrize("build", [vit, convnext])
def test_a_transformer_and_a_convnext_are_slimmed_where_their_gates_are_smallest(tmp_path: Any, build: Any) -> None:
    torch.manual_seed(0)
    network = build()
    before: dict[str, Tensor] = {}

    class Seen(SlimmingRegularizer):
        def on_prune(self, trainer: Any, pl_module: Any, event: Any) -> None:
            before.update({name.removeprefix("1."): value.clone() for name, value in self.gates.values.items()})
            super().on_prune(trainer, pl_module, event)

    prune, penalise = SlimmingPruner(Budget(channels=0.5), "2ep", verbose=False), Seen(1.0, gates=True)
    module = ToyModule(nn.Sequential(Colour(), network), lambda m: Adam(m.parameters(), 0.02))
    trainer(tmp_path, [prune, penalise], max_epochs=3).fit(module, *images())
    pool = torch.cat(list(before.values())).sort(descending=True).values
    threshold = pool[len(pool) // 2 - 1]
    parameters, left = dict(network.named_parameters()), 0
    for name, (reader, columns) in READERS[build].items():
        kept = parameters[reader].shape[1] // columns
        assert kept == max(1, int((before[name] >= threshold).sum())), name
        left += kept
    assert left == len(pool) // 2
    fresh = nn.Sequential(Colour(), build())
    load_compact(fresh, prune.folder / "compact.safetensors")
    x = torch.randn(3, 1, 6, 6)
    assert torch.allclose(fresh.eval()(x), module.network.eval()(x), atol=1e-6)


class Images(Net):
    """A network on images in the fits that are resumed."""

    build: Any = None

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.network = nn.Sequential(Colour(), type(self).build(1, 0.2))


class ViT(Images):
    """All but one of two heads leave: the one that is left is a group no more."""

    build = staticmethod(partial(vit, heads=2))


class Wide(Images):
    build = staticmethod(partial(vit, heads=8))


class Next(Images):
    build = staticmethod(convnext)


@pytest.mark.filterwarnings("ignore:the scales have not separated")
@pytest.mark.parametrize("kind", [ViT, Wide, Next])
def test_a_slimmed_transformer_or_convnext_resumes(tmp_path: Any, kind: type[Net]) -> None:
    def owners() -> list[Any]:
        penalise = SlimmingRegularizer(0.5, gates=True, module="network")
        return [SlimmingPruner(Budget(channels=0.5), "7st", module="network", verbose=False), penalise]

    case = Case("gates", per_step, module=kind)
    full = resuming_fit(case, tmp_path, owners=owners(), hooks=["on_train_batch_end"])
    assert full.saved[0].weights.numel() > full.weights.numel()
    for saved in full.saved[3:9:5]:  # before the cut and after it
        resumed = resuming_fit(case, tmp_path / "resumed", seeded=99, checkpoint=saved.path, hooks=(), owners=owners())
        check_resumed(full, resumed, saved)
        assert check_moved(full, saved)

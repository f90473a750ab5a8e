"""Constants of leaving channels: against the network as it was, and biases computed by hand."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.channels import Budget, compact, plan_removal, score_batch_norm, trace_channels
from lightning_prune.channels.fold import Fold, find_folds
from lightning_prune.errors import EqualityError
from tests.channels.networks import Net, conv, spread_weights

INPUTS = torch.rand(3, 3, 9, 9, generator=torch.Generator().manual_seed(2))


def _conv(i: int, o: int, k: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **options)


def _front(width: int = 8) -> list[nn.Module]:
    return [conv(3, width), nn.BatchNorm2d(width)]


def _sequence(*after: nn.Module, width: int = 8) -> nn.Module:
    return nn.Sequential(*_front(width), *after)


def _residual() -> nn.Module:
    """A stage whose channels pass three BatchNorms; one branch has an inner width of its own."""
    return Net(
        lambda n, x: n.head(F.relu((h := F.relu(n.front(x))) + n.norm(n.b(F.relu(n.inner(n.a(h))))))),
        front=nn.Sequential(*_front()), a=_conv(8, 6), inner=nn.BatchNorm2d(6), b=_conv(6, 8, bias=False),
        norm=nn.BatchNorm2d(8), head=_conv(8, 5),
    )  # fmt: skip


def _concat() -> nn.Module:
    return Net(
        lambda n, x: n.head(torch.cat([F.relu(n.one(x)), F.gelu(n.two(x))], 1)),
        one=nn.Sequential(*_front()), two=nn.Sequential(*_front(4)), head=_conv(12, 5),
    )  # fmt: skip


@dataclass(frozen=True)
class _Case:
    name: str
    build: Callable[[], nn.Module]
    into: list[str]
    shape: tuple[int, ...] = (3, 3, 9, 9)


BN = nn.BatchNorm2d
CASES = [
    _Case("bias", lambda: _sequence(nn.ReLU(), _conv(8, 5)), ["3.bias"]),
    _Case("no activation", lambda: _sequence(_conv(8, 5)), ["2.bias"]),
    _Case("sigmoid", lambda: _sequence(nn.Sigmoid(), _conv(8, 5)), ["3.bias"]),
    _Case("GELU", lambda: _sequence(nn.GELU(), _conv(8, 5)), ["3.bias"]),
    _Case("PReLU", lambda: _sequence(nn.PReLU(8), _conv(8, 5)), ["3.bias"]),
    _Case("running mean", lambda: _sequence(nn.ReLU(), _conv(8, 6, bias=False), BN(6), nn.ReLU(), _conv(6, 5)),
          ["4.running_mean", "6.bias"]),
    _Case("valid 3x3", lambda: _sequence(nn.ReLU(), _conv(8, 5, 3)), ["3.bias"]),
    _Case("reflected padding", lambda: _sequence(nn.ReLU(), _conv(8, 5, 3, padding=1, padding_mode="reflect")),
          ["3.bias"]),
    _Case("grouped", lambda: _sequence(nn.ReLU(), _conv(8, 6, 3, groups=2)), ["3.bias"]),
    _Case("depthwise", lambda: _sequence(nn.ReLU(), _conv(8, 8, 3, groups=8), nn.Tanh(), _conv(8, 5)), ["5.bias"]),
    _Case("padded depthwise and BatchNorm", lambda: _sequence(
        nn.ReLU(), _conv(8, 8, 3, padding=1, groups=8, bias=False), BN(8), nn.ReLU(), _conv(8, 5)), ["6.bias"]),
    _Case("max pooling", lambda: _sequence(nn.ReLU(), nn.MaxPool2d(3, 2, 1), _conv(8, 5)), ["4.bias"]),
    _Case("pooled and flattened", lambda: _sequence(
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)), ["5.bias"]),
    _Case("linear", lambda: nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Hardswish(), nn.Linear(8, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(),
        nn.Linear(7, 5)), ["4.running_mean", "6.bias"], (9, 6)),
    _Case("residual stage", _residual, ["a.bias", "norm.running_mean", "head.bias"]),
    _Case("concatenation", _concat, ["head.bias"]),
    _Case("instance norm", lambda: nn.Sequential(
        conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), _conv(8, 5)), ["3.bias"]),
]  # fmt: skip
IDS = [case.name for case in CASES]


def _random(model: nn.Module) -> nn.Module:
    return spread_weights(model, high=0.7).double()


def _example(case: _Case) -> Tensor:
    return torch.rand(case.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def _plan(model: nn.Module, inputs: Tensor, fraction: float = 0.5) -> Any:
    graph = trace_channels(model, inputs)
    generator = torch.Generator().manual_seed(6)
    scores = {group.name: torch.rand(group.size, generator=generator) for group in graph.groups}
    return plan_removal(graph, Budget(channels=fraction), scores)


def _scales_to_zero(model: nn.Module, plan: Any) -> nn.Module:
    """A copy whose normalisations have a scale of 0 at the channels that leave."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and f"{name}.weight" in plan.keep:
            stays = torch.zeros(module.num_features, dtype=torch.bool)
            stays[plan.keep[f"{name}.weight"][0]] = True
            with torch.no_grad():
                module.weight[~stays] = 0
    return model


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_where_the_scale_is_0_the_model_computes_what_it_did(case: _Case) -> None:
    inputs = _example(case)
    model = _random(case.build())
    plan = _plan(model, inputs)
    model = _scales_to_zero(model, plan)
    plain, dense = copy.deepcopy(model), model(inputs)
    report = compact(model, plan, inputs, fold=True)
    assert report.error < 1e-12
    assert report.folded is not None
    assert sorted(report.folded.into) == sorted(case.into)
    assert report.folded.silenced == {}
    torch.testing.assert_close(model(inputs), dense, rtol=1e-10, atol=1e-12)
    assert compact(plain, plan, inputs).folded is None  # the papers' rule drops the constants
    assert float((plain(inputs) - dense).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_other_scales_count_as_0(case: _Case) -> None:
    """Channels that leave with a scale are constants in the parent that the compact model equals."""
    inputs = _example(case)
    model = _random(case.build())
    plan = _plan(model, inputs)
    parent = _scales_to_zero(model, plan)
    compact(model, plan, inputs, fold=True)
    torch.testing.assert_close(model(inputs), parent(inputs), rtol=1e-10, atol=1e-12)


def test_the_bias_is_the_one_by_hand() -> None:
    model = _random(_sequence(nn.ReLU(), _conv(8, 5, 3)))
    plan = _plan(model, INPUTS.double())
    leaving = [i for i in range(8) if i not in plan.keep["0.weight"][0]]
    emitted = F.relu(model[1].bias[leaving])
    expected = model[3].bias + model[3].weight[:, leaving].sum((2, 3)) @ emitted
    weight = model[3].weight[:, plan.keep["3.weight"][1]].clone()
    report = compact(model, plan, INPUTS.double(), fold=True)
    torch.testing.assert_close(model[3].bias.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(model[3].weight, weight)
    assert report.folded is not None
    assert report.folded.into == {"3.bias": len(leaving)}


def _gated() -> nn.Module:
    return Net(lambda n, x: n.head(n.front(x) * torch.sigmoid(n.gate(x.mean((2, 3), keepdim=True)))),
               front=nn.Sequential(*_front()), gate=_conv(3, 8), head=_conv(8, 5))  # fmt: skip


def _function() -> nn.Module:
    return Net(lambda n, x: F.linear(F.relu(n.front(x)).mean((2, 3)), n.head.weight, n.head.bias),
               front=nn.Sequential(*_front()), head=nn.Linear(8, 5))  # fmt: skip


def _raw() -> nn.Module:
    net = Net(lambda n, x: F.relu(n.front(x)).mean((2, 3)) @ n.matrix, front=nn.Sequential(*_front()))
    net.matrix = nn.Parameter(torch.randn(8, 5))
    return net


def _tied() -> nn.Module:
    net = Net(lambda n, x: n.a(h := F.relu(n.front(x))) + n.b(h), front=nn.Sequential(*_front()), a=_conv(8, 5),
              b=_conv(8, 5))  # fmt: skip
    net.b.weight = net.a.weight
    return net


def _one_norm() -> nn.Module:
    return Net(lambda n, x: n.norm(n.a(F.gelu(n.front(x)))) + n.norm(n.b(x)), front=nn.Sequential(*_front()),
               a=_conv(8, 5, bias=False), b=_conv(3, 5, bias=False), norm=nn.BatchNorm2d(5))  # fmt: skip


SILENCED = [
    ("zero padding", lambda: _sequence(nn.Sigmoid(), conv(8, 5)), "3.weight",
     "4 of 4 channels: it pads with zeros, which are no constant of the channel"),
    ("same padding", lambda: _sequence(nn.Sigmoid(), _conv(8, 5, 3, padding="same")), "3.weight", "pads with zeros"),
    ("transposed", lambda: _sequence(nn.Sigmoid(), nn.ConvTranspose2d(8, 5, 2, 2)), "3.weight",
     "a transposed convolution spreads a constant unevenly"),
    ("no bias", lambda: _sequence(nn.Sigmoid(), _conv(8, 5, bias=False)), "3.weight",
     "the layer has no bias and no BatchNorm follows it alone"),
    ("BatchNorm for two", _one_norm, "a.weight", "the layer has no bias and no BatchNorm follows it alone"),
    ("gate", _gated, "head.weight", "no constants where it reads them"),
    ("no norm", lambda: nn.Sequential(conv(3, 8), nn.ReLU(), _conv(8, 5)), "2.weight", "no constants where it reads"),
    ("padded pooling", lambda: _sequence(nn.Sigmoid(), nn.AvgPool2d(3, 2, 1), _conv(8, 5)), "4.weight", "no constants"),
    ("called as a function", _function, "head.weight", "the layer is not called as a module|no constants"),
    ("raw matrix", _raw, "matrix", "no convolution or linear layer holds this weight|no constants"),
    ("shared weight", _tied, "a.weight", "several layers share this weight"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "reader", "why"), [s[1:] for s in SILENCED], ids=[s[0] for s in SILENCED])
def test_what_cannot_be_folded_is_silenced_and_named(build: Any, reader: str, why: str) -> None:
    """Then the compact model is the one of the plain rule."""
    inputs = INPUTS.double()
    model = _random(build())
    plan = _plan(model, inputs)
    plain = copy.deepcopy(model)
    report = compact(model, plan, inputs, fold=True)
    assert report.folded is not None
    assert report.folded.into == {}
    assert list(report.folded.silenced) == [reader]
    assert any(w in report.folded.silenced[reader] for w in why.split("|"))
    compact(plain, plan, inputs)
    torch.testing.assert_close(model(inputs), plain(inputs), rtol=1e-12, atol=1e-12)


def test_a_constant_of_0_needs_no_folding() -> None:
    """Below 0 a ReLU emits nothing: zero padding then does no harm, and nothing is reported."""
    model = _random(_sequence(nn.ReLU(), conv(8, 5)))
    plan = _plan(model, INPUTS.double())
    with torch.no_grad():
        model[1].bias.copy_(-model[1].bias.abs())
    model = _scales_to_zero(model, plan)
    dense = model(INPUTS.double())
    report = compact(model, plan, INPUTS.double(), fold=True)
    assert report.folded is not None
    assert report.folded.silenced == report.folded.into == {}
    torch.testing.assert_close(model(INPUTS.double()), dense, rtol=1e-12, atol=1e-12)


def test_channels_of_one_layer_are_folded_one_by_one() -> None:
    """Of a concatenation, the half that passes a BatchNorm is constant, the other is silenced."""
    model = _random(Net(
        lambda n, x: n.head(torch.cat([F.relu(n.one(x)), n.two(x)], 1)),
        one=nn.Sequential(*_front()), two=conv(3, 6), head=_conv(14, 5),
    ))  # fmt: skip
    inputs = INPUTS.double()
    plan = _plan(model, inputs)
    parent = _scales_to_zero(model, plan)
    with torch.no_grad():
        leaving = [i for i in range(8, 14) if i not in plan.keep["head.weight"][1]]
        parent.head.weight[:, leaving] = 0
    report = compact(model, plan, inputs, fold=True)
    assert report.folded is not None
    assert report.folded.into == {"head.bias": 4}
    assert report.folded.silenced == {"head.weight": "3 of 7 channels: no constants where it reads them"}
    torch.testing.assert_close(model(inputs), parent(inputs), rtol=1e-12, atol=1e-12)


def test_statistics_of_the_batch_absorb_constants() -> None:
    model = _random(
        _sequence(
            nn.Sigmoid(), _conv(8, 6, bias=False), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(), _conv(6, 5)
        )
    )
    inputs = INPUTS.double()
    plan = _plan(model, inputs)
    parent = _scales_to_zero(model, plan)
    report = compact(model, plan, inputs, fold=True)
    assert report.folded is not None
    assert list(report.folded.into) == ["6.bias"]
    assert report.folded.silenced == {}
    torch.testing.assert_close(model(inputs), parent(inputs), rtol=1e-8, atol=1e-9)


def test_a_layer_that_is_given_two_constants_is_silenced() -> None:
    model = _random(Net(lambda n, x: n.head(torch.tanh(h := n.front(x))) + n.head(torch.sigmoid(h)),
                        front=nn.Sequential(*_front()), head=_conv(8, 5)))  # fmt: skip
    report = compact(model, _plan(model, INPUTS.double()), INPUTS.double(), fold=True)
    assert report.folded is not None
    assert report.folded.silenced == {"head.weight": "4 of 4 channels: no constants where it reads them"}


def test_what_is_constant_by_chance_is_not_folded() -> None:
    """A ReLU that is off under the check's weights, and a clamp that is at its end there but not on the model's own."""
    off = nn.Sequential(conv(3, 8), Net(lambda n, x: F.relu(x - 9)), _conv(8, 5)).double()
    fold = find_folds(off, _plan(off, INPUTS.double()), INPUTS.double())
    assert [(reader.name, bool(reader.folded.any())) for reader in fold.readers] == [("2.weight", False)]
    both = Net(lambda n, x: torch.cat([(x + 99).clamp(0, 1), x], 1))
    full = _random(nn.Sequential(conv(3, 8), both, _conv(16, 5)))
    with torch.no_grad():
        full[0].weight.mul_(1e4)
    plan, plain = _plan(full, INPUTS.double()), copy.deepcopy(full)
    assert bool(find_folds(full, plan, INPUTS.double()).readers[0].folded.any())
    report = compact(full, plan, INPUTS.double(), fold=True)
    assert report.folded is not None
    assert report.folded.into == {}
    compact(plain, plan, INPUTS.double())
    torch.testing.assert_close(full(INPUTS.double()), plain(INPUTS.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", ["corrections", "hold_"])
def test_the_gate_sees_a_wrong_constant(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(Fold, part)

    def wrong(self: Fold, *args: Any) -> Any:
        found = right(self, *args)
        return {name: total * 1.001 for name, total in found.items()} if found is not None else None

    model = _random(_sequence(nn.ReLU(), _conv(8, 5)))
    plan, before = _plan(model, INPUTS.double()), copy.deepcopy(model.state_dict())
    monkeypatch.setattr(Fold, part, wrong if part == "corrections" else lambda *_: None)
    if part == "corrections":
        with pytest.raises(EqualityError, match="differs from its masked parent"):
            compact(model, plan, INPUTS.double(), fold=True)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    else:  # without the scales at 0 nothing is constant, so nothing is folded
        assert compact(model, plan, INPUTS.double(), fold=True).folded.into == {}  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_models_are_folded_too(dtype: torch.dtype) -> None:
    model = _random(_sequence(nn.ReLU(), _conv(8, 5)))
    plan = _plan(model, INPUTS.double())
    parent = _scales_to_zero(model, plan)(INPUTS.double())
    model, inputs = model.to(dtype), INPUTS.to(dtype)
    compact(model, plan, inputs, fold=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(model(inputs).double(), parent, rtol=0, atol=2e-6 if dtype == torch.float32 else 5e-2)


def test_optimizers_graphs_and_gradients_go_on() -> None:
    model = _random(_sequence(nn.ReLU(), _conv(8, 5)))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    loss = model(INPUTS.double()).square().mean()
    loss.backward()
    optimizer.step()
    bias = model[3].bias
    compact(model, _plan(model, INPUTS.double()), INPUTS.double(), optimizer, fold=True)
    assert model[3].bias is bias
    before = bias.detach().clone()
    optimizer.zero_grad()
    model(INPUTS.double()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, bias)


def test_a_mobilenet_with_scales_at_0_is_kept_exactly() -> None:
    """Its padded convolutions are depthwise with a BatchNorm behind, so every constant can be folded."""
    model = _random(torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=5))
    inputs = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    plan = plan_removal(trace_channels(model, inputs), Budget(channels=0.5), score_batch_norm)
    model = _scales_to_zero(model, plan)
    plain, dense = copy.deepcopy(model), model(inputs)
    report = compact(model, plan, inputs, fold=True)
    assert report.folded is not None
    assert report.folded.silenced == {}
    assert report.error < 1e-9
    torch.testing.assert_close(model(inputs), dense, rtol=1e-8, atol=1e-8)
    compact(plain, plan, inputs)
    assert float((plain(inputs) - dense).detach().norm() / dense.detach().norm()) > 1e-2

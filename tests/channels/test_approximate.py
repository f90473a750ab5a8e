"""Normalisation over channels that lose some: narrow networks by hand, the gate, and by how much outputs move."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import load_compact, save_compact
from lightning_prune.channels import Budget, RemovalPlan, compact, plan_removal, trace_channels
from lightning_prune.errors import EqualityError
from tests.channels.networks import Net, conv


def _tokens(width: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    """A residual stream of ``width`` that a normalisation reads, with an inner width of its own."""
    return Net(
        lambda n, x: n.head(n.last((h := n.stem(x)) + n.down(torch.tanh(n.up(n.norm(h)))))),
        stem=nn.Linear(6, width), norm=norm(width), up=nn.Linear(width, 2 * width), down=nn.Linear(2 * width, width),
        last=norm(width), head=nn.Linear(width, 5),
    )  # fmt: skip


def _image(width: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    return Net(
        lambda n, x: n.head((h := n.stem(x)) + n.body(n.norm(h))),
        stem=conv(3, width), norm=norm(width), body=conv(width, width), head=conv(width, 5),
    )  # fmt: skip


class _LastRms(nn.Module):
    """RMSNorm written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class _Standardised(nn.Module):
    """LayerNorm over axis 1 written out with var_mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * self.weight


class _AfterMean(_Standardised):
    """The same after another mean, of places, in the same module."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean((2, 3), keepdim=True))


class _ChannelsLast(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Case:
    name: str
    build: Callable[[int], nn.Module]
    shape: tuple[int, ...]


TOKENS, IMAGE = (3, 4, 6), (2, 3, 5, 5)
CASES = [
    _Case("LayerNorm", lambda w: _tokens(w, nn.LayerNorm), TOKENS),
    _Case("LayerNorm without scale", lambda w: _tokens(w, lambda n: nn.LayerNorm(n, elementwise_affine=False)), TOKENS),
    _Case("RMSNorm", lambda w: _tokens(w, nn.RMSNorm), TOKENS),
    _Case("RMSNorm written out", lambda w: _tokens(w, _LastRms), TOKENS),
    _Case("GroupNorm with one group", lambda w: _image(w, lambda n: nn.GroupNorm(1, n)), IMAGE),
    _Case("LayerNorm over channels and places", lambda w: _image(w, lambda n: nn.LayerNorm((n, 5, 5))), IMAGE),
    _Case("LayerNorm, channels last", lambda w: _image(w, _ChannelsLast), IMAGE),
    _Case("var_mean", lambda w: _image(w, _Standardised), IMAGE),
    _Case("var_mean after a mean", lambda w: _image(w, _AfterMean), IMAGE),
]  # fmt: skip


def _random(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1.0, 1.5, generator=generator)
    return model.eval()


def _inputs(case: _Case) -> Tensor:
    return torch.rand(case.shape, generator=torch.Generator().manual_seed(4))


def _plan(model: nn.Module, inputs: Tensor, fraction: float = 0.5) -> RemovalPlan:
    return plan_removal(trace_channels(model, inputs, approximate=True), Budget(channels=fraction))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_compact_model_is_the_narrow_one(case: _Case) -> None:
    """The same code built at half the width, with the sliced weights, gives the same; and the stream did shrink."""
    model, inputs = _random(case.build(8)), _inputs(case)
    stem = model.stem.weight.detach().clone()
    plan = _plan(model, inputs)
    report = compact(model, plan, inputs)
    assert report.dtype == "float64"
    assert report.error < 1e-12
    assert torch.equal(model.stem.weight, stem[plan.keep["stem.weight"][0]])
    narrow = case.build(4)
    narrow.load_state_dict(model.state_dict())
    assert torch.equal(narrow.eval()(inputs), model(inputs))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_report_says_by_how_much_outputs_moved(case: _Case) -> None:
    """Against the parent as it was, and against the parent with zeros where the leaving channels are read."""
    model, inputs = _random(case.build(8)), _inputs(case)
    with torch.no_grad():
        dense = model(inputs)
        plan = _plan(model, inputs)
        masked = case.build(8)
        masked.load_state_dict(model.state_dict())
        for name, axis in plan.reads:
            stays = torch.zeros(plan.shapes[name][axis])
            stays[plan.keep[name][axis]] = 1
            weight = masked.get_parameter(name)
            weight.mul_(stays.reshape([-1 if a == axis else 1 for a in range(weight.dim())]))
        silenced = masked.eval()(inputs)
        report = compact(model, plan, inputs)
        after = model(inputs)
    assert report.moved is not None
    assert report.moved.in_all == pytest.approx(float((dense - after).norm() / dense.norm()), rel=1e-5)
    assert report.moved.by_statistics == pytest.approx(float((silenced - after).norm() / silenced.norm()), rel=1e-5)
    assert 1e-3 < report.moved.by_statistics < report.moved.in_all * 10
    assert len(report.moved.normalisations) == (2 if "last.weight" in plan.keep or "Norm without" in case.name else 1)
    assert all(" in norm" in name or " in last" in name for name in report.moved.normalisations)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_gate_sees_a_wrong_channel_in_a_normalisation(case: _Case) -> None:
    """Statistics over another channel than those that stay, and a reader that keeps a channel which left."""
    model, inputs = _random(case.build(8)), _inputs(case)
    wrong = _plan(model, inputs)
    keep = wrong.statistics[0]["keep"]
    keep[0] = next(i for i in range(8) if i not in keep)
    with pytest.raises(EqualityError, match="differs from its masked parent"):
        compact(model, wrong, inputs)
    wrong = _plan(model, inputs)
    reader = next((name, axis) for name, axis in wrong.reads if name in ("up.weight", "body.weight"))
    wrong.reads.remove(reader)
    with pytest.raises(EqualityError, match="differs from its masked parent"):
        compact(model, wrong, inputs)
    wrong = _plan(model, inputs)
    for axes in (a for n, a in wrong.keep.items() if n.startswith("norm.")):
        axis = next(iter(axes))
        axes[axis] = [next(i for i in range(8) if i not in axes[axis]), *axes[axis][1:]]
        with pytest.raises(EqualityError, match="differs from its masked parent"):
            compact(model, wrong, inputs)
        break


def test_a_plan_of_other_normalisations_is_refused() -> None:
    case = CASES[0]
    model, inputs = case.build(8), _inputs(case)
    plan = _plan(model, inputs)
    plan.statistics[0]["call"] = 1
    with pytest.raises(EqualityError, match=r"the normalisation in norm, which loses channels, did not run"):
        compact(model, plan, inputs)
    plan = _plan(model, inputs)
    plan.statistics[0]["size"] = 9
    with pytest.raises(EqualityError, match=r"native_layer_norm in norm averages over a tensor of shape \(3, 4, 8\)"):
        compact(model, plan, inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_without_the_request_the_stream_stays(case: _Case) -> None:
    model, inputs = _random(case.build(8)), _inputs(case)
    graph = trace_channels(model, inputs)
    assert "stem" not in [group.name for group in graph.groups]
    assert "stem.weight" in [f.name for f in graph.frozen]
    if graph.groups:
        plan = plan_removal(graph, Budget(channels=0.5))
        assert plan.statistics == []
        assert compact(model, plan, inputs).moved is None


def test_softmax_over_channels_stays_and_whole_groups_leave_exactly() -> None:
    model = Net(
        lambda n, x: n.head(torch.softmax(n.a(x), 1) + n.c(n.norm(n.b(x)))),
        a=conv(3, 8), b=conv(3, 8), norm=nn.GroupNorm(4, 8), c=conv(8, 8), head=conv(8, 5),
    )  # fmt: skip
    inputs = torch.rand(IMAGE)
    graph = trace_channels(model, inputs, approximate=True)
    assert [(group.name, group.size) for group in graph.groups] == [("b", 4)]
    assert "softmax is taken along it" in next(f.reason for f in graph.frozen if f.name == "a.weight")
    plan = plan_removal(graph, Budget(channels=0.5))
    assert compact(model, plan, inputs).moved is None
    assert model.norm.num_groups == 2


def test_the_description_names_what_moves() -> None:
    case = CASES[0]
    text = trace_channels(case.build(8), _inputs(case), approximate=True).explain()
    assert "2 normalisations average over channels that may leave" in text
    assert "native_layer_norm in norm" in text
    assert "normalisations" not in trace_channels(case.build(8), _inputs(case)).explain()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_it_is_saved_and_loaded(case: _Case, tmp_path: Path) -> None:
    model, inputs = _random(case.build(8)), _inputs(case)
    compact(model, RemovalPlan.from_json(_plan(model, inputs).to_json()), inputs)
    save_compact(model, tmp_path / "small.safetensors")
    loaded = load_compact(case.build(8), tmp_path / "small.safetensors").eval()
    assert torch.equal(loaded(inputs), model(inputs))
    for one, other in zip(loaded.modules(), model.modules(), strict=True):
        assert getattr(one, "normalized_shape", None) == getattr(other, "normalized_shape", None)
        assert isinstance(getattr(one, "normalized_shape", ()), tuple)


def test_a_convnext_loses_its_stream() -> None:
    import torchvision

    model = torchvision.models.convnext_tiny().eval()
    inputs = torch.rand(1, 3, 32, 32)
    report = compact(model, _plan(model, inputs), inputs)
    assert report.error < 1e-9
    assert report.kept("macs") < 0.27
    assert model.features[0][0].out_channels == 48
    assert report.moved is not None
    assert len(report.moved.normalisations) == 23

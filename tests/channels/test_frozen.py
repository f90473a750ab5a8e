"""What may not leave is frozen with a reason that names it, and never guessed."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.channels import Budget, compact, plan_removal, trace_channels
from lightning_prune.channels.rules import RULES
from lightning_prune.errors import TraceError
from tests.channels.networks import Net, conv

IMAGE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _reasons(model: nn.Module, inputs: object) -> dict[str, str]:
    return {f.name: f.reason for f in trace_channels(model, inputs).frozen}


def _wrap(middle: object, inner: int = 8, **more: nn.Module) -> nn.Module:
    return Net(lambda n, x: n.head(middle(n, n.a(x))), a=conv(3, 8), head=conv(inner, 4), **more)  # type: ignore[operator]


FROZEN = [
    ("layer norm", _wrap(lambda n, h: F.layer_norm(h.movedim(1, -1), (8,)).movedim(-1, 1)),
     "LayerNorm takes statistics"),
    ("group norm, one group", _wrap(lambda n, h: n.norm(h), norm=nn.GroupNorm(1, 8)), "one group"),
    ("softmax", _wrap(lambda n, h: h.softmax(1)), "softmax is taken along it"),
    ("mean", _wrap(lambda n, h: h.mean(1, keepdim=True) * h), "mean is taken over it"),
    ("max", _wrap(lambda n, h: h.amax(1, keepdim=True) * h), "amax is taken over it"),
    ("cumsum", _wrap(lambda n, h: h.cumsum(1)), "cumsum is taken along it"),
    ("index", _wrap(lambda n, h: h[:, [1, 0, 2, 3, 4, 5, 6, 7]]), "looked up by number"),
    ("part", _wrap(lambda n, h: h[:, :3], 3), "a part of it is taken by fixed positions"),
    ("one by one", _wrap(lambda n, h: h * h[:, :1]), "taken one by one"),
    ("one by one, split", _wrap(lambda n, h: h * h.split(1, 1)[0]), "taken one by one"),
    ("uneven split", _wrap(lambda n, h: torch.cat(h.split([3, 5], 1), 1)), "pieces of fixed sizes"),
    ("flip", _wrap(lambda n, h: h.flip(1)), "flip moves its positions"),
    ("constant", _wrap(lambda n, h: h + torch.arange(8.0).view(1, 8, 1, 1)), "does not shrink"),
    ("no rule", _wrap(lambda n, h: torch.special.erfcx(h)), "special_erfcx has no rule"),
    ("fixed view", _wrap(lambda n, h: h.view(-1, 8, 8, 8)), "holds its size fixed"),
    ("fixed expand", _wrap(lambda n, h: h + n.gain.expand(2, 8, 8, 8), gain=nn.ParameterList()),
     "holds its size fixed"),
    ("gram", Net(lambda n, x: n.head(n.a(x) @ n.b(x).transpose(1, 2)), a=nn.Linear(6, 8), b=nn.Linear(6, 8),
                 head=nn.Linear(5, 4)), "two activations are multiplied"),
]  # fmt: skip


class _Expand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 8), conv(8, 4)
        self.gain = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x) + self.gain.expand(2, 8, 8, 8))


@pytest.mark.parametrize(("name", "model", "reason"), FROZEN, ids=[f[0] for f in FROZEN])
def test_frozen_with_its_reason(name: str, model: nn.Module, reason: str) -> None:
    if name == "fixed expand":
        model = _Expand()
    inputs = torch.rand(2, 5, 6) if name == "gram" else IMAGE
    assert reason in _reasons(model, inputs)["a.weight"]
    assert not [g for g in trace_channels(model, inputs).groups if g.name == "a"]


def test_recurrent_layers_are_frozen_with_a_reason() -> None:
    for kind in (nn.LSTM, nn.GRU):
        model = Net(lambda n, x: n.head(n.rnn(n.a(x))[0]), a=nn.Linear(6, 8), rnn=kind(8, 8), head=nn.Linear(8, 4))
        graph = trace_channels(model, torch.rand(2, 5, 6))
        assert graph.groups == []
        assert "a.weight, axis 0: 8 channels:" in graph.explain()


def test_an_operation_without_a_rule_freezes_inputs_and_outputs_only() -> None:
    model = Net(lambda n, x: n.head(n.b(torch.special.erfcx(n.a(x)))), a=conv(3, 8), b=conv(8, 6), head=conv(6, 4))
    graph = trace_channels(model, IMAGE)
    assert [g.name for g in graph.groups] == ["b"]
    assert "special_erfcx" not in RULES
    compact(model, plan_removal(graph, Budget(channels=0.5)), IMAGE)


def test_outputs_and_inputs_stay() -> None:
    model = nn.Sequential(conv(3, 8), conv(8, 4))
    graph = trace_channels(model, IMAGE)
    assert [(f.name, f.reason) for f in graph.frozen] == [("1.weight", "it is an output of the model")]
    assert all((n, a) != ("0.weight", 1) for g in graph.groups for n, a, _ in g.members)


def test_a_model_that_cannot_run_is_refused() -> None:
    with pytest.raises(TraceError, match="cannot be run with these example inputs"):
        trace_channels(conv(3, 8), torch.rand(1, 5, 4, 4))
    model = conv(3, 8).train()
    with pytest.raises(TraceError):
        trace_channels(model, torch.rand(1, 5, 4, 4))
    assert model.training


def test_branches_that_only_training_takes_shrink_along() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head, self.aux = conv(3, 8), conv(8, 4), conv(8, 2)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            h = torch.relu(self.a(x))
            return (self.head(h), self.aux(h)) if self.training else self.head(h)

    model = Auxiliary().eval()
    compact(model, plan_removal(trace_channels(model, IMAGE), Budget(channels=0.5)), IMAGE)
    assert model.aux.in_channels == 4
    assert model.train()(IMAGE)[1].shape == (2, 2, 8, 8)


def test_parameters_that_nothing_used_stay_and_are_named() -> None:
    model = Net(lambda n, x: n.head(n.a(x)), a=conv(3, 8), head=conv(8, 4), spare=conv(8, 2))
    graph = trace_channels(model, IMAGE)
    assert graph.unseen == ["spare.weight", "spare.bias"]
    assert "parameters that the recorded pass did not use: spare.weight" in graph.explain()


def test_a_pass_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.channels.recording.MAX_OPERATIONS", 50)
    model = Net(lambda n, x: functools.reduce(lambda h, _: n.a(h), range(100), x), a=nn.Conv2d(3, 3, 1))
    with pytest.raises(TraceError, match=r"more than 50 tensor operations.*Give smaller or shorter example inputs"):
        trace_channels(model, IMAGE)


def test_labels_that_outgrow_memory_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.channels.labels.MAX_ENTRIES", 30)
    model = nn.Sequential(*[conv(8, 8) for _ in range(6)])
    with pytest.raises(TraceError, match=r"up to convolution in [0-9] gave 3[0-9] bonds .* more than the 30"):
        trace_channels(model, torch.rand(1, 8, 16, 16))


def test_sizes_taken_from_what_a_module_within_reads_are_frozen() -> None:
    """Code that lays out one tensor by the width of its input, which only a module within it reads."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = conv(8, 12)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.inner(x).split([8, 4], 1)
            return first.reshape(x.shape) * second.mean()

    model = nn.Sequential(conv(3, 8), Outer(), conv(8, 6), conv(6, 4))
    graph = trace_channels(model, IMAGE)
    assert [g.name for g in graph.groups] == ["2"]
    assert "holds its size fixed" in _reasons(model, IMAGE)["0.weight"]
    compact(model, plan_removal(graph, Budget(channels=0.5)), IMAGE)


def test_a_model_that_keeps_something_from_its_first_call_is_recorded_again() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head, self.scale = conv(3, 8), conv(8, 4), None

        def forward(self, x: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = float(x.abs().mean() + 1)
            h = self.a(x)
            return self.head(h.reshape(h.shape) * self.scale)

    model = Lazy()
    graph = trace_channels(model, IMAGE)
    assert [g.size for g in graph.groups] == [8]
    compact(model, plan_removal(graph, Budget(channels=0.5)), IMAGE)


def test_products_of_transposed_tokens_are_followed() -> None:
    """They are folded into a matrix or expanded into a batch, by whether a weight needs a gradient."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = conv(3, 64), nn.Linear(64, 128, bias=False), nn.Linear(128, 4)

        def forward(self, x: Tensor) -> Tensor:
            t = self.b(self.a(x).flatten(2).transpose(1, 2))
            return self.head(t.reshape(t.shape).relu())

    model = Tokens()
    graph = trace_channels(model, IMAGE)
    assert [g.size for g in graph.groups] == [64, 128]
    compact(model, plan_removal(graph, Budget(channels=0.5)), IMAGE)

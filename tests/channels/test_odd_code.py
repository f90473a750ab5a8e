"""Forward code that hides things from a trace: frozen with a reason, or refused with what to do; never a mismatch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.channels import Budget, compact, plan_removal, trace_channels
from lightning_prune.errors import EqualityError, TraceError
from tests.channels.networks import Net

HALF = Budget(channels=0.5)
ROWS = torch.rand(30, 16, generator=torch.Generator().manual_seed(0))


def test_a_branch_without_effect_shrinks_along() -> None:
    """As in WaveNet: the last block's residual convolution changes nothing, since only the skips are read."""

    def forward(n: Net, x: Tensor) -> Tensor:
        h, total = n.first(x), 0
        for residual, skip in ((n.r0, n.s0), (n.r1, n.s1)):
            total = total + skip(torch.tanh(h))
            h = h + residual(torch.tanh(h))
        return n.last(total)

    one = lambda i, o: nn.Conv1d(i, o, 1)  # noqa: E731
    model = Net(forward, first=one(3, 8), r0=one(8, 8), s0=one(8, 6), r1=one(8, 8), s1=one(8, 6), last=one(6, 2))
    inputs = torch.rand(2, 3, 9)
    graph = trace_channels(model, inputs)
    assert graph.without_effect == ["r1.weight", "r1.bias"]
    assert "2 parameters on which no output depends: r1.weight, r1.bias" in graph.explain()
    compact(model, plan_removal(graph, HALF), inputs)
    assert (model.r1.in_channels, model.r1.out_channels, model.last.in_channels) == (4, 4, 3)


def test_a_constant_of_written_out_size_freezes_what_it_meets() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        return n.last(torch.zeros(x.shape[0], 8).to(x) + n.second(F.relu(n.first(x))))

    model = Net(forward, first=nn.Linear(16, 12), second=nn.Linear(12, 8), last=nn.Linear(8, 3))
    graph = trace_channels(model, ROWS)
    assert [g.name for g in graph.groups] == ["first"]
    reason = next(f.reason for f in graph.frozen if f.name == "second.weight")
    assert reason.startswith("the forward code holds its size fixed")
    compact(model, plan_removal(graph, HALF), ROWS)
    assert model.first.out_features == 6


def test_a_constant_that_follows_the_width_freezes_nothing() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        h = n.first(x)
        return n.last(h.new_zeros(h.shape) + h)

    model = Net(forward, first=nn.Linear(16, 12), last=nn.Linear(12, 3))
    assert [g.name for g in trace_channels(model, ROWS).groups] == ["first"]


def test_what_leaves_the_trace_through_numpy_is_frozen() -> None:
    model = Net(
        lambda n, x: n.last(torch.from_numpy(n.first(x).detach().numpy() * 2)),
        first=nn.Linear(16, 8),
        last=nn.Linear(8, 3),
    )
    graph = trace_channels(model, ROWS)
    assert graph.groups == []
    assert {f.name: f.reason for f in graph.frozen}["first.weight"] == "no recorded operation reads it as channels"


def test_paths_chosen_checkings_are_named_where_the_check_fails() -> None:
    """Two experts, of which the traced pass reaches one and the check, with its own weights, the other."""

    def forward(n: Net, x: Tensor) -> Tensor:
        h = n.first(x)
        return n.last(n.b(h) if n.checking else n.a(h))

    model = Net(forward, first=nn.Linear(16, 8), a=nn.Linear(8, 6), b=nn.Linear(8, 6), last=nn.Linear(6, 3))
    model.checking = False
    graph = trace_channels(model, ROWS)
    assert graph.unseen == ["b.weight", "b.bias"]
    plan = plan_removal(graph, HALF)
    model.checking = True
    with pytest.raises(EqualityError, match=r"did not use b\.weight and 1 more; .*example inputs that take every path"):
        compact(model, plan, ROWS)
    assert model.first.out_features == 8


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.jit is deprecated
def test_a_scripted_module_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(16, 8), nn.ReLU()))
    with pytest.raises(TraceError, match=r"^0 is a scripted module, whose code and sizes are fixed; give the module"):
        trace_channels(nn.Sequential(scripted, nn.Linear(8, 3)), ROWS)

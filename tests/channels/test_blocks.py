"""Residual blocks that leave whole: against networks built by hand without them, in plain torch."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from lightning_prune import load_compact, save_compact
from lightning_prune.channels import (
    Budget,
    RemovalPlan,
    compact,
    find_blocks,
    plan_removal,
    score_blocks,
    trace_channels,
)
from lightning_prune.channels.block_scores import score_filters
from lightning_prune.errors import BudgetError, ConfigError, EqualityError, MaskMismatchError, PruneError
from tests.channels.networks import Attention, Net, conv, spread_weights
from tests.channels.test_compact import OPTIMIZERS, _fingerprint, _same, _train_step

IMAGE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
TOKENS = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(5))


def _resnet(block: Any, layers: list[int]) -> nn.Module:
    """torchvision's network with narrow bottlenecks: their inner width is a quarter."""
    return ResNet(block, layers, 5) if block is BasicBlock else ResNet(block, layers, 5, width_per_group=16)


class _Inner(nn.Module):
    """A pre-norm transformer layer with hand-written attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, 2, 4)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


def _torch_encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _encoder_by_hand(model: nn.Module, x: Tensor, left: set[str]) -> Tensor:
    for n, layer in enumerate(model.layers):

        def attend(h: Tensor, n: int = n, layer: nn.Module = layer) -> Tensor:
            return torch.zeros_like(h) if f"layers.{n}.self_attn" in left else layer.self_attn(h, h, h)[0]

        def widen(h: Tensor, n: int = n, layer: nn.Module = layer) -> Tensor:
            return torch.zeros_like(h) if f"layers.{n}.linear1" in left else layer.linear2(F.relu(layer.linear1(h)))

        if layer.norm_first:
            x = x + attend(layer.norm1(x))
            x = x + widen(layer.norm2(x))
        else:
            x = layer.norm1(x + attend(x))
            x = layer.norm2(x + widen(x))
    return x


def _layers_by_hand(model: nn.Module, x: Tensor, left: set[str]) -> Tensor:
    for n, layer in enumerate(model):
        if f"{n}.attn" not in left:
            x = x + layer.attn(layer.norm1(x))
        if f"{n}.mlp" not in left:
            x = x + layer.mlp(layer.norm2(x))
    return x


def _mobilenet_by_hand(model: nn.Module, x: Tensor, left: set[str]) -> Tensor:
    for n, layer in enumerate(model.features):
        x = x if f"features.{n}" in left else layer(x)
    return model.classifier(x.mean((2, 3)))


def _convnext_by_hand(model: nn.Module, x: Tensor, left: set[str]) -> Tensor:
    for i, stage in enumerate(model.features):
        for j, layer in enumerate(stage):
            x = x if f"features.{i}.{j}" in left else layer(x)
    return model.classifier(x.mean((2, 3), keepdim=True))


def _resnet_by_hand(model: nn.Module, x: Tensor, left: set[str]) -> Tensor:
    x = model.maxpool(F.relu(model.bn1(model.conv1(x))))
    for i in range(1, 5):
        for j, block in enumerate(getattr(model, f"layer{i}")):
            x = x if f"layer{i}.{j}" in left else block(x)
    return model.fc(x.mean((2, 3)))


def _function() -> nn.Module:
    return Net(
        lambda n, x: n.head((h := F.relu(n.stem(x))) + n.b(F.relu(n.a(h))) * n.scale(h).sigmoid()),
        stem=conv(3, 6), a=conv(6, 9), b=conv(9, 6), scale=conv(6, 6), head=conv(6, 4),
    )  # fmt: skip


def _function_by_hand(model: nn.Module, x: Tensor, left: set[str]) -> Tensor:
    assert left == {"a"}
    return model.head(F.relu(model.stem(x)))


@dataclass(frozen=True)
class _Case:
    """A network, its input, the names of its blocks counted by other means, and its forward pass without some."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Tensor
    blocks: Callable[[nn.Module], list[str]]
    by_hand: Callable[[nn.Module, Tensor, set[str]], Tensor]


def _identities(kind: type[nn.Module], attribute: str, value: Any) -> Callable[[nn.Module], list[str]]:
    return lambda model: [n for n, m in model.named_modules() if isinstance(m, kind) and getattr(m, attribute) is value]


CASES = [
    _Case("basic blocks", lambda: _resnet(BasicBlock, [2, 1, 2, 1]), IMAGE,
          _identities(BasicBlock, "downsample", None), _resnet_by_hand),
    _Case("bottlenecks", lambda: _resnet(Bottleneck, [3, 1, 2, 1]), IMAGE,
          _identities(Bottleneck, "downsample", None), _resnet_by_hand),
    _Case("inverted residuals", lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25), IMAGE,
          _identities(torchvision.models.mobilenetv2.InvertedResidual, "use_res_connect", True), _mobilenet_by_hand),
    _Case("ConvNeXt", lambda: ConvNeXt([CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 3)], num_classes=5), IMAGE,
          lambda m: [n for n, k in m.named_modules() if type(k).__name__ == "CNBlock"], _convnext_by_hand),
    _Case("pre-norm layers", lambda: nn.Sequential(_Inner(8), _Inner(8)), TOKENS,
          lambda m: ["0.attn", "0.mlp", "1.attn", "1.mlp"], _layers_by_hand),
    _Case("TransformerEncoder, pre-norm", lambda: _torch_encoder(True), TOKENS,
          lambda m: [f"layers.{n}.{k}" for n in (0, 1) for k in ("self_attn", "linear1")], _encoder_by_hand),
    _Case("TransformerEncoder, post-norm", lambda: _torch_encoder(False), TOKENS,
          lambda m: [f"layers.{n}.{k}" for n in (0, 1) for k in ("self_attn", "linear1")], _encoder_by_hand),
    _Case("a branch in a function", _function, IMAGE, lambda m: ["a"], _function_by_hand),
]  # fmt: skip
CASE_IDS = [case.name for case in CASES]


def _plan(model: nn.Module, inputs: Tensor, keep: float = 0.5, scores: Any = None) -> RemovalPlan:
    return plan_removal(trace_channels(model, inputs), Budget(channels=keep), scores, granularity="block")


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_blocks_are_found_and_leave_as_by_hand(case: _Case) -> None:
    """Every one of them by itself, half of them, and all."""
    model = spread_weights(case.build())
    before = _fingerprint(model)
    blocks = find_blocks(trace_channels(model, case.inputs)).removable
    assert sorted(b.name for b in blocks) == sorted(case.blocks(model))
    assert _same(before, _fingerprint(model))
    names = [b.name for b in blocks]
    choices = [{name} for name in names[:2]] + [set(names[::2]), set(names)]
    with torch.no_grad():
        dense = model(case.inputs)
        for left in choices:
            small = copy.deepcopy(model)
            scores = {name: float(name not in left) for name in names}
            plan = _plan(small, case.inputs, max(1 - len(left) / len(names), 1e-9), scores)
            assert {entry["block"] for entry in plan.left} == left
            report = compact(small, plan, case.inputs)
            assert report.error <= 1e-12
            found, expected = small(case.inputs), case.by_hand(model, case.inputs, left)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert float((found - dense).abs().max()) > 1e-3 * float(dense.abs().max())
            assert sum(p.numel() for p in small.parameters()) == report.costs["params"][1]
            assert report.costs["params"][1] < report.costs["params"][0]
            if left == set(names[::2]):  # placeholders are no blocks, and the others keep their names
                again = find_blocks(trace_channels(small, case.inputs)).removable
                assert sorted(b.name for b in again) == sorted(set(names) - left)


def test_a_resnet_without_blocks_is_the_shallower_resnet() -> None:
    """Parameters that stay fill torchvision's own network with fewer blocks, which computes the same."""
    model = spread_weights(_resnet(BasicBlock, [2, 2, 2, 2]))
    plan = _plan(model, IMAGE, 0.2, lambda block, _: float(block.name.endswith("0")))
    compact(model, plan, IMAGE)
    shallow = _resnet(BasicBlock, [1, 1, 1, 1]).eval()
    shallow.load_state_dict(model.state_dict())
    assert torch.equal(model(IMAGE), shallow(IMAGE))


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_fast_path_gives_the_same(norm_first: bool) -> None:
    """Attention's fused path looks at parameters of modules that have left."""
    for kept in ("self_attn", "linear1"):
        model = spread_weights(_torch_encoder(norm_first))
        dense = copy.deepcopy(model)
        compact(model, _plan(model, TOKENS, 0.5, lambda b, _, kept=kept: float(kept in b.name)), TOKENS)
        other = "linear1" if kept == "self_attn" else "self_attn"
        with torch.no_grad():
            found, expected = model(TOKENS), _encoder_by_hand(dense, TOKENS, {f"layers.{n}.{other}" for n in (0, 1)})
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _relu_block(width: int = 6, positive: bool = False) -> nn.Module:
    block = Net(lambda n, x: F.relu(x + n.b(torch.tanh(n.a(x)))), a=conv(width, width), b=conv(width, width))
    return Net(lambda n, x: n.head(n.block(F.relu(n.stem(x)) if positive else n.stem(x))),
               stem=conv(3, width), block=block, head=conv(width, 4))  # fmt: skip


def test_a_relu_after_the_addition_needs_an_input_that_is_never_negative() -> None:
    assert [b.whole for b in find_blocks(trace_channels(_relu_block(positive=True), IMAGE)).removable] == [True]
    blocks = find_blocks(trace_channels(_relu_block(), IMAGE)).removable
    assert [(b.name, b.whole, b.module) for b in blocks] == [("block.a", False, "block")]  # only its branch
    whole = _plan(_relu_block(positive=True), IMAGE, 0.1)
    model = _relu_block()
    before = _fingerprint(model)
    with pytest.raises(EqualityError, match=r"differs from its masked parent by .* Groups of the plan: block\."):
        compact(model, whole, IMAGE)
    assert _same(before, _fingerprint(model))
    assert isinstance(model.block, Net)


def test_a_scaled_shortcut_is_no_identity() -> None:
    block = Net(lambda n, x: torch.add(n.a(x), x, alpha=2), a=conv(6, 6))
    model = nn.Sequential(conv(3, 6), block, conv(6, 4))
    assert [(b.name, b.whole) for b in find_blocks(trace_channels(model, IMAGE)).removable] == [("1.a", False)]
    dense = copy.deepcopy(model)
    compact(model, _plan(model, IMAGE, 0.1), IMAGE)
    assert torch.equal(model(IMAGE), dense[2](2 * dense[0](IMAGE)))


def _swap(plan: RemovalPlan) -> None:
    plan.left[0]["adds"][0][1] = 1 - plan.left[0]["adds"][0][1]


def _miss(plan: RemovalPlan) -> None:
    plan.left[0]["adds"][0][0] = 7


def _zero(plan: RemovalPlan) -> None:
    last = list(plan.left[0]["parts"])[-1]
    kind = plan.left[0]["parts"][last][0]
    plan.left[0]["parts"][last][0] = "zero" if kind == "identity" else "identity"


def _too_much(plan: RemovalPlan) -> None:
    plan.left[0]["parts"] = {"layer1.1": ["identity", 0], "layer1.2.conv1": ["zero", 0]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_swap, "differs from its masked parent"), (_miss, "the addition that ends block .* did not run"),
     (_zero, "differs from its masked parent"), (_too_much, "differs from its masked parent|cannot run")],
)  # fmt: skip
def test_the_gate_sees_a_wrong_plan(damage: Callable[[RemovalPlan], None], message: str) -> None:
    model = spread_weights(_resnet(Bottleneck, [3, 1, 1, 1]))
    plan = _plan(model, IMAGE, 0.5, lambda block, _: float(block.name != "layer1.1"))
    before = _fingerprint(model)
    damage(plan)
    with pytest.raises(EqualityError, match=message):
        compact(model, plan, IMAGE)
    assert _same(before, _fingerprint(model))


def test_a_block_that_no_output_sees_is_refused() -> None:
    model = Net(lambda n, x: n.head(n.stem(x)) + 0 * n.tail(n.block(F.relu(n.stem(x)))).mean(),
                stem=conv(3, 6), block=_relu_block().block, tail=conv(6, 4), head=conv(6, 4))  # fmt: skip
    with pytest.raises(EqualityError, match="no output depends on block block"):
        compact(model, _plan(model, IMAGE, 0.1), IMAGE)


def test_what_is_no_residual_block_is_not_offered() -> None:
    """Downsampling shortcuts, sums of siblings, gates, concatenation, doubling, a scaled skip."""
    model = Net(
        lambda n, x: n.head(torch.cat([
            n.a(h := n.stem(x)) + n.b(h), h * n.a(h), h + h, torch.add(n.b(h), h, alpha=2), n.c(h) + n.d(h)], 1)),
        stem=conv(3, 6), a=conv(6, 6), b=conv(6, 6), c=conv(6, 6, 1), d=conv(6, 6), head=conv(30, 4),
    )  # fmt: skip
    graph = trace_channels(model, IMAGE)
    assert find_blocks(graph).removable == []
    with pytest.raises(ConfigError, match="no residual block of this model can leave"):
        plan_removal(graph, Budget(channels=0.5), granularity="block")


def test_a_branch_that_serves_others_too_stays_with_the_reason() -> None:
    model = Net(lambda n, x: n.head((h := n.stem(x)) + (b := n.a(h))) + n.head(b),
                stem=conv(3, 6), a=conv(6, 6), head=conv(6, 4))  # fmt: skip
    found = find_blocks(trace_channels(model, IMAGE))
    assert found.removable == []
    assert found.staying == [("Net", "no module is used for its branch alone")]
    assert "Net: no module is used for its branch alone" in found.explain()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_go_on_without_the_block(kind: str) -> None:
    """Next steps equal those of the shallower network whose new optimizer got the state of what stays by hand."""

    def build(blocks: int) -> nn.Module:
        inner = [Net(lambda n, x: x + n.b(torch.tanh(n.a(x))), a=conv(4, 5), b=conv(5, 4)) for _ in range(blocks)]
        return nn.Sequential(conv(3, 4), *inner, conv(4, 2))

    model, small = build(3), IMAGE[:, :, :6, :6]
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(3):
        _train_step(model, optimizer, small)
    old = copy.deepcopy(optimizer.state_dict())["state"]
    names = [n for n, _ in model.named_parameters()]
    leaving = [p for n, p in model.named_parameters() if n.startswith("2.")]
    staying = [p for n, p in model.named_parameters() if not n.startswith("2.")]
    compact(model, _plan(model, small, 0.67, lambda block, _: float(block.name != "2")), small, optimizer)
    assert all(a is b for a, b in zip(staying, model.parameters(), strict=True))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in staying}
    assert not any(id(p) in {id(q) for q in leaving} for p in optimizer.state)

    shallow = build(2)
    shallow.load_state_dict(dict(zip(shallow.state_dict(), model.state_dict().values(), strict=True)))
    fresh = OPTIMIZERS[kind](shallow.parameters())
    state = {
        n: old[i] for n, i in enumerate(i for i, name in enumerate(names) if not name.startswith("2.")) if i in old
    }
    fresh.load_state_dict({**fresh.state_dict(), "state": state})
    for _ in range(2):
        _train_step(model, optimizer, small)
        _train_step(shallow, fresh, small)
    for one, other in zip(model.parameters(), shallow.parameters(), strict=True):
        assert torch.equal(one, other)


def test_groups_and_schedules_of_an_optimizer_stay() -> None:
    """A group that loses all its parameters stays, empty; schedules go on."""
    model = spread_weights(_resnet(BasicBlock, [2, 1, 1, 1]))
    own = [p for n, p in model.named_parameters() if n.startswith("layer1.1.")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("layer1.1.")]
    optimizer = torch.optim.AdamW([{"params": own, "lr": 0.5}, {"params": rest, "lr": 0.01}])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    _train_step(model, optimizer, IMAGE)
    plan = _plan(model, IMAGE, 0.5, lambda block, _: float(block.name != "layer1.1"))
    report = compact(model, plan, IMAGE, [optimizer])
    assert report.costs["blocks"] == (2, 1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, len(rest)]
    schedule.step()
    before = rest[0].detach().clone()
    _train_step(model, optimizer, IMAGE)
    assert not torch.equal(rest[0], before)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.005]


class _Keeping(torch.optim.SGD):
    """Keeps parameters of its own, as wrappers of optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.1)
        self.slow = {"weights": list(self.param_groups[0]["params"])}


def test_optimizers_from_which_nothing_can_be_taken_are_refused() -> None:
    model = spread_weights(_resnet(BasicBlock, [2, 1, 1, 1]))
    plan = _plan(model, IMAGE, 0.5)
    before = _fingerprint(model)
    with pytest.raises(PruneError, match=r"_Keeping keeps layer1\.\d\.conv1\.weight in 'slow' besides its parameter"):
        compact(model, plan, IMAGE, _Keeping(model.parameters()))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)
    optimizer.step(lambda: (optimizer.zero_grad(), loss := model(IMAGE).square().mean(), loss.backward())[1])
    after = _fingerprint(model)
    with pytest.raises(PruneError, match="LBFGS"):
        compact(model, plan, IMAGE, optimizer)
    assert _same(after, _fingerprint(model))
    assert not _same(before, after)
    compact(model, plan, IMAGE, torch.optim.LBFGS(model.parameters()))  # no step yet: nothing is kept


def test_a_parameter_that_others_hold_stays() -> None:
    model = nn.Sequential(conv(3, 4), Net(lambda n, x: x + n.a(x), a=conv(4, 4)), conv(4, 4))
    model[2].weight = model[1].a.weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gone = model[1].a.bias
    report = compact(model, _plan(model, IMAGE, 0.1), IMAGE, optimizer)
    assert report.costs["params"] == (4 * 27 + 4 + 4 * 36 + 4 + 4, 4 * 27 + 4 + 4 * 36 + 4)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert id(model[2].weight) in held
    assert id(gone) not in held


def test_a_block_that_runs_twice_leaves_twice() -> None:
    block = Net(lambda n, x: x + torch.tanh(n.a(x)), a=conv(4, 4))
    model = nn.Sequential(conv(3, 4), block, nn.ReLU(), block, conv(4, 2))
    dense = copy.deepcopy(model)
    plan = _plan(model, IMAGE, 0.1)
    assert [entry["block"] for entry in plan.left] == ["1"]
    compact(model, plan, IMAGE)
    assert [n for n, _ in model.named_parameters()] == ["0.weight", "0.bias", "4.weight", "4.bias"]
    assert torch.equal(model(IMAGE), dense[4](F.relu(dense[0](IMAGE))))


def _macs(model: nn.Module, inputs: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("what", ["channels", "params", "macs"])
@pytest.mark.parametrize("fraction", [0.8, 0.9, 1.0])
def test_budgets_are_met_from_below_in_order_of_scores(what: str, fraction: float) -> None:
    """Costs are those of other counters; one block more would exceed the budget."""
    build = lambda: spread_weights(_resnet(Bottleneck, [4, 3, 2, 2]))  # noqa: E731
    model = build()
    names = [b.name for b in find_blocks(trace_channels(model, IMAGE)).removable]
    order = [names[i] for i in (3, 0, 5, 1, 6, 2, 4)]
    scores = {name: float(n) for n, name in enumerate(order)}
    dense = {"params": sum(p.numel() for p in model.parameters()), "macs": _macs(model, IMAGE), "channels": len(names)}
    plan = plan_removal(trace_channels(model, IMAGE), Budget(**{what: fraction}), scores, granularity="block")
    left = {entry["block"] for entry in plan.left}
    assert left == set(order[: len(left)])
    compact(model, plan, IMAGE)
    costs = {"params": sum(p.numel() for p in model.parameters()), "macs": _macs(model, IMAGE),
             "channels": len(names) - len(left)}  # fmt: skip
    assert plan.costs["params"] == (dense["params"], costs["params"])
    assert plan.costs["macs"] == (dense["macs"], costs["macs"])
    assert plan.costs["blocks"] == (dense["channels"], costs["channels"])
    assert costs[what] <= fraction * dense[what]
    if left:
        other = build()
        fewer = {n: float(n not in order[: len(left) - 1]) for n in names}
        keep = 1 - (len(left) - 1) / len(names)
        compact(other, _plan(other, IMAGE, keep, fewer), IMAGE)
        more = {"params": sum(p.numel() for p in other.parameters()), "macs": _macs(other, IMAGE),
                "channels": len(names) - len(left) + 1}  # fmt: skip
        assert more[what] > fraction * dense[what]
    else:
        assert fraction == 1.0


def test_channels_of_the_cost_are_those_of_the_groups_that_are_left() -> None:
    model = spread_weights(_resnet(BasicBlock, [2, 2, 1, 1]))
    plan = _plan(model, IMAGE, 0.3)
    compact(model, plan, IMAGE)
    assert plan.costs["channels"][1] == sum(group.size for group in trace_channels(model, IMAGE).groups)


def test_the_default_score_is_the_branch_over_what_it_is_added_to() -> None:
    model = spread_weights(_resnet(BasicBlock, [2, 1, 1, 1]))
    with torch.no_grad():
        model.layer1[1].bn2.weight.mul_(1e-3)
        model.layer1[1].bn2.bias.mul_(1e-3)
        x = model.maxpool(F.relu(model.bn1(model.conv1(IMAGE))))
        expected = {}
        for n, block in enumerate(model.layer1):
            branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
            expected[f"layer1.{n}"] = float(branch.double().norm() / x.double().norm())
            x = F.relu(x + branch)
    graph = trace_channels(model, IMAGE)
    found = score_blocks(graph, find_blocks(graph).removable)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["layer1.1"] < 0.1 < found["layer1.0"]
    assert [e["block"] for e in _plan(model, IMAGE, 0.5).left] == ["layer1.1"]


def test_norms_of_filters_pass_over_what_has_none() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(6, 6), nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.linear(x)

    model = nn.Sequential(nn.Linear(4, 6), Scaled(), nn.Linear(6, 3))
    (block,) = find_blocks(trace_channels(model, torch.randn(2, 4))).removable
    expected = float(model[1].linear.weight.detach().norm(dim=1).mean())
    assert score_filters(model, block, 2.0) == pytest.approx(expected)


def test_ties_keep_the_earlier_block() -> None:
    model = _resnet(BasicBlock, [3, 1, 1, 1])
    assert [e["block"] for e in _plan(model, IMAGE, 0.67, lambda *_: 1.0).left] == ["layer1.2"]


class _ClassToken(nn.Module):
    """A transformer that is read at a token of its own: without attention it sees nothing of the others."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layers = nn.ModuleList(_Inner(8) for _ in range(depth))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0]), self.token.sum() + torch.zeros(2)  # the second output never saw the input


def _attention_first(block: Any, model: nn.Module) -> float:
    return float("mlp" in " ".join(block.parts)) + 0.1 * int(block.module.split(".")[1])


@pytest.mark.parametrize("fraction", [0.5, 0.34])
def test_outputs_go_on_depending_on_the_inputs(fraction: float) -> None:
    """The last attention stays against its score, and a block of a higher one leaves for it."""
    model = _ClassToken().eval()
    plan = _plan(model, TOKENS, fraction, _attention_first)
    left = [f"{entry['module']}.{part}" for entry in plan.left for part in entry["parts"] if "norm" not in part]
    attentions = [name for name in left if "attn" in name]
    assert len(plan.left) == round(6 * (1 - fraction))
    assert len(attentions) == 2
    assert not any("layers.2" in name for name in attentions)
    compact(model, plan, TOKENS)
    one, two = model(TOKENS)[0], model(TOKENS + torch.randn(2, 5, 8))[0]
    assert not torch.equal(one, two)


def test_a_budget_that_would_blind_the_network_is_refused() -> None:
    graph = trace_channels(_ClassToken(2), TOKENS)
    with pytest.raises(BudgetError, match=r"without 3 of its 4 removable .* without .*attn.* depend on the inputs"):
        plan_removal(graph, Budget(channels=0.1), _attention_first, granularity="block")


def test_bad_arguments_are_refused() -> None:
    graph = trace_channels(_resnet(BasicBlock, [2, 1, 1, 1]), IMAGE)
    with pytest.raises(ConfigError, match="granularity='layer': expected 'channel' or 'block'"):
        plan_removal(graph, Budget(channels=0.5), granularity="layer")
    with pytest.raises(ConfigError, match="round_to, min_channels, scope and max_layer_fraction are for"):
        plan_removal(graph, Budget(channels=0.5), round_to=8, granularity="block")
    with pytest.raises(ConfigError, match=r"no entry for block 'layer1\.1'"):
        plan_removal(graph, Budget(channels=0.5), {"layer1.0": 1.0}, granularity="block")
    with pytest.raises(ConfigError, match="not all numbers"):
        plan_removal(graph, Budget(channels=0.5), lambda *_: float("nan"), granularity="block")
    with pytest.raises(BudgetError, match=r"without all of its 2 removable blocks 0\.9\d+ of the params stay"):
        plan_removal(graph, Budget(params=0.5), granularity="block")


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_plans_are_replayed_and_compact_models_saved_and_loaded(case: _Case, tmp_path: Path) -> None:
    """Blocks leave, then channels; a fresh model follows both plans from the file."""
    model = spread_weights(case.build())
    plan = RemovalPlan.from_json(json.dumps(_plan(model, case.inputs).to_json()))
    replayed = copy.deepcopy(model)
    compact(model, plan, case.inputs)
    plan.apply_(replayed)
    assert torch.equal(model(case.inputs), replayed(case.inputs))
    channels = plan_removal(trace_channels(model, case.inputs), Budget(channels=0.6))
    report = compact(model, channels, case.inputs)
    assert report.error < 1e-9
    save_compact(model, tmp_path / "small.safetensors")
    loaded = load_compact(case.build(), tmp_path / "small.safetensors").eval()
    assert torch.equal(loaded(case.inputs), model(case.inputs))
    assert list(loaded.state_dict()) == list(model.state_dict())
    with pytest.raises(MaskMismatchError):
        plan.apply_(model)


def test_blocks_leave_after_channels_too() -> None:
    model = spread_weights(_resnet(Bottleneck, [3, 1, 1, 1]))
    compact(model, plan_removal(trace_channels(model, IMAGE), Budget(channels=0.5)), IMAGE)
    dense = copy.deepcopy(model)
    plan = _plan(model, IMAGE, 0.1)
    compact(model, plan, IMAGE)
    assert torch.equal(model(IMAGE), _resnet_by_hand(dense, IMAGE, {"layer1.1", "layer1.2"}))


def test_another_model_is_refused() -> None:
    plan = _plan(_resnet(BasicBlock, [2, 1, 1, 1]), IMAGE)
    with pytest.raises(MaskMismatchError, match="does not have"):
        compact(_resnet(BasicBlock, [1, 1, 1, 1]), plan, IMAGE)
    with pytest.raises(MaskMismatchError, match="the plan expects"):
        compact(_resnet(Bottleneck, [2, 1, 1, 1]), plan, IMAGE)


def test_modes_hooks_and_memory_of_what_left() -> None:
    model = _resnet(BasicBlock, [2, 1, 1, 1]).train()
    model.layer2[0].eval()
    calls: list[str] = []
    model.layer2[0].register_forward_hook(lambda *_: calls.append("hook"))
    modes = {n: m.training for n, m in model.named_modules()}
    compact(model, _plan(model, IMAGE, 0.1), IMAGE)
    assert all(m.training == modes[n] for n, m in model.named_modules())
    assert type(model.layer1[0]).__name__ == "Left"
    assert list(model.layer1.parameters()) == []
    calls.clear()
    model(IMAGE).sum().backward()
    assert calls == ["hook"]
    assert all(p.grad is not None for p in model.parameters())


def test_a_compiled_block_leaves() -> None:
    model = spread_weights(_resnet(BasicBlock, [2, 1, 1, 1]))
    dense = copy.deepcopy(model)
    model.layer1[1] = torch.compile(model.layer1[1], backend="eager")
    plan = _plan(model, IMAGE, 0.5, lambda block, _: float(block.name != "layer1.1"))
    compact(model, plan, IMAGE)
    assert type(model.layer1[1]).__name__ == "Left"
    assert torch.equal(model(IMAGE), _resnet_by_hand(dense, IMAGE, {"layer1.1"}))

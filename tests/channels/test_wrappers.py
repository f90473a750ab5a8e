"""Wrapped models: what is traced and shrunk is the module within, and everything about it comes back as it was."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_prune import (
    Budget,
    EqualityError,
    RemovalPlan,
    TraceError,
    compact,
    load_compact,
    plan_removal,
    save_compact,
    trace_channels,
)
from tests.channels.networks import conv

INPUTS = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4))


class Module(pl.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def half(model: nn.Module) -> RemovalPlan:
    return plan_removal(trace_channels(model, INPUTS), Budget(channels=0.5))


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPED = {
    "lightning": Module,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled inside": lambda net: Module(torch.compile(net, backend="eager")),
    "compiled inside and outside": lambda net: torch.compile(
        nn.Sequential(torch.compile(net, backend="eager")), backend="eager"
    ),
    "data parallel": nn.DataParallel,
    "ddp": nn.parallel.DistributedDataParallel,
    "ddp of compiled": lambda net: nn.parallel.DistributedDataParallel(torch.compile(net, backend="eager")),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_module_within_is_shrunk(kind: str, one_process: Any) -> None:
    """Equal, channel for channel, to the same removal on the bare network."""
    by_hand, net = network(), network()
    compact(by_hand, half(by_hand), INPUTS)
    wrapped = WRAPPED[kind](net)
    wrapped(INPUTS).sum().backward()  # compiled code, hooks and buckets of the full width exist
    wrapped.zero_grad()
    report = compact(wrapped, half(wrapped), INPUTS)
    assert report.kept("channels") == 0.5
    assert net[0].weight.shape == (4, 3, 3, 3)
    assert {n: t.shape for n, t in net.state_dict().items()} == {n: t.shape for n, t in by_hand.state_dict().items()}
    for (name, one), other in zip(net.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other), name
    net.eval()
    again = wrapped if "ddp" not in kind else WRAPPED[kind](net)  # a DDP wrapper has to be built anew
    assert torch.equal(again(INPUTS), net(INPUTS))
    again(INPUTS).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


def test_names_do_not_depend_on_compilation(tmp_path: Path) -> None:
    """A file of a compiled network loads into a plain one, and the other way round."""
    compiled = Module(torch.compile(network(), backend="eager"))
    plan = half(compiled)
    assert sorted(plan.keep) == sorted(half(Module(network())).keep)
    compact(compiled, plan, INPUTS)
    save_compact(compiled, tmp_path / "small.safetensors")
    plain = load_compact(Module(network()), tmp_path / "small.safetensors")
    assert torch.equal(plain.eval()(INPUTS), compiled.eval()(INPUTS))
    save_compact(plain, tmp_path / "plain.safetensors")
    fresh = Module(torch.compile(network(), backend="eager"))
    assert load_compact(fresh, tmp_path / "plain.safetensors") is fresh
    assert torch.equal(fresh.eval()(INPUTS), plain(INPUTS))


def test_sharded_parameters_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Named as torch's is."""

    with pytest.raises(TraceError, match=r"FullyShardedDataParallel shards parameters between processes"):
        trace_channels(FullyShardedDataParallel(), INPUTS)


def everything(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {n: (id(t), t.data_ptr(), t.dtype, t.device, t.requires_grad) for n, t in tensors.items()},
        "values": {n: t.detach().clone() for n, t in tensors.items()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "kinds": {n: type(m) for n, m in model.named_modules()},
        "hooks": {n: [len(m._forward_hooks), len(m._forward_pre_hooks)] for n, m in model.named_modules()},
        "flags": [torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for part in before.keys() - {"values"}:
        assert before[part] == after[part], part
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bare", "lightning", "compiled inside", "compiled"])
def test_everything_comes_back_after_a_failed_removal(kind: str, dtype: torch.dtype) -> None:
    net = network().to(dtype).train()
    net[1].eval()
    net[3].weight.requires_grad_(False)
    net[3].register_forward_hook(lambda *_: None)
    net[0].register_forward_pre_hook(lambda *_: None)
    wrapped = net if kind == "bare" else WRAPPED[kind](net)
    inputs = INPUTS.to(dtype)
    before = everything(wrapped)
    plan = plan_removal(trace_channels(wrapped, inputs), Budget(channels=0.5))
    assert_same(before, everything(wrapped))
    name, axis = plan.reads[-1]
    kept = plan.keep[name][axis]
    kept[0] = next(i for i in range(plan.shapes[name][axis]) if i not in kept)
    with pytest.raises(EqualityError, match="differs from its masked parent"):
        compact(wrapped, plan, inputs)
    assert_same(before, everything(wrapped))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lightning", "compiled inside"])
def test_modes_hooks_and_precision_survive_a_removal(kind: str, dtype: torch.dtype) -> None:
    net = network().to(dtype).train()
    net[1].eval()
    net[3].weight.requires_grad_(False)
    calls: list[str] = []
    net[3].register_forward_hook(lambda *_: calls.append("hook"))
    wrapped = WRAPPED[kind](net)
    before = everything(wrapped)
    inputs = INPUTS.to(dtype)
    compact(wrapped, plan_removal(trace_channels(wrapped, inputs), Budget(channels=0.5)), inputs)
    after = everything(wrapped)
    for part in ("modes", "kinds", "hooks", "flags"):
        assert before[part] == after[part], part
    for name, one in before["tensors"].items():
        other = after["tensors"][name]
        assert (one[0], *one[2:]) == (other[0], *other[2:]), name  # the same object; only its memory is new
    calls.clear()
    assert wrapped(inputs).dtype == dtype
    assert calls == ["hook"]


def test_a_trace_that_fails_leaves_everything() -> None:
    wrapped = Module(torch.compile(network(), backend="eager"))
    before = everything(wrapped)
    with pytest.raises(TraceError, match="cannot be run with these example inputs"):
        trace_channels(wrapped, torch.rand(2, 5, 6, 6))
    assert_same(before, everything(wrapped))

"""compact(): the gate can fail, failures leave everything as it was, optimizers and graphs go on."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_prune.channels import Budget, RemovalPlan, compact, plan_removal, trace_channels
from lightning_prune.channels.equality import compare
from lightning_prune.errors import ConfigError, EqualityError, MaskMismatchError, PruneError
from tests.channels.networks import CASES, Net, conv, example


def _small() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4))


def _plan(model: nn.Module, inputs: Any, fraction: float = 0.5) -> RemovalPlan:
    return plan_removal(trace_channels(model, inputs), Budget(channels=fraction))


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    state = {
        n: (id(t), t.data_ptr(), t.dtype, t.requires_grad, t.detach().clone()) for n, t in model.named_parameters()
    }
    state |= {n: (id(t), t.data_ptr(), t.dtype, False, t.clone()) for n, t in model.named_buffers()}
    state["modes"] = [m.training for m in model.modules()]
    state["attributes"] = [
        {k: v for k, v in vars(m).items() if isinstance(v, (int, float, tuple, str))} for m in model.modules()
    ]
    return state


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    for key, one in a.items():
        other = b[key]
        if isinstance(one, tuple):
            if one[:4] != other[:4] or not torch.equal(one[4], other[4]):
                return False
        elif one != other:
            return False
    return True


INPUTS = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_wrong_plan_is_refused_and_leaves_the_model_as_it_was(case: Any) -> None:
    """The check must see one swapped channel: keep at one reader a channel that left, drop one that stays."""
    model, inputs = case.build(8), example(case)
    plan = _plan(model, inputs)
    name, axis = plan.reads[-1]
    kept = plan.keep[name][axis]
    leaving = sorted(set(range(plan.shapes[name][axis])) - set(kept))
    kept[0] = leaving[-1]
    before = _fingerprint(model)
    with pytest.raises(EqualityError, match=r"differs from its masked parent.*Groups of the plan"):
        compact(model, plan, inputs)
    assert _same(before, _fingerprint(model))


def test_a_plan_that_cannot_run_is_refused_and_names_the_group() -> None:
    model = _small()
    plan = _plan(model, INPUTS)
    plan.keep["3.weight"][1] = plan.keep["3.weight"][1][:-1]
    before = _fingerprint(model)
    with pytest.raises(EqualityError, match=r"cannot run.*Groups of the plan: 0, 3"):
        compact(model, plan, INPUTS)
    assert _same(before, _fingerprint(model))


def test_a_branch_that_no_output_sees_is_refused() -> None:
    model = Net(
        lambda n, x: n.head(n.a(x)) + 0 * n.c(n.b(x)), a=conv(3, 8), head=conv(8, 4), b=conv(3, 8), c=conv(8, 4)
    )
    with pytest.raises(EqualityError, match=r"no output depends on b\.bias, b\.weight"):
        compact(model, _plan(model, INPUTS), INPUTS)


def test_zero_initialised_outputs_do_not_blind_the_check() -> None:
    """A model whose own weights give 0 everywhere is still checked: the check brings its own weights."""
    model = _small()
    nn.init.zeros_(model[5].weight)
    nn.init.zeros_(model[5].bias)
    plan = _plan(model, INPUTS)
    assert compare(model, plan, INPUTS).error < 1e-12
    plan.keep["5.weight"][1][0] = next(i for i in range(6) if i not in plan.keep["5.weight"][1])
    assert compare(model, plan, INPUTS).error > 1e-3


def test_the_check_in_single_precision_sees_what_double_sees() -> None:
    model = _small()
    plan = _plan(model, INPUTS)
    found = compare(model, plan, INPUTS, precision=torch.float32)
    assert found.error < 1e-5
    assert found.dtype == torch.float32
    stays = plan.keep["5.weight"][1]
    stays[0] = next(i for i in range(6) if i not in stays)
    with pytest.raises(EqualityError, match=r"allowed is 1e-04 in torch\.float32"):
        compact(model, plan, INPUTS, precision=torch.float32)
    with pytest.raises(ConfigError, match=r"precision=torch\.float16"):
        compact(model, _plan(model, INPUTS), INPUTS, precision=torch.float16)


def test_another_model_is_refused() -> None:
    plan = _plan(_small(), INPUTS)
    with pytest.raises(MaskMismatchError, match=r"does not have; give a fresh model"):
        compact(nn.Sequential(conv(3, 8)), plan, INPUTS)
    model = _small()
    compact(model, plan, INPUTS)
    with pytest.raises(MaskMismatchError, match=r"was the plan carried out already"):
        compact(model, plan, INPUTS)


class _Lion(torch.optim.Optimizer):
    """As third parties write it: steps by the sign of an interpolated momentum, one state tensor a parameter."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(torch.sign(0.9 * momentum + 0.1 * p.grad), alpha=group["lr"])
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adam amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "lion": lambda p: _Lion(p, 0.01),
}


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_go_on_as_a_freshly_sliced_one_would(kind: str) -> None:
    """After surgery the next steps equal those of a narrow model with a new optimizer and hand-sliced state."""
    model = _small().eval()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(3):
        _train_step(model, optimizer, INPUTS)
    plan = _plan(model, INPUTS)
    parameters = list(model.parameters())
    names = [n for n, _ in model.named_parameters()]
    old = copy.deepcopy(optimizer.state_dict())

    narrow = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 3), nn.ReLU(), conv(3, 4)).eval()
    compact(model, plan, INPUTS, optimizer)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    narrow.load_state_dict(model.state_dict())
    fresh = OPTIMIZERS[kind](narrow.parameters())
    for number, state in old["state"].items():
        name = names[number]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and list(value.shape) == plan.shapes.get(name):
                for axis, indices in plan.keep[name].items():
                    value = value[(slice(None),) * axis + (indices,)]
                state[key] = value
    fresh.load_state_dict(old)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):  # an odd number: steps of one size by sign cannot cancel out
        _train_step(model, optimizer, INPUTS)
        _train_step(narrow, fresh, INPUTS)
    for (name, one), other, first in zip(model.named_parameters(), narrow.parameters(), before, strict=True):
        assert torch.equal(one, other), name
        assert not torch.equal(one, first), name


class _Factored(torch.optim.SGD):
    """Keeps a statistic of another shape, as factored optimizers do."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["row"] = torch.ones(parameter.shape[0])


def test_optimizer_state_of_another_shape_is_refused_by_name() -> None:
    model = _small()
    optimizer = _Factored(model.parameters(), 0.1)
    _train_step(model, optimizer, INPUTS)
    before = _fingerprint(model)
    with pytest.raises(PruneError, match=r"_Factored keeps state 'row' of shape \(8,\) for 0.weight"):
        compact(model, _plan(model, INPUTS), INPUTS, [optimizer])
    assert _same(before, _fingerprint(model))


def test_lbfgs_is_refused_once_it_has_stepped() -> None:
    model = _small()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    compact(model, _plan(model, INPUTS), INPUTS, optimizer)
    optimizer.step(lambda: model(INPUTS).square().mean())
    with pytest.raises(PruneError, match="LBFGS keeps one flat vector"):
        compact(model, _plan(model, INPUTS), INPUTS, optimizer)


def test_gradients_and_graphs_that_are_alive_survive() -> None:
    model = _small().eval()
    loss = model(INPUTS).square().mean()
    loss.backward(retain_graph=True)
    plan = _plan(model, INPUTS)
    gradient = model[3].weight.grad.clone()
    compact(model, plan, INPUTS)
    expected = gradient[plan.keep["3.weight"][0]][:, plan.keep["3.weight"][1]]
    assert torch.equal(model[3].weight.grad, expected)
    model.zero_grad()
    model(INPUTS).square().mean().backward()  # the old graph (loss) still holds its accumulators
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert loss.grad_fn is not None


def test_hooks_modes_and_requires_grad_survive() -> None:
    model = _small().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    calls: list[str] = []
    model[3].register_forward_hook(lambda *_: calls.append("hook"))
    compact(model, _plan(model, INPUTS), INPUTS)
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True, True]
    assert not model[0].weight.requires_grad
    assert model[3].weight.requires_grad
    calls.clear()
    model(INPUTS)
    assert calls == ["hook"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_comes_back(dtype: torch.dtype) -> None:
    model, inputs = _small().to(dtype), INPUTS.to(dtype)
    report = compact(model, _plan(model, inputs), inputs)
    assert report.dtype == "float64"
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(inputs).dtype == dtype
    assert torch.get_default_dtype() == torch.float32


def test_storage_shrinks_and_memory_format_stays() -> None:
    model = _small().to(memory_format=torch.channels_last)
    compact(model, _plan(model, INPUTS), INPUTS)
    weight = model[3].weight
    assert weight.untyped_storage().nbytes() == weight.numel() * 4
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_several_removals_in_turn() -> None:
    model = torchvision.models.resnet18().eval()
    inputs = torch.rand(1, 3, 32, 32)
    for _ in range(2):
        compact(model, _plan(model, inputs, 0.5), inputs)
    assert model.conv1.out_channels == 16
    assert model(inputs).shape == (1, 1000)


SINGLE = [lambda x: x.float(), lambda x: x.to(torch.float32), lambda x: x.to(dtype=torch.float32)]


@pytest.mark.parametrize("ask", SINGLE)
def test_a_model_that_asks_for_single_precision_by_name_is_checked_in_double(ask: Callable[[Tensor], Tensor]) -> None:
    model = Net(lambda n, x: n.head(torch.relu(n.a(ask(x)))), a=conv(3, 8), head=conv(8, 4))
    report = compact(model, _plan(model, INPUTS), INPUTS)
    assert report.dtype == "float64"
    assert model(INPUTS).dtype == torch.float32


def test_gates_behind_growing_sums_are_seen() -> None:
    """Branches added in each of many blocks grow until sigmoids are exactly 0 or 1 under weights of full size."""

    def run(n: nn.Module, x: Tensor) -> Tensor:
        h = n.stem(x)
        for block in n.blocks:
            h = h + block[0](h) + block[1](h)
            h = h * torch.sigmoid(block[3](torch.relu(block[2](h.mean((2, 3), keepdim=True)))))
        return n.head(h)

    blocks = nn.ModuleList(
        nn.ModuleList([conv(16, 16), conv(16, 16), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)]) for _ in range(20)
    )
    model = Net(run, stem=conv(3, 16), blocks=blocks, head=conv(16, 4))
    assert compact(model, _plan(model, INPUTS), INPUTS).error < 1e-9


@pytest.mark.parametrize("chaotic", [2, 12])
def test_draws_that_amplify_rounding_are_drawn_again(chaotic: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sines of huge angles hang on their last bits; a wrong plan is refused under the first draw that shows it."""
    equality = sys.modules["lightning_prune.channels.equality"]
    drawn, seeds = equality.random_tensors, []

    def draw(model: nn.Module, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        seeds.append(seed)
        tensors = drawn(model, dtype, seed)
        tensors["head.weight"] = tensors["head.weight"] * (1e16 if seed < chaotic else 1)
        return tensors

    monkeypatch.setattr(equality, "random_tensors", draw)
    model = Net(lambda n, x: n.head(torch.relu(n.a(x))).sin(), a=conv(3, 64), head=conv(64, 4))
    plan = _plan(model, INPUTS)
    wrong = copy.deepcopy(plan)
    wrong.keep["a.weight"][0] = sorted({*range(64)} - {*wrong.keep["a.weight"][0]})
    if chaotic == 12:
        with pytest.raises(EqualityError, match="amplifies rounding"):
            compact(model, wrong, INPUTS)
        return
    with pytest.raises(EqualityError, match="differs from its masked parent"):
        compact(model, wrong, INPUTS)
    assert max(seeds) == 2
    assert compact(model, plan, INPUTS).error < 1e-9
    assert max(seeds) == 2


def test_a_model_that_insists_on_single_precision_is_checked_in_it() -> None:
    model = Net(lambda n, x: n.head(torch.relu(n.a(x.type("torch.FloatTensor")))), a=conv(3, 8), head=conv(8, 4))
    report = compact(model, _plan(model, INPUTS), INPUTS)
    assert report.dtype == "float32"
    assert report.error < 1e-5

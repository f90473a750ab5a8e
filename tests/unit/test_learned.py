"""Learned masks without a Trainer: gradients against autograd of the written formulas, counts, draws, layers."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ConfigError, MaskMismatchError, SelectionError, select
from lightning_prune.learned import (
    Levels,
    MaskLearner,
    MaskSettings,
    Passing,
    TopMask,
    frozen_weight,
    fused,
    popup_weight,
    sampled_weight,
    shift_logits_,
    stochastic,
)
from lightning_prune.learned.counts import count_kept

CPU = torch.device("cpu")
COMPILED = [False, pytest.param(True, marks=pytest.mark.skipif(find_spec("numba") is None, reason="Numba is missing"))]


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether passes over large tensors are compiled."""
    monkeypatch.setattr(fused, "can_compile", lambda: request.param)
    return bool(request.param)


def drawn(probabilities: Tensor, *numbers: int) -> Tensor:
    """The mask by NumPy, from the documented rule: round(p * 65536) of the 65536 levels pass."""
    levels = Levels(*numbers, CPU).next(probabilities.numel()).numpy().astype(np.int64) + 2**15
    passes = levels + 0.5 < probabilities.detach().numpy().ravel().astype(np.float64) * 2**16
    return torch.from_numpy(passes.astype(np.float64)).view(probabilities.shape)


# ---------------------------------------------------------------- edge-popup


def test_popup_literal() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
    scores = torch.tensor([[0.1, -0.9, 0.3], [-0.4, 0.2, 0.8]])
    assert popup_weight(weight, scores, 0.5).tolist() == [[0, -2, 0], [4, 0, -6]]
    assert popup_weight(weight, scores, 1.0).tolist() == weight.tolist()
    tied = torch.tensor([[0.5, -0.5, 0.5], [0.1, 0.5, 0.9]])
    assert popup_weight(weight, tied, 0.5).tolist() == [[1, -2, 0], [0, 0, -6]]  # the later of equal ones leave


@pytest.mark.parametrize("compiled", COMPILED, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_popup_gradient_is_autograds_of_the_formula(dtype: torch.dtype, compiled: bool) -> None:
    weight, given = torch.randn(2, 130, 140, dtype=dtype).unbind()
    scores = torch.randn(130, 140, dtype=dtype, requires_grad=True)
    own = torch.autograd.grad((popup_weight(weight, scores, 0.3) * given).sum(), scores)[0]
    mask = select({"": scores.abs()}, density=0.3)[""].to(dtype)
    straight = mask + scores.abs() - scores.abs().detach()
    result = weight * straight
    expected = torch.autograd.grad((result * given).sum(), scores)[0]
    assert torch.equal(popup_weight(weight, scores, 0.3), weight * mask)
    torch.testing.assert_close(own, expected)
    assert (own[mask == 0] != 0).all()


def test_popup_gradient_at_zero_and_of_the_gradient() -> None:
    weight, scores = torch.tensor([2.0, 3.0, 5.0, 7.0]), torch.tensor([0.0, -0.0, 1.0, -1.0], requires_grad=True)
    given = torch.tensor([1.0, 1.0, 10.0, 100.0], requires_grad=True)
    for create_graph in (False, True):
        grad = torch.autograd.grad(popup_weight(weight, scores, 0.5), scores, given, create_graph=create_graph)[0]
        assert grad.tolist() == [-2, -3, 50, -700]
    assert torch.autograd.grad(grad.sum(), given)[0].tolist() == [-2, -3, 5, -7]


@pytest.mark.parametrize("density", [0.02, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("grain", [0.0, 0.01])  # scores all different; many equal ones
@pytest.mark.parametrize("compiled", COMPILED, indirect=True)
def test_what_passes_is_what_a_selection_keeps_wherever_scores_move(
    density: float, grain: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, scores, direction = torch.randn(3, 300, 300).unbind()
    passing, kept, anew = Passing(), count_kept(density, scores.numel()), []
    found = torch.empty(0)
    anywhere = TopMask._anywhere
    monkeypatch.setattr(TopMask, "_anywhere", lambda *args: (anew.append(1), anywhere(*args))[1])
    for step in range(40):
        if step == 20:
            scores = scores * 7  # a jump
        if step == 30:
            weight.mul_(2)
        if step == 33:
            found.zero_()  # somebody writes to the result, which is the caller's
        scores = scores + 1e-3 * direction + 1e-4 * torch.randn(300, 300)
        values = (scores / grain).round() * grain if grain else scores
        found = passing(values, weight, kept)
        expected = weight * select({"": values.abs()}, remove=scores.numel() - kept)[""]
        assert torch.equal(found, expected), step
        assert torch.equal(passing(values, weight, kept), expected)
    if not grain and density < 1:
        assert 1 <= len(anew) <= 8, len(anew)  # the rest never looked at all values at once


@pytest.mark.parametrize("compiled", COMPILED, indirect=True)
@pytest.mark.parametrize("passes_before", [True, False])
def test_nan_scores_are_told(passes_before: bool, compiled: bool) -> None:
    passing, scores, weight = Passing(), torch.randn(300, 100), torch.ones(300, 100)
    passing(scores, weight, 10_000)
    passing(scores, weight, 10_000)
    scores.view(-1)[scores.abs().argmax() if passes_before else scores.abs().argmin()] = math.nan
    with pytest.raises(SelectionError, match="NaN"):
        passing(scores, weight, 10_000)


def test_training_follows_an_evaluation_in_inference_mode() -> None:
    passing, weight, scores = Passing(), torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3, requires_grad=True)
    weight = weight.to(memory_format=torch.channels_last)
    for _ in range(3):
        with torch.inference_mode():
            found = popup_weight(weight, scores, 0.5, passing).clone()
        x = torch.randn(2, 4, 5, 5, requires_grad=True)
        nn.functional.conv2d(x, popup_weight(weight, scores, 0.5, passing)).sum().backward()
        assert torch.equal(found, popup_weight(weight, scores, 0.5))
        with torch.no_grad():
            scores.add_(0.05 * torch.randn_like(scores))
            weight.mul_(1.5)


def test_the_result_is_like_a_parameter() -> None:
    """Reading it twice in a step is free; a graph that is older than a step is refused, as torch refuses it."""
    passing, weight = Passing(), torch.randn(20, 20)
    scores, x = torch.randn(20, 20, requires_grad=True), torch.randn(3, 20, requires_grad=True)
    popup_weight(weight, scores, 0.5, passing)
    one, two = (x @ popup_weight(weight, scores, 0.5, passing) for _ in range(2))
    (one + two).sum().backward()
    expected = torch.autograd.grad((2 * x @ popup_weight(weight, scores, 0.5)).sum(), scores)[0]
    torch.testing.assert_close(scores.grad, expected)
    late = (x @ popup_weight(weight, scores, 0.5, passing)).sum()
    with torch.no_grad():
        scores.mul_(1 + 0.02 * torch.randn(20, 20))
    popup_weight(weight, scores, 0.5, passing)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@pytest.mark.parametrize(
    ("density", "total", "kept"), [(0.5, 5, 2), (0.5, 7, 4), (0.1, 10, 1), (1, 3, 3), (0.7, 10, 7)]
)
def test_one_meaning_of_density(density: float, total: int, kept: int) -> None:
    assert count_kept(density, total) == kept
    scores = torch.randn(1, total)
    assert int(popup_weight(torch.ones(1, total), scores, density).sum()) == kept
    assert select({"": scores.abs()}, density=density).kept == kept


# ---------------------------------------------------------------- stochastic


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("size", [(30, 40), (600, 500)])  # one piece, several
def test_sampled_gradient_is_autograds_of_the_formula(rescale: bool, size: tuple[int, int]) -> None:
    weight, given = torch.randn(2, *size, dtype=torch.float64).unbind()
    logits = torch.randn(size, dtype=torch.float64, requires_grad=True)
    found = sampled_weight(weight, logits, Levels(3, 1, 2, 0, CPU), rescale=rescale)
    own = torch.autograd.grad((found * given).sum(), logits)[0]

    probabilities = torch.sigmoid(logits)
    sample = drawn(probabilities.detach(), 3, 1, 2, 0)
    straight = sample + probabilities - probabilities.detach()
    result = weight * straight * (straight.numel() / straight.sum() if rescale else 1)
    expected = torch.autograd.grad((result * given).sum(), logits)[0]
    torch.testing.assert_close(found, result.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)
    assert 0.4 < sample.mean() < 0.6


@pytest.mark.skipif(find_spec("numba") is None, reason="Numba is missing")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_passes_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on alike on a machine with Numba and on one without."""
    weight, grad, scores = torch.randn(3, 50_001, dtype=dtype).unbind()
    scores[::7], grad[3], grad[7], grad[14] = 0, math.inf, math.inf, math.nan
    signed = torch.empty_like(weight)
    fused.times_sign(signed, grad, weight, scores)
    product = grad * weight
    expected = torch.where(scores > 0, product, -product)
    torch.testing.assert_close(signed, expected, rtol=0, atol=0, equal_nan=True)
    own = scores.clone().requires_grad_()
    monkeypatch.setattr(fused, "can_compile", lambda: False)
    popup_weight(weight, own, 0.5).backward(grad)
    torch.testing.assert_close(own.grad, expected, rtol=0, atol=0, equal_nan=True)
    over, nan = fused.count_over()(scores.numpy(), scores.numpy().dtype.type(0.7))
    assert (over, nan) == (int((scores.abs() > 0.7).sum()), 0)
    scores[17] = math.nan
    assert fused.count_over()(scores.numpy(), scores.numpy().dtype.type(0.7))[1] == 1

    probabilities = torch.rand(50_001, dtype=dtype)
    level = Levels(1, 2, 3, 0, CPU).next(50_001)
    probabilities[:30_000] = 0.5 + (level[:30_000].to(dtype) + torch.arange(30_000) % 3 / 2) / 2**16  # at the boundary
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(fused, "can_compile", lambda compiled=compiled: compiled)
        out = torch.empty_like(weight)
        found.append((stochastic._pass(out, weight, probabilities, level), out))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert fused.usable(weight) is False


def test_entries_pass_with_their_probability() -> None:
    probabilities = torch.tensor([0.0, 2**-18, 0.01, 0.3, 0.5, 0.99, 1.0]).repeat_interleave(20_000)
    logits = torch.logit(probabilities.double()).float()
    mask = sampled_weight(torch.ones_like(logits), logits, Levels(0, 0, 0, 0, CPU))
    shares = mask.view(7, -1).mean(1).tolist()
    assert shares[:2] == [0, 0]
    assert shares[6] == 1
    for share, p in zip(shares[2:6], (0.01, 0.3, 0.5, 0.99), strict=True):
        assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 20_000))


def test_a_draw_is_a_function_of_its_numbers() -> None:
    first = Levels(1, 2, 3, 0, CPU).next(1000)
    before = torch.get_rng_state()
    assert torch.equal(first, Levels(1, 2, 3, 0, CPU).next(1000))
    assert torch.equal(before, torch.get_rng_state())
    parts = Levels(1, 2, 3, 0, CPU)
    assert torch.equal(first, torch.cat([parts.next(400), parts.next(600)]))
    for other in ((0, 2, 3, 0), (1, 0, 3, 0), (1, 2, 0, 0), (1, 2, 3, 1)):
        assert (Levels(*other, CPU).next(1000) == first).float().mean() < 0.01


@pytest.mark.parametrize("density", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_logits_are_shifted_to_a_density(density: float, spread: float) -> None:
    logits = spread * torch.randn(400, 50) + 5
    before = logits.clone()
    shift_logits_(logits, density)
    assert torch.sigmoid(logits).mean().item() == pytest.approx(density, rel=2e-3)
    difference = logits - before
    torch.testing.assert_close(difference, difference[0, 0].expand_as(difference), rtol=0, atol=1e-4)
    again = logits.clone()
    shift_logits_(again, density)
    assert torch.equal(again, logits)


# ------------------------------------------------------------------ freezing


def test_initialisations() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.5, -2.0]])
    signs = np.array([[1, -1, 1, -1]])
    assert torch.equal(frozen_weight(weight), weight)
    found = frozen_weight(weight, "signed_constant").numpy()
    np.testing.assert_allclose(found, signs * np.std(weight.numpy()), rtol=1e-6)
    np.testing.assert_allclose(frozen_weight(weight, "kaiming_constant").numpy(), signs * math.sqrt(2 / 4), rtol=1e-6)
    found = frozen_weight(weight, "kaiming_constant", density=0.25).numpy()
    np.testing.assert_allclose(found, signs * math.sqrt(2 / (4 * 0.25)), rtol=1e-6)
    conv = frozen_weight(torch.randn(64, 32, 3, 3), "kaiming_normal", generator=torch.Generator().manual_seed(0))
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.02)


# -------------------------------------------------------------------- layers


class Odd(nn.Module):
    """Convolution, BatchNorm, attention, LSTM, a tied layer, and a weight that is read and not called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.read = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.lstm(x)[0]
        return torch.addmm(self.read.bias, self.second(self.first(x).relu()).mean(1), self.read.weight.t())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}
SETTINGS = {
    "edge_popup": MaskSettings("edge_popup", 0.4),
    "stochastic": MaskSettings("stochastic", None, rescale=True),
    "stochastic at a density": MaskSettings("stochastic", 0.4),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_scores_move_and_nothing_else(settings: MaskSettings, optimizer: str) -> None:
    network = Odd()
    names = list(network.state_dict())
    classes = [type(module) for module in network.modules()]
    stepper = OPTIMIZERS[optimizer](network.parameters())
    learner = MaskLearner(network, settings)
    learner.take_over([stepper])
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    x = torch.randn(6, 4, 5)

    def loss() -> Tensor:
        stepper.zero_grad()
        value = network(x).square().sum()
        value.backward()
        return value

    for learner.draw in range(1, 4):
        stepper.step(loss)
        learner.hold_density()
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    expected = {n for n in before if n.endswith("_scores") and not n.startswith("attention.out_proj")}
    assert expected <= moved <= {n for n in before if n.endswith("_scores")}
    assert list(network.state_dict()) == names

    network.eval()
    outputs, state = network(x), network.state_dict()
    masks = learner.finish()
    assert [type(module) for module in network.modules()] == classes
    assert list(network.state_dict()) == names
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in state.items())
    torch.testing.assert_close(network(x), outputs)
    assert all(p.requires_grad for p in network.parameters())
    for name, mask in masks.items():
        found = network.get_parameter(name)
        factor = mask.numel() / mask.sum() if settings.rescale else 1.0
        torch.testing.assert_close(found, before[name] * mask * factor)
    if settings.density is not None:
        assert all(int(mask.sum()) == round(0.4 * mask.numel()) for mask in masks.values())


def test_optimizers_keep_their_groups() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    groups = [
        {"params": [network[2].weight], "lr": 0.3},
        {"params": [network[0].weight, network[0].bias, *network[1].parameters(), network[2].bias]},
    ]
    optimizer = torch.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=0.5)
    learner = MaskLearner(network, MaskSettings(), train=["0.bias"])
    learner.take_over([optimizer])
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(learner.scores["2.weight"])]
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(learner.scores["0.weight"]), id(network[0].bias)]
    assert optimizer.state[learner.scores["2.weight"]]["sum"].eq(0.5).all()


def test_batch_norm_has_no_scale_and_shift() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    nn.init.constant_(network[1].weight, 0.5)
    MaskLearner(network, MaskSettings())
    assert network[1].weight.tolist() == [1, 1, 1, 1]
    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    nn.init.constant_(other[1].weight, 0.5)
    MaskLearner(other, MaskSettings(), affine=True)
    assert other[1].weight.tolist() == [0.5] * 4
    assert not other[1].weight.requires_grad


def test_it_goes_on_from_its_state() -> None:
    def grown(steps: int, state: Any = None) -> MaskLearner:
        torch.manual_seed(0 if state is None else 9)
        network = nn.Linear(20, 10, bias=False)
        learner = MaskLearner(network, MaskSettings("stochastic", None, init="kaiming_normal", seed=4))
        if state is not None:
            learner.load_state_dict(state)
        optimizer = torch.optim.SGD(learner.scores.values(), 10.0)
        for _ in range(steps):
            learner.draw += 1
            optimizer.zero_grad()
            network(torch.ones(3, 20)).square().sum().backward()
            optimizer.step()
        return learner

    whole, half = grown(6), grown(3)
    resumed = grown(3, half.state_dict())
    assert torch.equal(resumed.scores["weight"], whole.scores["weight"])
    assert not torch.equal(half.scores["weight"], whole.scores["weight"])
    assert resumed.masks == whole.masks
    other = MaskLearner(nn.Linear(20, 11), MaskSettings())
    with pytest.raises(MaskMismatchError, match=r"another network: 'weight' of shape \(10, 20\)"):
        other.load_state_dict(half.state_dict())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_mask_of_nan_is_refused(settings: MaskSettings) -> None:
    learner = MaskLearner(nn.Linear(20, 10), settings)
    with torch.no_grad():
        learner.scores["weight"][0, 0] = math.nan
    with pytest.raises(SelectionError, match="NaN"):
        _ = learner.masks


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: MaskSettings("popup"), ConfigError, "method='popup' is unknown; did you mean 'edge_popup'"),
        (lambda: MaskSettings(density=0), ConfigError, r"density=0: expected the fraction .* in \(0, 1\]"),
        (lambda: MaskSettings(density=1.5), ConfigError, "density=1.5"),
        (lambda: MaskSettings(density=50), ConfigError, "density=50"),
        (lambda: MaskSettings(density=float("nan")), ConfigError, "density=nan"),
        (lambda: MaskSettings("stochastic", True), ConfigError, "density=True"),
        (lambda: MaskSettings("stochastic", 1), ConfigError, "every weight would pass"),
        (lambda: MaskSettings(density=None), ConfigError, "edge_popup needs density="),
        (lambda: MaskSettings(init="kaiming"), ConfigError, "init='kaiming' is unknown; did you mean 'kaiming_"),
        (lambda: MaskSettings(rescale=True), ConfigError, "rescale=True is for stochastic masks"),
        (lambda: MaskSettings(scale_fan=True), ConfigError, "scale_fan=True needs"),
        (lambda: MaskSettings("stochastic", None, start=1.0), ConfigError, "start=1.0"),
        (lambda: MaskSettings(seed=-1), ConfigError, "seed=-1"),
        (lambda: MaskSettings(seed=2**64), ConfigError, "from 0 to 4294967295"),
        (lambda: [popup_weight(torch.ones(3), torch.ones(3), d) for d in (1.0, True)], ConfigError, "density=True"),
        (lambda: MaskLearner(nn.Linear(4, 1), MaskSettings(density=0.1)), SelectionError, "keeps none of them"),
        (lambda: MaskLearner(nn.BatchNorm1d(4), MaskSettings()), ConfigError, "nothing to prune"),
        (lambda: MaskLearner(nn.Linear(4, 2), MaskSettings(), train=["wieght"]), ConfigError, "train: 'wieght'"),
        (lambda: MaskLearner(nn.Linear(4, 2), MaskSettings(), train=["weight"]), ConfigError, "names weights that get"),
        (lambda: MaskLearner(nn.Linear(4, 2), MaskSettings(), train="bias"), ConfigError, "expected a list"),
        (lambda: popup_weight(torch.ones(3), torch.ones(4), 0.5), SelectionError, "one score for each weight"),
        (lambda: popup_weight(torch.ones(3), torch.tensor([1, torch.nan, 0]), 0.5), SelectionError, "NaN"),
        (lambda: shift_logits_(torch.tensor([1, torch.nan]), 0.5), SelectionError, "NaN"),
        (
            lambda: sampled_weight(torch.ones(9), torch.full((9,), -50.0), Levels(0, 0, 0, 0, CPU)),
            SelectionError,
            "a layer of 9 weights sampled none of them",
        ),
    ],
)  # fmt: skip
def test_bad_input(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_weights_are_not_loaded_meanwhile() -> None:
    network = nn.Sequential(nn.Linear(4, 2))
    learner = MaskLearner(network, MaskSettings())
    with pytest.raises(ConfigError, match="into '0' while masks are learned"):
        network.load_state_dict(network.state_dict())
    learner.finish()
    network.load_state_dict(network.state_dict())
    other = MaskLearner(nn.Linear(4, 2), MaskSettings())
    with pytest.raises(ConfigError, match="no optimizer steps 'weight'"):
        other.take_over([torch.optim.SGD(network.parameters(), 0.1)])

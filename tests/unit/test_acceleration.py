"""Masks turned into speed: equal outputs, emptied channels gone, forms chosen by what was measured."""

import copy
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn

from lightning_prune import (
    ConfigError,
    MaskMismatchError,
    MaskSet,
    NoEffectWarning,
    SelectionError,
    accelerate,
    acceleration,
    compiled_rows,
    select,
    trace_channels,
)
from lightning_prune.channels.emptied import fold_constants_, plan_emptied
from lightning_prune.compressed import CompressedConv2d, CompressedLinear, candidates, is_two_of_four
from lightning_prune.costs import Latency, LatencyComparison
from lightning_prune.costs.timing import Interval


def sparse_(module: nn.Module, density: float = 0.2) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1:
                p.mul_(torch.rand_like(p) < density)
    return module


def network() -> nn.Sequential:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def forms_take(monkeypatch: pytest.MonkeyPatch, part: float | None) -> None:
    """Every other form is measured to take this part of the dense layer's time."""
    interval = None if part is None else Interval(part, part, part)
    monkeypatch.setattr(acceleration, "_ratio", lambda *_: interval)


class Faster:
    """Comparisons that come out as they are told to, the last one for ever."""

    def __init__(self, *ratios: float) -> None:
        self.ratios = list(ratios)

    def __call__(self, *_: Any, **__: Any) -> LatencyComparison:
        ratio = self.ratios.pop(0) if len(self.ratios) > 1 else self.ratios[0]
        latency = Latency(1.0, 1.0, 1.0, 11, 1, 0, 1)
        return LatencyComparison(ratio, ratio, ratio, latency, latency)


# ------------------------------------------------------------------------ layers

COMPILED = [False, pytest.param(True, marks=pytest.mark.skipif(find_spec("numba") is None, reason="Numba is missing"))]


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (12,), (0, 12)])
def test_compressed_linear_is_the_linear_layer(
    compiled: bool, bias: bool, contiguous: bool, shape: tuple[int, ...]
) -> None:
    layer = sparse_(nn.Linear(12, 9, bias=bias))
    x = torch.rand(shape)
    with torch.inference_mode():
        other = CompressedLinear(layer, contiguous, compiled)
        torch.testing.assert_close(other(x), layer(x))
        assert other(x).is_contiguous() or not contiguous
    assert f"{int((layer.weight != 0).sum())} weights" in repr(other)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
        {"kernel_size": (1, 3), "padding": (0, 2), "dilation": (1, 2)},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
    ],
)
def test_compressed_convolution_is_the_convolution(options: dict[str, Any], compiled: bool) -> None:
    layer = sparse_(nn.Conv2d(6, 5, **options))
    x = torch.rand(3, 6, 11, 9)
    with torch.inference_mode():
        torch.testing.assert_close(CompressedConv2d(layer, compiled)(x), layer(x))


LAYOUTS = {
    "rows": lambda matrix: matrix,
    "columns": lambda matrix: matrix.t().contiguous().t(),
    "neither": lambda matrix: matrix.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.skipif(find_spec("numba") is None, reason="Numba is missing")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_rows_are_the_product(threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against NumPy: rows with no weight, some and all; columns of any number and layout; shares of rows."""
    monkeypatch.setattr(compiled_rows, "SMALLEST_SHARE", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    density = torch.linspace(0, 1, 21)[:, None]
    for inputs in (5, 37):  # smaller than a tile of the transposition, and no multiple of one
        weight = torch.randn(21, inputs, dtype=dtype) * (torch.rand(21, inputs) < density)
        bias = torch.randn(21, dtype=dtype)
        rows = scipy.sparse.csr_array(weight.numpy())
        parts = (torch.from_numpy(part) for part in (rows.indptr, rows.indices, rows.data))
        multiply = compiled_rows.multiplier(*parts, bias)
        for count in (0, 1, 7, 8, 15, 16, 20, 33, 64, 101, 128, 512, 1037):
            matrix = torch.randn(inputs, count, dtype=dtype)
            expected = weight.numpy() @ matrix.numpy() + bias.numpy()[:, None]
            tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
            for name, lay_out in LAYOUTS.items():
                found = multiply(lay_out(matrix))
                np.testing.assert_allclose(found.numpy(), expected, **tolerance, err_msg=f"{name}, {count} columns")


@pytest.mark.skipif(find_spec("numba") is None, reason="Numba is missing")
def test_compiled_rows_take_what_lies_beyond_the_columns_for_nothing() -> None:
    """Infinity and NaN beside the matrix in memory stay out of the product, and nothing beside the result changes."""
    weight, memory = torch.ones(3, 4).to_sparse_csr(), torch.full((4, 48), torch.nan)
    matrix = memory[:, 16:21]
    matrix.fill_(1)
    parts = (weight.crow_indices().int(), weight.col_indices().int(), weight.values())
    found = compiled_rows.multiplier(*parts, torch.zeros(3))(matrix)
    assert found.tolist() == [[4.0] * 5] * 3
    assert int(memory.isnan().sum()) == 4 * 43


def test_without_numba_torch_computes_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that was made compiled and copied to a machine without it."""
    layer = sparse_(nn.Linear(12, 9))
    other, x = CompressedLinear(layer, compiled=True), torch.rand(4, 12)
    monkeypatch.setattr(compiled_rows, "can_compile", lambda: False)
    assert "compiled rows" not in candidates(layer)
    torch.testing.assert_close(other(x), layer(x))


def test_layers_without_another_form() -> None:
    assert candidates(nn.Conv2d(4, 4, 3, groups=2)) == {}
    assert candidates(nn.Conv2d(4, 4, 3, padding="same")) == {}
    assert candidates(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")) == {}
    assert candidates(nn.Conv1d(4, 4, 3)) == {}
    assert list(candidates(nn.Linear(4, 4).bfloat16())) == ["compressed rows"]


def test_a_compressed_network_copies_and_moves() -> None:
    layer = sparse_(nn.Linear(12, 9))
    other = copy.deepcopy(CompressedLinear(layer)).double()
    x = torch.rand(2, 12, dtype=torch.float64)
    torch.testing.assert_close(other(x), layer.double()(x))


# ----------------------------------------------------------------- emptied channels


def test_unread_channels_leave_and_what_only_they_read() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net[4].weight[:, [1, 4]] = 0  # nobody reads these two
        net[2].weight[:, 3] = 0
        net[2].weight[[0, 2, 3, 5], 6] = 0  # read by the two alone
    x = torch.rand(4, 5)
    expected = net(x)
    plan = plan_emptied(trace_channels(net, x))
    assert plan is not None
    assert plan.keep["2.weight"][0] == [0, 2, 3, 5]
    assert plan.keep["0.weight"][0] == [0, 1, 2, 4, 5, 7]
    plan.apply_(net)
    torch.testing.assert_close(net(x), expected)


def test_nothing_empty_is_no_plan() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    assert plan_emptied(trace_channels(net, torch.rand(1, 5))) is None


def test_a_group_keeps_a_channel() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(net[2].weight)
    plan = plan_emptied(trace_channels(net, torch.rand(1, 5)))
    assert plan is not None
    assert len(plan.keep["0.weight"][0]) == 1


def test_constants_go_into_biases() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net[0].weight[[2, 5]] = 0  # sigmoid(bias), whatever comes in
    x = torch.rand(4, 5)
    expected = net(x)
    graph = trace_channels(net, x)
    assert fold_constants_(graph, x) == 2
    assert fold_constants_(graph, x) == 0
    torch.testing.assert_close(net(x), expected)
    assert not net[2].weight[:, [2, 5]].any()
    plan = plan_emptied(graph)
    assert plan is not None
    assert plan.keep["0.weight"][0] == [0, 1, 3, 4, 6, 7]


def test_constants_that_padding_breaks_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)).eval()
    with torch.no_grad():
        net[0].weight[[0, 1]] = 0
        net[0].bias[0], net[0].bias[1] = 1.0, -1.0  # the second is 0 behind its ReLU, at the border too
    x = torch.rand(2, 3, 8, 8)
    expected = net(x)
    assert fold_constants_(trace_channels(net, x), x) == 1
    torch.testing.assert_close(net(x), expected)
    assert net[2].weight[:, 0].any()
    assert not net[2].weight[:, 1].any()


# -------------------------------------------------------------------- whole networks


@pytest.mark.parametrize("part", [0.5, 2.0], ids=["gains", "loses"])
def test_outputs_are_the_masked_networks(part: float, monkeypatch: pytest.MonkeyPatch) -> None:
    forms_take(monkeypatch, part)
    monkeypatch.setattr(acceleration, "compare_latency", Faster(0.5))
    net = network().eval()
    masks = select({n: p.detach().abs() for n, p in net.named_parameters() if p.dim() > 1}, density=0.2)
    x = torch.rand(2, 3, 8, 8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fast = accelerate(net, masks, x)
    masked = copy.deepcopy(net)
    masks.apply_(masked)
    torch.testing.assert_close(fast(x), masked(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    taken = {layer.form for layer in fast.layers}
    assert taken == ({"compressed rows"} if part < 1 else {"dense"})
    compressed = [m for m in fast.model.modules() if isinstance(m, CompressedLinear | CompressedConv2d)]
    assert len(compressed) == (len(fast.layers) if part < 1 else 0)
    assert all(layer.density <= 0.5 for layer in fast.layers)
    assert "whole network" in fast.table()


def test_a_whole_that_is_not_faster_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    forms_take(monkeypatch, 0.5)
    monkeypatch.setattr(acceleration, "compare_latency", Faster(1.3, 1.0))
    net = nn.Sequential(sparse_(nn.Linear(16, 16)), nn.Softmax(-1))
    with pytest.warns(NoEffectWarning, match="nothing was faster than dense"):
        fast = accelerate(net, None, torch.rand(2, 16))
    assert [layer.form for layer in fast.layers] == ["dense"]
    assert "Layers stayed dense" in fast.notes[0]
    assert not any(isinstance(m, CompressedLinear) for m in fast.model.modules())


def test_emptied_channels_that_cost_time_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "compare_latency", Faster(1.3, 1.0))
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        net[2].weight[:, 3] = 0
    with pytest.warns(NoEffectWarning):
        fast = accelerate(net, None, torch.rand(2, 16))
    assert fast.plan is None
    assert fast.model[0].out_features == 16


def test_code_that_insists_on_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.last = sparse_(nn.Linear(8, 6)), sparse_(nn.Linear(18, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.fc(x).view(-1, 18))  # fails while the second layer's input is looked for

    forms_take(monkeypatch, 0.5)
    monkeypatch.setattr(acceleration, "compare_latency", Faster(0.5))
    net = Views()
    fast = accelerate(net, None, torch.rand(3, 8))
    assert fast.model.fc.contiguous
    torch.testing.assert_close(fast(torch.ones(3, 8)), net(torch.ones(3, 8)))


def test_layers_that_gain_nothing_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(sparse_(nn.Linear(64, 64), 0.45), nn.ReLU(), nn.Linear(64, 4))
    monkeypatch.setattr(acceleration, "compare_latency", Faster(1.0))
    with pytest.warns(NoEffectWarning):
        fast = accelerate(net, None, torch.rand(256, 64), seconds=0.02, remove_channels=False)
    assert [(layer.name, layer.form) for layer in fast.layers] == [("0", "dense")]
    assert fast.layers[0].ratios["compressed rows"].median > 0


def test_masks_that_do_not_fit_are_refused() -> None:
    net = nn.Linear(4, 4)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    with pytest.raises(MaskMismatchError, match="no parameter 'wight'"):
        accelerate(net, {"wight": mask}, torch.rand(1, 4))
    with pytest.raises(MaskMismatchError, match="have fills"):
        accelerate(net, MaskSet({"weight": mask}, fills={"weight": torch.ones(4, 4)}), torch.rand(1, 4))


# ------------------------------------------------------------------------------ 2:4


def test_two_of_four_by_hand() -> None:
    scores = {"w": torch.tensor([[1.0, 4, 3, 2, 5, 5, 5, 5], [0.0, -1, -2, -3, 9, 0, 8, 0]])}
    masks = select(scores, granularity="2:4")
    assert masks["w"].int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 1, 0]]
    assert is_two_of_four(masks["w"].float())
    assert not is_two_of_four(torch.ones(2, 8))
    assert not is_two_of_four(torch.zeros(2, 6))


def test_patterns_of_convolutions_lie_along_the_inputs() -> None:
    scores = torch.rand(6, 8, 3, 3)
    mask = select({"w": scores}, granularity="1:4")["w"]
    blocks = mask.unflatten(1, (2, 4))
    assert (blocks.sum(2) == 1).all()
    assert torch.equal(blocks.int().argmax(2), scores.unflatten(1, (2, 4)).argmax(2))


def test_patterns_are_nested_in_earlier_masks() -> None:
    earlier = MaskSet({"w": torch.tensor([[False, True, True, False, True, False, False, False]])})
    scores = {"w": torch.tensor([[9.0, 1, 2, 9, 1, 9, 9, 9]])}
    masks = select(scores, granularity="2:4", within=earlier)
    assert masks["w"].int().tolist() == [[0, 1, 1, 0, 1, 0, 0, 0]]
    assert masks <= earlier


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"granularity": "4:2"}, "granularity='4:2' is unknown"),
        ({"granularity": "channel"}, "granularity='channel' is unknown"),
        ({"granularity": "2:4", "density": 0.5}, "says how many stay"),
    ],
)
def test_patterns_that_cannot_be(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        select({"w": torch.rand(4, 8)}, **options)


@pytest.mark.parametrize("scores", [torch.rand(8), torch.rand(4, 6), torch.full((4, 8), float("nan"))])
def test_tensors_that_no_pattern_fits(scores: Tensor) -> None:
    with pytest.raises(SelectionError, match=r"axis 1|NaN"):
        select({"w": scores}, granularity="2:4")


@pytest.mark.gpu
def test_two_of_four_on_a_gpu() -> None:
    layer = nn.Linear(1024, 1024, device="cuda", dtype=torch.float16)
    masks = select({"weight": layer.weight.detach().abs()}, granularity="2:4")
    x = torch.rand(512, 1024, device="cuda", dtype=torch.float16)
    fast = accelerate(layer, masks, x)
    assert "2:4" in fast.layers[0].ratios
    masks.apply_(layer)
    torch.testing.assert_close(fast(x), layer(x), rtol=1e-2, atol=1e-2)

"""Ranks by certificates against ``torch.linalg.matrix_rank`` and NumPy, on maps made to be hard; rates and scores."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import ConfigError, MeasurementError, feature_ranks, trace_channels
from lightning_prune.channels import ranks
from lightning_prune.channels.feature_maps import RankSums, find_taps
from lightning_prune.channels.ranks import matrix_ranks
from lightning_prune.channels.rates import parse_rates, rank_scores, rates_of_layers, widths_by_rates
from lightning_prune.experiments import VGG16BN, DenseNet40, PreActResNet164, ResNet56
from tests._helpers.channels import Residual


def of_rank(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Maps of every rank, with singular values over up to seven decades, in float32."""
    size = min(height, width)
    u = torch.linalg.qr(torch.randn(count, height, size, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(count, width, size, generator=generator, dtype=torch.float64))[0]
    decades = 7 * torch.rand(count, 1, generator=generator)
    values = 10 ** (-decades * torch.rand(count, size, generator=generator))
    values[torch.rand(count, size, generator=generator) < torch.rand(count, 1, generator=generator)] = 0
    return ((u * values[:, None]) @ v.mT).float()


def sparse(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Smooth maps behind a ReLU, from dead to dense, with rows and columns of zeros and copies."""
    smooth = F.avg_pool2d(torch.randn(count, 1, height, width, generator=generator), 3, 1, 1)[:, 0]
    maps = F.relu(smooth - torch.randn(count, 1, 1, generator=generator))
    maps[::5, height // 2 :] = maps[::5, : height - height // 2]
    return maps * (torch.rand(count, height, 1, generator=generator) < torch.rand(count, 1, 1, generator=generator))


@pytest.mark.parametrize(
    "shape", [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 1), (1, 7), (7, 14), (14, 7), (40, 36)]
)
@pytest.mark.parametrize("make", [of_rank, sparse])
def test_ranks_are_those_of_the_reference(shape: tuple[int, int], make: object) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    maps = make(400, *shape, generator)  # type: ignore[operator]
    expected = torch.linalg.matrix_rank(maps)
    assert torch.equal(matrix_ranks(maps), expected)
    if min(shape) > 2:
        assert expected.unique().numel() > 2
    ours = matrix_ranks(maps[:50]).numpy()
    assert np.array_equal(ours, np.linalg.matrix_rank(maps[:50].numpy()))


@pytest.mark.parametrize("size", [8, 16, 32])
def test_singular_values_around_the_threshold(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = []
    for factor in (0.1, 0.3, 0.45, 0.6, 0.95, 1.0, 1.05, 1.4, 1.7, 3.0, 10.0):
        u, v = (torch.linalg.qr(torch.randn(20, size, size, generator=generator, dtype=torch.float64))[0] for _ in "uv")
        values = torch.rand(20, size, generator=generator, dtype=torch.float64) * 0.15 + 0.05
        values[:, 0], values[:, -1] = 1.0, factor * size * torch.finfo(torch.float32).eps
        maps.append(((u * values[:, None]) @ v.mT).float())
    together = torch.cat(maps)
    assert torch.equal(matrix_ranks(together), torch.linalg.matrix_rank(together))


def test_most_maps_need_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    reference = torch.linalg.matrix_rank

    def counting(maps: Tensor) -> Tensor:
        asked.append(len(maps))
        return reference(maps)

    generator = torch.Generator().manual_seed(1)
    maps = sparse(2000, 16, 16, generator)
    monkeypatch.setattr(ranks.torch.linalg, "matrix_rank", counting)
    matrix_ranks(maps)
    assert sum(asked) < 0.02 * len(maps)
    asked.clear()
    monkeypatch.setattr(ranks, "_WIDEST", 0)  # without elimination
    matrix_ranks(maps)
    assert 0.02 * len(maps) < sum(asked) < 0.5 * len(maps)


def test_extreme_maps() -> None:
    dead, one = torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)
    one[0, 2, 5] = -3.0
    tiny, huge = torch.eye(8)[None] * 1e-30, torch.eye(8)[None] * 1e18
    assert matrix_ranks(torch.cat([dead, one, tiny, huge])).tolist() == [0, 0, 0, 1, 8, 8]
    assert matrix_ranks(torch.zeros(0, 8, 8)).shape == (0,)
    assert matrix_ranks(torch.eye(8, dtype=torch.bfloat16)[None]).tolist() == [8]
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(MeasurementError, match="infinite or NaN"):
            matrix_ranks(torch.full((1, 4, 4), wrong))


# ------------------------------------------------------------------- feature maps


def hooked(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every output of ``F.relu``, in order."""
    found, relu = [], F.relu

    def tapped(x: Tensor, *args: object) -> Tensor:
        found.append(relu(x))
        return found[-1]

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "relu", tapped)
        model.eval()(images)
    return found


def mean_ranks(maps: Tensor) -> Tensor:
    return torch.tensor(np.linalg.matrix_rank(maps.numpy())).double().mean(0)


def test_residual_networks_are_read_after_the_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ResNet56(width=0.25)
    images = torch.randn(6, 3, 32, 32)
    maps = hooked(model, images, monkeypatch)
    found = feature_ranks(model.train(), images.split(4), images=5)
    assert model.training
    assert len(found) == len(maps) == 55
    for ranked, own in zip(found.values(), maps, strict=True):
        assert torch.allclose(ranked, mean_ranks(own[:5]))


def test_concatenated_channels_are_those_of_their_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DenseNet40(growth=3)
    images = torch.randn(2, 3, 32, 32)
    maps = hooked(model, images, monkeypatch)
    found = feature_ranks(model, [images], images=2)
    layers = list(found)
    assert layers[:3] == ["conv1", "features.0.conv", "features.1.conv"]
    for index in (0, 1, 2, 5):
        assert torch.allclose(found[layers[index + 1]], mean_ranks(maps[index + 1][:, -3:]))
    assert torch.allclose(found["conv1"], mean_ranks(maps[0]))


def test_in_place_activations_and_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VGG16BN(width=0.1).eval()
    images = torch.randn(2, 3, 32, 32)
    seen: list[Tensor] = []
    for module in model.features:
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    found = feature_ranks(model, [[images, torch.zeros(2)]], images=2)  # images and labels of a loader
    seen = seen[len(seen) - 13 :]
    assert len(found) == 13
    for ranked, own in zip(found.values(), seen, strict=True):
        assert torch.allclose(ranked, mean_ranks(own.detach()))


def test_pre_activation_and_linear_bottlenecks_have_a_place() -> None:
    taps = find_taps(trace_channels(PreActResNet164(width=0.25), torch.zeros(1, 3, 32, 32)))
    assert len(taps) == 166
    assert {tap.operation for tap in taps} == {"relu"}
    linear = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.SiLU())
    taps = find_taps(trace_channels(linear, torch.zeros(1, 1, 8, 8)))
    assert [(tap.name, tap.operation, tap.limit) for tap in taps] == [("0", "native_batch_norm", 6), ("2", "silu", 4)]


def test_the_same_images_give_the_same_ranks_in_any_batches() -> None:
    model, images = Residual(), torch.randn(12, 1, 6, 6)
    one, other = feature_ranks(model, [images], 12), feature_ranks(model, images.flip(0).split(5), 12)
    assert all(torch.equal(one[name], other[name]) for name in one)


class Fickle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(torch.neg(h)) if len(x) > 2 else torch.relu(h))


def test_bad_input() -> None:
    model = Residual()
    for images in (0, -1, True, 2.5):
        with pytest.raises(ConfigError, match="at least 1"):
            feature_ranks(model, [torch.zeros(4, 1, 6, 6)], images=images)
    with pytest.raises(ConfigError, match="images=9 asks for more than the 8 images"):
        feature_ranks(model, [torch.zeros(4, 1, 6, 6)] * 2, images=9)
    with pytest.raises(ConfigError, match="more than the 0 images"):
        feature_ranks(model, [], images=9)
    with pytest.raises(ConfigError, match="has no 2d convolution"):
        feature_ranks(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), [torch.zeros(4, 4)], images=2)
    with pytest.raises(Exception, match="chooses its path by values"):
        feature_ranks(Fickle(), [torch.zeros(4, 1, 6, 6)], images=4)


# -------------------------------------------------------------------------- rates


def test_rates_as_the_papers_write_them() -> None:
    assert parse_rates("[0.95]+[0.5]*6+[0.9]*4+[0.8]*2") == [0.95] + [0.5] * 6 + [0.9] * 4 + [0.8] * 2
    published = "[0.1]+[0.60]*35+[0.0]*2+[0.6]*6+[0.4]*3" + "+[0.1]+[0.4]" * 4
    assert len(parse_rates(published)) == 55  # ResNet-56
    assert parse_rates([0.5, 0]) == [0.5, 0]
    for wrong in ("[0.5]*", "0.5", "[0.5]-[0.5]", "", "[0.5.5]"):
        with pytest.raises(ConfigError, match="is not like"):
            parse_rates(wrong)
    for rate in ("[1.0]", [0.5, 1.5], [-0.1], {"a": True}):
        with pytest.raises(ConfigError, match=r"must lie in \[0, 1\)"):
            parse_rates(rate)  # type: ignore[arg-type]


def test_rates_become_widths_by_the_references_rules() -> None:
    graph = trace_channels(Residual(20), torch.zeros(2, 1, 6, 6))
    rates = rates_of_layers(graph, [0.2, 0.45, 0.6])  # stem, a, b; the stage of stem and b loses 0.4
    assert rates == {"stem": 0.2, "a": 0.45, "b": 0.6}
    assert widths_by_rates(graph, rates, "hrank") == {"stem": 12, "a": 11}
    assert widths_by_rates(graph, rates, "hrankplus") == {"stem": 12, "a": 11}
    assert widths_by_rates(graph, {"a": 0.62}, "hrank") == {"stem": 20, "a": 8}
    assert widths_by_rates(graph, {"a": 0.62}, "hrankplus") == {"stem": 20, "a": 7}
    assert widths_by_rates(graph, {"a": 0.62}, "hrankplus", least=9) == {"stem": 20, "a": 9}
    assert rates_of_layers(graph, {"[ab]": 0.5}) == {"stem": 0.0, "a": 0.5, "b": 0.5}
    with pytest.raises(ConfigError, match="has 2 entries; expected 3"):
        rates_of_layers(graph, [0.5, 0.5])
    with pytest.raises(ConfigError, match="matches no"):
        rates_of_layers(graph, {"c": 0.5})
    with pytest.raises(ConfigError, match="a would be emptied"):
        widths_by_rates(graph, {"a": 0.96}, "hrankplus")


def test_scores_are_relative_to_the_map_and_weak_layers_are_named() -> None:
    graph = trace_channels(Residual(4), torch.zeros(2, 1, 6, 6))
    sums = {"stem": [6, 12, 0, 3], "a": [12, 12, 12, 12], "b": [2, 1, 0, 1]}
    ranks_ = RankSums({k: torch.tensor(v) for k, v in sums.items()}, {"stem": 6, "a": 6, "b": 3}, images=2)
    scores, weak = rank_scores(graph, ranks_)
    # (6 / 2 / 6 + 2 / 2 / 3) / 2 and so on
    assert torch.allclose(scores["stem"], torch.tensor([5 / 12, 7 / 12, 0, 5 / 24], dtype=torch.float64))
    assert weak == {"a": "its mean ranks lie between 1.000 and 1.000 of the largest"}
    assert torch.allclose(scores["a"], graph.model.a.weight.detach().double().flatten(1).norm(dim=1))
    _, weak = rank_scores(graph, RankSums(ranks_.sums, {"stem": 2, "a": 2, "b": 2}, images=2))
    assert weak["stem"] == "its maps are 2 pixels high or wide"
    _, weak = rank_scores(graph, RankSums({}, {}, images=2))
    assert weak["a"] == "no 2d convolution makes its channels"

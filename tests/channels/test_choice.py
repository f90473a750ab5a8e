"""Channel selection: each reader of shared channels loses its own, as the paper's layer does; all else as before."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import (
    Budget,
    ChannelSelection,
    ConfigError,
    compact,
    load_compact,
    plan_removal,
    save_compact,
    trace_channels,
)
from lightning_prune.channels.scores import score_batch_norm, score_norms
from lightning_prune.experiments import DenseNet40, PreActResNet164


class TwoReaders(nn.Module):
    """A stem whose channels two pre-activation branches read, each through a selection of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.select_a, self.bn_a, self.a = ChannelSelection(6), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.select_b, self.bn_b, self.b = ChannelSelection(6), nn.BatchNorm2d(6), nn.Linear(6, 3)
        generator = torch.Generator().manual_seed(0)
        for bn in (self.bn_a, self.bn_b):
            for tensor in (bn.weight, bn.bias, bn.running_mean):
                nn.init.normal_(tensor, generator=generator)
            nn.init.uniform_(bn.running_var, 0.5, 2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.a(F.relu(self.bn_a(self.select_a(h))))
        return self.b(F.relu(self.bn_b(self.select_b(h))).mean((2, 3)))


def papers_way(model: TwoReaders, x: Tensor, kept: dict[str, list[int]]) -> Tensor:
    """Full BatchNorms, channels picked after them, and narrow consumers."""
    h = model.stem(x)
    h = h + F.conv2d(F.relu(model.bn_a(h))[:, kept["a"]], model.a.weight[:, kept["a"]], model.a.bias, padding=1)
    pooled = F.relu(model.bn_b(h))[:, kept["b"]].mean((2, 3))
    return F.linear(pooled, model.b.weight[:, kept["b"]], model.b.bias)


def test_it_computes_what_the_papers_layer_does() -> None:
    torch.manual_seed(0)
    model, x = TwoReaders().eval(), torch.randn(4, 1, 5, 5)
    graph = trace_channels(model, x)
    assert [(group.name, group.size) for group in graph.groups] == [("select_a", 6), ("select_b", 6)]
    scores = {group.name: score_batch_norm(group, model) for group in graph.groups}
    assert torch.equal(scores["select_a"], model.bn_a.weight.detach().abs().double())
    kept = {n: sorted(scores[f"select_{n}"].argsort(descending=True)[:3].tolist()) for n in "ab"}
    with torch.no_grad():
        expected = papers_way(model, x, kept)
    report = compact(model, plan_removal(graph, Budget(channels=0.5), scores), x)
    assert report.error < 1e-12
    assert model.select_a.indexes.tolist() == kept["a"]
    assert model.select_b.indexes.tolist() == kept["b"]
    assert model.bn_a.num_features == model.a.in_channels == model.b.in_features == 3
    assert model.stem.out_channels == 6
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5)
    again = plan_removal(trace_channels(model, x), Budget(channels=0.67))
    compact(model, again, x)
    assert len(model.select_a.indexes) == 2
    assert set(model.select_a.indexes.tolist()) < set(kept["a"])


def test_norms_are_those_of_what_reads_the_channels(tmp_path: Any) -> None:
    model, x = TwoReaders().eval(), torch.randn(2, 1, 5, 5)
    graph = trace_channels(model, x)
    expected = model.a.weight.detach().double().transpose(0, 1).flatten(1).norm(dim=1)
    assert torch.allclose(score_norms(graph.groups[0], model), expected)
    compact(model, plan_removal(graph, Budget(channels=0.5)), x)
    save_compact(model, tmp_path / "small.safetensors")
    fresh = TwoReaders().eval()
    load_compact(fresh, tmp_path / "small.safetensors")
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(("build", "groups"), [(PreActResNet164, 163), (DenseNet40, 39)])
def test_the_papers_networks(build: Any, groups: int) -> None:
    options = {"width": 0.125} if build is PreActResNet164 else {"growth": 6}
    model = build(selection=True, **options)
    plain = build(**options)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("indexes")}
    plain.load_state_dict(weights)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.eval()(x), model.eval()(x))  # a selection of everything changes nothing
    graph = trace_channels(model, x)
    assert len(graph.groups) == groups
    assert compact(model, plan_removal(graph, Budget(channels=0.6)), x).error < 1e-9
    assert model.conv1.out_channels == plain.conv1.out_channels


def test_bad_channel_counts() -> None:
    for channels in (0, -2, 1.5, True):
        with pytest.raises(ConfigError, match="expected a whole number of at least 1"):
            ChannelSelection(channels)  # type: ignore[arg-type]

"""Which parameters pruning touches, by default and by name."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_prune.errors import ConfigError, NoEffectWarning
from lightning_prune.prunable import prunable_parameters, untouched_parameters


def kinds() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "conv1": nn.Conv1d(2, 2, 3),
            "conv2": nn.Conv2d(2, 2, 3),
            "conv3": nn.Conv3d(2, 2, 3),
            "up1": nn.ConvTranspose1d(2, 2, 3),
            "up2": nn.ConvTranspose2d(2, 2, 3),
            "up3": nn.ConvTranspose3d(2, 2, 3),
            "linear": nn.Linear(2, 2),
            "bn": nn.BatchNorm2d(2),
            "inorm": nn.InstanceNorm2d(2, affine=True),
            "ln": nn.LayerNorm((2, 2)),
            "gn": nn.GroupNorm(1, 2),
            "embedding": nn.Embedding(3, 2),
            "bag": nn.EmbeddingBag(3, 2),
            "prelu": nn.PReLU(2),
            "attention": nn.MultiheadAttention(2, 1),
            "cross": nn.MultiheadAttention(2, 1, kdim=3, vdim=4),
            "rnn": nn.RNN(2, 2),
            "lstm": nn.LSTM(2, 3, num_layers=2, bidirectional=True, proj_size=2),
            "gru": nn.GRU(2, 2),
            "cell": nn.LSTMCell(2, 2),
        }
    )


def test_the_default_is_every_weight_of_layers_that_multiply() -> None:
    found = prunable_parameters(kinds())
    lstm = [f"lstm.weight_{kind}_l{i}{way}" for i in (0, 1) for way in ("", "_reverse") for kind in ("ih", "hh", "hr")]
    assert list(found) == [
        *(f"{name}.weight" for name in ("conv1", "conv2", "conv3", "up1", "up2", "up3", "linear")),
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        *lstm,
        "gru.weight_ih_l0",
        "gru.weight_hh_l0",
        "cell.weight_ih",
        "cell.weight_hh",
    ]
    parameters = dict(kinds().named_parameters())
    assert all(parameters[name].dim() >= 2 for name in found)


def test_subclasses_and_lazy_layers_count() -> None:
    class MyLinear(nn.Linear):
        pass

    net = nn.Sequential(MyLinear(3, 4), nn.LazyLinear(2))
    with pytest.raises(ConfigError, match=r"1\.weight has no weights yet \(a lazy layer\): run the module"):
        prunable_parameters(net)
    net(torch.ones(1, 3))
    assert list(prunable_parameters(net)) == ["0.weight", "1.weight"]


def test_a_shared_parameter_counts_once_under_its_first_name() -> None:
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    net["c"] = net["a"]
    assert list(prunable_parameters(net)) == ["a.weight"]
    net["d"] = nn.Linear(1, 1)
    assert list(prunable_parameters(net, exclude="b")) == ["d.weight"]
    assert list(prunable_parameters(net, exclude="c.weight")) == ["d.weight"]


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_an_output_layer_tied_to_an_embedding_is_left_out(first: str) -> None:
    layers = {"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "other": nn.Linear(3, 3)}
    net = nn.ModuleDict(dict(sorted(layers.items(), key=lambda item: item[0] != first)))
    net["head"].weight = net["embedding"].weight
    assert list(prunable_parameters(net)) == ["other.weight"]
    assert list(prunable_parameters(net, include="head.weight")) == [f"{first}.weight", "other.weight"]


def test_what_is_not_touched_is_named_with_the_reason() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3, bias=False))
    prunable = prunable_parameters(net, exclude="2")
    left = {row["name"]: row for row in untouched_parameters(net, prunable, ["2"])}
    assert sorted([*left, *prunable]) == sorted(name for name, _ in net.named_parameters())
    assert left["2.weight"] == {"name": "2.weight", "axis": None, "size": 12, "reason": "excluded by '2'", "where": ""}
    assert {row["reason"][:6] for name, row in left.items() if name != "2.weight"} == {"biases"}


def blocks() -> nn.Sequential:
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1), "bn": nn.BatchNorm2d(2), "down": nn.Conv2d(2, 2, 1)})

    return nn.Sequential(*(block() for _ in range(11)), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), 23),
        ("11", 22),
        ("11.weight", 22),
        (["1"], 21),  # the module named 1, not 10 and 11
        ("*.down", 12),
        ("*.down.weight", 12),
        ("1?", 20),
        (["0.conv", "*.down"], 11),
        ("0.bn", 23),  # never pruned anyway, yet it is there
        ("_orig_mod.11.weight", 22),
    ],
)
def test_exclude_takes_names_modules_and_patterns(exclude: Any, left: int) -> None:
    assert len(prunable_parameters(blocks(), exclude=exclude)) == left


def test_include_adds_and_exclude_wins() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "linear": nn.Linear(2, 2)})
    assert list(prunable_parameters(net, include="embedding")) == ["embedding.weight", "linear.weight"]
    assert list(prunable_parameters(net, include="linear")) == ["linear.weight"]  # a module: no vectors
    assert list(prunable_parameters(net, include="linear.bias")) == ["linear.weight", "linear.bias"]
    assert list(prunable_parameters(net, include="*.bias")) == ["linear.weight", "linear.bias"]
    assert list(prunable_parameters(net, include="embedding", exclude="embedding")) == ["linear.weight"]


@pytest.mark.parametrize("argument", ["exclude", "include"])
def test_a_name_that_matches_nothing_is_an_error(argument: str) -> None:
    with pytest.raises(ConfigError, match=rf"{argument}: '0\.cnov' matches no parameter .* did you mean '0\.conv'"):
        prunable_parameters(blocks(), **{argument: ["11", "0.cnov"]})
    with pytest.raises(ConfigError, match=rf"{argument} takes names or patterns \(strings\), got 3"):
        prunable_parameters(blocks(), **{argument: [3]})
    with pytest.raises(ConfigError, match="matches no parameter"):
        prunable_parameters(blocks(), **{argument: "0.con"})


def test_nothing_prunable_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to prune in BatchNorm1d"):
        prunable_parameters(nn.BatchNorm1d(3))
    with pytest.raises(ConfigError, match=r"besides what exclude=\['weight'\] leaves out"):
        prunable_parameters(nn.Linear(2, 2), exclude="weight")


def test_names_of_a_compiled_module_are_the_plain_ones() -> None:
    plain = blocks()
    assert list(prunable_parameters(torch.compile(plain))) == list(prunable_parameters(plain))


@pytest.mark.parametrize(
    "recompute",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    ],
)
def test_weights_computed_in_each_forward_are_named_and_left_out(recompute: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    recompute(net[0])
    with pytest.warns(NoEffectWarning, match=r"not pruned: 0\.weight\. Each is computed anew"):
        assert list(prunable_parameters(net)) == ["1.weight"]
    assert list(prunable_parameters(net, exclude="0.weight")) == ["1.weight"]  # and no warning
    assert list(prunable_parameters(net, exclude="0")) == ["1.weight"]


def test_the_deprecated_weight_normalisation_is_seen_too() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LSTM(2, 2))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net[1], "weight_hh_l0")
    with pytest.warns(NoEffectWarning, match=r"not pruned: 1\.weight_hh_l0\."):
        assert list(prunable_parameters(net)) == ["0.weight", "1.weight_ih_l0"]

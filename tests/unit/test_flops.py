"""Counts of parameters and multiply-adds, against hand counts, torch's counter and what torchvision publishes."""

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import Budget, MaskMismatchError, MaskSet, MeasurementError, compact, plan_removal, trace_channels
from lightning_prune.costs import Costs, Count, count_costs
from lightning_prune.running import evaluation


class Attention(nn.Module):
    """Self-attention whose projections lie stacked in one parameter, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.attention(x, x, x, need_weights=False)[0]))


class Named(nn.Module):
    """Keyword inputs, and outputs in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"y": self.fc(x) * scale}


def by_torch(model: nn.Module, inputs: Tensor) -> int:
    with evaluation(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), (2, 6, 9, 9), 2 * 5 * 5 * 8 * 3 * 9),
        (nn.Conv1d(4, 5, 3), (1, 4, 10), 8 * 5 * 4 * 3),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 27 * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 5, 5), 25 * 4 * 3 * 9),
        (nn.Linear(7, 3), (2, 5, 7), 2 * 5 * 7 * 3),
    ],
    ids=["conv", "conv1d", "conv3d", "transposed", "linear"],
)
def test_counts_by_hand(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    costs = count_costs(nn.Sequential(layer, nn.ReLU()), torch.rand(shape))
    assert costs.macs == (macs, macs)
    assert costs.modules["0"].macs == (macs, macs)
    assert costs.modules["1"].macs == (0, 0)
    assert costs.recovered == {}
    assert costs.params.total == sum(p.numel() for p in layer.parameters())


def test_what_fvcore_alone_leaves_out_is_counted_and_named() -> None:
    x = torch.rand(2, 6, 8)
    costs = count_costs(Attention(), x)
    projections, scores, out = 2 * 6 * 8 * (24 + 8), 2 * 2 * (6 * 6 * 8) * 2 // 2, 2 * 6 * 8 * 3
    assert costs.recovered == {"scaled_dot_product_attention": scores}
    assert costs.by_operator == {"linear": projections + out, "scaled_dot_product_attention": scores}
    assert costs.modules["attention"].macs.total == projections + scores
    assert costs.macs.total == projections + scores + out == by_torch(Attention(), x)
    assert "scaled_dot_product_attention" not in costs.uncounted
    assert costs.incomplete == ()
    assert costs.other == {"layer_norm": 2 * 6 * 8 * 5}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:  # the trap: attention's fast path is opaque
        Attention().eval()(x)
    assert counter.get_total_flops() // 2 < costs.macs.total


def test_normalisation_stands_apart() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    costs = count_costs(net, torch.rand(1, 3, 5, 5))
    assert costs.macs.total == 25 * 12
    assert costs.other == {"batch_norm": 2 * 4 * 25, "adaptive_avg_pool2d": 4 * 25}
    assert "batch_norm" in costs.table()


def test_einsum_is_exact() -> None:
    class Einsum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.einsum("bij,bkj->bik", a, b).softmax(-1)

    costs = count_costs(Einsum(), (torch.rand(3, 101, 103), torch.rand(3, 107, 103)))
    assert costs.by_operator == {"einsum": 3 * 101 * 103 * 107} == costs.recovered


def test_recurrent_layers_are_counted_as_their_products() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru = nn.LSTM(8, 16, batch_first=True), nn.GRU(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(self.lstm(x)[0])[0]

    costs = count_costs(Recurrent(), torch.rand(2, 5, 8))
    assert costs.macs.total == 2 * 5 * (8 + 16) * 4 * 16 + 2 * 5 * (16 + 4) * 3 * 4
    assert costs.recovered == {"gru + lstm": costs.macs.total}
    assert costs.modules["lstm"].macs.total == 2 * 5 * (8 + 16) * 4 * 16


def test_products_that_nobody_counts_are_named() -> None:
    class Distances(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, x)

    costs = count_costs(nn.Sequential(nn.Linear(4, 4), Distances()), torch.rand(1, 5, 4))
    assert costs.incomplete == ("cdist",)
    assert costs.uncounted["cdist"] == 1
    assert "TOO LOW: cdist" in costs.table()


def test_a_model_that_fvcore_cannot_follow_is_counted_by_torch() -> None:
    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(self.fc(x), torch.ones(3))  # a vector: fvcore's rule for matmul fails

    costs = count_costs(Vectors(), torch.rand(2, 4))
    assert costs.macs.total >= 2 * 4 * 3
    assert "fvcore could not follow" in costs.notes[0]
    assert costs.notes[0] in costs.table()


# ------------------------------------------------------------------------- zeros


def by_loops(model: nn.Sequential, x: Tensor) -> int:
    """Multiply-adds with a weight that is not 0: each weight of a layer is used once at each place of its output."""
    total = 0
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.Conv2d | nn.Linear):
                places = x.numel() // x.shape[1 if isinstance(layer, nn.Conv2d) else -1]
                total += places * int((layer.weight != 0).sum())
    return total


def test_zeros_are_skipped_exactly() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(288, 5))
    x = torch.rand(2, 3, 10, 10)
    for p in net.parameters():
        p.data[torch.rand_like(p) < 0.7] = 0
    costs = count_costs(net, x)
    assert costs.macs.nonzero == by_loops(net, x) < costs.macs.total
    assert costs.params == (
        sum(p.numel() for p in net.parameters()),
        sum(int((p != 0).sum()) for p in net.parameters()),
    )
    assert costs.modules["1"].params.nonzero == int((net[1].weight != 0).sum() + (net[1].bias != 0).sum())


def test_zeros_in_stacked_projections_and_in_computed_weights() -> None:
    net = Attention()
    with torch.no_grad():
        net.attention.in_proj_weight[:8] = 0  # the queries
    dense = count_costs(Attention(), torch.rand(1, 6, 8)).macs
    assert count_costs(net, torch.rand(1, 6, 8)).macs == (dense.total, dense.nonzero - 6 * 64)

    class Standardised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)

    layer = Standardised(6, 4)
    with torch.no_grad():
        layer.weight[1] = 0
    assert count_costs(layer, torch.rand(1, 6)).macs == (24, 18)


def test_zeros_of_activations_save_nothing() -> None:
    assert count_costs(nn.Linear(6, 4), torch.zeros(1, 6)).macs == (24, 24)


def test_masks_count_what_they_keep_and_leave_the_weights() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    before = {n: p.clone() for n, p in net.named_parameters()}
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[0, :4] = True
    costs = count_costs(net, torch.rand(3, 6), masks=MaskSet({"0.weight": mask}))
    assert costs.macs == Count(3 * 40, 3 * 14)
    assert costs.modules["0"].params == Count(35, 9)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_masks_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    before = {n: p.clone() for n, p in net.named_parameters()}
    right = {"0.weight": torch.zeros(5, 6, dtype=torch.bool)}
    with pytest.raises(MaskMismatchError, match=r"no parameter '1.wight'; did you mean '1.weight'"):
        count_costs(net, torch.rand(3, 6), masks=right | {"1.wight": torch.zeros(2, 5, dtype=torch.bool)})
    with pytest.raises(MaskMismatchError, match=r"'1.weight' of shape"):
        count_costs(net, torch.rand(3, 6), masks=right | {"1.weight": torch.zeros(5, 2, dtype=torch.bool)})
    filled = MaskSet(right, fills={"0.weight": torch.ones(5, 6)})
    with pytest.raises(MaskMismatchError, match="have fills"):
        count_costs(net, torch.rand(3, 6), masks=filled)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


# ----------------------------------------------------------- what goes in, what stays


def test_inputs_of_any_form() -> None:
    assert count_costs(Named(), {"x": torch.rand(3, 4), "scale": torch.ones(1)}).macs.total == 24
    assert count_costs(Named(), (torch.rand(3, 4), torch.ones(1))).macs.total == 24


def test_a_model_that_needs_other_inputs() -> None:
    with pytest.raises(MeasurementError, match="Linear cannot be run with these example inputs"):
        count_costs(nn.Linear(4, 2), torch.rand(3, 5))


def test_nothing_is_left_behind() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    x = torch.rand(3, 4)
    torch.set_rng_state(state)
    count_costs(net, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_shared_modules_and_parameters_count_once_and_run_twice() -> None:
    layer = nn.Linear(4, 4)
    costs = count_costs(nn.Sequential(layer, nn.ReLU(), layer), torch.rand(1, 4))
    assert costs.params.total == 20
    assert costs.macs.total == 32
    assert costs.modules["0"].macs.total == 32


def test_to_json_holds_plain_numbers() -> None:
    content = count_costs(Attention(), torch.rand(1, 6, 8)).to_json()
    assert content["macs"]["total"] == sum(content["by_operator"].values())
    assert all(type(n) is int for n in content["by_operator"].values())


# ----------------------------------------------------------------- other counts


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "swin_t", "vit_b_32"])
def test_the_planner_counts_the_same(name: str) -> None:
    """The table by which budgets are planned, and the count of the network that comes out."""
    size = 224 if name == "vit_b_32" else 64
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.rand(1, 3, size, size)
    plan = plan_removal(trace_channels(model, x), Budget(macs=0.5))
    assert plan.costs["macs"][0] == count_costs(model, x).macs.total == by_torch(model, x)
    assert plan.costs["params"][0] == count_costs(model, x).params.total
    compact(model, plan, x, precision=torch.float32)
    costs = count_costs(model, x)
    assert plan.costs["macs"][1] == costs.macs.total
    assert plan.costs["params"][1] == costs.params.total


def published(name: str) -> tuple[Costs, float, int]:
    weights = torchvision.models.get_model_weights(name).DEFAULT
    options = {"googlenet": {"aux_logits": False, "init_weights": False}, "inception_v3": {"init_weights": False}}
    size = weights.transforms().crop_size[0]
    own = {"image_size": size} if name.startswith("vit_") else options.get(name, {})
    model = torchvision.models.get_model(name, weights=None, **own).eval()
    return count_costs(model, torch.zeros(1, 3, size, size)), weights.meta["_ops"], weights.meta["num_params"]


SPREAD = ["resnet18", "mobilenet_v2", "squeezenet1_1", "googlenet", "swin_t", "vit_b_16"]


def check_published(name: str) -> None:
    costs, operations, params = published(name)
    assert abs(costs.macs.total / 1e9 - operations) <= 0.01 * operations + 0.0005  # published with three decimals
    assert costs.params.total == params
    assert costs.incomplete == ()


@pytest.mark.parametrize("name", SPREAD)
def test_agrees_with_what_torchvision_publishes(name: str) -> None:
    check_published(name)


@pytest.mark.zoo
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_agrees_over_all_classification_networks(name: str) -> None:
    check_published(name)

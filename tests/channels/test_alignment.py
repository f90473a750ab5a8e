"""round_to by device: the rule against torch's own, and what it does to plans."""

import pytest
import torch
import torchvision
from torch import nn

from lightning_prune.channels import Budget, alignment, plan_removal, trace_channels
from lightning_prune.errors import ConfigError
from tests.channels.networks import conv

INPUTS = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_widths_are_those_to_which_torch_pads_matrix_products(dtype: torch.dtype) -> None:
    from torch._inductor.fx_passes.pad_mm import get_alignment_size_dtype

    assert alignment("cuda", dtype) == get_alignment_size_dtype(dtype) > 1
    assert alignment(torch.device("cuda", 1), dtype) == alignment("cuda", dtype)


@pytest.mark.parametrize(("capability", "lanes"), [("AVX512", 16), ("AVX2", 8), ("DEFAULT", 4), ("SVE256", 4)])
def test_cpu_widths_fill_a_vector(capability: str, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert alignment("cpu", torch.float32) == lanes
    assert alignment("cpu", torch.bfloat16) == 2 * lanes
    assert alignment("cpu", torch.float64) == lanes // 2


def test_devices_and_types_without_a_rule_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no rule for device type 'meta', only for cpu, cuda and mps"):
        alignment("meta", torch.float32)
    with pytest.raises(ConfigError, match=r"torch\.int8: expected a floating-point type"):
        alignment("cpu", torch.int8)


def _widths(model: nn.Module, round_to: object, **more: int) -> list[int]:
    plan = plan_removal(trace_channels(model, INPUTS), Budget(channels=0.4), round_to=round_to, **more)  # type: ignore[arg-type]
    return [g["kept"] for g in plan.groups]


def test_auto_is_the_rule_for_the_models_own_device_and_type() -> None:
    model = torchvision.models.resnet18()
    step = alignment("cpu", torch.float32)
    assert step > 1
    widths = _widths(model, "auto")
    assert widths == _widths(model, step)
    assert all(width % step == 0 for width in widths)
    model.half()
    model.fc.float()  # fewer parameters than the rest: float16 decides
    graph = trace_channels(_Body(model), INPUTS.half())
    plan = plan_removal(graph, Budget(channels=0.4), round_to="auto")
    assert all(g["kept"] % alignment("cpu", torch.float16) == 0 for g in plan.groups)


class _Body(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = self.model
        x = m.maxpool(m.relu(m.bn1(m.conv1(x))))
        return m.fc(m.layer4(m.layer3(m.layer2(m.layer1(x)))).mean((2, 3)).float())


def test_a_plan_can_be_made_for_another_device() -> None:
    net = nn.Sequential(conv(3, 32), nn.ReLU(), conv(32, 5))
    assert _widths(net, "cuda") == [12]
    assert _widths(net, torch.device("cuda:0")) == [12]
    assert _widths(net, {"cuda": 8, "cpu": 5}) == [10]
    with pytest.raises(ConfigError, match=r"has no entry for 'cpu', the device of the model"):
        _widths(net, {"cuda": 8})
    with pytest.raises(ConfigError, match=r"round_to='fast': expected a number, 'auto' or a device"):
        _widths(net, "fast")
    with pytest.raises(ConfigError, match=r"round_to=8\.0: expected a number"):
        _widths(net, 8.0)


@pytest.mark.parametrize("round_to", [4, 8, 32, "auto", "cuda"])
def test_rounding_never_empties_a_layer_or_goes_below_the_least_width(round_to: object) -> None:
    """Layers narrower than the step keep their width; the least width wins over the step."""
    net = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 40), nn.ReLU(), conv(40, 5))
    graph = trace_channels(net, INPUTS)
    step = alignment("cpu" if round_to == "auto" else "cuda", torch.float32) if isinstance(round_to, str) else round_to
    plan = plan_removal(graph, Budget(channels=0.9), round_to=round_to, min_channels=5)  # type: ignore[arg-type]
    for group in plan.groups:
        assert group["kept"] >= 5
        assert group["kept"] == group["size"] or group["kept"] % step == 0
    assert any(g["kept"] < g["size"] for g in plan.groups)

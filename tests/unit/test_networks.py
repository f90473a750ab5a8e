"""Networks of the experiments: published sizes, fresh initialisations, what they compute, bad input."""

import copy
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.errors import ConfigError
from lightning_prune.experiments import networks
from lightning_prune.experiments.networks import (
    MLP500300,
    VGG16BN,
    VGG19BN,
    Conv2,
    Conv4,
    Conv6,
    DenseNet40,
    LeNet300100,
    PreActResNet164,
    ResNet20,
    ResNet32,
    ResNet56,
    ResNet110,
    SmallConvNet,
    torchvision_model,
)

CLASSES = [found for found in (getattr(networks, name) for name in networks.__all__) if isinstance(found, type)]
INPUTS = {LeNet300100: (1, 28, 28), MLP500300: (1, 28, 28), SmallConvNet: (1, 8, 8)}


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def weights(network: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)) -> int:
    return sum(m.weight.numel() for m in network.modules() if isinstance(m, kinds))


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def without_norm(network: nn.Module) -> int:
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    return parameters(network) - sum(parameters(m) for m in norms)


@pytest.mark.parametrize(
    ("build", "count", "published"),
    [
        # Frankle and Carbin 2019, figure 2: weights
        (LeNet300100, weights, "266K"),
        (Conv2, weights, "4.3M"),
        (Conv4, weights, "2.4M"),
        (Conv6, lambda network: weights(network, (nn.Conv2d,)), "1.1M"),
        # He et al. 2016, table 6
        (ResNet20, parameters, "0.27M"),
        (ResNet32, parameters, "0.46M"),
        (ResNet56, parameters, "0.85M"),
        (ResNet110, parameters, "1.7M"),
        # Liu et al. 2017, table 1
        (PreActResNet164, parameters, "1.70M"),
        (lambda: PreActResNet164(100), parameters, "1.73M"),
        (VGG19BN, parameters, "20.04M"),
        (lambda: VGG19BN(100), parameters, "20.08M"),
        (lambda: DenseNet40(100), parameters, "1.10M"),
        # Lin et al. 2020: BatchNorm not counted
        (VGG16BN, without_norm, "14.98M"),
        (DenseNet40, weights, "1.04M"),
    ],
)
def test_sizes_are_those_published(
    build: Callable[[], nn.Module], count: Callable[[nn.Module], int], published: str
) -> None:
    number, unit = published[:-1], {"K": 1e3, "M": 1e6}[published[-1]]
    digits = len(number.partition(".")[2])
    assert f"{count(build()) / unit:.{digits}f}" == number


def test_exact_sizes_that_the_docstrings_state() -> None:
    found = {build.__name__: parameters(build()) for build in CLASSES}
    assert found["LeNet300100"] == 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10 == 266_610
    assert weights(Conv6()) == 2_261_184
    expected = {"ResNet20": 269_722, "ResNet32": 464_154, "ResNet56": 853_018, "ResNet110": 1_727_962}
    expected |= {"VGG16BN": 14_991_946, "VGG19BN": 20_035_018, "DenseNet40": 1_059_298, "MLP500300": 546_610}
    assert {name: found[name] for name in expected} == expected
    for name, count in expected.items():
        assert f"{count:,}" in getattr(networks, name).__doc__


@pytest.mark.parametrize("build", [*CLASSES, lambda: torchvision_model("resnet18", 7)])
def test_reset_parameters_equals_building_anew(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    expected = build().state_dict()
    torch.manual_seed(4)
    network = build()
    earlier = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        for tensor in network.state_dict().values():  # biases, scales and running statistics must come back too
            tensor.add_(1)
    torch.manual_seed(3)
    network.reset_parameters()
    assert equal(network.state_dict(), expected)
    assert not equal(earlier, expected)


@pytest.mark.parametrize("build", CLASSES)
def test_every_parameter_takes_part(build: type[nn.Module]) -> None:
    network = build(num_classes=7)
    logits = network(torch.rand(4, *INPUTS.get(build, (3, 32, 32))))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("build", [b for b in CLASSES if b is not DenseNet40])
def test_width_scales_the_hidden_channels_only(build: type[nn.Module]) -> None:
    network = build(num_classes=3, width=0.5)
    assert parameters(network) < 0.6 * parameters(build(num_classes=3))
    assert network(torch.rand(2, *INPUTS.get(build, (3, 32, 32)))).shape == (2, 3)


def test_lenet_is_gaussian_glorot_with_zero_biases() -> None:
    network = LeNet300100()
    for layer in (network.fc1, network.fc2):
        expected = (2 / (layer.in_features + layer.out_features)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert (layer.weight.abs() > 2 * expected).float().mean().item() == pytest.approx(0.0455, abs=0.005)  # Gaussian
        assert not layer.bias.any()


def test_slimming_initialisation() -> None:
    network = PreActResNet164()
    assert {v for m in network.modules() if isinstance(m, nn.BatchNorm2d) for v in m.weight.tolist()} == {0.5}
    weight = network.layer3[5].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def reference_resnet20(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """ResNet-20 in evaluation, written out with functions only."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / (var + 1e-5).sqrt()
        return x * scale.view(-1, 1, 1) + (state[f"{name}.bias"] - mean * scale).view(-1, 1, 1)

    out = norm(F.conv2d(images, state["conv1.weight"], padding=1), "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            inner = F.conv2d(out, state[f"{name}.conv1.weight"], padding=1, stride=stride)
            inner = F.conv2d(norm(inner, f"{name}.bn1").clamp(min=0), state[f"{name}.conv2.weight"], padding=1)
            if stride == 2:
                out = out[..., ::2, ::2]
                zeros = torch.zeros(len(out), out.shape[1] // 2, *out.shape[2:])
                out = torch.cat([zeros, out, zeros], dim=1)
            out = (norm(inner, f"{name}.bn2") + out).clamp(min=0)
    return out.flatten(2).mean(2) @ state["linear.weight"].T + state["linear.bias"]


def test_resnet20_computes_what_the_paper_describes() -> None:
    network = ResNet20().eval()
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in name else 0))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(images), reference_resnet20(network.state_dict(), images))


def test_a_published_resnet20_loads_strictly(data_root: Path) -> None:
    file = data_root / "resnet20-cifar10.safetensors"
    if not file.is_file():
        pytest.skip(f"needs {file}")
    network = ResNet20()
    state = load_file(file)
    network.load_state_dict(state, strict=True)
    loaded = network.state_dict()
    assert {name for name in loaded if "num_batches" not in name} == {
        name for name in state if "num_batches" not in name
    }
    assert equal({name: loaded[name] for name in state}, state)


def test_torchvision_networks_keep_their_names_and_copies_reset_themselves() -> None:
    from torchvision import models

    network = torchvision_model("resnet18", 10)
    assert network.state_dict().keys() == models.resnet18(num_classes=10).state_dict().keys()
    original = copy.deepcopy(network.state_dict())
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        before = copy.deepcopy(other.state_dict())
        other.reset_parameters()
        assert not equal(other.state_dict(), before)
        assert equal(network.state_dict(), original)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "squeezenet1_1", "mobilenet_v3_small"])
def test_torchvision_networks_give_plain_logits_in_training(name: str) -> None:
    network = torchvision_model(name, 5)
    size = 75 if name == "inception_v3" else 64
    assert network(torch.rand(2, 3, size, size)).shape == (2, 5)


def test_pretrained_weights_get_a_head_of_the_asked_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    def load_nothing(name: str, weights: str | None = None, **options: object) -> nn.Module:
        return get_model(name, **options)

    get_model = models.get_model
    monkeypatch.setattr(models, "get_model", load_nothing)
    for name in ("resnet18", "squeezenet1_1", "vgg11"):
        network = torchvision_model(name, 5, weights="DEFAULT")
        assert network(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    network = torchvision_model("resnet18", 1000, weights="DEFAULT")
    assert network.fc.out_features == 1000


def test_networks_are_built_from_configurations() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network")
    for path, arguments in [
        ("lightning_prune.experiments.ResNet20", {"num_classes": 5, "width": 0.25}),
        ("lightning_prune.experiments.torchvision_model", {"name": "resnet18", "num_classes": 5}),
    ]:
        config = parser.parse_object({"network": {"class_path": path, "init_args": arguments}})
        network = parser.instantiate(config).network if hasattr(parser, "instantiate") else None
        network = network or parser.instantiate_classes(config).network
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LeNet300100(num_classes=1), "num_classes=1"),
        (lambda: Conv2(num_classes=2.5), r"num_classes=2\.5"),
        (lambda: ResNet20(width=0), "width=0"),
        (lambda: VGG16BN(width=float("nan")), "width=nan"),
        (lambda: DenseNet40(growth=0), "growth=0"),
        (lambda: torchvision_model("resnet81"), r"named 'resnet81'.*resnet18"),
        (lambda: torchvision_model("zzz"), "list_models"),
        (lambda: torchvision_model("fcn_resnet50"), "no classification network named 'fcn_resnet50'"),
        (lambda: torchvision_model("resnet18", weights="BEST"), "no weights named 'BEST'.*IMAGENET1K_V1"),
    ],
)
def test_bad_arguments(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(ConfigError, match=r"weights DEFAULT of resnet18 could not be fetched.*connection"):
        torchvision_model("resnet18", weights="DEFAULT")

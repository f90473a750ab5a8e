"""Networks that begin with a run's weights, or with a compact network's widths and fresh weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_prune import Budget, compact, plan_removal, save_compact, trace_channels
from lightning_prune.errors import ConfigError, FileFormatError, MaskMismatchError
from lightning_prune.experiments import ImageClassifier, ResNet20, compacted, shaped_like, trained

X = torch.zeros(2, 3, 32, 32)


def small() -> ResNet20:
    return ResNet20(width=0.25)


@pytest.mark.parametrize("kind", ["checkpoint", "state", "safetensors"])
def test_weights_come_back(tmp_path: Path, kind: str) -> None:
    source = small()
    with torch.no_grad():
        source.bn1.running_mean.fill_(3)
    state, path = source.state_dict(), tmp_path / "weights.ckpt"
    if kind == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif kind == "state":
        torch.save(state, path)
    else:
        torch.save({"state_dict": ImageClassifier(source).state_dict(), "epoch": 3}, path)
    network = small()
    assert not torch.equal(network.conv1.weight, source.conv1.weight)
    assert trained(network, path) is network
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("wrap", [nn.Module.eval, ImageClassifier], ids=["network", "classifier"])
def test_a_compact_networks_widths_with_fresh_weights(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """As :func:`save_compact` writes it, and as a fit of a classifier does."""
    pruned = small()
    whole = wrap(pruned)
    plan = plan_removal(trace_channels(whole, X), Budget(macs=0.5))
    compact(whole, plan, X)
    save_compact(whole, tmp_path / "compact.safetensors")
    dense = sum(p.numel() for p in small().parameters())
    torch.manual_seed(5)
    network = shaped_like(small(), tmp_path / "compact.safetensors")
    shapes = {name: value.shape for name, value in pruned.state_dict().items()}
    assert {name: value.shape for name, value in network.state_dict().items()} == shapes
    assert sum(p.numel() for p in network.parameters()) < dense
    matrices = [(name, p) for name, p in network.named_parameters() if p.dim() > 1]
    assert all(not torch.equal(p, pruned.get_parameter(name)) for name, p in matrices)
    weight = network.layer3[1].conv1.weight  # drawn for its present width: He's deviation, by its inputs
    assert float(weight.detach().std()) == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.15)
    network(X).sum().backward()
    torch.manual_seed(5)
    again = shaped_like(small(), tmp_path / "compact.safetensors")
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("wrap", [nn.Module.eval, ImageClassifier], ids=["network", "classifier"])
def test_a_compact_network_comes_back_with_its_weights(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    pruned = small()
    whole = wrap(pruned)
    compact(whole, plan_removal(trace_channels(whole, X), Budget(macs=0.5)), X)
    save_compact(whole, tmp_path / "compact.safetensors")
    found = compacted(small(), tmp_path / "compact.safetensors").state_dict()
    assert found.keys() == pruned.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in pruned.state_dict().items())


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "weights.ckpt"
    with pytest.raises(FileFormatError, match=r"weights.ckpt: there is no such file"):
        trained(small(), file)
    with pytest.raises(FileFormatError, match="there is no such file"):
        trained(small(), tmp_path / "weights.safetensors")
    for path in (file, tmp_path / "weights.safetensors"):
        path.write_bytes(b"not a file of tensors at all")
        with pytest.raises(FileFormatError, match=r"is damaged,? or no (safetensors )?file"):
            trained(small(), path)
    torch.save([1, 2], file)
    with pytest.raises(FileFormatError, match="holds a list; expected tensors by name"):
        trained(small(), file)
    torch.save(small, file)  # code, which is not run
    with pytest.raises(FileFormatError, match="without running code"):
        trained(small(), file)
    torch.save(ResNet20(width=0.5).state_dict(), file)
    with pytest.raises(MaskMismatchError, match=r"does not fit this ResNet20.*size mismatch.*same width"):
        trained(small(), file)
    with pytest.raises(ConfigError, match="Sequential has no reset_parameters"):
        shaped_like(nn.Sequential(nn.Linear(2, 2)), file)
    with pytest.raises(FileFormatError):
        shaped_like(small(), file)

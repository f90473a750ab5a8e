"""The compact network beside the one that Torch-Pruning makes when it is asked for the very same channels."""

import warnings

import pytest
import torch
import torchvision
from torch import nn

from lightning_prune.channels import Budget, RemovalPlan, compact, plan_removal, trace_channels
from lightning_prune.channels.trace import ChannelGraph

tp = pytest.importorskip("torch_pruning")
IMAGE = torch.rand(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
QUICK = ["resnet18", "mobilenet_v2", "squeezenet1_1", "mnasnet0_5", "mobilenet_v3_small"]
# Left out: grouped convolutions (there the peer takes the same place of every group, we take whole groups), GoogLeNet
# (it does not see every branch) and networks with attention.
MORE = ["alexnet", "vgg11_bn", "resnet50", "wide_resnet50_2", "densenet121", "efficientnet_b0", "efficientnet_v2_s",
        "mobilenet_v3_large", "convnext_tiny"]  # fmt: skip


def remove_with_peer(model: nn.Module, graph: ChannelGraph, plan: RemovalPlan) -> None:
    """Have the peer remove each group's leaving channels; it finds by itself what must shrink along."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dependencies = tp.DependencyGraph().build_dependency(model, example_inputs=IMAGE)
    modules = dict(model.named_modules())
    for group in graph.groups:
        name, axis = group.makers[0]
        if name not in plan.keep or axis not in plan.keep[name]:
            continue
        leaving = set(group.positions(name, axis).ravel().tolist()) - set(plan.keep[name][axis])
        module = modules[name.rpartition(".")[0]]
        prune = dependencies.get_pruner_of_module(module).prune_out_channels
        dependencies.get_pruning_group(module, prune, sorted(leaving)).prune()


def check_same_network(name: str) -> None:
    ours = torchvision.models.get_model(name, weights=None).eval().double()
    theirs = torchvision.models.get_model(name, weights=None).eval().double()
    theirs.load_state_dict(ours.state_dict())
    graph = trace_channels(ours, IMAGE)
    plan = plan_removal(graph, Budget(channels=0.5))
    remove_with_peer(theirs, graph, plan)
    compact(ours, plan, IMAGE)
    assert any(plan.keep.values())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key]), key
    with torch.no_grad():
        assert torch.equal(ours(IMAGE), theirs(IMAGE))


@pytest.mark.parametrize("name", QUICK)
def test_same_network_as_torch_pruning(name: str) -> None:
    check_same_network(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", MORE)
def test_same_network_as_torch_pruning_more(name: str) -> None:
    check_same_network(name)

"""The networks of the pruning papers; each can draw a fresh initialisation with ``reset_parameters()``."""

from lightning_prune.experiments.networks.densenet import DenseNet40
from lightning_prune.experiments.networks.files import compacted, shaped_like, trained
from lightning_prune.experiments.networks.narrow import (
    convnext_cifar,
    efficientnet_cifar,
    mobilenet_v2_cifar,
    shufflenet_v2_cifar,
    vit_cifar,
)
from lightning_prune.experiments.networks.resnet import PreActResNet164, ResNet20, ResNet32, ResNet56, ResNet110
from lightning_prune.experiments.networks.small import MLP500300, Conv2, Conv4, Conv6, LeNet300100, SmallConvNet
from lightning_prune.experiments.networks.vgg import VGG16BN, VGG19BN
from lightning_prune.experiments.networks.zoo import torchvision_model

__all__ = [
    "MLP500300",
    "VGG16BN",
    "VGG19BN",
    "Conv2",
    "Conv4",
    "Conv6",
    "DenseNet40",
    "LeNet300100",
    "PreActResNet164",
    "ResNet20",
    "ResNet32",
    "ResNet56",
    "ResNet110",
    "SmallConvNet",
    "compacted",
    "convnext_cifar",
    "efficientnet_cifar",
    "mobilenet_v2_cifar",
    "shaped_like",
    "shufflenet_v2_cifar",
    "torchvision_model",
    "trained",
    "vit_cifar",
]

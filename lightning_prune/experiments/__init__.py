"""The papers' networks, data and training task, as the recipes use them."""

from lightning_prune.experiments.classifier import ImageClassifier
from lightning_prune.experiments.data import (
    CIFAR10,
    CIFAR100,
    MNIST,
    Digits,
    ImageFolders,
    TensorDataModule,
    TensorLoader,
)
from lightning_prune.experiments.networks import (
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
from lightning_prune.experiments.schedules import Cosine, Drops, OneCycle, Schedule

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "VGG16BN",
    "VGG19BN",
    "Conv2",
    "Conv4",
    "Conv6",
    "Cosine",
    "DenseNet40",
    "Digits",
    "Drops",
    "ImageClassifier",
    "ImageFolders",
    "LeNet300100",
    "OneCycle",
    "PreActResNet164",
    "ResNet20",
    "ResNet32",
    "ResNet56",
    "ResNet110",
    "Schedule",
    "SmallConvNet",
    "TensorDataModule",
    "TensorLoader",
    "torchvision_model",
]

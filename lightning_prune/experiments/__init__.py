"""The papers' networks, data and training task, as the recipes use them."""

from lightning_prune.experiments.classifier import ImageClassifier
from lightning_prune.experiments.data import MNIST, Digits, TensorLoader
from lightning_prune.experiments.networks import Conv2, Conv4, Conv6, LeNet300100, SmallConvNet
from lightning_prune.experiments.schedules import Cosine, Drops, OneCycle, Schedule

__all__ = [
    "MNIST",
    "Conv2",
    "Conv4",
    "Conv6",
    "Cosine",
    "Digits",
    "Drops",
    "ImageClassifier",
    "LeNet300100",
    "OneCycle",
    "Schedule",
    "SmallConvNet",
    "TensorLoader",
]

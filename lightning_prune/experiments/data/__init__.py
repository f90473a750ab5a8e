"""Data modules of the experiments, and the loader for data that fits in memory."""

from lightning_prune.experiments.data.cifar import CIFAR10, CIFAR100
from lightning_prune.experiments.data.folders import ImageFolders
from lightning_prune.experiments.data.grey import MNIST, Digits
from lightning_prune.experiments.data.loader import TensorLoader
from lightning_prune.experiments.data.module import Split, Splits, TensorDataModule
from lightning_prune.experiments.data.transforms import CropFlip, Pixels

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "CropFlip",
    "Digits",
    "ImageFolders",
    "Pixels",
    "Split",
    "Splits",
    "TensorDataModule",
    "TensorLoader",
]

"""Data modules of the experiments, and the loader for data that fits in memory."""

from lightning_prune.experiments.data.grey import MNIST, Digits
from lightning_prune.experiments.data.loader import TensorLoader
from lightning_prune.experiments.data.module import Split, Splits, TensorDataModule

__all__ = ["MNIST", "Digits", "Split", "Splits", "TensorDataModule", "TensorLoader"]

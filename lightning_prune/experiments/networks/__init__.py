"""The networks of the pruning papers; each can draw a fresh initialisation with ``reset_parameters()``."""

from lightning_prune.experiments.networks.small import Conv2, Conv4, Conv6, LeNet300100, SmallConvNet

__all__ = ["Conv2", "Conv4", "Conv6", "LeNet300100", "SmallConvNet"]

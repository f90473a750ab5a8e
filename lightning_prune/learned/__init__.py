"""Supermasks that are learned: weights stay frozen, and which of them pass is trained."""

from lightning_prune.learned.frozen import INITS, frozen_weight
from lightning_prune.learned.masks import METHODS, MaskLearner, MaskSettings
from lightning_prune.learned.popup import Passing, popup_weight
from lightning_prune.learned.stochastic import Levels, sampled_weight, shift_logits_
from lightning_prune.learned.top import TopMask

__all__ = [
    "INITS",
    "METHODS",
    "Levels",
    "MaskLearner",
    "MaskSettings",
    "Passing",
    "TopMask",
    "frozen_weight",
    "popup_weight",
    "sampled_weight",
    "shift_logits_",
]

"""The Lightning face: callbacks decide when, call the functions of the layers below, and report."""

from lightning_prune.callbacks.channels import ChannelPruner
from lightning_prune.callbacks.connectivity import RoundConnectivity
from lightning_prune.callbacks.costs import CostProfiler
from lightning_prune.callbacks.early_bird import EarlyBird
from lightning_prune.callbacks.events import Position, PruneEvent
from lightning_prune.callbacks.hrank import HRankPruner
from lightning_prune.callbacks.learned import LearnedSupermask
from lightning_prune.callbacks.magnitude import IterativeMagnitudePruner
from lightning_prune.callbacks.plans import load_compact_checkpoint
from lightning_prune.callbacks.rewind import LRRewind, WeightRewind
from lightning_prune.callbacks.slimming import SlimmingRegularizer
from lightning_prune.callbacks.slimming_pruner import SlimmingPruner
from lightning_prune.callbacks.supermask import SupermaskScorer
from lightning_prune.callbacks.tickets import TicketWriter
from lightning_prune.callbacks.training_cost import TrainingCost

__all__ = [
    "ChannelPruner",
    "CostProfiler",
    "EarlyBird",
    "HRankPruner",
    "IterativeMagnitudePruner",
    "LRRewind",
    "LearnedSupermask",
    "Position",
    "PruneEvent",
    "RoundConnectivity",
    "SlimmingPruner",
    "SlimmingRegularizer",
    "SupermaskScorer",
    "TicketWriter",
    "TrainingCost",
    "WeightRewind",
    "load_compact_checkpoint",
]

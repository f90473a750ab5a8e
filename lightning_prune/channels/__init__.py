"""Removing channels for real: trace, groups, plans, surgery, and the check that nothing else changed."""

from lightning_prune.channels.alignment import alignment
from lightning_prune.channels.block_scores import score_blocks
from lightning_prune.channels.blocks import Blocks, find_blocks
from lightning_prune.channels.budget import Budget
from lightning_prune.channels.choice import ChannelSelection
from lightning_prune.channels.compact import CompactReport, compact
from lightning_prune.channels.feature_maps import feature_ranks
from lightning_prune.channels.groups import ChannelGroup, FrozenAxis
from lightning_prune.channels.plan import RemovalPlan
from lightning_prune.channels.planning import plan_removal, plan_widths
from lightning_prune.channels.residual import Block
from lightning_prune.channels.scores import score_batch_norm, score_norms, score_taylor
from lightning_prune.channels.trace import ChannelGraph, trace_channels

__all__ = [
    "Block",
    "Blocks",
    "Budget",
    "ChannelGraph",
    "ChannelGroup",
    "ChannelSelection",
    "CompactReport",
    "FrozenAxis",
    "RemovalPlan",
    "alignment",
    "compact",
    "feature_ranks",
    "find_blocks",
    "plan_removal",
    "plan_widths",
    "score_batch_norm",
    "score_blocks",
    "score_norms",
    "score_taylor",
    "trace_channels",
]

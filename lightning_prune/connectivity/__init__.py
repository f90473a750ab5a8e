"""Linear mode connectivity: interpolation between networks, error barriers, alignment by permutation symmetries."""

from lightning_prune.connectivity.align import Alignment, align_states
from lightning_prune.connectivity.batch_norm import recalibrate
from lightning_prune.connectivity.error_rate import ErrorRate
from lightning_prune.connectivity.line import LinearPath, linear_mode_connectivity
from lightning_prune.connectivity.plane import ErrorPlane, error_plane

__all__ = [
    "Alignment",
    "ErrorPlane",
    "ErrorRate",
    "LinearPath",
    "align_states",
    "error_plane",
    "linear_mode_connectivity",
    "recalibrate",
]

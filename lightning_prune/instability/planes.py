"""Planes through a branch point and the ends of two copies, measured once each."""

from typing import Any

from lightning_prune.connectivity import ErrorPlane
from lightning_prune.files import read_json, write_json
from lightning_prune.instability.analysis import Analysis, Unit
from lightning_prune.instability.lines import Measuring, pairs


def measure_planes(analysis: Analysis, side: int) -> dict[str, ErrorPlane]:
    """Measure the plane of each point and ticket, for its first seed and its first two copies.

    The corners are the ends of both copies (``a`` and ``b``) and the network from which they branched (``c``).
    Statistics of BatchNorm are estimated anew at every place: those of a branch point early in training and of
    places outside the triangle are those of no network. Planes measured before are read.

    Args:
        analysis: Whose branches have ended.
        side: Places in each direction, at least 2; ``side ** 2`` evaluations a plane.

    Returns:
        The planes by name: ``seed0-0st``.
    """
    first: dict[tuple[str, int], tuple[Unit, Unit]] = {}
    for one, two in pairs(analysis):
        assert one.at is not None
        first.setdefault((one.at, one.round), (one, two))
    found: dict[str, ErrorPlane] = {}
    measuring: Measuring | None = None
    for one, two in first.values():
        path = analysis.path(one).parent / f"plane{one.copy}-{two.copy}.json"
        content = read_json(path, "a measured plane") if path.exists() else None
        if content is None or not _fits(content, analysis, side):
            measuring = measuring or Measuring(analysis)
            content = measuring.plane(one, two, side).to_json()
            write_json(path, content)
        found[path.parent.relative_to(analysis.folder).as_posix().replace("/", "-")] = ErrorPlane.from_json(content)
    return found


def _fits(content: dict[str, Any], analysis: Analysis, side: int) -> bool:
    return len(content["xs"]) == side and list(content["errors"]) == analysis.settings.splits

"""Pictures as SVG files, drawn without a window system."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_prune.connectivity import ErrorPlane
from lightning_prune.errors import ConfigError
from lightning_prune.files import atomic_write


def check_pictures() -> None:
    """See that pictures can be drawn, before anything is trained.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "pictures need matplotlib, which is not installed: pip install 'lightning-prune[pictures]', or go without "
            "(--no-pictures)."
        ) from error


def make_figure(panels: int) -> Any:
    """A figure that touches no window system and no global state."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure, atomically."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def draw_macs_against_latency(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw which part of their latency networks keep where a part of their multiply-adds is kept.

    On the diagonal fewer multiply-adds save as much time as they promise; above it they promise too much.

    Args:
        rows: For each compact network ``network`` (its name), ``macs`` (the part kept) and ``latency`` (the part kept,
            with the ends of its interval). Networks of one name are joined.
        path: The SVG file.

    Raises:
        ConfigError: matplotlib is not installed, or no rows.
    """
    check_pictures()
    if not rows:
        raise ConfigError("there is nothing to draw: rows is empty.")
    figure, (axis,) = make_figure(1)
    figure.set_size_inches(7, 5)
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    axis.annotate("as promised", (0.84, 0.79), rotation=34, color="0.5", fontsize=8)
    ends = []
    for turn, name in enumerate(dict.fromkeys(row["network"] for row in rows)):
        points = sorted((row["macs"], *row["latency"]) for row in rows if row["network"] == name)
        macs, ratio, low, high = (np.array(values) for values in zip(*points, strict=True))
        color, marker = f"C{turn % 10}", "os^Dv"[turn % 5]
        axis.errorbar(macs, ratio, [ratio - low, high - ratio], color=color, marker=marker, markersize=4, linewidth=1)
        ends.append((ratio[0], macs[0], name, color))
    place = -1.0
    for height, macs_kept, name, color in sorted(ends):  # labels that would lie on each other move up
        place = max(height, place + 0.035)
        axis.annotate(name, (macs_kept, height), (0.015, place), color=color, fontsize=8, va="center")
    axis.set(xlabel="multiply-adds kept", ylabel="latency kept, as measured", xlim=(0, 1), ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    write_figure(figure, Path(path))


def draw_plane(plane: ErrorPlane, path: str | Path, split: str | None = None) -> None:
    """Draw the error on a plane as contours, with the three networks on it.

    Args:
        plane: What :func:`error_plane` measured; an error rate, drawn in per cent.
        path: The SVG file.
        split: Default: the last.

    Raises:
        ConfigError: matplotlib is not installed, or no such split.
    """
    check_pictures()
    split = split or list(plane.errors)[-1]
    if split not in plane.errors:
        raise ConfigError(f"split={split!r} was not measured; there are {', '.join(plane.errors)}.")
    figure, (axis,) = make_figure(1)
    drawn = axis.contourf(plane.xs, plane.ys, 100 * np.array(plane.errors[split]), levels=20)
    figure.colorbar(drawn, label=f"error, {split} (%)")
    for name, (x, y) in zip("abc", plane.places, strict=True):
        axis.plot(x, y, marker="o", color="white", markeredgecolor="black")
        axis.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points", color="white")
    axis.set(xlabel="distance along a to b", ylabel="distance across", aspect="equal")
    write_figure(figure, Path(path))

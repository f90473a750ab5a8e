"""Pictures as SVG files, drawn without a window system."""

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

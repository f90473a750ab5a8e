"""A report's charts as a PNG, through matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from lightning_prune.errors import ConfigError
from lightning_prune.files import atomic_write
from lightning_prune.reports.figures import Figure, label_of
from lightning_prune.reports.svg import MOST_LABELS, Line, label_places, y_of

COLOURS = ("#0072b2", "#c44e00", "#00805c", "#b0478a", "#946200", "#3d7ea6")


def check_png() -> None:
    """See that a PNG can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError('PNG needs matplotlib: pip install "lightning-prune[pictures]".') from error


def write_png(path: Path, figures: Sequence[Figure], names: Sequence[str]) -> None:
    """Draw charts side by side, the methods' names above them.

    Args:
        path: The file.
        figures: The charts.
        names: Of the methods, in their order.

    Raises:
        ConfigError: matplotlib is not installed, or there is no chart.
    """
    check_png()
    from matplotlib.figure import Figure as Canvas

    if not figures:
        raise ConfigError("no chart to draw: the metric and what is left are known at fewer than two points.")
    columns = min(len(figures), 3)
    rows = -(-len(figures) // columns)
    own = (f"{label_of(index)}: {name}" for index, name in enumerate(names))
    lines = [part for name in own for part in wrap(name, 66 * columns, subsequent_indent="     ")]
    canvas = Canvas(figsize=(5.2 * columns, 4 * rows + 0.2 * len(lines) + 0.1), layout="constrained")
    for index, figure in enumerate(figures):
        _draw(canvas.add_subplot(rows, columns, index + 1), figure)
    if lines:
        canvas.suptitle("\n".join(_plain(line) for line in lines), fontsize=9, ha="left", x=0.01)
    with atomic_write(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=150)


def _draw(axes, figure: Figure) -> None:  # type: ignore[no-untyped-def]
    for line in figure.lines:
        if not line.marks:
            continue
        x, y = [m.x for m in line.marks], [m.y for m in line.marks]
        spread = [[m.y - m.low for m in line.marks], [m.high - m.y for m in line.marks]]
        colour = _colour(line)
        axes.errorbar(x, y, yerr=spread, color=colour, marker="o", markersize=4, linewidth=1.5, capsize=0)
        rings = sorted(line.front)
        axes.plot([x[i] for i in rings], [y[i] for i in rings], "o", color=colour, markersize=10, fillstyle="none")
        if line.name is not None and line.name != line.label:
            axes.plot([], [], color=colour, marker="o", markersize=4, label=f"{line.label}: {line.name}")
    _name_lines(axes, figure)
    if figure.ideal:
        low, high = max(figure.x.low, figure.y.low), min(figure.x.high, figure.y.high)
        axes.plot([low, high], [low, high], color="0.5", linestyle=":")
        axes.annotate(figure.ideal, (high, high), (-22, -9), textcoords="offset points", color="0.4", ha="right")
    if figure.guide is not None:
        axes.axhline(figure.guide, color="0.5", linestyle=":")
    axes.set_xscale("log" if figure.x.log else "linear")
    axes.set_xlim(*((figure.x.high, figure.x.low) if figure.x.falling else (figure.x.low, figure.x.high)))
    axes.set_ylim(figure.y.low, figure.y.high)
    axes.set_xticks([tick for tick, _ in figure.x.texts()], [text for _, text in figure.x.texts()])
    axes.set_yscale("log" if figure.y.log else "linear")
    axes.set_yticks([tick for tick, _ in figure.y.texts()], [text for _, text in figure.y.texts()])
    axes.minorticks_off()
    axes.set_xlabel(_plain(figure.x.label))
    axes.set_ylabel(_plain(figure.y.label))
    axes.set_title(_plain(figure.title), fontsize=10)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name_lines(axes, figure: Figure) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.patheffects import withStroke

    drawn = [line for line in figure.lines if line.marks]
    if len(drawn) > MOST_LABELS:
        return
    for line, _, height in label_places(drawn, figure.x, figure.y):
        mark = line.marks[line.label_at]
        up = 0.87 * (y_of(figure.y, mark.y) - height)  # of the page's units, in points
        right = figure.x.place(mark.x) + 0.019 * len(line.label) <= 1.06
        axes.annotate(
            line.label,
            (mark.x, mark.y),
            (7 if right else -7, up - 3.5),
            textcoords="offset points",
            color=_colour(line),
            weight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
            ha="left" if right else "right",
        )
    if any(line.name is not None and line.name != line.label for line in drawn):
        axes.legend(fontsize=7, frameon=False)


def _colour(line: Line) -> Any:
    return COLOURS[line.colour % len(COLOURS)] if line.shade is None else _between(line.shade)


def _between(shade: float) -> tuple[float, ...]:
    """A colour on the way from the first to the second."""
    first, second = ([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in COLOURS[:2])
    return tuple((1 - shade) * a + shade * b for a, b in zip(first, second, strict=True))


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar would open matplotlib's formulas

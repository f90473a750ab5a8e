"""A report's charts as a PNG, through matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from lightning_prune.errors import ConfigError
from lightning_prune.files import atomic_write
from lightning_prune.reports.figures import Figure, figures_of
from lightning_prune.reports.runs import Group

COLOURS = ("#0072b2", "#c44e00", "#00805c", "#b0478a", "#946200", "#3d7ea6")


def write_png(path: Path, groups: Sequence[Group], metric: str) -> None:
    """Draw the charts of :func:`figures_of` side by side, the methods' names above them.

    Raises:
        ConfigError: matplotlib is not installed, or the runs have too few numbers for a chart.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ConfigError('PNG needs matplotlib: pip install "lightning-prune[pictures]".') from error
    figures = figures_of(groups, metric)
    if not figures:
        raise ConfigError(f"no chart to draw: {metric!r} and what is left are known at fewer than two points.")
    columns = min(len(figures), 3)
    rows = -(-len(figures) // columns)
    canvas = Canvas(figsize=(5.2 * columns, 4 * rows + 0.3 * len(groups)), layout="constrained")
    for index, figure in enumerate(figures):
        _draw(canvas.add_subplot(rows, columns, index + 1), figure)
    names = [f"{line.label}: {group.name}" for line, group in zip(figures[0].lines, groups, strict=False)]
    canvas.suptitle("\n".join(_plain(name) for name in names), fontsize=9, ha="left", x=0.01)
    with atomic_write(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=150)


def _draw(axes, figure: Figure) -> None:  # type: ignore[no-untyped-def]
    for line in figure.lines:
        if not line.marks:
            continue
        x, y = [m.x for m in line.marks], [m.y for m in line.marks]
        spread = [[m.y - m.low for m in line.marks], [m.high - m.y for m in line.marks]]
        colour = COLOURS[line.colour % len(COLOURS)]
        axes.errorbar(x, y, yerr=spread, color=colour, marker="o", markersize=4, linewidth=1.5, capsize=0)
        rings = sorted(line.front)
        axes.plot([x[i] for i in rings], [y[i] for i in rings], "o", color=colour, markersize=10, fillstyle="none")
        end = (x[line.label_at], y[line.label_at])
        axes.annotate(line.label, end, (7, 0), textcoords="offset points", color=colour, weight="bold")
    if figure.ideal:
        low, high = max(figure.x.low, figure.y.low), min(figure.x.high, figure.y.high)
        axes.plot([low, high], [low, high], color="0.5", linestyle=":")
        axes.annotate(figure.ideal, (high, high), (-4, -12), textcoords="offset points", color="0.4", ha="right")
    axes.set_xscale("log" if figure.x.log else "linear")
    axes.set_xlim(*((figure.x.high, figure.x.low) if figure.x.falling else (figure.x.low, figure.x.high)))
    axes.set_ylim(figure.y.low, figure.y.high)
    axes.set_xticks([tick for tick, _ in figure.x.texts()], [text for _, text in figure.x.texts()])
    axes.minorticks_off()
    axes.set_xlabel(_plain(figure.x.label))
    axes.set_ylabel(_plain(figure.y.label))
    axes.set_title(_plain(figure.title), fontsize=10)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar would open matplotlib's formulas

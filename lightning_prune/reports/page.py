"""A report as one HTML file that asks for nothing else: style, script and charts stand in it."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightning_prune.connectivity import ErrorPlane
from lightning_prune.reports.beside import Analysed, Curve, Ranks, curves_of_run, ranks_of_run, readable
from lightning_prune.reports.document import chart_content, document
from lightning_prune.reports.figures import Figure, figures_of, label_of
from lightning_prune.reports.lines import figures_of_analysis, figures_of_rounds
from lightning_prune.reports.planes import plane_chart
from lightning_prune.reports.runs import Group, notes_on
from lightning_prune.reports.sections import count_text, frozen, layers, methods, rounds, where
from lightning_prune.reports.svg import line_chart, strip_chart

MOST_RANKS = 6
"""Methods whose ranks are drawn."""


def page_of(
    groups: Sequence[Group],
    metric: str,
    problems: Sequence[str] = (),
    analyses: Mapping[str, Analysed] | None = None,
) -> str:
    """The report.

    What runs have left beside their records (lines between networks, ranks of feature maps) is read from their folders.

    Args:
        groups: As of :func:`group_runs`; may be empty where there are analyses.
        metric: The metric of their points.
        problems: What could not be read; stands at the top.
        analyses: Lines and planes of ``lightning-prune connectivity``, by folder.
    """
    page = _Page()
    curves, ranks, damaged = _beside(groups)
    title = f"Pruning report: {metric}" if groups else "Connectivity report"
    parts = [f"<h1>{escape(title)}</h1>", _summary(groups)]
    parts += [f'<p class="warn">{escape(note)}</p>' for note in [*notes_on(groups), *problems, *damaged]]
    parts += [methods(groups, metric), page.main(groups, metric), rounds(groups, metric) if groups else ""]
    parts += [layers(groups), frozen(groups), page.connected(groups, curves)]
    parts += [page.analysed(name, found) for name, found in (analyses or {}).items()]
    parts += [_ranks(ranks), where(groups)]
    names = [[label_of(index), group.name] for index, group in enumerate(groups)]
    return document(title, parts, names, page.charts)


class _Page:
    """Collects the numbers of the charts, which the script reads, while they are drawn."""

    def __init__(self) -> None:
        self.charts: list[dict[str, Any]] = []

    def chart(self, figure: Figure) -> str:
        """A figure as HTML."""
        self.charts.append(chart_content(figure))
        drawn = line_chart(figure.title, figure.lines, figure.x, figure.y, figure.ideal, figure.guide)
        return (
            f'<figure data-chart="{len(self.charts) - 1}"><h3>{escape(figure.title)}</h3>{drawn}'
            f"<figcaption>{escape(figure.note)}</figcaption></figure>"
        )

    def grid(self, figures: Sequence[Figure], more: str = "") -> str:
        """Figures side by side, and ``more`` of them that are HTML already."""
        return f'<div class="charts">{"".join(self.chart(figure) for figure in figures)}{more}</div>'

    def main(self, groups: Sequence[Group], metric: str) -> str:
        """The metric against what is left, and speed-ups."""
        figures = figures_of(groups, metric)
        if not figures:
            return ""
        spread = any(len(group.runs) > 1 for group in groups)
        how = "Points are means over runs, whiskers reach from the lowest to the highest. " if spread else ""
        how += "Point at a chart to read its numbers, at a method above to find it."
        return f"<h2>What was lost, what was gained</h2><p>{how}</p>{self.grid(figures)}"

    def connected(self, groups: Sequence[Group], curves: Mapping[int, Sequence[Curve]]) -> str:
        """Lines between successive rounds."""
        figures = figures_of_rounds(groups, curves)
        return f"<h2>Are successive rounds connected?</h2>{self.grid(figures)}" if figures else ""

    def analysed(self, name: str, found: Analysed) -> str:
        """Lines and planes of an analysis."""
        counts = [(len({curve.seed for curve in found.curves}), "seed"), (len(found.curves), "line")]
        counts += [(len(found.planes), "plane")] if found.planes else []
        text = f"{escape(name)}: {', '.join(count_text(*pair) for pair in counts)}."
        planes = "".join(_plane(*pair) for pair in found.planes.items())
        return f"<h2>Stability to SGD noise</h2><p>{text}</p>{self.grid(figures_of_analysis(found.curves), planes)}"


def _plane(name: str, plane: ErrorPlane) -> str:
    split = next(reversed(list(plane.errors)))
    title = f"{name}: error on the plane through two copies and where they branched"
    errors = [[100 * error for error in row] for row in plane.errors[split]]
    corners = zip(("other copy", "one copy", "branch point"), plane.places, strict=True)
    drawn = plane_chart(title, plane.xs, plane.ys, errors, f"error, {split}, %", list(corners))
    other, one, start = (f"{100 * error:.4g} %" for error in plane.corners[split])
    note = f"Error of one copy {one}, of the other {other}, where they branched {start}. Distances: Euclidean."
    return f"<figure><h3>{escape(title)}</h3>{drawn}<figcaption>{escape(note)}</figcaption></figure>"


def _beside(groups: Sequence[Group]) -> tuple[dict[int, list[Curve]], dict[int, Ranks], list[str]]:
    """Lines of all runs of each method; the ranks of its first run that has some; what could not be read."""
    curves: dict[int, list[Curve]] = {}
    ranks: dict[int, Ranks] = {}
    problems: list[str] = []
    for index, group in enumerate(groups):
        for folder in (run.folder for run in group.runs if run.folder is not None):
            found = readable(curves_of_run, folder, problems)
            if found:
                curves.setdefault(index, []).extend(found)
            cuts = readable(ranks_of_run, folder, problems)
            if cuts and index not in ranks and len(ranks) < MOST_RANKS:
                ranks[index] = cuts[0]
    return curves, ranks, problems


def _summary(groups: Sequence[Group]) -> str:
    if not groups:
        return ""
    number = sum(len(run.rounds) for g in groups for run in g.runs)
    counts = (sum(len(g.runs) for g in groups), "run"), (len(groups), "method"), (number, "round")
    data = sorted({str(run.task["data"]) for g in groups for run in g.runs if "data" in run.task})
    on = f" on {', '.join(data)}" if data else ""
    return f"<p>{', '.join(count_text(*pair) for pair in counts)}{escape(on)}.</p>"


def _ranks(ranks: Mapping[int, Ranks]) -> str:
    figures = []
    for index, cut in ranks.items():
        title = f"{label_of(index)}: mean ranks of feature maps before the cut of round {cut.round}"
        rows = [
            (layer.name, [(value, number in layer.kept) for number, value in enumerate(layer.values)])
            for layer in cut.layers
        ]
        drawn = strip_chart(title, "mean rank, % of the largest possible", rows)
        note = f"One mark a channel, over {cut.images:,} images. Dots: kept; crosses: removed."
        figures.append(
            f'<figure><h3>{escape(title)}</h3><div class="tall">{drawn}</div><figcaption>{note}</figcaption></figure>'
        )
    return f'<h2>Ranks of feature maps</h2><div class="charts">{"".join(figures)}</div>' if figures else ""

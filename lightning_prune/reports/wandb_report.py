"""A W&B Report over a project's runs, with the package wandb-workspaces."""

from collections.abc import Sequence
from typing import Any

from lightning_prune.errors import ConfigError
from lightning_prune.reports.runs import lower_is_better
from lightning_prune.reports.wandb_content import LAYER_COLUMNS

TITLE_LENGTH = 128


def require_workspaces() -> Any:
    """The module ``wandb_workspaces.reports.v2``.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import wandb_workspaces.reports.v2
    except ImportError as error:
        raise ConfigError(
            f"W&B Reports need the package wandb-workspaces ({error}): pip install 'lightning-prune[wandb-report]'."
        ) from error
    return wandb_workspaces.reports.v2


def build_report(project: str, entity: str, metric: str, title: str, rounds: str = "") -> Any:
    """The report, as an object of ``wandb_workspaces``; nothing is sent.

    Args:
        project: The W&B project with the runs.
        entity: Who owns it; ``""`` where nobody is logged in. With one, W&B is asked for the project.
        metric: Metric of the runs, as the LightningModule logs it.
        title: At the top, at most 128 characters.
        rounds: A table of rounds in Markdown, to stand under the charts.

    Raises:
        ConfigError: wandb-workspaces is not installed; an argument out of range.
    """
    wr = require_workspaces()
    for name, value in (("project", project), ("metric", metric), ("title", title)):
        if not value.strip():
            raise ConfigError(f"{name}={value!r}: expected some text.")
    if len(title) > TITLE_LENGTH:
        raise ConfigError(f"title has {len(title)} characters; W&B takes up to {TITLE_LENGTH}.")
    better = "lower" if lower_is_better(metric) else "higher"
    intro = (
        "Every point is the trained network of one round, before the next cut; lines are means over the runs of a "
        f"method, bands reach from the lowest to the highest. Of {metric}, {better} is better. Theoretical speed-up is "
        "a ratio of multiply-adds, measured speed-up one of latencies timed by turns."
    )
    blocks = [
        wr.H1("What was lost, what was gained"),
        wr.P(intro),
        wr.PanelGrid(runsets=[_runset(wr, project, entity)], panels=_charts(wr, metric)),
        wr.H1("Layer by layer"),
        wr.P(f"The table of each cut: {', '.join(LAYER_COLUMNS)}."),
        wr.PanelGrid(runsets=[_runset(wr, project, entity)], panels=_tables(wr)),
    ]
    if rounds:
        blocks += [wr.H1("Rounds"), wr.MarkdownBlock(rounds)]
    return wr.Report(
        project=project, entity=entity, title=title, description="Written by lightning-prune.", blocks=blocks
    )


def specification(report: Any) -> dict[str, Any]:
    """The report as JSON content, as W&B would store it."""
    content: dict[str, Any] = report._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return content


def _runset(wr: Any, project: str, entity: str) -> Any:
    """The project's runs, by method, those first that stay sparsest without a loss."""
    return wr.Runset(
        project=project,
        entity=entity,
        name="Pruning runs",
        groupby=["config.prune.method"],
        order=[wr.OrderBy(wr.SummaryMetric("prune/matching_sparsity"), ascending=False)],
        pinned_columns=[f"summary:prune/{name}" for name in ("sparsity", "dense", "change", "matching_sparsity")],
    )


def _charts(wr: Any, metric: str) -> list[Any]:
    """The metric against what was left, both speed-ups, and what was reached without a loss."""

    def line(x: str, y: str, title: str, title_x: str, title_y: str) -> Any:
        return wr.LinePlot(
            title=title,
            x=f"prune/end/{x}",
            y=[f"prune/end/{y}"],
            title_x=title_x,
            title_y=title_y,
            groupby=wr.Config("prune.method"),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        )

    left = "part of the dense network's"
    charts = [
        line("sparsity", metric, f"{metric} against sparsity", "removed, part of what can leave", metric),
        line("macs", metric, f"{metric} against multiply-adds", f"multiply-adds left, {left}", metric),
        line("params", metric, f"{metric} against parameters", f"parameters left, {left}", metric),
        line("latency_ms", metric, f"{metric} against measured latency", "latency, ms", metric),
        line(
            "theoretical_speedup", "measured_speedup", "Speed-up", "theoretical (multiply-adds)", "measured (latency)"
        ),
        wr.BarPlot(
            title=f"Highest sparsity with {metric} no worse than dense",
            metrics=[wr.SummaryMetric("prune/matching_sparsity")],
            title_x="removed, part of what can leave",
        ),
        wr.ScatterPlot(
            title=f"Change of {metric} at the end",
            x=wr.SummaryMetric("prune/sparsity"),
            y=wr.SummaryMetric("prune/change"),
        ),
        wr.RunComparer(diff_only="split"),
    ]
    return _placed(wr, charts)


def _tables(wr: Any) -> list[Any]:
    tables = [wr.WeavePanelSummaryTable(table_name=f"prune/{name}") for name in ("layers", "costs")]
    return _placed(wr, [*tables, wr.MediaBrowser(title="Each run's own report", media_keys=["prune/report"])])


def _placed(wr: Any, panels: Sequence[Any]) -> list[Any]:
    """Two beside each other on W&B's grid of 24 columns."""
    for number, panel in enumerate(panels):
        panel.layout = wr.Layout(x=12 * (number % 2), y=8 * (number // 2), w=12, h=8)
    return list(panels)

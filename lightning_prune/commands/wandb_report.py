"""``lightning-prune wandb-report``: a W&B Report over the runs of a project."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from lightning_prune.errors import ConfigError
from lightning_prune.files import write_json
from lightning_prune.reports.runs import choose_metric, group_runs, read_runs
from lightning_prune.reports.tables import markdown_of, table_of
from lightning_prune.reports.wandb_api import find_project
from lightning_prune.reports.wandb_report import build_report, require_workspaces, specification


def main(arguments: Sequence[str]) -> None:
    """Save the report in W&B; without a login, write its specification and say what to do.

    Raises:
        ConfigError: wandb-workspaces is missing; no such project, no pruning runs in it, a metric that none has, or no
            readable record.
        WriteError: The file cannot be written.
    """
    given = _parser().parse_args(arguments)
    require_workspaces()
    entity, _, name = given.project.rpartition("/")
    project = None if given.offline else find_project(name, entity)
    metric, rounds = _of_records(given.runs, given.metric) if given.runs else (given.metric, "")
    if project is not None:
        metric = project.choose_metric(metric)
    report = build_report(name, "" if project is None else project.entity, metric or "val_acc", given.title, rounds)
    if project is not None:
        _publish(report, given.draft)
        return
    write_json(given.output, specification(report))
    why = "as asked" if given.offline else "nobody is logged in to W&B"
    print(f"written: {given.output} (the report's specification; {why}, so nothing was sent)")
    print(_advice(given, arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-prune wandb-report", description=__doc__)
    parser.add_argument("project", metavar="PROJECT", help="the W&B project, or ENTITY/PROJECT")
    parser.add_argument("--metric", help="a metric of the runs (default: what most of them have; offline val_acc)")
    parser.add_argument("--title", default="Pruning report", help="at the top (default: %(default)s)")
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="RUN", help="run folders: their rounds are put in as a table"
    )
    parser.add_argument("--draft", action="store_true", help="save a draft instead of publishing")
    parser.add_argument("--offline", action="store_true", help="write the specification without asking W&B")
    parser.add_argument(
        "--output", metavar="FILE", default="wandb_report.json", help="the specification (default: %(default)s)"
    )
    return parser


def _of_records(paths: Sequence[str], wanted: str | None) -> tuple[str, str]:
    """The metric of records, and their rounds in Markdown."""
    runs, problems = read_runs(paths)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    metric = choose_metric(runs, wanted)
    return metric, markdown_of(*table_of(group_runs(runs, metric), metric))


def _publish(report: Any, draft: bool) -> None:
    try:
        report.save(draft=draft)
    except Exception as error:
        raise ConfigError(f"W&B did not take the report ({type(error).__name__}: {error}).") from error
    print(f"{'saved as a draft' if draft else 'published'}: {report.url}")


def _advice(given: argparse.Namespace, arguments: Sequence[str]) -> str:
    again = " ".join(["lightning-prune wandb-report", *(word for word in arguments if word != "--offline")])
    return "\n".join(
        [
            "To publish it:",
            "  wandb login                               once",
            "  wandb sync FOLDER/wandb/offline-run-*     for offline runs (FOLDER: the logger's save_dir)",
            f"  {again}",
        ]
    )

"""``lightning-prune report``: what runs lost and gained, as one HTML file, Markdown, CSV or PNG."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.errors import ConfigError
from lightning_prune.files import atomic_write
from lightning_prune.record import RunRecord
from lightning_prune.reports.beside import find_analyses
from lightning_prune.reports.page import page_of
from lightning_prune.reports.png import write_png
from lightning_prune.reports.rounds import rounds_table
from lightning_prune.reports.runs import Group, choose_metric, group_runs, notes_on, read_runs
from lightning_prune.reports.tables import csv_of, markdown_of, table_of

FORMATS = ("html", "md", "csv", "png")


def main(arguments: Sequence[str]) -> None:
    """Write or print the report.

    Raises:
        ConfigError: No readable run, a metric that none has, options that do not fit together.
        WriteError: The file cannot be written.
    """
    given = _parser().parse_args(arguments)
    form = _form(given)
    analyses, damaged = find_analyses(given.runs) if form == "html" else ({}, [])
    runs, problems = read_runs(given.runs, needed=not analyses)
    problems = [*damaged, *(problems if runs else [])]  # a folder of an analysis needs no record
    metric = choose_metric(runs, given.metric) if runs else ""
    groups = group_runs(runs, metric)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if form == "html":
        _write(page_of(groups, metric, problems, analyses), given.output or "report.html")
        return
    for note in notes_on(groups):
        print(f"note: {note}", file=sys.stderr)
    if form == "png":
        path = Path(given.output or "report.png")
        write_png(path, groups, metric)
        print(f"written: {path}")
    elif form == "md":
        controls = [RunRecord.read(path) for path in given.control]
        _write(_markdown(groups, runs, controls, metric, not given.no_per_cent), given.output)
    else:
        _write(csv_of(*table_of(groups, metric)), given.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-prune report", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders, records, folders of run folders, or of `connectivity`"
    )
    parser.add_argument("--output", metavar="FILE", help="where to (default: report.html, report.png, or the terminal)")
    parser.add_argument("--format", choices=FORMATS, help="default: as --output ends; md with --control; else html")
    parser.add_argument(
        "--metric", help="a recorded metric (default: val_acc where all runs have it, else what they monitor)"
    )
    parser.add_argument(
        "--control", nargs="+", default=[], metavar="RUN", help="md: the control's folders, same seeds and order"
    )
    parser.add_argument("--no-per-cent", action="store_true", help="md: show the metric as it is, not in points")
    return parser


def _form(given: argparse.Namespace) -> str:
    ending = Path(given.output).suffix.lower().lstrip(".") if given.output else ""
    form = given.format or (ending if ending in FORMATS else "md" if given.control else "html")
    if given.control and form != "md":
        raise ConfigError(f"--control belongs to --format md; {form} shows the control as a method: give it as a RUN.")
    return str(form)


def _markdown(
    groups: Sequence[Group], runs: Sequence[RunRecord], controls: Sequence[RunRecord], metric: str, per_cent: bool
) -> str:
    """Seeds of one method paired round by round, with intervals; several methods one under the other."""
    equal = len({len(run.rounds) for run in runs}) == 1
    best = all(row.best is not None for run in runs for row in run.rounds)
    if controls or (len(groups) == 1 and equal and best):
        return rounds_table(runs, metric, controls, per_cent=per_cent) + "\n"
    return markdown_of(*table_of(groups, metric)) + "\n"


def _write(text: str, output: str | None) -> None:
    if output is None:
        print(text, end="")
        return
    with atomic_write(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written: {output}")

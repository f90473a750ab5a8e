"""``lightning-prune report``: what runs lost and gained, as one HTML file, Markdown, CSV or PNG."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_prune.commands.output import write_or_print
from lightning_prune.errors import ConfigError
from lightning_prune.record import RunRecord
from lightning_prune.reports.beside import Analysed, curves_of_runs, find_analyses
from lightning_prune.reports.figures import CHARTS, Figure, figures_of
from lightning_prune.reports.lines import figures_of_analysis, figures_of_rounds
from lightning_prune.reports.page import page_of
from lightning_prune.reports.png import check_png, write_png
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
    if form == "png":
        check_png()
    analyses, damaged = find_analyses(given.runs) if form in ("html", "png") else ({}, [])
    runs, problems = read_runs(given.runs, needed=not analyses)
    known = {str(Path(path)) for path in given.runs if any(Path(a).is_relative_to(path) for a in analyses)}
    problems = [*damaged, *(p for p in problems if not any(p.startswith(f"{path} holds no") for path in known))]
    metric = choose_metric(runs, given.metric) if runs else ""
    groups = group_runs(runs, metric)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if form == "html":
        write_or_print(page_of(groups, metric, problems, analyses), given.output or "report.html")
        return
    for note in notes_on(groups):
        print(f"note: {note}", file=sys.stderr)
    if form == "png":
        path = Path(given.output or "report.png")
        write_png(path, _charts(groups, metric, analyses, given.charts), [group.name for group in groups])
        print(f"written: {path}")
    elif form == "md":
        controls = [RunRecord.read(path) for path in given.control]
        write_or_print(_markdown(groups, runs, controls, metric, not given.no_per_cent), given.output)
    else:
        write_or_print(csv_of(*table_of(groups, metric)), given.output)


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
    parser.add_argument("--charts", nargs="+", choices=CHARTS, help="png: draw these (default: all that there are)")
    parser.add_argument("--no-per-cent", action="store_true", help="md: show the metric as it is, not in points")
    return parser


def _charts(
    groups: Sequence[Group], metric: str, analyses: Mapping[str, Analysed], wanted: Sequence[str] | None
) -> list[Figure]:
    """The charts of the page that were asked for, by default all."""
    curves = {index: curves_of_runs([run.folder for run in group.runs]) for index, group in enumerate(groups)}
    figures = figures_of(groups, metric) if groups else []
    figures += figures_of_rounds(groups, {index: own for index, own in curves.items() if own})
    figures += [figure for found in analyses.values() for figure in figures_of_analysis(found.curves)]
    missing = [key for key in wanted or () if key not in {figure.key for figure in figures}]
    if missing:
        there = ", ".join(dict.fromkeys(figure.key for figure in figures)) or "none"
        raise ConfigError(f"--charts {missing[0]}: these runs have no numbers for it; there are: {there}.")
    return [figure for figure in figures if not wanted or figure.key in wanted]


def _form(given: argparse.Namespace) -> str:
    ending = Path(given.output).suffix.lower().lstrip(".") if given.output else ""
    form = given.format or (ending if ending in FORMATS else "md" if given.control else "html")
    if given.charts and form != "png":
        raise ConfigError("--charts belongs to --format png; html shows all of them.")
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

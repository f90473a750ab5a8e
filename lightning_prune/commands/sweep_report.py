"""``lightning-prune sweep-report``: whether pruning paid in a sweep, as HTML, Markdown, CSV, JSON or pictures."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.commands.output import write_or_print
from lightning_prune.reports.document import picture
from lightning_prune.reports.sweep.cells import choose_metric, read_arms
from lightning_prune.reports.sweep.charts import charts_of, key_of
from lightning_prune.reports.sweep.page import sweep_page
from lightning_prune.reports.sweep.result import SweepResult, analyse
from lightning_prune.reports.sweep.tables import content, markdown, numbers
from lightning_prune.reports.tables import csv_of

FORMATS = ("html", "md", "csv", "json")


def main(arguments: Sequence[str]) -> None:
    """Write or print the report.

    Raises:
        ConfigError: No readable arm, or a metric that none has.
        WriteError: A file cannot be written.
    """
    given = _parser().parse_args(arguments)
    arms, problems = read_arms(given.folder)
    result = analyse(arms, choose_metric(arms, given.metric), problems)
    ending = Path(given.out).suffix.lower().lstrip(".") if given.out else ""
    form = given.format or (ending if ending in FORMATS else "html")
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if form == "html":
        write_or_print(sweep_page(result), given.out or "report.html")
    elif form == "md":
        write_or_print(markdown(result), given.out)
    elif form == "csv":
        write_or_print(csv_of(*numbers(result)), given.out)
    else:
        write_or_print(json.dumps(content(result), indent=1, allow_nan=False) + "\n", given.out)
    if given.pictures is not None:
        _pictures(result, Path(given.pictures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-prune sweep-report", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="of a sweep: every arm.json in it and below it is read")
    parser.add_argument("--out", metavar="FILE", help="where to (default: report.html, or the terminal)")
    parser.add_argument("--format", choices=FORMATS, help="default: as --out ends, else html")
    parser.add_argument("--metric", help="a recorded metric (default: test_acc where all arms have it, else val_acc)")
    parser.add_argument("--pictures", metavar="FOLDER", help="write each chart there too, as an SVG file")
    return parser


def _pictures(result: SweepResult, folder: Path) -> None:
    """Every chart with its list of names, as NETWORK-COST.svg."""
    for network in result.networks:
        name = re.sub(r"[^\w.-]", "_", network)
        for chart in charts_of(result, network):
            path = folder / f"{name}-{chart.quantity}.svg"
            write_or_print(picture(chart.drawn(key_of(result, network))), path)

"""``lightning-prune report``: records of several seeds as a Markdown table."""

import argparse
from collections.abc import Sequence

from lightning_prune.record import RunRecord
from lightning_prune.reports.rounds import rounds_table


def main(arguments: Sequence[str]) -> None:
    """Print the table of :func:`rounds_table`."""
    parser = argparse.ArgumentParser("lightning-prune report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs that differ in their seed")
    parser.add_argument("--control", nargs="+", default=[], metavar="RUN", help="the control's folders, same order")
    parser.add_argument("--metric", default="val_acc", help="a recorded metric (default: val_acc)")
    parser.add_argument("--no-per-cent", action="store_true", help="show the metric as it is, not in points")
    given = parser.parse_args(arguments)
    runs, controls = ([RunRecord.read(path) for path in paths] for paths in (given.runs, given.control))
    print(rounds_table(runs, given.metric, controls, per_cent=not given.no_per_cent))

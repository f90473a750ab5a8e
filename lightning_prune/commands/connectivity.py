"""``lightning-prune connectivity``: does SGD noise decide where training ends? Instability analysis of a recipe."""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

from lightning_prune.environment import describe_environment
from lightning_prune.errors import ConfigError
from lightning_prune.files import atomic_write, write_json
from lightning_prune.instability.analysis import Analysis, Settings, Unit, find_tickets
from lightning_prune.instability.lines import measure
from lightning_prune.instability.planes import measure_planes
from lightning_prune.instability.report import draw, table
from lightning_prune.instability.share import Share
from lightning_prune.recipes import trusted
from lightning_prune.reports.pictures import check_pictures, draw_plane

RESULT, TABLE = "connectivity.json", "connectivity.md"


def main(arguments: Sequence[str]) -> None:
    """Run what is missing, measure, write JSON, table and pictures."""
    given, overrides = _parser().parse_known_args(arguments)
    tickets = find_tickets(given.tickets)
    seeds = sorted(tickets) if tickets else list(range(given.seeds))
    at = given.at.split(",") if given.at else ([] if tickets else ["0st"])
    settings = Settings(
        overrides, at, seeds, given.copies, tickets, given.same_noise, given.points, given.splits.split(","),
        given.align, given.calibration_batches,
    )  # fmt: skip
    if given.plane and not (given.pictures and given.plane > 1):
        raise ConfigError(
            f"--plane {given.plane}: expected places in each direction, at least 2, and no --no-pictures."
        )
    if given.pictures and not (given.list or given.only):
        check_pictures()
    analysis = Analysis(given.out, given.config, settings)
    if given.list:
        for unit in analysis.units():
            print(f"{'done' if analysis.is_done(unit) else 'to do'}  {_command(arguments, unit)}")
        return
    share, units = analysis.share(), _chosen(analysis, given.only)
    _train(analysis, share, units)
    if given.only:
        return
    share.wait(lambda: all(map(analysis.is_done, units)), "runs of other processes")
    if share.leads or share.count > 1:
        _conclude(analysis, share, given)


def _conclude(analysis: Analysis, share: Share, given: argparse.Namespace) -> None:
    """Measure the lines, those of this process or all; write JSON, table and pictures."""
    entries = measure(analysis, share)
    if not share.leads:
        return
    write_json(
        given.out / RESULT,
        {
            "format": "lightning_prune.connectivity",
            "version": 1,
            "settings": analysis.settings_json(),
            "lines": entries,
            "environment": describe_environment(),
        },
    )
    text = table(entries)
    with atomic_write(given.out / TABLE) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    written = [RESULT, TABLE]
    if given.pictures:
        written += draw(entries, given.out)
    if given.plane:
        for name, plane in measure_planes(analysis, given.plane).items():
            written.append(f"plane-{name}.svg")
            draw_plane(plane, given.out / written[-1])
    print(f"\n{text}\n\nWritten to {given.out}: {', '.join(written)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-prune connectivity",
        description=f"{__doc__} Further arguments change the recipe, as in `fit` (--trainer.max_epochs 3). Pruning "
        "callbacks, checkpoints and early stopping of the recipe are left out: every branch is one whole training. "
        "Under torchrun, processes divide runs on one device among them; a run on several (ddp) takes all of them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, type=Path, metavar="RECIPE", help="the recipe, or a run's config.yaml"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/connectivity"), help="folder of the analysis")
    parser.add_argument("--at", help="points at which copies branch off: 0st,100st,1%%,3ep (default: 0st)")
    parser.add_argument("--copies", type=int, default=2, help="branches at each point (default: 2)")
    parser.add_argument("--seeds", type=int, default=3, help="initialisations, seeds 0 to N - 1 (default: 3)")
    parser.add_argument(
        "--tickets", nargs="+", type=Path, default=[], metavar="RUN",
        help="folders of finished pruning runs: each ticket branches at its rewinding point, under the run's seed",
    )  # fmt: skip
    parser.add_argument("--same_noise", action="store_true", help="the control: copies share data order, too")
    parser.add_argument("--points", type=int, default=30, help="places on each line (default: 30)")
    parser.add_argument("--splits", default="train,test", help="where errors are measured (default: train,test)")
    parser.add_argument("--align", action="store_true", help="measure lines to an aligned copy as well")
    parser.add_argument("--calibration_batches", type=int, default=20, help="for BatchNorm statistics estimated anew")
    parser.add_argument(
        "--plane", type=int, default=0, metavar="N",
        help="also draw the plane through each branch point and the ends of its first two copies: N x N places",
    )  # fmt: skip
    parser.add_argument("--only", metavar="NAME", help="do one run (as --list names them) and nothing else")
    parser.add_argument("--list", action="store_true", help="print every run as a command of its own, and stop")
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="draw none")
    return parser


def _train(analysis: Analysis, share: Share, units: Sequence[Unit]) -> None:
    """Train what is missing, with Lightning's progress bar; say which training it is and about how long is left."""
    own = share.of(sorted(units, key=lambda unit: unit.at is not None))  # trunks first: branches wait for theirs
    to_do = [unit for unit in own if not analysis.is_done(unit)]
    for unit in own:
        if unit not in to_do:
            print(f"{unit.name}: done before")
    begin = time.monotonic()
    for done, unit in enumerate(to_do):
        trunk = Unit(unit.seed)
        if unit != trunk:
            share.wait(partial(analysis.is_done, trunk), trunk.name)
        rest = timedelta(seconds=round((time.monotonic() - begin) / max(done, 1) * (len(to_do) - done)))
        left = f", about {rest} left" if done else ""
        print(f"{unit.name}: training {done + 1} of {len(to_do)}{left}", flush=True)
        analysis.run(unit)


def _chosen(analysis: Analysis, only: str | None) -> list[Unit]:
    units = analysis.units()
    if only is None:
        return units
    found = [unit for unit in units if unit.name == only]
    if not found:
        raise ConfigError(f"--only {only}: there is no such run; there are {', '.join(unit.name for unit in units)}.")
    return found


def _command(arguments: Sequence[str], unit: Unit) -> str:
    rest = [word for word in arguments if word != "--list"]
    program = Path(sys.argv[0]).name if sys.argv and "lightning-prune" in sys.argv[0] else "lightning-prune"
    trust = [f"--trust={','.join(trusted())}"] if trusted() else []
    return shlex.join([program, "connectivity", *rest, *trust, "--only", unit.name])

"""``lightning-prune models``: what the channel engine reaches on torchvision's and timm's networks."""

import argparse
import fnmatch
import os
import time
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from lightning_prune.channels.budget import Budget
from lightning_prune.environment import describe_environment
from lightning_prune.errors import ConfigError
from lightning_prune.progress import progress
from lightning_prune.reports.coverage import COLUMNS, CoverageTable, ZooModel, check_model
from lightning_prune.reports.zoo import zoo

TITLE = "What the channel engine reaches on whole networks"
FRACTION = 0.5
EXPLANATION = f"""\
Random weights, `Budget(channels={FRACTION})`: every group of channels that can leave loses half. A row stands for all
of this: the compact network equals its masked parent (`error`: largest difference over the output's scale, in float64;
1e-9 is allowed), a training step with momentum before and after moves every parameter that has a gradient, and saving
and loading into a fresh network gives equal outputs, bit for bit.

`channels`, `params` and `MACs` are fractions kept. `plan s` is CPU time of trace and plan, `compact s` of the equality
check and the removal. Frozen channels are summarised by reason, with the number of axes and the first of them.

Half of every width keeps a quarter of the MACs of layers of which both widths shrink, and half of those of which one
does (depthwise, first and last layers). Where more than 30 % stay, the last column says how the MACs split."""
DOCUMENTS = (
    Path(__file__).parent.parent / "reports" / "COVERAGE.md",  # in an installed package
    Path(__file__).parent.parent.parent / "tests" / "zoo" / "COVERAGE.md",  # in the repository
)


def main(arguments: Sequence[str]) -> None:
    """Print the table that comes with the library, or run networks and print, and write, their rows.

    Raises:
        ConfigError: No network matches.
        FileFormatError: ``--resume`` with a file that is no coverage table.
    """
    parser = argparse.ArgumentParser("lightning-prune models", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="GLOB", help="run these networks, such as 'torchvision/resnet*' ('*' is all)"
    )
    parser.add_argument("--output", metavar="FILE", help="run, and write the rows to this Markdown file as they come")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows with a result that the file has, run only what is missing"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the networks and run nothing")
    given = parser.parse_args(arguments)
    if given.resume and not given.output:
        raise ConfigError("--resume needs --output FILE, the table to go on with.")
    if given.list or given.only or given.output:
        chosen = choose(given.only or ["*"])
        if given.list:
            print("\n".join(entry.name for entry in chosen))
        else:
            run(chosen, Path(given.output) if given.output else None, resume=given.resume)
        return
    print(next(path for path in DOCUMENTS if path.exists()).read_text(encoding="utf-8"))


def choose(patterns: Sequence[str]) -> list[ZooModel]:
    """The networks whose names match one of the patterns.

    Raises:
        ConfigError: A pattern that matches none.
    """
    entries = zoo()
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(entry.name, pattern) for entry in entries):
            raise ConfigError(f"--only {pattern}: no network has such a name; --list prints all {len(entries)}.")
    return [entry for entry in entries if any(fnmatch.fnmatchcase(entry.name, p) for p in patterns)]


def run(entries: Sequence[ZooModel], output: Path | None, *, resume: bool) -> None:
    """Check networks one after the other; print each row when it is there, and write the table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that seconds mean the same on every machine
    try:
        table = CoverageTable(output, TITLE, note(), resume=resume) if output else None
        done = [entry for entry in entries if table and table.has_result(entry)]
        if done:
            print(f"{len(done)} of {len(entries)} networks have a result in {output}", flush=True)
        print(" | ".join(COLUMNS), flush=True)
        left = [entry for entry in entries if entry not in done]
        with progress("networks", len(left)) as bar:
            for entry in left:
                bar.advance(0, now=entry.name)
                start = time.perf_counter()
                row = check_model(entry, Budget(channels=FRACTION))
                print(" | ".join([*row.cells(), f"{time.perf_counter() - start:.1f} s in all"]), flush=True)
                if table:
                    table.add(entry.section, row)
                bar.advance()
    finally:
        torch.set_num_threads(threads)


def note() -> str:
    """What the table says about how it was made."""
    environment = describe_environment()
    versions = ", ".join(
        f"{name} {environment.get(name) or _version(name)}" for name in ("python", "torch", "torchvision", "timm")
    )
    made = f"{date.today().isoformat()}; {versions}; {environment['device']}, {os.cpu_count()} cores, one thread"
    return f"Written by `lightning-prune models --output FILE` ({made}).\n\n{EXPLANATION}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

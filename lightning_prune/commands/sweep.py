"""``lightning-prune sweep``: networks x methods x budgets x seeds, every arm at the same training cost."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lightning_prune.errors import ConfigError, PruneError
from lightning_prune.recipes import trusted
from lightning_prune.sweep.driver import Driver
from lightning_prune.sweep.facts import network_facts
from lightning_prune.sweep.latency import measure_arms
from lightning_prune.sweep.planning import Arm, plan_arms
from lightning_prune.sweep.running import commands_of, is_done
from lightning_prune.sweep.schema import percent, read_sweep

T = TypeVar("T")


def main(arguments: Sequence[str]) -> None:
    """Plan, then run what is missing, list it, or measure latency.

    Raises:
        ConfigError: A sweep file or an option that does not fit, or an output folder with runs of another sweep.
        FileFormatError: A file that cannot be read.
    """
    words, extra = list(arguments), []
    if "--" in words:
        words, extra = words[: words.index("--")], joined(words[words.index("--") + 1 :])
    given = _parser().parse_args(words)
    extra += [f"--trust={','.join(trusted())}"] if trusted() else []
    sweep = read_sweep(given.config)
    if given.output is not None:
        sweep = replace(sweep, output=given.output)
    networks = chosen(given.networks, list(sweep.networks), "--networks", str)
    methods = chosen(given.methods, list(sweep.methods), "--methods", str)
    budgets = chosen(given.budgets, list(sweep.budgets), "--budgets", float)
    seeds = chosen(given.seeds, list(sweep.seeds), "--seeds", int)
    narrow = budgets if any(sweep.methods[name].kind == "narrowed" for name in methods) else []
    facts = {name: network_facts(sweep, sweep.networks[name], narrow, extra) for name in networks}
    arms = plan_arms(sweep, facts, networks, methods, budgets, seeds, extra)
    if given.list:
        _list(arms, sweep.output)
        return
    if given.measure or given.measure_again:
        problems = measure_arms(sweep, arms, facts, given.measure_again)
        _report(problems, len(arms))
        return
    driver = Driver(arms, sweep.output, facts, given.keep_going)
    driver.run()
    _report([f"{label}: {reason}" for label, reason in driver.failures.items()], len(arms))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-prune sweep",
        description=f"{__doc__} What follows -- goes to every fit, such as -- --data.root FOLDER. Finished arms are "
        "skipped, killed ones go on from their last checkpoint; several sweeps may share one output folder.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="the sweep file")
    for name in ("networks", "methods", "budgets", "seeds"):
        parser.add_argument(f"--{name}", metavar="A,B", help=f"only these {name} of the file")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="another folder than the file's")
    parser.add_argument("--list", action="store_true", help="print the command of every fit in order, and run nothing")
    parser.add_argument("--measure", action="store_true", help="only measure the latency of finished arms that lack it")
    parser.add_argument("--measure-again", action="store_true", help="the same for all finished arms")
    parser.add_argument("--keep-going", action="store_true", help="go on with the others when an arm fails")
    return parser


def joined(words: Sequence[str]) -> list[str]:
    """Options for every fit, ``--key value`` written as ``--key=value``.

    Raises:
        ConfigError: A word that belongs to no option.
    """
    found: list[str] = []
    for word in words:
        if word.startswith("--"):
            found.append(word)
        elif found and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            raise ConfigError(f"-- ... {word}: expected options for every fit after --, such as --data.root FOLDER.")
    return found


def chosen(given: str | None, known: list[T], name: str, read: Callable[[str], Any]) -> list[T]:
    """The values of a comma-separated option, all of the file's without it; in the file's order.

    Raises:
        ConfigError: One that the file does not have.
    """
    if given is None:
        return known
    wanted = []
    for text in given.split(","):
        try:
            value = read(text.strip())
        except ValueError:
            value = text
        if value not in known:
            raise ConfigError(f"{name} {text}: the sweep file has {', '.join(map(str, known))}.")
        wanted.append(value)
    return [value for value in known if value in wanted]


def _list(arms: Sequence[Arm], output: Path) -> None:
    for arm, stage in commands_of(arms):
        state = "done" if is_done(stage, output) else "to do"
        budget = "" if arm.budget is None else f", keeps {percent(arm.budget)} % of {arm.budget_on}"
        print(f"# {state}: {stage.folder} ({arm.method.kind}{budget})\n{shlex.join(stage.command)}")


def _report(problems: Sequence[str], count: int) -> None:
    """Repeat what failed; the exit status tells it."""
    if problems:
        first_lines = [problem.splitlines()[0] for problem in problems]
        print(f"\n{len(problems)} of {count} arms failed:", *first_lines, sep="\n  ", file=sys.stderr)
        raise PruneError(f"{len(problems)} of {count} arms failed.")

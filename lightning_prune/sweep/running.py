"""Running the stages of an arm: each once, resumed where it was killed, and never over another run."""

import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightning_prune.callbacks.claims import lock_folder
from lightning_prune.callbacks.training_cost import COST_NAME
from lightning_prune.errors import ConfigError, PruneError
from lightning_prune.files import read_json, write_json
from lightning_prune.recipes import parse_yaml
from lightning_prune.sweep.changes import read_recipe
from lightning_prune.sweep.planning import Arm, Stage

STAGE_NAME, RECIPE_NAME = "stage.json", "config.yaml"
FORMAT, VERSION = "lightning_prune stage", 1
_WHERE_ONLY = (
    "--data.root=",
    "--data.init_args.root=",
    "--trainer.enable_progress_bar=",
    "--trainer.default_root_dir=",
)
_LAST_LINES = 12

Runner = Callable[[Sequence[str], Path], int]
"""Runs a command line, its output into a file, and gives the exit status."""


class StageError(PruneError):
    """A fit that failed."""


class BusyError(PruneError):
    """A run that another process is at."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the run of a folder for this sweep.

    Raises:
        BusyError: Another sweep holds it.
    """
    file = _lock(folder.parent / ".held" / folder.name)
    try:
        yield
    finally:
        file.close()


def _lock(folder: Path) -> IO[str]:
    try:
        return lock_folder(folder)
    except ConfigError as error:
        raise BusyError(str(error)) from error


@contextmanager
def stopping() -> Iterator[None]:
    """Let a request to end (SIGTERM) end the fit that is under way, too; only a main thread can hear it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def essence_of(stage: Stage, output: Path) -> dict[str, Any]:
    """What makes a stage the training it is: the content of its recipes and its options, wherever files lie."""
    words, recipes, options = list(stage.command[2:]), [], {}
    while words:
        word = words.pop(0)
        if word == "--config":
            recipes.append(read_recipe(Path(words.pop(0))))
        elif not word.startswith(_WHERE_ONLY):
            key, _, value = word.partition("=")
            options[key] = value.replace(str(output), "OUTPUT")
    return {"recipes": json.loads(json.dumps(recipes, default=str)), "options": options}


def is_done(stage: Stage, output: Path) -> bool:
    """Whether a stage has been run to its end, by a sweep or by its command line alone.

    Raises:
        ConfigError: Its folder holds another run.
        FileFormatError: A file there is damaged.
    """
    if not (stage.folder / COST_NAME).exists():
        if (stage.folder / STAGE_NAME).exists():
            _check_same(stage, output)
        return False
    if (stage.folder / STAGE_NAME).exists():
        return bool(_check_same(stage, output)["done"])
    _check_recipe(stage)
    return True


def _check_same(stage: Stage, output: Path) -> dict[str, Any]:
    path = stage.folder / STAGE_NAME
    content = read_json(path, "a stage of a sweep")
    there, here = content.get("essence"), essence_of(stage, output)
    if there != here:
        raise ConfigError(
            f"{stage.folder} holds a run of another command: {difference(there, here)}. Give another output folder, "
            "delete this one, or set the sweep back."
        )
    return content


def _check_recipe(stage: Stage) -> None:
    """See that a run that no sweep has started is that of the stage, as far as its saved recipe tells."""
    path = stage.folder / RECIPE_NAME
    try:
        there = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{stage.folder} holds a run without {RECIPE_NAME}; delete it.") from error
    for word in stage.command[2:]:
        if not word.startswith("--") or "=" not in word or word.startswith(_WHERE_ONLY):
            continue
        key, _, value = word[2:].partition("=")
        found: Any = there
        for name in key.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        expected = parse_yaml(value)
        if isinstance(there, dict) and key.split(".")[0] in there and not _within(expected, found):
            raise ConfigError(
                f"{stage.folder} holds a run of another command: {key} is {found!r:.200} there, and {expected!r:.200} "
                "in this sweep. Give another output folder, or delete this one."
            )


def _within(expected: Any, found: Any) -> bool:
    """Whether what was asked for stands in a saved recipe, which holds every default beside it."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(_within(value, found.get(name)) for name, value in expected.items())
    if isinstance(expected, list):
        whole = isinstance(found, list) and len(found) >= len(expected)
        return whole and all(_within(a, b) for a, b in zip(expected, found, strict=False))
    if isinstance(expected, str) and isinstance(found, str) and "." in expected and "/" not in expected:
        return expected.rpartition(".")[2] == found.rpartition(".")[2]  # a class may be named by where it is defined
    return bool(expected == found)


def difference(there: Any, here: Any, where: str = "") -> str:
    """The first place at which two contents differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            if there.get(key) != here.get(key):
                return difference(there.get(key), here.get(key), f"{where}.{key}".removeprefix("."))
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, (a, b) in enumerate(zip(there, here, strict=True)):
            if a != b:
                return difference(a, b, f"{where}.{index}".removeprefix("."))
    return f"{where or 'it'} is {there!r:.300} there, and {here!r:.300} in this sweep"


def run_stage(stage: Stage, output: Path, runner: Runner) -> float:
    """Run a stage that is not done: from its newest checkpoint where it was killed, else from the beginning.

    Returns:
        Wall-clock seconds of the process, all tries together.

    Raises:
        StageError: The fit failed.
        BusyError: A fit that outlived its sweep is still writing there.
        ConfigError: Its folder holds another run, or a file that it needs is missing.
    """
    for path in stage.needs:
        if not path.exists():
            raise ConfigError(f"{stage.folder} needs {path}, which is not there: run the arm that writes it as well.")
    _lock(stage.folder).close()
    path = stage.folder / STAGE_NAME
    # not the one written at the end: a fit that goes on from there has nothing left to do, and no cost to tell
    checkpoints = sorted((stage.folder / "checkpoints").glob("resume*.ckpt"), key=lambda found: found.stat().st_mtime)
    words, spent = list(stage.command), 0.0
    if path.exists():
        spent = float(_check_same(stage, output)["seconds"])
    elif any(not found.name.startswith(".") for found in stage.folder.iterdir()):
        raise ConfigError(f"{stage.folder} holds files of a run that is not this sweep's: delete it, or give another.")
    if checkpoints:
        words.append(f"--ckpt_path={checkpoints[-1]}")
        _forget_later(checkpoints[-1])
    else:
        shutil.rmtree(stage.folder)
    content = {"format": FORMAT, "version": VERSION, "command": list(stage.command)}
    content["essence"] = essence_of(stage, output)
    write_json(path, content | {"done": False, "seconds": spent})
    log = stage.folder.parent / "logs" / f"{stage.folder.name}.log"
    written = log.stat().st_size if log.exists() else 0
    begin = time.monotonic()
    try:
        status = runner(words, log)
    finally:
        spent += time.monotonic() - begin
        write_json(path, content | {"done": False, "seconds": spent})
    if status != 0:
        raise StageError(f"{stage.folder}: exit status {status}. The end of {log}:\n{_tail(log, written)}")
    if not (stage.folder / COST_NAME).exists():
        raise StageError(f"{stage.folder}: the fit ended without {COST_NAME}; see {log}.")
    for leftover in (stage.folder / "checkpoints").glob("resume*.ckpt"):
        leftover.unlink()
    write_json(path, content | {"done": True, "seconds": spent})
    return spent


def _forget_later(checkpoint: Path) -> None:
    """Delete the checkpoints that a killed fit has written after this one: beside them, new ones get other names."""
    begin = checkpoint.stat().st_mtime
    for path in checkpoint.parent.glob("*.ckpt"):
        if path.stat().st_mtime > begin:
            path.unlink()


def _tail(log: Path, begin: int) -> str:
    """The last lines that a fit has written, without its command."""
    if not log.exists():
        return "    (nothing)"
    with log.open("rb") as file:
        file.seek(begin)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if not line.startswith("$ ")]
    return "\n".join(f"    {line[:300]}" for line in lines[-_LAST_LINES:])


def commands_of(arms: Sequence[Arm]) -> Iterator[tuple[Arm, Stage]]:
    """Every stage of the arms once, in an order in which they can be run."""
    seen = set()
    for arm in arms:
        for stage in arm.stages:
            if stage.folder not in seen:
                seen.add(stage.folder)
                yield arm, stage

"""A process of its own for every fit, without loading torch and Lightning anew in each."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_LOADED = ["lightning_prune.cli"]


def run_program(words: Sequence[str], log: Path) -> int:
    """Run ``lightning-prune`` with these words as a process of its own, which ends with this one.

    Where the system can fork, the process is a copy of one that has loaded the libraries and done nothing else: the
    seconds that this takes are then spent once a sweep.

    Args:
        words: ``lightning-prune`` and its words.
        log: Where its output is added.

    Returns:
        The exit status.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(words)}\n")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return _run_anew(words, log)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    child = context.Process(target=_run_here, args=(list(words), str(log)))
    child.start()
    try:
        child.join()
    except BaseException:
        child.terminate()
        child.join()
        raise
    return int(child.exitcode or 0)


def _run_here(words: list[str], log: str) -> None:
    """In the child: what ``python -m lightning_prune`` does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(log, "ab") as file, open(os.devnull, "rb") as nothing:
        for stream, source in ((0, nothing), (1, file), (2, file)):
            os.dup2(source.fileno(), stream)
    sys.argv[1:] = words[1:]
    runpy.run_module("lightning_prune", run_name="__main__")


def _run_anew(words: Sequence[str], log: Path) -> int:
    command = [sys.executable, "-m", "lightning_prune", *words[1:]]
    with (
        log.open("ab") as file,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT) as child,
    ):
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            raise

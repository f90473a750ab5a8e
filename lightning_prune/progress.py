"""A progress bar with the remaining time for long work outside training; nothing where nobody watches."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_live: list[Any] = []  # the bars on the screen: work inside other work adds a line to them


class Bar:
    """Where a piece of work tells how far it has come; made by :func:`progress`."""

    def __init__(self, bars: Any = None, task: Any = None) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: float = 1, now: str | None = None) -> None:
        """Count a part as done.

        Args:
            amount: How much, in the unit of the total.
            now: What comes next; stands behind the bar's name.
        """
        if self._bars is not None:
            self._bars.update(self._task, advance=amount, **({} if now is None else {"now": now}))


@contextmanager
def progress(what: str, total: float | None, now: str = "") -> Iterator[Bar]:
    """Show a bar with done, total and remaining time while the block runs; it goes when the block ends.

    Nothing is shown where standard error is no terminal, on processes other than the first, and while Lightning's
    ``RichProgressBar`` has the screen. Lines printed meanwhile stand above the bar.

    Args:
        what: The work, in a few words.
        total: Parts of it; None: not known, so no remaining time.
        now: The part that comes first.

    Yields:
        The bar to tell.

    Example:
        >>> with progress("ranks", total=3) as bar:
        ...     for _ in range(3):
        ...         bar.advance()
    """
    if not _is_watched():
        yield Bar()
        return
    if _live:
        task = _live[0].add_task(what, total=total, now=now)
        try:
            yield Bar(_live[0], task)
        finally:
            _live[0].remove_task(task)
        return
    with _bars() as bars:
        _live.append(bars)
        try:
            yield Bar(bars, bars.add_task(what, total=total, now=now))
        finally:
            _live.clear()


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("passed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[now]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file goes on going there
    )


def _is_watched() -> bool:
    try:
        terminal = sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False
    return terminal and _is_first() and not _lightning_draws()


def _is_first() -> bool:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return int(torch.distributed.get_rank()) == 0
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _lightning_draws() -> bool:
    """Whether something draws live on rich's own console, as Lightning's RichProgressBar does: two would mix."""
    if "rich" not in sys.modules:
        return False
    import rich

    console = rich.get_console()
    return bool(getattr(console, "_live_stack", None) or getattr(console, "_live", None))

"""Lines on the screen during a fit: through the progress bar where there is one, so that neither breaks the other."""

from collections.abc import Callable

import lightning.pytorch as pl


class LiveTable:
    """Prints the rows of a table as they come, on process 0; the header before the first.

    Args:
        verbose: False: nothing is printed.
    """

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._begun = False

    def restart(self) -> None:
        """Print the header again before the next row."""
        self._begun = False

    def print(self, trainer: pl.Trainer, header: Callable[[], str], row: str) -> None:
        """Print a row."""
        if not self._verbose or not trainer.is_global_zero:
            return
        lines = [row] if self._begun else [header(), row]
        self._begun = True
        bar = trainer.progress_bar_callback
        for line in lines:
            if bar is not None and getattr(bar, "is_enabled", True):
                bar.print(line)
            else:
                print(line)

"""Progress bars: seen on a terminal with the remaining time, silent elsewhere, and never in the way of the work."""

import io
import sys

import pytest
import rich
from rich.live import Live

from lightning_prune.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        if self.closed:
            raise ValueError("closed")
        return True


def a_screen(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error as a terminal; in the test itself, because pytest sets the stream anew before the call."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_a_terminal_sees_how_far_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = a_screen(monkeypatch)
    with progress("ranks [of] maps", total=640, now="conv1") as bar:
        bar.advance(64)
        bar.advance(576, now="conv2")
    seen = screen.getvalue()
    for text in ("ranks [of] maps", "640/640", "0:00:00", "left", "conv2"):
        assert text in seen
    assert seen.rstrip().endswith("\x1b[2K")  # the bar is gone when the work ends


def test_work_inside_work_adds_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = a_screen(monkeypatch)
    with progress("networks", total=2) as outer:
        for name in "ab":
            with progress(f"inside {name}", total=None) as inner:
                inner.advance()
            outer.advance()
    seen = screen.getvalue()
    assert "networks" in seen
    assert "inside b" in seen
    with progress("afterwards", total=1):
        pass
    assert "afterwards" in screen.getvalue()


def test_an_error_goes_through_and_the_next_bar_works(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = a_screen(monkeypatch)
    with pytest.raises(ValueError, match="inside"), progress("breaks", total=2):
        raise ValueError("inside")
    with progress("works", total=1) as bar:
        bar.advance()
    assert "1/1" in screen.getvalue()


@pytest.mark.parametrize("case", ["no terminal", "second process", "lightning draws", "closed"])
def test_elsewhere_nothing_is_written(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with progress("work", total=1) as bar:
            bar.advance(now="next")

    screen = a_screen(monkeypatch)
    quiet: io.StringIO = screen
    if case == "no terminal":
        quiet = io.StringIO()
        monkeypatch.setattr(sys, "stderr", quiet)
    elif case == "second process":
        monkeypatch.setenv("LOCAL_RANK", "1")
    elif case == "closed":
        closed = Terminal()
        closed.close()
        monkeypatch.setattr(sys, "stderr", closed)
    if case == "lightning draws":
        with Live(console=rich.get_console(), auto_refresh=False):
            work()
    else:
        work()
    assert quiet.getvalue() == ""

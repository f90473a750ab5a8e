"""Where the text of a report goes."""

from pathlib import Path

from lightning_prune.files import atomic_write


def write_or_print(text: str, path: str | Path | None) -> None:
    """Write ``text`` to a file, whole and atomically, and say so; print it where no file is named.

    Raises:
        WriteError: The file cannot be written.
    """
    if path is None:
        print(text, end="")
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written: {path}")

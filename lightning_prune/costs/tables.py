"""Plain text tables."""

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table whose columns are as wide as they must be; the first ``left`` columns are set to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        sides = ["<" if i < left else ">" for i in range(len(row))]
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines

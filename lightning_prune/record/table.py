"""The table of rounds that is printed while a run goes on."""

import math

from lightning_prune.record.round import Round

_TITLES = {"params": "params", "macs": "MACs"}


def header_text(monitor: str | None, unit: str = "weights") -> str:
    """The table's heading for :func:`row_text`, at most 79 columns.

    Args:
        monitor: Name of the metric in the column before the last; shortened to 18 characters.
        unit: What the rows count.
    """
    name = monitor or "-"
    name = name if len(name) <= 18 else name[:16] + ".."
    left = f"{'weights left':>12}  {'count':>17}"
    if unit != "weights":
        left = "  ".join(f"{title:>9}" for title in (unit, *_TITLES.values()))
    return f"{'round':>5}  {left}  {name:>18}  {'against dense':>13}"


def row_text(row: Round, monitor: str | None, dense: Round | None = None) -> str:
    """One line of the table that is printed round by round, at most 79 columns.

    Args:
        row: The round.
        monitor: Which of ``row.metrics`` to show.
        dense: Round 0, with which the value is compared; None shows no difference.
    """
    value = None if monitor is None else row.metrics.get(monitor)
    reference = None if monitor is None or dense is None or dense.round == row.round else dense.metrics.get(monitor)
    shown = "-" if value is None else _number(value)
    difference = "-" if value is None or reference is None else _number(value - reference, sign="+")
    left = f"{f'{100 * row.density:.3f} %':>12}  {row.kept:>17,}"
    if row.unit != "weights":
        costs = [row.costs.get(name, (1, 1)) for name in (row.unit, *_TITLES)]
        left = "  ".join(f"{f'{100 * now / max(dense, 1):.2f} %':>9}" for now, dense in costs)
    return f"{row.round:>5}  {left}  {shown:>18}  {difference:>13}"


def _number(value: float, sign: str = "") -> str:
    """Four decimals, or three digits and an exponent where those would show nothing or not fit."""
    if math.isnan(value):
        return "nan"
    short = value == 0 or 1e-4 <= abs(value) < 1e6 or math.isinf(value)
    return f"{value:{sign}.4f}" if short else f"{value:{sign}.2e}"

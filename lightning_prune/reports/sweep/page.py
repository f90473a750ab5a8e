"""The report on a sweep as one HTML file that asks for nothing else."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightning_prune.reports.document import chart_content, document
from lightning_prune.reports.sections import count_text, duration, surroundings
from lightning_prune.reports.sweep.cells import ROLES, Cell
from lightning_prune.reports.sweep.charts import charts_of, entries_of
from lightning_prune.reports.sweep.result import SweepResult
from lightning_prune.reports.sweep.scatter import SHAPE_NAMES, Entry
from lightning_prune.reports.sweep.verdicts import BEATS, sentence_of
from lightning_prune.reports.sweep.words import (
    cells_in_words,
    differences_in_words,
    how_told,
    scores_in_words,
)


def sweep_page(result: SweepResult) -> str:
    """The report."""
    title = f"Does it pay? {result.metric} of a sweep"
    entries = entries_of(result)
    charts: list[dict[str, Any]] = []
    parts = [f"<h1>{escape(title)}</h1>", _summary(result), f"<p>{escape(result.fairness)}</p>"]
    parts += [f'<p class="warn">{escape(note)}</p>' for note in result.notes]
    parts += [_methods(result, entries), _scores(result, entries)]
    for network in result.networks:
        parts.append(_network(result, network, entries, charts))
    parts.append(_where(result))
    names = [[entry.label, entry.name] for entry in entries.values()]
    return document(title, parts, names, charts)


def _summary(result: SweepResult) -> str:
    controls = {cell.method for cell in result.cells if cell.role is not None}
    methods = {cell.method for cell in result.cells if cell.role is None}
    budgets = {cell.budget for cell in result.cells if cell.budget is not None}
    seeds = {arm.seed for arm in result.arms}
    counts = (
        (len(result.arms), "arm"),
        (len(result.networks), "network"),
        (len(methods), "method"),
        (len(controls), "control"),
        (len(budgets), "budget"),
        (len(seeds), "seed"),
    )
    return f"<p>{', '.join(count_text(*pair) for pair in counts)}.</p>"


def _methods(result: SweepResult, entries: Mapping[str, Entry]) -> str:
    """Each method and control with its marker and letter; of methods, how they did against the first control."""
    first = {cell.method: cell for cell in reversed(result.cells)}
    lists: dict[str, list[str]] = {"Methods": [], "Controls": []}
    for name, entry in entries.items():
        said = [sentence_of("It", role, score) for role, score in list(result.scores.get(name, {}).items())[:1]]
        role = first[name].role
        what = SHAPE_NAMES[entry.kind] if role is None else ROLES[role]
        lists["Controls" if entry.control else "Methods"].append(
            f'<li class="{entry.look}" data-m="{entry.number}" tabindex="0"><span class="name">{entry.sign}'
            f'<b class="{entry.look}">{entry.label}</b>{escape(name)} <small>({escape(what)})</small></span>'
            f"{''.join(f'<br><small>{escape(line)}</small>' for line in said)}</li>"
        )
    return "".join(
        f'<h2>{title}</h2><ol class="methods sides">{"".join(items)}</ol>' for title, items in lists.items() if items
    )


def _scores(result: SweepResult, entries: Mapping[str, Entry]) -> str:
    if not result.scores or not result.roles:
        return ""
    head, rows = scores_in_words(result)
    body = "".join(_row(row, entries) for row in rows)
    return (
        "<h2>Wins and losses</h2><p>In how many networks and budgets each method beats its control / is worse / cannot "
        f"be told. {escape(how_told(result))}</p>{_table(head, f'<tbody>{body}</tbody>')}"
    )


def _network(result: SweepResult, network: str, entries: Mapping[str, Entry], charts: list[dict[str, Any]]) -> str:
    """Charts and tables of a network."""
    cells = result.networks[network]
    drawn = []
    for chart in charts_of(result, network):
        charts.append(chart_content(chart.figure))
        drawn.append(
            f'<figure data-chart="{len(charts) - 1}"><h3>{escape(chart.figure.title)}</h3>{chart.drawn()}'
            f"<figcaption>{escape(chart.figure.note)}</figcaption></figure>"
        )
    how = (
        "Points are means over seeds, lines up and down reach from the lowest to the highest. Filled: methods; hollow: "
        "controls. Smaller markers: smaller budgets. Rings and the dotted stair: the Pareto front of means, controls "
        "included."
    )
    pictures = f'<p>{how}</p><div class="charts">{"".join(drawn)}</div>' if drawn else ""
    return f"<h2>{escape(network)}</h2>{pictures}{_kept(result, cells, entries)}{_against(result, cells, entries)}"


def _kept(result: SweepResult, cells: Sequence[Cell], entries: Mapping[str, Entry]) -> str:
    head, rows = cells_in_words(result, cells)
    bodies = []
    for title, control in (("Methods", False), ("Controls", True)):
        own = [row for row, cell in zip(rows, cells, strict=True) if (cell.role is not None) == control]
        if own:
            apart = f'<tr class="apart"><th colspan="{len(head)}" scope="rowgroup">{title}</th></tr>'
            look = " class=controls" if control else ""
            bodies.append(f"<tbody{look}>{apart}{''.join(_row(row, entries) for row in own)}</tbody>")
    return f"<h3>What was kept, reached and spent</h3>{_table(head, ''.join(bodies))}"


def _against(result: SweepResult, cells: Sequence[Cell], entries: Mapping[str, Entry]) -> str:
    if not any(own.cell.network == cells[0].network for own in result.differences):
        return "<p>No control to compare with.</p>"
    head, rows = differences_in_words(result, cells)
    body = "".join(_row(row, entries) for row in rows)
    return f"<h3>Methods minus controls</h3>{_table(head, f'<tbody>{body}</tbody>', 'arms minus')}"


def _table(head: Sequence[str], bodies: str, look: str = "arms") -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return f'<div class="scroll"><table class="{look}"><thead><tr>{heads}</tr></thead>{bodies}</table></div>'


def _row(row: Sequence[str], entries: Mapping[str, Entry]) -> str:
    """A row whose first cell is a method; its entries stand before it."""
    first, *others = row
    cells = "".join(_cell(text) for text in others)
    return f"<tr><td><b>{entries[first].label}</b> {escape(first)}</td>{cells}</tr>"


def _cell(text: str) -> str:
    """A cell; its second line is small."""
    first, _, second = text.partition("\n")
    look = ' class="off"' if "off its limit" in second else ' class="beats"' if second.startswith(BEATS) else ""
    small = f"<br><small>{escape(second)}</small>" if second else ""
    return f"<td{look}>{escape(first)}{small}</td>"


def _where(result: SweepResult) -> str:
    """Versions, and every arm with its folder."""
    lines = []
    for arm in result.arms:
        value = arm.metrics.get(result.metric)
        off = arm.cost.deviation
        cells = [arm.network, arm.method, "" if arm.budget is None else f"{100 * arm.budget:.4g} %", str(arm.seed)]
        cells += ["" if value is None else f"{value * result.scale:.2f}", f"{arm.cost.macs:.4g}"]
        cells += [
            "no limit" if off is None else f"{100 * off:+.2f} %",
            duration(arm.cost.seconds),
            str(arm.folder or ""),
        ]
        lines.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    names = ("network", "method", "budget", "seed", f"{result.metric}{result.unit}", "multiply-adds spent")
    head = "".join(f"<th>{escape(name)}</th>" for name in (*names, "off its limit", "time", "folder"))
    return (
        f"<h2>Where it ran</h2>{surroundings(arm.versions for arm in result.arms)}"
        f"<details><summary>{count_text(len(lines), 'arm')}, one by one (each folder's arm.json holds the commands)"
        f'</summary><div class="scroll"><table class="words"><thead>'
        f"<tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )

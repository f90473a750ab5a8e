"""The parts of a report's page that are text: methods, rounds, layers, what stayed, where the runs ran."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lightning_prune.record import RunRecord
from lightning_prune.reports.figures import label_of
from lightning_prune.reports.runs import Group, Spread, spreads_of
from lightning_prune.reports.svg import colour_of
from lightning_prune.reports.tables import Cell, cell_text, table_of

MOST_BARS = 12
"""Methods whose layers are drawn; of the others the table speaks."""
MOST_METHODS = 12
"""Methods that are listed at once; the others are folded away."""
MOST_ROWS = 100
"""Rows of the table of rounds that are shown at once (page.css knows the number too)."""
MOST_NAMES = 3

_LEFT = {
    "weights": "weights left",
    "channels": "channels left",
    "blocks": "blocks left",
    "params": "parameters left",
    "macs": "MACs left",
}


def count_text(number: int, what: str) -> str:
    """``"1 run"``, ``"2 runs"``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def methods(groups: Sequence[Group], metric: str) -> str:
    """Each method with its colour, and in numbers what it lost and gained from the dense network to its last round."""
    items = [_method(index, group, metric) for index, group in enumerate(groups)]
    if not items:
        return ""
    shown, folded = items[:MOST_METHODS], items[MOST_METHODS:]
    more = ""
    if folded:
        more = f'<details><summary>{count_text(len(folded), "more method")}</summary><ol class="methods">'
        more += f"{''.join(folded)}</ol></details>"
    return f'<ol class="methods">{"".join(shown)}</ol>{more}'


def _method(index: int, group: Group, metric: str) -> str:
    seeds = f"seed {group.seeds}" if len(group.runs) == 1 else f"{len(group.runs)} runs, seeds {group.seeds}"
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{text}</dd></div>" for name, text in _facts(group, metric))
    key = '<svg class="key" viewBox="0 0 30 8" aria-hidden="true"><path class="way" d="M0 4H30"/></svg>'
    return (
        f'<li class="{colour_of(index)}" data-m="{index}" tabindex="0">{key}<span class="name">'
        f'<b class="{colour_of(index)}">{label_of(index)}</b>{escape(group.name)} '
        f"<small>({escape(seeds)})</small></span>"
        f'<dl class="facts">{facts}</dl></li>'
    )


def _facts(group: Group, metric: str) -> Iterable[tuple[str, str]]:
    """(what, HTML) from the dense network to the last round."""
    dense, last = group.points[0].values, group.points[-1].values
    if "metric" in dense and "metric" in last and len(group.points) > 1:
        before, after = dense["metric"].mean, last["metric"].mean
        text = f"{before:.4g} → <b>{after:.4g}</b> <small>({after - before:+.2g})</small>"
        yield f"{metric}, dense → round {group.points[-1].round}", text
    elif "metric" in last:
        yield metric, f"<b>{last['metric'].mean:.4g}</b>"
    for name, label in _LEFT.items():
        if name in last:
            yield label, f"<b>{last[name].mean:.3g} %</b>"
    for name, label in (("measured_speedup", "measured speed-up"), ("theoretical_speedup", "theoretical speed-up")):
        if name in last:
            yield label, f"<b>{last[name].mean:.3g} ×</b>"
    for name, spread in final_metrics(group).items():
        yield f"{name}, at the end", f"<b>{spread.mean:.4g}</b>{_range(spread)}"
    seconds = [sum(s for s in run.timing["seconds"] if s is not None) for run in group.runs]
    if any(seconds):
        yield "wall time, a run", duration(sum(seconds) / len(seconds))


def _range(spread: Spread) -> str:
    return "" if spread.low == spread.high else f" <small>({spread.low:.4g} to {spread.high:.4g})</small>"


def final_metrics(group: Group) -> dict[str, Spread]:
    """What was measured once at the end of the runs, such as test metrics."""
    found: dict[str, list[float]] = {}
    for run in group.runs:
        for name, value in run.final.items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append(float(value))
    return spreads_of(found)


def duration(seconds: float) -> str:
    """Seconds as ``12 s``, ``3.4 min`` or ``5.6 h``."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"


def rounds(groups: Sequence[Group], metric: str) -> str:
    """The table of all rounds."""
    head, rows = table_of(groups, metric)
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in head)
    whose = [index for index, group in enumerate(groups) for _ in group.points]
    lines = "".join(_row(index, row[1:]) for index, row in zip(whose, rows, strict=True))
    long = len(rows) > MOST_ROWS
    everything = f'<button type="button" id="all">Show all {len(rows):,} rows</button>' if long else ""
    return (
        "<h2>Rounds</h2><p>Means over runs. A click on a heading sorts.</p>"
        '<div class="tools"><button type="button" id="md">Copy as Markdown</button>'
        f'<button type="button" id="csv">Copy as CSV</button>{everything}</div>'
        f'<div class="scroll"><table id="rounds"><thead><tr>{heads}</tr></thead>'
        f"<tbody{' class=short' if long else ''}>{lines}</tbody></table></div>"
    )


def _row(index: int, cells: Sequence[Cell]) -> str:
    """A row; the method's letter stands for its name, which the script writes in full when it copies."""
    first = f'<td class="{colour_of(index)}">{label_of(index)}</td>'
    return f"<tr>{first}{''.join(f'<td>{escape(cell_text(cell))}</td>' for cell in cells)}</tr>"


def layers(groups: Sequence[Group]) -> str:
    """Bars of what each layer kept in the last round."""
    figures = []
    for index, group in enumerate(groups[:MOST_BARS]):
        bars = kept_of_layers(group)
        if not bars:
            continue
        number = max(len(run.rounds) for run in group.runs) - 1
        unit = group.runs[0].rounds[0].unit
        names = short_names(list(bars))
        drawn = "".join(_bar(name, *kept) for name, kept in zip(names, bars.values(), strict=True))
        title = f"{label_of(index)}: {unit} kept in round {number}"
        figures.append(
            f'<figure><h3>{escape(title)}</h3><div class="bars tall {colour_of(index)}">{drawn}</div></figure>'
        )
    if not figures:
        return ""
    left_out = len(groups) - MOST_BARS
    more = f"<p>{count_text(left_out, 'method')} more without a picture here.</p>" if left_out > 0 else ""
    return (
        "<h2>What each layer kept</h2><p>A full bar is the dense layer. Means over the runs that came so far.</p>"
        f'<div class="charts">{"".join(figures)}</div>{more}'
    )


def kept_of_layers(group: Group) -> dict[str, tuple[float, float]]:
    """What each layer kept and had, as means over the runs of a method that reached its last round."""
    length = max(len(run.rounds) for run in group.runs)
    last = [run.rounds[-1].per_layer for run in group.runs if len(run.rounds) == length]
    names = [name for name in last[0] if all(name in own for own in last)]
    return {
        name: (sum(own[name][0] for own in last) / len(last), sum(own[name][1] for own in last) / len(last))
        for name in names
    }


def short_names(names: Sequence[str]) -> list[str]:
    """Names of parameters without the part before and the word behind that all of them share."""
    parts = [name.split(".") for name in names]
    if len(parts) > 1:
        while all(len(own) > 1 and own[0] == parts[0][0] and not own[1].isdigit() for own in parts):
            parts = [own[1:] for own in parts]
        if all(len(own) > 1 and own[-1] == "weight" for own in parts):
            parts = [own[:-1] for own in parts]
    return [".".join(own) for own in parts]


def _bar(name: str, kept: float, total: float) -> str:
    part = 100 * kept / total if total else 100.0
    return (
        f'<div><span class="name">{escape(name)}</span>'
        f'<span class="track"><span style="width:{part:.1f}%"></span></span>'
        f'<span class="count">{part:.3g} % <small>of {total:,.0f}</small></span></div>'
    )


def frozen(groups: Sequence[Group]) -> str:
    """What may not leave, by reason."""
    found: dict[tuple[str, bool], dict[tuple[str, str], tuple[int, set[int]]]] = {}
    for index, group in enumerate(groups):
        for run in group.runs:
            for entry in run.frozen:
                key = str(entry.get("reason")), entry.get("axis") is None
                place = str(entry.get("name")), str(entry.get("axis"))
                size = entry.get("size")
                own = found.setdefault(key, {})
                known, seen = own.get(place, (size if isinstance(size, int) else 0, set()))
                own[place] = known, seen | {index}
    if not found:
        return ""
    lines = []
    for (reason, whole), entries in sorted(found.items(), key=lambda item: -len(item[1])):
        names = [name for name, _ in entries]
        more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
        total = sum(size for size, _ in entries.values())
        indices = sorted(set().union(*(seen for _, seen in entries.values())))
        who = ", ".join(label_of(i) for i in indices[:8]) + (", …" if len(indices) > 8 else "")
        what = count_text(total, "weight" if whole else "channel")
        cells = (reason, f"{', '.join(names[:MOST_NAMES])}{more}", who)
        lines.append(
            f"<tr><td>{escape(cells[0])}</td><td>{escape(cells[1])}</td>"
            f'<td class="number">{what}</td><td>{escape(cells[2])}</td></tr>'
        )
    return (
        "<h2>What stayed, and why</h2><p>Parameters and channels that no cut may touch.</p>"
        '<div class="scroll"><table class="words"><thead><tr><th>why</th><th>where</th><th class="number">how many</th>'
        f"<th>methods</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def surroundings(each: Iterable[Mapping[str, Any]]) -> str:
    """A list of versions and devices, all that runs or arms had of each."""
    found: dict[str, dict[str, None]] = {}
    for own in each:
        for name, value in own.items():
            if value is not None:
                found.setdefault(str(name), {})[str(value)] = None
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape('; '.join(values))}</dd>" for name, values in found.items())
    return f'<dl class="where">{items}</dl>'


def where(groups: Sequence[Group]) -> str:
    """Versions and devices, and every run with its folder."""
    if not groups:
        return ""
    runs = [(index, run) for index, group in enumerate(groups) for run in group.runs]
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell_text(cell))}</td>' for cell in _run(index, run))}</tr>" for index, run in runs
    )
    names = ("method", "seed", "rounds", "recipe", "commit", "wall time", "folder")
    head = f"<thead><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr></thead>"
    table = f'<div class="scroll"><table class="words">{head}<tbody>{lines}</tbody></table></div>'
    return (
        f"<h2>Where the runs ran</h2>{surroundings(run.environment for _, run in runs)}"
        f"<details><summary>{count_text(len(runs), 'run')}, one by one</summary>{table}</details>"
    )


def _run(index: int, run: RunRecord) -> list[Cell]:
    seconds = [s for s in run.timing["seconds"] if s is not None]
    commit = str(run.environment.get("git_commit") or "")[:10]
    changed = " (changed)" if commit and run.environment.get("git_changed") else ""
    return [
        label_of(index),
        run.seed,
        len(run.rounds),
        str(run.task.get("recipe") or ""),
        commit + changed,
        duration(sum(seconds)) if seconds else "",
        "" if run.folder is None else str(run.folder),
    ]

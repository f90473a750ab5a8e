"""A report as one HTML file that asks for nothing else: style, script and charts stand in it."""

from collections.abc import Sequence
from html import escape
from typing import Any

from lightning_prune.reports.figures import figures_of, label_of
from lightning_prune.reports.runs import Group
from lightning_prune.reports.svg import NUM_COLOURS, bar_chart, line_chart
from lightning_prune.reports.tables import Cell, cell_text, table_of

MOST_BARS = 12
"""Methods whose layers are drawn; of the others the table speaks."""

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1f24;--soft:#5c6570;--edge:#d5dae0;--grid:#e7eaee;
--k0:#0072b2;--k1:#c44e00;--k2:#00805c;--k3:#b0478a;--k4:#946200;--k5:#3d7ea6}
@media (prefers-color-scheme:dark){:root{--back:#14171b;--text:#e8eaed;--soft:#a2abb5;--edge:#3a414a;--grid:#282e35;
--k0:#56b4e9;--k1:#ff8c42;--k2:#2fc79a;--k3:#e58fc4;--k4:#e6b400;--k5:#9ad0f0}}
*{box-sizing:border-box}
body{margin:0 auto;padding:16px;max-width:1120px;background:var(--back);color:var(--text);
font:16px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:0 0 .25rem}
p,dd,figcaption{color:var(--soft);margin:.25rem 0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:24px}
figure{margin:0}svg{width:100%;height:auto;display:block}
svg text{fill:var(--text);font:12.5px system-ui,sans-serif}
.grid{stroke:var(--grid)}.ideal{stroke:var(--soft);stroke-dasharray:3 4}
svg polyline{fill:none;stroke:currentColor;stroke-width:1.8}
svg .p{fill:currentColor;stroke:transparent;stroke-width:10}
svg .front{fill:none;stroke:currentColor;stroke-width:1.5}
svg .w{stroke:currentColor;stroke-width:1.2;fill:none}
svg .end{fill:currentColor;font-weight:700}
.d1 polyline{stroke-dasharray:7 4}.d2 polyline{stroke-dasharray:2 3}
.whole{fill:var(--grid)}.kept{fill:var(--k0)}
.methods{list-style:none;padding:0}.methods li{margin:.4rem 0}.methods b{display:inline-block;min-width:1.6em}
.scroll{overflow-x:auto;max-height:75vh;border:1px solid var(--edge)}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:5px 9px;text-align:right;border-bottom:1px solid var(--grid)}
th:first-child,td:first-child{text-align:left;min-width:11em}
thead th{position:sticky;top:0;background:var(--back)}
button{font:inherit;color:inherit;background:none;border:1px solid var(--edge);border-radius:5px;padding:5px 10px;
cursor:pointer}
th button{border:0;padding:0;font-weight:600;text-align:inherit}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
.warn{border-left:4px solid var(--k1);padding:2px 12px}
""" + "".join(f".c{i}{{color:var(--k{i})}}" for i in range(NUM_COLOURS))

_SCRIPT = r"""
const table = document.getElementById("rounds"), body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") !== "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[column].textContent;
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const numbers = [Number(x), Number(y)];
    const found = numbers.some(Number.isNaN) ? x.localeCompare(y) : numbers[0] - numbers[1];
    return up ? found : -found;
  };
  body.append(...[...body.rows].sort(order));
}));
const cells = () => [heads, ...[...body.rows].map(row => [...row.cells])].map(row => row.map(c => c.textContent));
const markdown = () => {
  const safe = text => text.replace(/\\/g, "\\\\").replace(/\|/g, "\\|").replace(/</g, "&lt;").replace(/[\r\n]/g, " ");
  const lines = cells().map(row => "| " + row.map(safe).join(" | ") + " |");
  lines.splice(1, 0, "|" + " --- |".repeat(heads.length));
  return lines.join("\n") + "\n";
};
const csv = () => cells().map(row => row.map(
  text => /[",\r\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text).join(",")).join("\n") + "\n";
const copy = async (button, text) => {
  const label = button.dataset.label ??= button.textContent;
  let done = true;
  try { await navigator.clipboard.writeText(text); } catch {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  button.textContent = done ? "copied" : "could not copy";
  setTimeout(() => { button.textContent = label; }, 1500);
};
document.getElementById("md").addEventListener("click", event => copy(event.currentTarget, markdown()));
document.getElementById("csv").addEventListener("click", event => copy(event.currentTarget, csv()));
"""


def page_of(groups: Sequence[Group], metric: str, problems: Sequence[str] = ()) -> str:
    """The report.

    Args:
        groups: As of :func:`group_runs`.
        metric: The metric of their points.
        problems: What could not be read; stands at the top.
    """
    parts = [f"<h1>Pruning report: {escape(metric)}</h1>", _summary(groups)]
    parts += [f'<p class="warn">{escape(problem)}</p>' for problem in _notes(groups, problems)]
    parts.append(_methods(groups))
    figures = [
        f"<figure><h3>{escape(f.title)}</h3>{line_chart(f.title, f.lines, f.x, f.y, f.diagonal)}"
        f"<figcaption>{escape(f.note)}</figcaption></figure>"
        for f in figures_of(groups, metric)
    ]
    if figures:
        parts.append(
            "<h2>What was lost, what was gained</h2><p>Points: means over runs; whiskers: lowest and highest.</p>"
        )
        parts.append(f'<div class="charts">{"".join(figures)}</div>')
    head, rows = table_of(groups, metric)
    parts += [_table(head, rows), _layers(groups), _where(groups)]
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Pruning report: {escape(metric)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(parts)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _summary(groups: Sequence[Group]) -> str:
    runs, rounds = sum(len(g.runs) for g in groups), sum(len(run.rounds) for g in groups for run in g.runs)
    return f"<p>{_count(runs, 'run')}, {_count(len(groups), 'method')}, {_count(rounds, 'round')}.</p>"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _notes(groups: Sequence[Group], problems: Sequence[str]) -> list[str]:
    notes = list(problems)
    networks = {(run.rounds[0].unit, run.rounds[0].total) for group in groups for run in group.runs}
    for unit in sorted({unit for unit, _ in networks}):
        totals = sorted(total for own, total in networks if own == unit)
        if len(totals) > 1:
            found = ", ".join(f"{total:,}" for total in totals)
            notes.append(
                f"Different networks stand in one chart: they have {found} prunable {unit}. Compare with care."
            )
    return notes


def _methods(groups: Sequence[Group]) -> str:
    items = [
        f'<li><b class="c{index % NUM_COLOURS}">{label_of(index)}</b> {escape(group.name)} '
        f"<small>({_count(len(group.runs), 'run')}, seeds: {escape(group.seeds)})</small></li>"
        for index, group in enumerate(groups)
    ]
    return f'<ul class="methods">{"".join(items)}</ul>'


def _table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell_text(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return (
        "<h2>Rounds</h2><p>Means over runs. Click a heading to sort. "
        '<button type="button" id="md">Copy as Markdown</button> '
        '<button type="button" id="csv">Copy as CSV</button></p>'
        f'<div class="scroll"><table id="rounds"><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _layers(groups: Sequence[Group]) -> str:
    figures = []
    for index, group in enumerate(groups[:MOST_BARS]):
        last = max(group.runs, key=lambda run: len(run.rounds)).rounds[-1]
        bars = [
            (name, kept / total if total else 1.0, f"{kept:,} of {total:,}")
            for name, (kept, total) in last.per_layer.items()
        ]
        if bars:
            title = f"{label_of(index)}: {last.unit} kept in round {last.round}"
            figures.append(f"<figure><h3>{escape(title)}</h3>{bar_chart(title, bars)}</figure>")
    if not figures:
        return ""
    left_out = len(groups) - MOST_BARS
    more = f"<p>{_count(left_out, 'method')} more without a picture here.</p>" if left_out > 0 else ""
    return (
        "<h2>What each layer kept</h2><p>Of the run of each method that went furthest, in its last round.</p>"
        f'<div class="charts">{"".join(figures)}</div>{more}'
    )


def _where(groups: Sequence[Group]) -> str:
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        for run in group.runs:
            for name, value in run.environment.items():
                if value is not None:
                    found.setdefault(name, {})[str(value)] = None
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape('; '.join(values))}</dd>" for name, values in found.items())
    return f"<h2>Where the runs ran</h2><dl>{rows}</dl>" if rows else ""

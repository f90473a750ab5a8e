"""Files that ask for nothing else: a page with its style, script and charts, and a chart by itself."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning_prune.reports.figures import Figure
from lightning_prune.reports.svg import BOTTOM, HEIGHT, LEFT, NUM_COLOURS, RIGHT, TOP, WIDTH, Axis

_HERE = Path(__file__).parent
_COLOURS, _CHARTS, _STYLE, _SCRIPT = (
    (_HERE / name).read_text(encoding="utf-8") for name in ("colours.css", "charts.css", "page.css", "page.js")
)


def document(
    title: str, parts: Sequence[str], names: Sequence[Sequence[str]] = (), charts: Sequence[Mapping[str, Any]] = ()
) -> str:
    """A page that asks for nothing else.

    Args:
        title: Plain text.
        parts: HTML, in order.
        names: The label and the name of each method, for the script.
        charts: The content of each chart, as of :func:`chart_content`.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{_COLOURS}{_CHARTS}{_STYLE}{_classes()}</style></head>\n<body>{''.join(parts)}"
        f'<div id="tip" role="status" hidden></div>'
        f'<script type="application/json" id="data">{_json({"names": names, "charts": charts})}</script>'
        f"<script>\n{_SCRIPT}</script></body></html>\n"
    )


def picture(chart: str) -> str:
    """A chart, as of :func:`svg`, as a file of its own: in the light colours of the page, on white."""
    light = _COLOURS.partition("@media")[0]
    style = f"<style>\n{light}{_CHARTS}{_classes()}svg{{background:#fff}}</style>"
    named = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{named.replace('>', f'>{style}', 1)}\n"


def chart_content(figure: Figure) -> dict[str, Any]:
    """What the script needs to find the point under the pointer and to say what it is."""

    def axis(own: Axis) -> dict[str, Any]:
        content = {"label": own.label.removesuffix(" (log scale)"), "low": own.low, "high": own.high}
        return content | {"log": own.log, "falling": own.falling, "named": bool(own.named)}

    lines = []
    for line in figure.lines:
        points = [
            [m.tag, *map(_short, (m.x, m.y))] + ([*map(_short, (m.low, m.high)), m.count] if m.count > 1 else [])
            for m in line.marks
        ]
        lines.append({"m": line.colour, "p": points} | ({} if line.name is None else {"n": line.name}))
    frame = [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM]
    return {"x": axis(figure.x), "y": axis(figure.y), "tag": figure.tag, "frame": frame, "lines": lines}


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _json(content: Any) -> str:
    """JSON that cannot end the element that holds it, whatever stands in its texts."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _classes() -> str:
    return "".join(f".c{i}{{color:var(--k{i})}}" for i in range(NUM_COLOURS))

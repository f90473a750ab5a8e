"""The report's page in a real browser: drawn, sorted, hovered over, copied; on a phone, in the dark, with many runs."""

import csv
import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.files import write_json
from lightning_prune.record import RunRecord
from lightning_prune.reports.page import page_of
from lightning_prune.reports.runs import group_runs
from lightning_prune.reports.tables import markdown_of, table_of
from tests._helpers.runs import run_of

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]  # fmt: skip
HOSTILE = "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>\"|&\n"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 812}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next((found for found in map(shutil.which, NAMES) if found), None)
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'lightning-prune[test]'")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield chromium
        chromium.close()


def runs(folder: Path, layer: str = "conv", method: str = "Pruner") -> list[RunRecord]:
    """Two methods, two seeds each, with everything a page can show."""
    found = []
    for name, shift in ((method, 0.0), ("Other", 0.05)):
        for seed in (0, 1):
            run = run_of(seed, [0.9 - shift * r - 0.01 * seed - 0.002 * r * r for r in range(5)], name, layer)
            run.frozen = [{"name": layer, "axis": 0, "size": 3, "reason": f"an output, {layer}", "where": "linear"}]
            run.task = {"data": layer, "recipe": layer}
            run.final = {"test_acc": 0.8 - shift}
            run.folder = folder / f"{name[:5]}{seed}".replace("<", "_")
            run.folder.mkdir(parents=True)
            lines = [
                {"rounds": [r, r + 1], "density": [0.5**r, 0.5 ** (r + 1)], "alphas": [0.0, 0.5, 1.0],
                 "errors": {"val": [0.1, 0.1 + 0.02 * r, 0.12]}, "barriers": {"val": 0.02 * r}}
                for r in range(4)
            ]  # fmt: skip
            write_json(
                run.folder / "connectivity.json", {"format": "lightning_prune.rounds", "version": 1, "lines": lines}
            )
            layers = {layer: {"ranks": [float(c) for c in range(9)], "limit": 8, "kept": [4, 5, 6, 7, 8]}}
            cuts = [{"round": 1, "images": 64, "layers": layers}]
            write_json(run.folder / "ranks.json", {"format": "lightning_prune.ranks", "version": 1, "cuts": cuts})
            found.append(run)
    return found


class Opened:
    """A page that is open, with all that it said and asked for."""

    def __init__(self, browser: Any, path: Path, viewport: dict[str, int], **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.context = browser.new_context(viewport=viewport, **options)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.set_default_timeout(200_000)  # a busy machine is no failure
        self.page.goto(path.as_uri())

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *error: Any) -> None:
        self.context.close()
        if error[0] is None:
            assert self.said == []
            assert [url for url in self.asked if not url.endswith(".html")] == []  # nothing but pages of these tests


def write(folder: Path, records: list[RunRecord]) -> Path:
    path = folder / "report.html"
    path.write_text(page_of(group_runs(records, "val_acc"), "val_acc"), encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, runs(tmp_path / "runs"))


def column(page: Any, number: int) -> list[str]:
    return page.eval_on_selector_all(f"#rounds tbody td:nth-child({number})", "cells => cells.map(c => c.textContent)")


def point(page: Any, chart: int, line: int, number: int) -> tuple[float, float]:
    """Where a point of a chart is on the screen."""
    return page.evaluate(
        """async ([chart, line, number]) => {
            const svg = document.querySelectorAll("figure[data-chart] svg")[chart];
            svg.scrollIntoView({block: "center"});
            await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));  // scrolled for good
            const path = svg.querySelectorAll(".line .dots")[line];
            const [x, y] = path.getAttribute("d").split("M")[number + 1].split("h")[0].split(" ").map(Number);
            const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
            return [at.x, at.y];
        }""",
        [chart, line, number],
    )


def test_charts_are_drawn_and_nothing_complains(browser: Any, path: Path) -> None:
    with Opened(browser, path, DESKTOP) as page:
        titles = page.eval_on_selector_all("h2", "heads => heads.map(h => h.textContent)")
        assert titles == [
            "What was lost, what was gained", "Rounds", "What each layer kept", "What stayed, and why",
            "Are successive rounds connected?", "Ranks of feature maps", "Where the runs ran"]  # fmt: skip
        boxes = page.eval_on_selector_all(
            "figure[data-chart] svg",
            """charts => charts.map(svg => {
                const box = part => { const b = part.getBBox(); return [b.x, b.y, b.x + b.width, b.y + b.height]; };
                return {lines: [...svg.querySelectorAll(".way")].map(box), texts: [...svg.querySelectorAll("text")].map(
                    text => [text.textContent, text.getBoundingClientRect(), svg.getBoundingClientRect()])};
            })""",
        )
        assert len(boxes) == 5 + 3  # sparsity, parameters, MACs, latency, speed-up; barriers, lines of two methods
        for chart in boxes:
            assert chart["lines"]
            for left, top, right, bottom in chart["lines"]:
                assert 60 < left < right < 410
                assert 10 < top <= bottom < 260
            for text, own, whole in chart["texts"]:
                assert own["left"] >= whole["left"] - 1, text
                assert own["right"] <= whole["right"] + 1, text
                assert own["top"] >= whole["top"] - 1, text
        assert page.eval_on_selector_all(".bars .track span", "bars => bars.map(b => b.style.width)") == ["6.2%"] * 2
        assert page.locator(".front").count() > 0


def test_a_click_on_a_heading_sorts(browser: Any, path: Path) -> None:
    with Opened(browser, path, DESKTOP) as page:
        heads = page.eval_on_selector_all("#rounds th", "heads => heads.map(h => h.textContent)")
        number = heads.index("val_acc") + 1
        button = page.locator("#rounds th button").nth(number - 1)
        button.click()
        values = [float(text) for text in column(page, number)]
        assert values == sorted(values)
        assert len(set(values)) > 5
        button.click()
        assert [float(text) for text in column(page, number)] == sorted(values, reverse=True)
        assert page.locator("#rounds th[aria-sort]").count() == 1
        speedup = heads.index("measured speed-up (ratio of latencies)") + 1
        for _ in range(2):  # what no round 0 has stays at the end, whichever way it is sorted
            page.locator("#rounds th button").nth(speedup - 1).click()
            assert column(page, speedup)[-2:] == ["", ""]
            assert "" not in column(page, speedup)[:-2]


def test_hover_and_touch_show_values(browser: Any, path: Path) -> None:
    with Opened(browser, path, DESKTOP) as page:
        assert not page.locator("#tip").is_visible()
        page.mouse.move(*point(page, 0, 0, 2))
        text = page.locator("#tip").inner_text()
        assert text.splitlines() == [
            "A Pruner", "round 2", "weights left, % of prunable: 25",
            "val_acc (higher is better): 0.887, mean of 2 (0.882 to 0.892)"]  # fmt: skip
        x, y = point(page, 0, 0, 2)
        page.mouse.move(x + 70, y - 90)
        assert not page.locator("#tip").is_visible()
        page.locator(".methods li").nth(1).hover()
        seen = page.eval_on_selector_all(
            "figure[data-chart='0'] .line", "lines => lines.map(l => Number(getComputedStyle(l).opacity))"
        )
        assert seen == [0.12, 1]
    with Opened(browser, path, PHONE, has_touch=True, is_mobile=True) as page:
        page.touchscreen.tap(*point(page, 0, 1, 4))
        assert page.locator("#tip").inner_text().startswith("B Other\nround 4\n")
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 375


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(browser: Any, path: Path, scheme: str) -> None:
    with Opened(browser, path, DESKTOP, color_scheme=scheme) as page:
        colours = page.evaluate(
            """() => {
                const of = (part, name) => getComputedStyle(document.querySelector(part))[name];
                const lines = [...document.querySelectorAll(".methods li")].map(l => getComputedStyle(l).color);
                return [of("body", "backgroundColor"), of("body", "color"), of("figcaption", "color"), ...lines];
            }"""
        )
        back, *others = map(luminance, colours)
        assert (back > 0.5) == (scheme == "light")
        for colour, least in zip(others, (7, 4.5, 4.5, 4.5), strict=True):
            assert (max(back, colour) + 0.05) / (min(back, colour) + 0.05) >= least


@pytest.mark.parametrize("width", [320, 375, 768])
def test_narrow_screens_need_no_sideways_scrolling(browser: Any, path: Path, width: int) -> None:
    with Opened(browser, path, {"width": width, "height": 812}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        small = page.eval_on_selector_all(
            "svg text", "texts => Math.min(...texts.map(t => t.getBoundingClientRect().height))"
        )
        assert small >= 8


def test_names_do_no_harm(browser: Any, tmp_path: Path) -> None:
    path = write(tmp_path, runs(tmp_path / "runs", HOSTILE, HOSTILE))
    with Opened(browser, path, DESKTOP) as page:
        page.mouse.move(*point(page, 0, 0, 1))
        assert "<script>window.harmed" in page.locator("#tip").inner_text()
        assert page.locator("img").count() == 0
        assert page.evaluate("window.harmed") is None
        page.locator("#rounds th button").first.click()
        assert "<script>window.harmed" in page.locator(".methods li").first.inner_text()


def test_the_table_is_copied_as_markdown_and_csv(browser: Any, path: Path, tmp_path: Path) -> None:
    head, rows = table_of(group_runs(runs(tmp_path / "again"), "val_acc"), "val_acc")
    with Opened(browser, path, DESKTOP, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.click("#md")
        page.wait_for_selector("#md[data-copied=true]")  # its text says so for a moment only
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.replace("\r", "").splitlines() == markdown_of(head, rows).splitlines()
        page.click("#csv")
        page.wait_for_selector("#csv[data-copied=true]")  # its text says so for a moment only
        read = list(csv.reader(io.StringIO(page.evaluate("navigator.clipboard.readText()"))))
        assert read[0] == head
        assert [row[:2] for row in read[1:]] == [[str(cell) for cell in row[:2]] for row in rows]


def test_five_hundred_runs_of_twenty_rounds_stay_quick(browser: Any, tmp_path: Path) -> None:
    """Each run a method of its own, which is the most lines and rows that there can be.

    Seconds are those of the processor, in this process and in the page's main thread: others on the machine do not
    count.
    """
    records = [run_of(s, [0.9 - 0.0001 * s - 0.01 * r for r in range(20)], rate=s) for s in range(500)]
    begin = time.process_time()
    path = write(tmp_path, records)
    made = time.process_time() - begin
    assert path.stat().st_size < 6e6
    empty = tmp_path / "empty.html"
    empty.write_text("<!DOCTYPE html><title>empty</title>", encoding="utf-8")
    with Opened(browser, empty, DESKTOP) as page:
        clock = page.context.new_cdp_session(page)
        clock.send("Performance.enable", {"timeDomain": "threadTicks"})

        def used() -> float:
            metrics = clock.send("Performance.getMetrics")["metrics"]
            return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

        page.goto(path.as_uri())
        page.mouse.move(*point(page, 0, 3, 5))
        assert page.locator("#tip").is_visible()
        shown = used()
        assert shown > 0
        assert made + shown < 10
        page.locator("#rounds th button").nth(4).click()
        assert page.locator("#rounds th[aria-sort=ascending]").count() == 1
        for number in range(5):
            page.mouse.move(*point(page, 0, 3, number))
            assert page.locator("#tip").is_visible()
        print(f"made in {made:.2f} s, shown in {shown:.2f} s, sorted and pointed at in {used() - shown:.2f} s")
        assert used() - shown < 3

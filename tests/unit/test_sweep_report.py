"""The report on a sweep: against NumPy, SciPy and brute force, with everything that a sweep may lack."""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from lightning_prune.cli import main
from lightning_prune.errors import ConfigError
from lightning_prune.record import Arm, ArmLatency
from lightning_prune.reports.sweep.cells import ROLES, cells_of, choose_metric, read_arms
from lightning_prune.reports.sweep.charts import charts_of, entries_of
from lightning_prune.reports.sweep.fairness import fairness_of, notes_of, off_limit
from lightning_prune.reports.sweep.page import sweep_page
from lightning_prune.reports.sweep.result import analyse
from lightning_prune.reports.sweep.scatter import name_places
from lightning_prune.reports.sweep.tables import content, markdown, numbers
from lightning_prune.reports.sweep.verdicts import BEATS, UNTOLD, WORSE, Score, on_front, sentence_of
from tests._helpers.pages import Page
from tests._helpers.sweeps import CONTROLS, LIMIT, METHODS, arm_of, write_sweep


def seeds_of(method: str, values: list[float], first: int = 0, **others: Any) -> list[Arm]:
    return [arm_of(method, first + index, value, **others) for index, value in enumerate(values)]


@pytest.mark.parametrize(("lower", "metric"), [(False, "test_acc"), (True, "test_loss")])
@pytest.mark.parametrize("shift", [-0.05, 0.0, 0.05])
def test_differences_are_those_of_scipy(shift: float, lower: bool, metric: str) -> None:
    noise = np.random.default_rng(3)
    control = noise.normal(0.8, 0.02, 4)
    method = control + shift + noise.normal(0, 0.01, 4)
    arms = [
        *(arm_of("cut", i, metrics={metric: v}) for i, v in enumerate(method)),
        arm_of("cut", 9, metrics={metric: 0.1}),  # a seed that the control lacks
        *(arm_of("small", i, kind="scratch", metrics={metric: v}) for i, v in enumerate(control)),
    ]
    (found,) = analyse(arms, metric).differences
    expected = stats.ttest_rel(method, control)
    interval = expected.confidence_interval(0.95)
    assert found.seeds == (0, 1, 2, 3)
    assert found.mean == pytest.approx(np.mean(method - control))
    assert found.mean - found.half_width == pytest.approx(interval.low)
    assert found.mean + found.half_width == pytest.approx(interval.high)
    better, worse = (interval.high < 0, interval.low > 0) if lower else (interval.low > 0, interval.high < 0)
    assert found.verdict == (BEATS if better else WORSE if worse else UNTOLD)
    assert (found.verdict == UNTOLD) == (expected.pvalue > 0.05)
    assert (found.verdict == UNTOLD) == (shift == 0.0)


def test_one_seed_decides_nothing() -> None:
    result = analyse([arm_of("cut", 0, 0.9), arm_of("small", 0, 0.1, kind="scratch")], "test_acc")
    (found,) = result.differences
    assert (found.seeds, found.verdict) == ((0,), UNTOLD)
    assert math.isnan(found.half_width)
    assert "| +80.00 cannot be told, n = 1 |" in markdown(result)
    assert result.cells[0].deviation is None
    row = dict(zip(*(lambda head, rows: (head, rows[0]))(*numbers(result)), strict=True))
    assert (row["scratch_cost_low"], row["scratch_cost_mean"]) == (None, pytest.approx(0.8))


def test_a_tie_is_no_win() -> None:
    arms = [*seeds_of("cut", [0.8, 0.7]), *seeds_of("small", [0.8, 0.7], kind="scratch")]
    assert analyse(arms, "test_acc").differences[0].verdict == UNTOLD


def test_controls_are_those_of_the_budget_and_the_shape() -> None:
    arms = [
        *seeds_of("l1", [0.8, 0.81]),
        *seeds_of("l1", [0.7, 0.71], budget=0.25),
        *seeds_of("taylor", [0.8, 0.81], kept=0.44),
        *seeds_of("masks", [0.8, 0.81], kind="rounds"),
        *seeds_of("small_l1", [0.7, 0.72], kind="scratch", of="l1", kept=0.4),
        *seeds_of("small_hrank", [0.7, 0.72], kind="scratch", of="hrank", kept=0.45),
        *seeds_of("dense", [0.9, 0.91], kind="dense", budget=None),
        *seeds_of("late", [0.1, 0.2], first=7, kind="narrowed"),  # no seed in common
    ]
    result = analyse(arms, "test_acc")
    found = {(own.cell.method, own.cell.budget, own.role): own for own in result.differences}
    assert found["l1", 0.5, "scratch_cost"].control.method == "small_l1"  # its own shape, though another is nearer
    assert found["taylor", 0.5, "scratch_cost"].control.method == "small_hrank"  # 0.45 is nearer to 0.44 than 0.4
    assert found["masks", 0.5, "scratch_cost"].control.method == "small_hrank"
    assert not found["masks", 0.5, "scratch_cost"].same_unit
    assert found["l1", 0.25, "dense"].control.method == "dense"
    assert ("l1", 0.25, "scratch_cost") not in found
    assert not any(role == "narrowed_cost" for *_, role in found)
    assert (result.scores["l1"]["scratch_cost"].told, result.scores["l1"]["scratch_cost"].missing) == (1, 1)
    assert result.scores["masks"]["scratch_cost"].unlike == 1
    text = markdown(result)
    assert "no such control" in text
    assert "its budget: 50 % of MACs" in text
    assert "budgets count different things in 1" in text


def test_wins_and_losses_are_counted_over_networks_and_budgets() -> None:
    arms = []
    gains = {("a", 0.5): 0.05, ("a", 0.25): -0.05, ("b", 0.5): 0.06, ("b", 0.25): 0.0}
    for (network, budget), gain in gains.items():
        values = [0.5, 0.52, 0.51]
        jitter = [0.001, -0.001, 0.0]
        arms += seeds_of("small", values, kind="scratch", network=network, budget=budget)
        arms += seeds_of(
            "cut", [v + gain + j for v, j in zip(values, jitter, strict=True)], network=network, budget=budget
        )
    result = analyse(arms, "test_acc")
    assert result.scores == {"cut": {"scratch_cost": Score(beats=2, worse=1, untold=1)}}
    assert sentence_of("cut", "scratch_cost", result.scores["cut"]["scratch_cost"]) == (
        "cut beats its control (from scratch, equal cost) in 2 of 4 comparisons (worse in 1, cannot be told in 1)."
    )
    assert "does not beat its control" in sentence_of("cut", "dense", Score(worse=3, untold=1))
    assert "is not shown to beat its control (dense, trained as long) in any of 2" in sentence_of(
        "cut", "dense", Score(untold=2)
    )
    assert "has no such control" in sentence_of("cut", "dense", Score(missing=2))


def test_the_front_is_that_of_brute_force() -> None:
    noise = np.random.default_rng(5)
    for _ in range(30):
        points = noise.integers(1, 6, size=(12, 2)) / 10  # coarse, so that many tie
        arms = [arm_of(f"m{i:02}", value=float(y), kept=float(x)) for i, (x, y) in enumerate(points)]
        cells = cells_of(arms, "test_acc")
        expected = {
            i for i, (x, y) in enumerate(points) if not any((a <= x and b >= y) and (a < x or b > y) for a, b in points)
        }
        assert on_front(cells, "macs", "test_acc") == expected
        assert 0 < len(expected) < 12


def test_cells_hold_means_and_spreads_over_seeds() -> None:
    values = [0.8, 0.84, 0.79]
    arms = seeds_of("cut", values, cost=1.5 * LIMIT, before={"val_acc": 0.85}, after_cut={"val_acc": 0.3})
    arms += seeds_of("dense", [0.9], kind="dense", budget=None, cost=0.75 * LIMIT)
    cell = cells_of(arms, "test_acc")[0]
    metric = cell.values["metric"]
    assert (metric.mean, metric.low, metric.high) == (pytest.approx(np.mean(values)), 0.79, 0.84)
    assert cell.deviation == pytest.approx(np.std(values, ddof=1))
    assert cell.values["cost"].mean == pytest.approx(2.0)
    assert cell.values["seconds"].mean == pytest.approx(61.0)
    assert (cell.values["before"].mean, cell.values["after_cut"].mean) == (0.85, 0.3)
    text = markdown(analyse(arms, "test_acc"))
    assert "| val_acc, % before the cut → right after it |" in text
    assert "| 85.00 → 30.00 | 2.000 (off its limit by +50.0 %) |" in text
    assert "| no dense arm (off its limit by +50.0 %) |" in markdown(analyse(arms[:3], "test_acc"))


def test_masked_networks_keep_the_dense_operations() -> None:
    arms = [
        arm_of("masks", kind="rounds", budget=0.2, value=0.85),
        arm_of("timed", kind="rounds", budget=0.2, latency=ArmLatency(0.9, 0.8, 1.0, 8, 1, "cpu")),
        arm_of("cut", ratio=0.6),
        arm_of("untimed"),
        arm_of("dense", kind="dense", budget=None, value=0.9),
    ]
    result = analyse(arms, "test_acc")
    charts = {chart.quantity: chart for chart in charts_of(result, "net")}
    names = {entry.label: name for name, entry in entries_of(result).items()}
    places = {
        quantity: {names[spot.line.label]: spot.line.marks[0].x for spot in chart.spots}
        for quantity, chart in charts.items()
    }
    assert places["macs"] == {"masks": 100.0, "timed": 100.0, "cut": 50.0, "untimed": 50.0, "dense": 100.0}
    assert places["nonzero_params"]["masks"] == pytest.approx(20.0)
    assert places["latency"] == pytest.approx({"masks": 100.0, "timed": 90.0, "cut": 60.0, "dense": 100.0})
    assert "Not known, so not drawn: untimed, 50 % of MACs." in charts["latency"].figure.note
    assert "masked networks that were not timed stand at the dense latency" in charts["latency"].figure.note
    assert "batches of 64, threads: 1, cpu; batches of 8" in charts["latency"].figure.note
    notes = " ".join(result.notes)
    assert "Latency was not measured of net untimed, 50 % of MACs." in notes
    assert "they do not compare" in notes


def test_costs_off_their_limit_are_named() -> None:
    costs = {"even": 1.0, "edge": 1.02, "over": 1.021, "under": 0.9}
    arms = [arm_of(name, cost=part * 1000.0, limit=1000.0) for name, part in costs.items()]
    arms += [arm_of("free", limit=None), arm_of("steps", kind="narrowed", equal="steps", limit=None)]
    assert [(arm.method, pytest.approx(part)) for arm, part in off_limit(arms)] == [("under", -0.1), ("over", 0.021)]
    assert fairness_of(arms) == (
        "The costs of 4 arms with a limit differ from it by at most -10 % (net under 50 % seed 0); 2 by more than 2 %. "
        "2 arms have no limit of cost: what is equal there is the steps."
    )
    notes = notes_of(arms, cells_of(arms, "test_acc"), "test_acc")
    assert "Not a fair comparison: net under 50 % seed 0 spent -10 % of its limit." in notes
    assert not any("edge" in note for note in notes)
    assert any("Without a limit of cost" in note and "free" in note and "steps" not in note for note in notes)
    other = [*arms, arm_of("rich", cost=1100.0, limit=1100.0)]
    assert any("limits of net's arms differ" in n for n in notes_of(other, cells_of(other, "test_acc"), "test_acc"))
    page = sweep_page(analyse(arms, "test_acc"))
    assert page.count('class="off"') == 2
    assert "No arm states" in fairness_of([arm_of(limit=None)])


def test_what_is_missing_is_said() -> None:
    arms = [
        *seeds_of("cut", [0.8, 0.7, 0.9]),
        *seeds_of("half", [0.8, math.nan]),
        *seeds_of("huge", [0.8, 1e308, -1e308]),
        *seeds_of("small", [0.7, 0.6, 0.8], kind="scratch", network="other"),
        arm_of("bare", metrics={"val_acc": 0.5}, network="other"),
    ]
    result = analyse(arms, "test_acc")
    text = "\n".join(result.notes)
    lost = "net half 50 % seed 1, net huge 50 % seed 1, net huge 50 % seed 2"
    assert f"test_acc is no number to average in {lost}: left out" in text
    assert "test_acc was not recorded in other bare 50 % seed 0" in text
    assert "net is not complete: seeds are missing of half, 50 % of MACs (1 of 3)." in text
    assert "net lacks what other networks have: bare, 50 % of MACs, small, 50 % of MACs." in text
    assert "| not known |" in markdown(result)
    assert "No control to compare with." in sweep_page(result)
    json.dumps(content(result), allow_nan=False)


def test_damaged_and_repeated_arms_are_left_out_by_name(tmp_path: Path) -> None:
    good = arm_of("cut", 0)
    good.write(tmp_path / "a")
    good.write(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "arm.json").write_text(json.dumps(good.to_json())[:100])
    arms, problems = read_arms(tmp_path)
    assert [arm.folder for arm in arms] == [tmp_path / "a"]
    assert len(problems) == 2
    assert str(tmp_path / "b" / "arm.json") in problems[0]
    assert str(tmp_path / "c" / "arm.json") in problems[1]
    page = sweep_page(analyse(arms, "test_acc", problems))
    assert all(part in page for part in ("c/arm.json", "is the same arm, seed 0, as"))


@pytest.mark.parametrize("text", [None, "{}"])
def test_nothing_to_report_on_is_an_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "arm.json").write_text(text)
    with pytest.raises(ConfigError, match="no arms of a sweep to report on"):
        read_arms(tmp_path)
    with pytest.raises(ConfigError, match="no arms"):
        read_arms(tmp_path / "nowhere")


def test_the_metric_is_chosen() -> None:
    both, one = arm_of(metrics={"test_acc": 0.5, "val_acc": 0.6}), arm_of(metrics={"val_acc": 0.6, "mse": 1.0})
    assert choose_metric([both]) == "test_acc"
    assert choose_metric([both, one]) == "val_acc"
    assert choose_metric([both, one], "mse") == "mse"
    with pytest.raises(ConfigError, match="no arm recorded metric 'f1'; recorded: mse, test_acc, val_acc"):
        choose_metric([both, one], "f1")
    with pytest.raises(ConfigError, match="share no metric"):
        choose_metric([arm_of(metrics={"a": 1.0}), arm_of(metrics={"b": 1.0})])


def test_the_page_stands_alone_and_believes_no_name() -> None:
    hostile = "<script>alert(1)</script>\"'|&`[x](y)"
    arms = seeds_of(hostile, [0.8, 0.9], network=hostile, ratio=0.5, versions={hostile: hostile})
    for name in (hostile, f"{hostile} again"):  # of two controls the difference names the one it is to
        arms += seeds_of(name, [0.9, 0.9], kind="dense", budget=None, network=hostile)
    result = analyse(arms, "test_acc", [hostile])
    text = sweep_page(result)
    page = Page(text)
    assert page.open == []
    assert sum(tag == "script" for tag, _ in page.tags) == 2  # the data and the page's own
    for _, attributes in page.tags:
        assert not {"src", "href", "onclick", "onload"} & attributes.keys()
    assert not re.search(r"https?://|@import|url\(", text)
    assert hostile not in text
    assert "<script>" not in markdown(result)


def test_a_large_grid_is_readable(tmp_path: Path) -> None:
    arms = write_sweep(tmp_path, networks=("net",), seeds=2)
    result = analyse(arms, "test_acc")
    assert len(result.cells) == 2 * (len(METHODS) + len(CONTROLS)) + 2
    for chart in charts_of(result, "net"):
        drawn = ElementTree.fromstring(chart.drawn())
        names = [text.text for text in drawn.iter("text") if "end" in text.get("class", "").split()]
        assert sorted(names) == sorted(spot.line.label for spot in chart.spots)
        assert len(chart.spots) == len(result.cells)
        shapes = {(spot.kind, spot.control) for spot in chart.spots}
        assert len(shapes) == 6  # channels, masks and the four kinds of control differ without colour
        places = [(float(spot.line.marks[0].x), float(spot.line.marks[0].y)) for spot in chart.spots]
        assert len(places) == len(chart.spots)
        marks = [(m.attrib["x"], m.attrib["y"]) for m in drawn.iter("text") if "end" in m.get("class", "").split()]
        boxes = [(float(x), float(y), 8.0 * len(name or "")) for (x, y), name in zip(marks, names, strict=True)]
        for i, (x, y, wide) in enumerate(boxes):
            for a, b, other in boxes[:i]:
                assert x + wide <= a or a + other <= x or abs(y - b) >= 11 - 1e-6
    assert list(result.scores["hrank"]) == [role for role in ROLES if role in result.roles]


def test_names_find_a_place_where_there_is_none() -> None:
    result = analyse([arm_of(f"m{i:02}") for i in range(60)] + [arm_of("x", kept=0.9)], "test_acc")
    spots = charts_of(result, "net")[0].spots
    found = name_places(spots, [(200.0, 100.0)] * len(spots))
    assert len(found) == len(spots)
    assert len(set(found)) > 25


@pytest.mark.parametrize("form", ["html", "md", "csv", "json"])
def test_the_command_writes_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    arms = [*seeds_of("cut", [0.8, 0.81], ratio=0.6), *seeds_of("small", [0.7, 0.72], kind="scratch", ratio=0.6)]
    for arm in arms:
        arm.write(tmp_path / "runs" / arm.method / str(arm.seed))
    out = tmp_path / f"report.{form}"
    pictures = ["--pictures", str(tmp_path / "pictures")] if form == "html" else []
    main(["sweep-report", str(tmp_path / "runs"), "--out", str(out), *pictures])
    text = out.read_text(encoding="utf-8")
    if form == "html":
        assert Page(text).open == []
        assert "It beats its control (from scratch, equal cost) in the only comparison (worse in 0" in text
        drawn = sorted((tmp_path / "pictures").iterdir())
        assert [path.name for path in drawn] == ["net-latency.svg", "net-macs.svg", "net-nonzero_params.svg"]
        for path in drawn:
            words = "".join(ElementTree.fromstring(path.read_text()).itertext())
            assert all(name in words for name in ("A cut", "B small", "% of dense"))
    if form == "md":
        assert "| cut | 50 % of MACs | 0, 1 | 50.0 % |" in text
        assert " beats it, n = 2 |" in text
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [row["method"] for row in rows] == ["cut", "small"]
        assert float(rows[0]["test_acc"]) == pytest.approx(0.805)
        assert rows[0]["scratch_cost_verdict"] == BEATS
        assert rows[1]["scratch_cost_verdict"] == ""
    if form == "json":
        read = json.loads(text)
        assert read["scores"]["cut"]["scratch_cost"]["beats"] == 1
        assert read["cells"][0]["latency"] == pytest.approx(0.6)
    assert f"written: {out}" in capsys.readouterr().out


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arm_of().write(tmp_path / "arm")
    main(["sweep-report", str(tmp_path), "--format", "md"])
    assert capsys.readouterr().out.startswith("# Sweep: test_acc")
    with pytest.raises(SystemExit, match="1"):
        main(["sweep-report", str(tmp_path), "--metric", "f1"])
    assert "no arm recorded metric 'f1'" in capsys.readouterr().err

"""Reports over many runs: grouping, spread, the Pareto front, and pages that stand alone and believe no name."""

import csv
import io
import json
import math
import time
from html import escape, unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.cli import main
from lightning_prune.connectivity import ErrorPlane
from lightning_prune.files import write_json
from lightning_prune.record import Round, RunRecord
from lightning_prune.reports.page import page_of
from lightning_prune.reports.runs import front, group_runs
from lightning_prune.reports.svg import Axis, Line, Mark, label_places
from tests._helpers.pages import Page
from tests._helpers.runs import run_of

HOSTILE = "<script>alert(1)</script>\"'|&\n"


def write(folder: Path, runs: dict[str, RunRecord]) -> Path:
    for name, run in runs.items():
        run.write(folder / name)
    return folder


def test_seeds_group_and_methods_part() -> None:
    runs = [run_of(0, [0.9, 0.8], rate=1), run_of(0, [0.9, 0.6], rate=2), run_of(1, [0.7, 0.6, 0.5], rate=1)]
    one, two = group_runs(runs, "val_acc")
    assert (one.name, one.seeds, two.name) == ("Pruner (rate=1)", "0, 1", "Pruner (rate=2)")
    assert len(one.points) == 3
    many = [run_of(0, [0.9], a=i, b=i, c=i, d=i, e=i) for i in range(3)] + [run_of(0, [0.9], "Other", a=1)]
    many += [run_of(0, [0.9], a=0, b=0, c=0, d=0, e=9)]
    assert [group.name for group in group_runs(many, "val_acc")] == [
        *(f"Pruner (a={i}, b={i}, c={i}, d={i}, …)" for i in range(3)),
        "Other",  # none other has its callbacks, so nothing need be said
        "Pruner (a=0, b=0, c=0, d=0, …) #2",
    ]
    metric = one.points[1].values["metric"]
    assert (metric.mean, metric.low, metric.high, metric.count) == (pytest.approx(0.7), 0.6, 0.8, 2)
    assert one.points[2].values["metric"].count == 1
    assert one.points[1].values["macs"].mean == 50.0
    assert one.points[0].values["latency_ms"].mean == 3.25  # the dense network, from the comparison with it
    assert one.points[0].values["macs"].mean == 100.0


def test_numbers_that_are_none_are_left_out() -> None:
    (group,) = group_runs([run_of(0, [0.5, math.nan]), run_of(1, [0.7, 0.5])], "val_acc")
    assert group.points[1].values["metric"].count == 1
    assert group.points[1].values["metric"].mean == 0.5


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12), st.booleans(), st.booleans())
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]], lower: bool, rises: bool) -> None:
    data = np.array(points, dtype=float).reshape(-1, 2) * [1 if rises else -1, 1 if lower else -1]
    expected = [
        i for i, own in enumerate(data) if not any((other <= own).all() and (other < own).any() for other in data)
    ]
    assert sorted(front(points, lower, rises)) == expected


def test_the_page_stands_alone_and_believes_no_name() -> None:
    runs = [run_of(0, [0.9, 0.8, 0.7], HOSTILE, HOSTILE), run_of(1, [0.9, 0.85, 0.6], f"{HOSTILE}2", HOSTILE)]
    for run in runs:
        run.environment[HOSTILE] = HOSTILE
    text = page_of(group_runs(runs, "val_acc"), "val_acc", [HOSTILE])
    page = Page(text)
    assert not page.open
    assert [tag for tag, _ in page.tags].count("script") == 2  # the numbers, and the code
    assert "alert(1)</script>" not in text
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object")
        assert not {"src", "href", "onclick", "onload"} & set(attributes)
    assert "url(" not in text
    assert "http://" not in text
    assert "https://" not in text
    charts = text.split("<svg")[1:]
    assert len(charts) == 2 + 5  # a sample of each method's line; sparsity, parameters, MACs, latency, speed-up
    for chart in charts:
        ElementTree.fromstring("<svg" + chart.split("</svg>")[0] + "</svg>")
    for word in ("prefers-color-scheme: dark", "width=device-width", "Rings:"):
        assert word in text
    assert page.rows[1][0] == "A"
    assert escape(HOSTILE) in text


def test_the_table_holds_the_numbers() -> None:
    page = Page(page_of(group_runs([run_of(0, [0.9, 0.8]), run_of(1, [0.8, 0.7])], "val_acc"), "val_acc"))
    head, dense, first = page.rows[:3]
    assert head[:7] == ["method", "round", "runs", "sparsity, %", "val_acc", "lowest", "highest"]
    assert dense[:7] == ["A", "0", "2", "0", "0.85", "0.8", "0.9"]
    assert first[:7] == ["A", "1", "2", "50", "0.75", "0.7", "0.8"]
    assert first[head.index("measured speed-up (ratio of latencies)")] == "1.125"


def test_different_networks_are_named() -> None:
    small = RunRecord({"Pruner": {}}, 0, {})
    small.add_round(Round(0, 1, 1, 1, 7, 7, "d", metrics={"val_acc": 0.5}))
    text = page_of(group_runs([run_of(0, [0.9, 0.8]), small], "val_acc"), "val_acc")
    assert "they have 7, 1,000 prunable weights" in text


def test_other_data_are_named_and_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("Digits", "MNIST"):
        run = run_of(0, [0.9, 0.8])
        run.task = {"data": name}
        run.write(tmp_path / name)
    main(["report", str(tmp_path), "--format", "csv"])
    seen = capsys.readouterr()
    assert "note: Runs on different data stand side by side (Digits, MNIST)" in seen.err
    rows = list(csv.DictReader(io.StringIO(seen.out)))
    assert [row["method"] for row in rows] == ["Pruner (data=Digits)"] * 2 + ["Pruner (data=MNIST)"] * 2
    main(["compare", str(tmp_path / "Digits"), str(tmp_path / "MNIST")])
    assert "note: Runs on different data" in capsys.readouterr().err
    main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")])
    assert "different data stand side by side" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_masks_of_each_seeds_own_run_are_one_method() -> None:
    runs = [run_of(s, [0.9], masks_from=f"runs/seed{s}") for s in (0, 1)]
    (group,) = group_runs(runs, "val_acc")
    assert len(group.runs) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "connectivity.json",
            '{"format": "lightning_prune.rounds", "version": 2}',
            "has version 2, this library reads 1",
        ),
        ("connectivity.json", '{"format": "lightning_prune.rounds", "version": 1, "lines": [{}]}', "is damaged"),
        ("ranks.json", '{"format": "lightning_prune.ranks", "ver', "is not valid JSON"),
        ("ranks.json", "[]", "is no file of lightning_prune's"),
    ],
)
def test_what_stands_beside_a_record_may_be_damaged(name: str, content: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "runs", {"a": run_of(0, [0.9, 0.8])})
    (tmp_path / "runs" / "a" / name).write_text(content)
    main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert message in unescape(text)
    assert "val_acc against sparsity" in text


def test_an_analysis_has_charts_without_any_record(tmp_path: Path) -> None:
    def line(step: int, seed: int, height: float) -> dict[str, Any]:
        errors = {"train": [0.0, height, 0.0], "test": [0.1, 0.1 + height, 0.1]}
        barriers = dict.fromkeys(errors, height)
        return {"seed": seed, "step": step, "density": 1.0, "batch_norm": "interpolate", "aligned": False,
                "alphas": [0.0, 0.5, 1.0], "errors": errors, "barriers": barriers}  # fmt: skip

    lines = [line(step, seed, height) for seed in (0, 1) for step, height in ((0, 0.5), (100, 0.01))]
    write_json(tmp_path / "connectivity.json", {"format": "lightning_prune.connectivity", "version": 1, "lines": lines})
    main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "2 seeds, 4 lines" in text
    content = json.loads(text.split('id="data">')[1].split("</script>")[0])
    along, barrier = content["charts"]
    assert [chart["y"]["label"] for chart in (along, barrier)] == ["error, test, %", "error barrier, test, points"]
    assert [point[1:3] for point in along["lines"][0]["p"]] == [[0.0, 10.0], [0.5, 60.0], [1.0, 10.0]]
    assert [point[1:3] for point in barrier["lines"][0]["p"]] == [[0.0, 50.0], [1.0, 1.0]]
    pytest.importorskip("matplotlib")
    main(["report", str(tmp_path), "--output", str(tmp_path / "p.png"), "--charts", "barrier", "line"])
    assert picture_size(tmp_path / "p.png")[0] > picture_size(tmp_path / "p.png")[1]  # two, side by side


def parts_of(text: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring("<svg" + text.split("<svg")[-1].split("</svg>")[0] + "</svg>").iter(tag))


def test_planes_of_an_analysis_are_colours_of_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"seed": 0, "step": 5, "density": 1.0, "batch_norm": "interpolate", "aligned": False, "alphas": [0.0, 1.0],
            "errors": {"test": [0.1, 0.2]}, "barriers": {"test": 0.0}}  # fmt: skip
    write_json(
        tmp_path / "connectivity.json", {"format": "lightning_prune.connectivity", "version": 1, "lines": [line]}
    )
    rows = [[0.1, 0.2, 0.4], [0.15, 0.3, 0.9]]
    places, corners = ((0.0, 0.0), (2.0, 0.0), (1.0, 1.0)), {"test": (0.1, 0.4, 0.3)}
    plane = ErrorPlane((0.0, 1.0, 2.0), (0.0, 1.0), {"test": tuple(map(tuple, rows))}, places, corners).to_json()
    write_json(tmp_path / "seed0" / "5st" / "plane0-1.json", plane)
    write_json(tmp_path / "seed0" / "9st" / "plane0-1.json", plane | {"ys": [0.0, 1.0, 2.0]})
    main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")])
    assert "9st/plane0-1.json is damaged (ValueError: places and errors" in capsys.readouterr().err
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "1 seed, 1 line, 1 plane." in text
    assert "seed0/5st: error on the plane" in text
    cells, spots = [part for part in parts_of(text, "rect") if len(part)], parts_of(text, "circle")
    assert [cell[0].text for cell in cells] == [f"error, test, %: {100 * e:.4g}" for row in rows for e in row]
    sides = {float(cell.attrib[side]) for cell in cells for side in ("width", "height")}
    assert max(sides) - min(sides) < 0.3  # one length of a distance both ways
    middles = [
        [
            float(cells[i].attrib[at]) + float(cells[i].attrib[size]) / 2
            for at, size in (("x", "width"), ("y", "height"))
        ]
        for i in (0, 2, 4)
    ]
    np.testing.assert_allclose([(float(s.attrib["cx"]), float(s.attrib["cy"])) for s in spots], middles, atol=0.2)
    colours = pytest.importorskip("matplotlib").colormaps["cividis"]
    for cell, error in zip(cells, np.ravel(rows), strict=True):
        drawn = [int(cell.attrib["fill"][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        np.testing.assert_allclose(drawn, colours((error - 0.1) / 0.8)[:3], atol=0.06)


@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_names_of_lines_do_not_lie_on_each_other(ends: list[tuple[float, float]]) -> None:
    lines = [Line("A", [Mark(x, y, y, y)], i) for i, (x, y) in enumerate(ends)]
    places = [(px, py) for _, px, py in label_places(lines, Axis("x", 0, 1), Axis("y", 0, 1))]
    assert len(places) == len(lines)
    for i, (px, py) in enumerate(places):
        assert all(abs(px - other) >= 17 or abs(py - height) >= 14 for other, height in places[:i])


def test_many_runs_stay_small_and_quick() -> None:
    runs = [run_of(s, [0.9 - 0.001 * s - 0.01 * r for r in range(9)], rate=s % 250) for s in range(500)]
    start = time.perf_counter()
    text = page_of(group_runs(runs, "val_acc"), "val_acc")
    assert time.perf_counter() - start < 10
    assert len(text.encode()) < 6e6
    assert text.count("<tr><td class=") == 250 * 9


def test_the_command_shows_good_runs_and_names_bad_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "runs", {"a": run_of(0, [0.9, 0.8]), "b": run_of(1, [0.8, 0.7]), "c": run_of(2, [0.1])})
    newer = json.loads((folder / "c" / "record.json").read_text()) | {"version": 99}
    (folder / "c" / "record.json").write_text(json.dumps(newer))
    (folder / "d").mkdir()
    (folder / "d" / "record.json").write_text('{"format": "lightning_prune.rec')
    page = tmp_path / "page.html"
    main(["report", str(folder), "--output", str(page)])
    seen = capsys.readouterr()
    assert "version 99" in seen.err
    assert seen.err.count("left out:") == 2
    text = page.read_text(encoding="utf-8")
    assert "version 99" in text
    assert Page(text).rows[1][2] == "2"


def picture_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_markdown_csv_and_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, {"a": run_of(0, [0.9, 0.8], "A|B"), "b": run_of(1, [0.8, 0.7], "C")})
    main(["report", str(folder), "--format", "csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["method"], row["round"], float(row["val_acc"])) for row in rows] == [
        ("A|B", "0", 0.9), ("A|B", "1", 0.8), ("C", "0", 0.8), ("C", "1", 0.7)]  # fmt: skip
    main(["report", str(folder), "--format", "md"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("| A\\|B | 0 | 1 |")
    pytest.importorskip("matplotlib")
    main(["report", str(folder), "--output", str(tmp_path / "p.png")])
    everything = picture_size(tmp_path / "p.png")
    main(["report", str(folder), "--output", str(tmp_path / "one.png"), "--charts", "macs"])
    assert picture_size(tmp_path / "one.png")[0] == pytest.approx(everything[0] / 3, rel=0.01)  # of three columns


def test_seeds_of_one_method_and_a_control_make_the_paired_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, shift in (("own", 0.0), ("control", 0.1)):
        for seed in (0, 1):
            record = RunRecord({"Pruner": {"reinit": name == "control"}}, seed, {})
            for index in (0, 1):
                metrics = {"val_acc": 0.9 - shift - 0.1 * index + 0.02 * seed}
                best = {"step": 5, "metrics": metrics, "monitor": "val_acc"}
                record.add_round(Round(index, 10, 1, 10, 10 - index, 10, "d", metrics=metrics, best=best))
            record.write(tmp_path / f"{name}{seed}")
    own, control = ([str(tmp_path / f"{name}{seed}") for seed in (0, 1)] for name in ("own", "control"))
    main(["report", *own, "--control", *control, "--metric", "val_acc"])
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")][-1] == "ticket - control"
    assert [cell.strip() for cell in lines[3].strip("|").split("|")][-1] == "+10.00 ± 0.00"
    main(["report", *own, "--format", "md"])
    assert "at the best step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none"], "no runs to report on"),
        (["{}/a", "--metric", "f1"], "no run recorded metric 'f1'; recorded: val_acc"),
        (["{}/a", "--control", "{}/a", "--format", "csv"], "--control belongs to --format md"),
        (["{}/a", "--charts", "macs"], "--charts belongs to --format png"),
        (
            ["{}/a", "--format", "png", "--charts", "barrier"],
            "--charts barrier: these runs have no numbers for it",
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {"a": run_of(0, [0.9, 0.8])})
    with pytest.raises(SystemExit):
        main(["report", *(argument.format(tmp_path) for argument in arguments)])
    assert message in " ".join(capsys.readouterr().err.split())


def test_compare_puts_two_methods_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"a/0": run_of(0, [0.9, 0.8]), "a/1": run_of(1, [0.9, 0.6]), "b": run_of(0, [0.9, 0.75, 0.5])}
    write(tmp_path, runs)
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    text = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[0] == "│"]
    assert cells[0] == ["val_acc", "0", "0.9", "0.9", "+0"]
    assert cells[1][1:] == ["1", "0.7 (0.6 to 0.8)", "0.75", "+0.05"]
    assert cells[2][1:] == ["2", "-", "0.5", ""]

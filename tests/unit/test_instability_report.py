"""The table and the pictures of measured lines."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lightning_prune import ConfigError
from lightning_prune.connectivity import ErrorPlane
from lightning_prune.instability.report import draw, table
from lightning_prune.reports.pictures import check_pictures, draw_macs_against_latency, draw_plane


def line(seed: int, step: int, middle: float, **more: Any) -> dict[str, Any]:
    errors = (0.1, middle, 0.2)
    return {
        "seed": seed, "step": step, "density": 1.0, "batch_norm": "interpolate", "aligned": False,
        "alphas": [0.0, 0.5, 1.0], "errors": {"test": list(errors)},
        "barriers": {"test": middle - 0.15}, "heights_above_line": {"test": middle - 0.15}, **more,
    }  # fmt: skip


def test_seeds_are_averaged_after_their_pairs() -> None:
    lines = [line(0, 0, 0.5), line(0, 0, 0.7), line(1, 0, 0.4), line(0, 500, 0.16), line(1, 500, 0.16)]
    rows = table(lines).splitlines()[2:]
    seeds = np.array([45.0, 25.0])
    half = stats.t.ppf(0.975, 1) * seeds.std(ddof=1) / np.sqrt(2)
    assert rows[0].startswith("| 0 | 100.00 % | interpolate | 2 x 1 | 15.00 ± 0.00 | 35.00 ± ")
    assert f"| 35.00 ± {half:.2f} |" in rows[0]
    assert rows[0].endswith("| no |")
    assert rows[1].startswith("| 500 |")
    assert rows[1].endswith("| 1.00 ± 0.00 | 1.00 ± 0.00 | yes |")
    with pytest.raises(ConfigError, match="no line was measured"):
        table([])


def test_pictures_show_what_varies(tmp_path: Path) -> None:
    dense = [line(seed, step, 0.3) for seed in range(2) for step in (0, 500)]
    assert draw(dense, tmp_path) == ["lines.svg", "barrier-against-step.svg"]
    sparse = [line(0, 0, 0.3, density=d) for d in (0.5, 0.25)]
    assert draw(sparse, tmp_path / "sparse") == ["lines.svg", "barrier-against-density.svg"]
    assert "</svg>" in (tmp_path / "sparse" / "lines.svg").read_text()
    for name, places in (("", ("0", "500")), ("sparse/", ("50 %", "25 %"))):  # ticks are where was measured
        drawn = (tmp_path / f"{name}barrier-against-{'density' if name else 'step'}.svg").read_text()
        assert all(f"<!-- {place} -->" in drawn for place in places)


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_pictures()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"lightning-prune\[pictures\]"):
        check_pictures()


def test_a_plane_is_drawn(tmp_path: Path) -> None:
    rows = tuple(tuple(0.1 * x + 0.01 * y for x in range(3)) for y in range(3))
    plane = ErrorPlane((0.0, 1.0, 2.0), (0.0, 1.0, 2.0), {"test": rows}, ((0, 0), (1, 0), (0, 1)), {"test": (0, 0, 0)})
    draw_plane(plane, tmp_path / "plane.svg")
    assert "</svg>" in (tmp_path / "plane.svg").read_text()
    with pytest.raises(ConfigError, match="split='train' was not measured; there are test"):
        draw_plane(plane, tmp_path / "other.svg", "train")


def test_macs_against_latency_are_drawn_once_for_each_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text stays text
    rows = [{"network": name, "macs": m, "latency": [m, m - 0.01, m + 0.02]} for name in "ab" for m in (0.25, 0.5)]
    draw_macs_against_latency(rows, tmp_path / "macs.svg")
    drawn = (tmp_path / "macs.svg").read_text()
    assert [drawn.count(f">{name}</text>") for name in "abc"] == [1, 1, 0]
    with pytest.raises(ConfigError, match="rows is empty"):
        draw_macs_against_latency([], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()

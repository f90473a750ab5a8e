"""The record of an arm of a sweep: what is written is read, and nothing damaged passes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.record import Arm, ArmCost, ArmLatency, ArmStage


def full_arm(**parts: Any) -> Arm:
    given: dict[str, Any] = {
        "network": "resnet20",
        "method": "channels_l1",
        "kind": "cut",
        "budget": 0.5,
        "budget_on": "macs",
        "seed": 3,
        "kept": {"macs": 0.49, "params": 0.6, "nonzero_params": 0.55, "nonzero_macs": 0.45},
        "latency": ArmLatency(0.7, 0.68, 0.73, 64, 1, "cpu"),
        "metrics": {"test_acc": 0.8, "val_loss": math.nan, "worst": math.inf},
        "before": {"val_acc": 0.82},
        "after_cut": {"val_acc": 0.3},
        "cost": ArmCost(9.9e12, 1e13, 120.5, (ArmStage("resnet20/seed3/first", 6e12, 600, 70.0),)),
        "commands": (("lightning-prune", "fit", "--seed_everything=3"),),
        "versions": {"torch": "2.11.0", "python": "3.12"},
    }
    return Arm(**given | parts)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"kind": "dense", "budget": None, "budget_on": None, "latency": None, "before": None, "after_cut": None},
        {"kind": "scratch", "of": "channels_l1", "equal": "steps", "cost": ArmCost(1.0, None, 0.0)},
    ],
)
def test_what_is_written_is_read(tmp_path: Path, parts: dict[str, Any]) -> None:
    written = full_arm(**parts)
    written.write(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "arm.json"):
        read = Arm.read(path)
        assert read.to_json() == written.to_json()  # NaN is the text "NaN" there, and equal to itself
        assert read.cost == written.cost
        assert read.latency == written.latency
        assert math.isnan(read.metrics["val_loss"])
        assert read.metrics["worst"] == math.inf
        assert read.folder == tmp_path / "run"
    content = json.loads((tmp_path / "run" / "arm.json").read_text())
    assert content["format"] == "lightning_prune arm"
    assert content["metrics"]["val_loss"] == "NaN"
    assert "folder" not in content


def test_deviation_is_of_the_limit() -> None:
    assert ArmCost(103.0, 100.0, 1.0).deviation == pytest.approx(0.03)
    assert ArmCost(96.0, 100.0, 1.0).deviation == pytest.approx(-0.04)
    assert ArmCost(96.0, None, 1.0).deviation is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "lightning_prune.record"}, "is no arm of a sweep"),
        ({"version": 2}, "upgrade lightning-prune"),
        ({"version": True}, "no valid version"),
        ({"network": ""}, "network='': expected text"),
        ({"network": "a" * 101}, "expected text of 1 to 100"),
        ({"method": "two\nlines"}, "printable"),
        ({"method": ["a"]}, "expected text"),
        ({"kind": "magic"}, "expected one of cut, rounds"),
        ({"seed": 1.5}, "seed=1.5: expected a whole number"),
        ({"seed": -1}, "at least 0"),
        ({"budget": 0}, r"expected a fraction in \(0, 1\]"),
        ({"budget": 1.5}, r"expected a fraction in \(0, 1\]"),
        ({"budget": None}, "expected both or neither"),
        ({"budget": True}, "expected a number"),
        ({"budget_on": "cents"}, "expected one of macs"),
        ({"equal": {}}, "expected one of cost, steps"),
        ({"kept": {"macs": 0.5}}, "kept has macs; expected"),
        ({"kept": None}, "expected names and values"),
        ({"kept": {"macs": -0.1, "params": 1, "nonzero_params": 1, "nonzero_macs": 1}}, "kept.macs=-0.1"),
        ({"kept": {"macs": "NaN", "params": 1, "nonzero_params": 1, "nonzero_macs": 1}}, "kept.macs=nan"),
        ({"metrics": {"test_acc": "good"}}, "metrics.test_acc='good': expected a number"),
        ({"metrics": [1]}, "expected names and values"),
        ({"metrics": {"test_acc": 10**400}}, "a float can hold"),
        ({"latency": {"ratio": 0.5}}, "missing"),
        ({"latency": 0.5}, "latency=0.5: expected names and values"),
        ({"latency.low": 0.9}, "expected 0 < low <= ratio <= high"),
        ({"latency.threads": 0}, "latency.threads=0"),
        ({"cost": None}, "cost=None: expected names and values"),
        ({"cost.macs": "Infinity"}, "cost.macs=inf: expected a number from 0 to 1e\\+30"),
        ({"cost.limit": 0}, "expected more than 0"),
        ({"cost.stages": {}}, "cost.stages={}: expected a list"),
        ({"cost.stages": [{"folder": "a"}]}, "missing"),
        ({"cost.stages": [3]}, "cost.stages=3"),
        ({"commands": ["lightning-prune fit"]}, "expected the words of each command line"),
        ({"commands": [[1]]}, "each a text"),
        ({"versions": 3}, "versions"),
        ({"before": 3}, "before=3"),
        ({"folder": "/etc"}, "folder"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_damaged_arm_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = full_arm().to_json()
    for name, value in change.items():
        *parents, last = name.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match=message) as caught:
        Arm.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["network", "kind", "seed", "kept", "metrics", "cost"])
def test_a_missing_part_is_named(tmp_path: Path, name: str) -> None:
    content = full_arm().to_json()
    del content[name]
    (tmp_path / "arm.json").write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match=name):
        Arm.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"format": ', '{"format": NaN}', "\x00\x01", "[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "arm.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"arm\.json"):
        Arm.read(tmp_path)


@pytest.mark.parametrize("depth", [5_000, 50_000])
def test_deep_content_is_refused(tmp_path: Path, depth: int) -> None:
    text = json.dumps(full_arm().to_json())
    deep = text.replace('"2.11.0"', "[" * depth + "]" * depth)
    assert len(deep) > len(text)
    (tmp_path / "arm.json").write_text(deep)
    with pytest.raises(FileFormatError, match=r"arm\.json"):
        Arm.read(tmp_path)


def test_a_writer_is_told_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"kept\.macs=-1\.0"):
        full_arm(kept={"macs": -1, "params": 1, "nonzero_params": 1, "nonzero_macs": 1})

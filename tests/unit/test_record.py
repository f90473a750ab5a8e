import csv
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import environment, record
from lightning_prune.environment import describe_environment
from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.record import Round, RunRecord, check_free
from lightning_prune.record.table import header_text, row_text


def row(index: int = 0, **parts: Any) -> Round:
    given = {"round": index, "step": 100 * (index + 1), "epoch": 2 * index, "steps": 100, "kept": 80, "total": 100}
    return Round(**(given | {"digest": f"d{index}"} | parts))


def full_row(index: int) -> Round:
    return row(
        index,
        per_layer={"conv.weight": (30, 40), "fc.weight": (50, 60)},
        removed=20,
        metrics={"val_acc": 0.91, "val_loss": math.nan, "worst": -math.inf},
        learning_rates=(0.1, 0.01),
        best={"step": 50, "epoch": 1, "monitor": "val_acc", "value": 0.93, "metrics": {"val_loss": math.inf}},
        best_checkpoint="checkpoints/best.ckpt",
        ticket="tickets/round-01.safetensors",
        stopped_early=True,
    )


def full_record() -> RunRecord:
    run = RunRecord({"Pruner": {"fraction": 0.2, "exclude": ("fc",), "to": None}}, seed=3, task={"data": "Digits"})
    run.frozen = [{"name": "fc.weight", "axis": 0, "size": 10, "reason": "an output", "where": "linear"}]
    run.add_round(full_row(0), seconds=1.25)
    run.add_round(row(1, kept=64))
    run.final = {"test_acc": 0.9, "test_loss": math.nan}
    return run


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = full_record()
    written.write(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "record.json"):
        read = RunRecord.read(path)
        assert read.state_dict() == written.state_dict()
        assert read.rounds[0].best == full_row(0).best
        assert read.rounds[0].per_layer == {"conv.weight": (30, 40), "fc.weight": (50, 60)}
        assert read.rounds[0].learning_rates == (0.1, 0.01)
        assert read.rounds[1] == written.rounds[1]
        assert read.method == {"Pruner": {"fraction": 0.2, "exclude": ["fc"], "to": None}}
        assert read.seed == 3
        assert (read.task, read.frozen) == (written.task, written.frozen)
        assert read.folder == tmp_path / "run"
        assert read.timing == {"seconds": [1.25, None]}


def test_numbers_that_json_has_not_survive(tmp_path: Path) -> None:
    full_record().write(tmp_path)
    strict = json.loads((tmp_path / "record.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert strict["rounds"][0]["metrics"] == {"val_acc": 0.91, "val_loss": "NaN", "worst": "-Infinity"}
    read = RunRecord.read(tmp_path)
    assert math.isnan(read.rounds[0].metrics["val_loss"])
    assert read.rounds[0].metrics["worst"] == -math.inf
    assert read.rounds[0].best is not None
    assert read.rounds[0].best["metrics"]["val_loss"] == math.inf
    assert math.isnan(read.final["test_loss"])
    assert float(strict["final"]["test_loss"]) != float(strict["final"]["test_loss"])  # any reader's float() takes it


@given(st.dictionaries(st.text(max_size=5), st.floats(), max_size=4))
def test_every_float_survives_json(metrics: dict[str, float]) -> None:
    content = json.loads(json.dumps(row(metrics=metrics).to_json(), allow_nan=False))
    back = Round.from_json(content).metrics
    assert back.keys() == metrics.keys()
    assert all(
        np.float64(back[k]).tobytes() == np.float64(v).tobytes() or (v != v and back[k] != back[k])
        for k, v in metrics.items()
    )


def test_the_state_is_plain(tmp_path: Path) -> None:
    run = RunRecord({"P": {"fraction": np.float64(0.2), "n": torch.tensor(3)}}, seed=1)
    run.add_round(row(metrics={"a": torch.tensor(0.5), "b": np.float32(0.25)}, learning_rates=[torch.tensor(0.1)]))
    run.final = {"test": torch.tensor(1.5)}
    torch.save(run.state_dict(), tmp_path / "x")
    state = torch.load(tmp_path / "x", weights_only=True)
    assert state == run.state_dict()
    assert RunRecord.from_state_dict(state).comparable() == run.comparable()
    assert run.rounds[0].metrics == {"a": 0.5, "b": 0.25}
    assert run.final["test"].item() == state["final"]["test"] == 1.5
    types: set[type] = set()

    def visit(part: Any) -> None:
        types.add(type(part))
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            visit(inner)

    visit(run.state_dict())
    assert types <= {dict, list, str, int, float, bool, type(None)}


def test_only_time_and_place_are_left_out_of_the_comparison() -> None:
    one, two = full_record(), full_record()
    two.timing["seconds"] = [99.0, 98.0]
    two.environment = {"device": "another"}
    assert one.comparable() == two.comparable()
    assert {"format", "version", "method", "seed", "rounds", "final", "frozen"} == one.comparable().keys()
    for change in (
        lambda run: run.cut_to(1),
        lambda run: run.final.update(test_acc=0.8),
        lambda run: setattr(run, "seed", 4),
        lambda run: run.method["Pruner"].update(fraction=0.3),
        lambda run: run.rounds.__setitem__(1, row(1, kept=64, metrics={"val_acc": 0.1})),
        lambda run: run.rounds.__setitem__(1, row(1, kept=64, digest="other")),
    ):
        other = full_record()
        change(other)
        assert other.comparable() != one.comparable()


def test_a_resumed_run_forgets_later_rows(tmp_path: Path) -> None:
    run = full_record()
    run.write(tmp_path)
    run.cut_to(1)
    assert [r.round for r in run.rounds] == [0]
    assert run.timing == {"seconds": [1.25]}
    assert run.final == {}
    run.write(tmp_path)
    assert len(RunRecord.read(tmp_path).rounds) == 1
    assert len((tmp_path / "rounds.csv").read_text().splitlines()) == 2
    run.add_round(row(1))
    assert len(run.rounds) == 2
    run.final = {"test": 1.0}
    run.cut_to(2)
    assert run.final == {"test": 1.0}
    with pytest.raises(ConfigError, match="holds 2 rounds and cannot be cut to 3"):
        run.cut_to(3)


def test_rows_come_in_order() -> None:
    run = RunRecord({}, environment={})
    with pytest.raises(ConfigError, match="holds 0 rounds, so the next is not round 1"):
        run.add_round(row(1))
    assert run.rounds == []
    assert run.timing == {"seconds": []}


def test_the_csv_has_a_line_a_round(tmp_path: Path) -> None:
    full_record().write(tmp_path)
    with open(tmp_path / "rounds.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["round"] for line in lines] == ["0", "1"]
    assert [float(line["density"]) for line in lines] == [0.8, 0.64]
    assert [float(line["sparsity"]) for line in lines] == [0.2, 0.36]
    assert lines[0]["metrics/val_acc"] == "0.91"
    assert math.isnan(float(lines[0]["metrics/val_loss"]))
    assert lines[0]["kept/conv.weight"] == "30"
    assert lines[0]["best_value"] == "0.93"
    assert lines[0]["best/val_loss"] == "Infinity"
    assert lines[0]["learning_rate_1"] == "0.01"
    assert lines[0]["seconds"] == "1.25"
    assert lines[1]["metrics/val_acc"] == ""


def test_an_empty_record_is_a_record(tmp_path: Path) -> None:
    RunRecord({}).write(tmp_path)
    assert RunRecord.read(tmp_path).rounds == []
    assert (tmp_path / "rounds.csv").exists()


def test_density_and_sparsity_have_one_denominator() -> None:
    some = row(kept=30, total=120)
    assert (some.density, some.sparsity) == (0.25, 0.75)
    assert (row(kept=0, total=0).density, row(kept=0, total=0).sparsity) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"kept": 101}, r"round 0 of the record: kept=101 is more than total=100"),
        ({"step": -1}, r"step=-1 must be a whole number"),
        ({"removed": 1.5}, r"removed=1.5 must be a whole number"),
        ({"epoch": True}, r"epoch=True must be a whole number"),
        ({"digest": None}, r"digest=None must be text"),
        ({"metrics": {"acc": "high"}}, r"is no number"),
        ({"metrics": [1]}, r"is no number"),
        ({"per_layer": {"w": 3}}, r"is no number"),
        ({"best": {"value": object()}}, r"round 0 of the record, best.value of the record is a object"),
    ],
)
def test_impossible_rows_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        row(**parts)


def test_hyperparameters_that_are_no_json_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.P.network of the record is a Linear; expected numbers, text"):
        RunRecord({"P": {"network": torch.nn.Linear(1, 1)}})
    with pytest.raises(ConfigError, match=r"method.P.x\[1\] of the record is a Tensor"):
        RunRecord({"P": {"x": [1, torch.zeros(2)]}})


def _damage(path: Path, change: Any) -> None:
    content = json.loads((path / "record.json").read_text())
    result = change(content)
    (path / "record.json").write_text(json.dumps(content if result is None else result))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), r"record.json is no run record: its format is 'other', expected"),
        (lambda c: [c], r"is no run record: its format is None"),
        (lambda c: c.update(version=2), r"has version 2, this library reads up to 1; upgrade lightning-prune"),
        (lambda c: c.update(version="1"), r"no valid version: '1'"),
        (lambda c: c.update(version=True), r"no valid version: True"),
        (lambda c: c.update(version=0), r"no valid version: 0"),
        (lambda c: c.pop("rounds") and None, r"is damaged: missing or of the wrong type: \['rounds'\]"),
        (lambda c: c.update(seed="x"), r"is damaged: .*seed"),
        (lambda c: c["timing"].clear(), r"is damaged: .*seconds"),
        (lambda c: c["timing"]["seconds"].pop() and None, r"is damaged: 2 rounds, 1 timings"),
        (lambda c: c["timing"].update(seconds=["a", "b"]), r"is damaged: "),
        (lambda c: c["rounds"].reverse(), r"is damaged: .*the next is not round 1"),
        (lambda c: c["rounds"].__setitem__(0, 5), r"is damaged: a row of the record must be a JSON object, got int"),
        (lambda c: c["rounds"][0].pop("kept") and None, r"is damaged: .*missing or unknown fields: .*kept"),
        (lambda c: c["rounds"][0].update(new=1), r"is damaged: .*missing or unknown fields: .*new"),
        (lambda c: c["rounds"][0].update(kept=1000), r"is damaged: .*kept=1000 is more than total=100"),
        (lambda c: c["rounds"][0].update(metrics=None), r"is damaged: "),
        (lambda c: c.update(frozen={"a": 1}), r"is damaged: its task is no mapping, or frozen no list of mappings"),
        (lambda c: c.update(task=["a"]), r"is damaged: its task is no mapping"),
    ],
)
def test_damaged_and_foreign_records_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    full_record().write(tmp_path)
    assert len(RunRecord.read(tmp_path).rounds) == 2
    _damage(tmp_path, change)
    with pytest.raises(FileFormatError, match=message):
        RunRecord.read(tmp_path)


def test_a_missing_and_a_truncated_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"record.json does not exist; expected a run record"):
        RunRecord.read(tmp_path)
    full_record().write(tmp_path)
    whole = (tmp_path / "record.json").read_text()
    (tmp_path / "record.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match=r"record.json is not a run record: it is not valid JSON"):
        RunRecord.read(tmp_path)


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    check_free(tmp_path / "new")
    check_free(tmp_path)
    full_record().write(tmp_path)
    with pytest.raises(
        ConfigError, match=r"record.json is the record of an earlier run.*resume that run.*another folder"
    ):
        check_free(tmp_path)


def test_the_table() -> None:
    dense = row(0, kept=266_200, total=266_200, metrics={"val_acc": 0.9812})
    later = row(1, kept=18_288, total=266_200, metrics={"val_acc": 0.98})
    assert [header_text("val_acc"), row_text(dense, "val_acc", dense), row_text(later, "val_acc", dense)] == [
        "round  weights left              count             val_acc  against dense",
        "    0     100.000 %            266,200              0.9812              -",
        "    1       6.870 %             18,288              0.9800        -0.0012",
    ]


@given(
    st.floats(),
    st.floats(),
    st.integers(0, 10**12),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=60),
)
def test_table_rows_are_aligned_and_fit(value: float, reference: float, total: int, monitor: str) -> None:
    dense = row(0, kept=total, total=total, metrics={monitor: reference})
    later = row(1, kept=total // 3, total=total, metrics={monitor: value})
    lines = [header_text(monitor), row_text(dense, monitor, dense), row_text(later, monitor, dense)]
    assert {len(line) for line in lines} == {len(header_text("val_acc"))}
    assert len(lines[0]) <= 79
    assert all(line.isprintable() for line in lines)


def test_table_rows_without_a_value() -> None:
    assert row_text(row(1), "val_acc", row(0)).split()[-2:] == ["-", "-"]
    assert row_text(row(1), None, row(0)).split()[-2:] == ["-", "-"]
    assert row_text(row(1, metrics={"a": 0.5}), "a", None).split()[-2:] == ["0.5000", "-"]
    assert row_text(row(1, metrics={"a": math.nan}), "a", row(0, metrics={"a": 1.0})).split()[-2:] == ["nan", "nan"]
    assert row_text(row(1, metrics={"a": 1e-9}), "a", row(0, metrics={"a": 2e-9})).split()[-2:] == [
        "1.00e-09",
        "-1.00e-09",
    ]


def test_the_environment_says_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    expected = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    monkeypatch.chdir(tmp_path)
    found = describe_environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["device"]
    assert found["git_commit"] == expected.stdout.strip()
    assert found["git_changed"] is False
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], cwd=tmp_path, check=True)
    assert describe_environment()["git_changed"] is True


@pytest.mark.parametrize("error", [OSError("no git"), subprocess.TimeoutExpired("git", 5)])
def test_the_environment_never_fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **options: Any) -> Any:
        assert options["timeout"] <= 10
        assert options["stdin"] == subprocess.DEVNULL
        raise error

    monkeypatch.setattr(environment.subprocess, "run", broken)
    found = describe_environment("meta")
    assert found["git_commit"] is None
    assert found["git_changed"] is None
    assert found["device"] == "meta"


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe_environment()["git_commit"] is None


def test_the_version_of_the_layout_is_stated() -> None:
    state = RunRecord({}).state_dict()
    assert (state["format"], state["version"]) == (record.FORMAT, record.VERSION) == ("lightning_prune.record", 1)

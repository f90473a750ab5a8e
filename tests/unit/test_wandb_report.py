"""The W&B Report: what its specification holds, and what the command says where it cannot be sent."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from lightning_prune import ConfigError, RunRecord
from lightning_prune.commands.wandb_report import main
from lightning_prune.record import Round

wr = pytest.importorskip("wandb_workspaces.reports.v2", reason="needs wandb-workspaces (extra wandb-report)")
from lightning_prune.reports.wandb_report import build_report, specification  # noqa: E402


def panels(content: dict[str, Any]) -> list[dict[str, Any]]:
    grids = [block for block in content["spec"]["blocks"] if block["type"] == "panel-grid"]
    return [panel for grid in grids for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]]


def test_the_specification_holds_every_chart() -> None:
    content = specification(build_report("pruning", "", "val_acc", "All runs", "| round |\n| --- |\n"))
    lines = [panel["config"] for panel in panels(content) if panel["viewType"] == "Run History Line Plot"]
    assert {(line["xAxis"], *line["metrics"]) for line in lines} == {
        ("prune/end/sparsity", "prune/end/val_acc"),
        ("prune/end/macs", "prune/end/val_acc"),
        ("prune/end/params", "prune/end/val_acc"),
        ("prune/end/latency_ms", "prune/end/val_acc"),
        ("prune/end/theoretical_speedup", "prune/end/measured_speedup"),
    }
    grouping = {(line["groupBy"], line["groupAgg"], line["groupArea"]) for line in lines}
    assert grouping == {("prune.value.method", "mean", "minmax")}
    assert all(line["xAxisTitle"] and line["yAxisTitle"] for line in lines)
    text = json.dumps(content)
    for part in ("prune/layers", "prune/costs", "prune/report", "prune/matching_sparsity", "| round |", "All runs"):
        assert part in text
    (runs,) = content["spec"]["blocks"][3]["metadata"]["runSets"]
    assert runs["grouping"] == [{"section": "config", "name": "prune.value.method"}]
    assert runs["sort"]["keys"][0]["key"] == {"section": "summary", "name": "prune/matching_sparsity"}
    assert "higher is better" in text
    assert "lower is better" in json.dumps(specification(build_report("p", "", "val_loss", "t")))


def test_no_two_panels_lie_on_each_other() -> None:
    content = specification(build_report("p", "", "val_acc", "t"))
    for block in content["spec"]["blocks"]:
        if block["type"] == "panel-grid":
            places = [panel["layout"] for panel in block["metadata"]["panelBankSectionConfig"]["panels"]]
            cells = [(p["x"] + x, p["y"] + y) for p in places for x in range(p["w"]) for y in range(p["h"])]
            assert len(cells) == len(set(cells))
            assert max(x for x, _ in cells) < 24


def test_what_is_written_is_read_by_the_package() -> None:
    content = specification(build_report("pruning", "", "val_acc", "All runs"))
    back = wr.Report._from_model(wr.internal.ReportViewspec.model_validate(content))
    assert (back.project, back.title) == ("pruning", "All runs")
    again = specification(back)
    assert [panel["config"] for panel in panels(again)] == [panel["config"] for panel in panels(content)]


def run_folder(folder: Path) -> Path:
    record = RunRecord({"Pruner": {"fraction": 0.5}}, seed=1)
    for number, kept in enumerate((100, 50)):
        metrics = {"val_acc": 0.9 + number / 100, "val_f1": 0.5}
        record.add_round(Round(number, 10 * number, number, 10, kept, 100, "d", metrics=metrics))
    record.write(folder)
    return folder


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "login", lambda **options: False)
    monkeypatch.setattr(wandb, "Api", lambda: pytest.fail("asked W&B without a login"))


@pytest.mark.usefixtures("logged_out")
def test_without_a_login_the_specification_is_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "spec.json"
    main(["team/pruning", "--runs", str(run_folder(tmp_path / "run")), "--output", str(path), "--title", "Mine"])
    content = json.loads(path.read_text())
    assert content["displayName"] == "Mine"
    assert content["project"]["name"] == "pruning"
    assert "0.91" in json.dumps(content)
    said = capsys.readouterr().out
    assert "nobody is logged in to W&B, so nothing was sent" in said
    assert "wandb login" in said
    assert "wandb sync" in said
    assert f"lightning-prune wandb-report team/pruning --runs {tmp_path / 'run'} --output {path} --title Mine" in said


def test_offline_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "login", lambda **options: pytest.fail("asked"))
    main(["pruning", "--offline", "--metric", "val_f1", "--output", str(tmp_path / "spec.json")])
    assert "prune/end/val_f1" in (tmp_path / "spec.json").read_text()


class Api:
    """Stands in for W&B: runs of one project."""

    default_entity = "me"
    summaries: tuple[dict[str, Any], ...] = ({"prune/end/val_f1": 0.5, "prune/end/sparsity": 0.5, "loss": 1.0},)

    def runs(self, path: str) -> list[Any]:
        if path != "me/pruning":
            raise ValueError(f"could not find project {path}")
        return [SimpleNamespace(summary=summary) for summary in self.summaries]


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for W&B, and the reports that it was given."""
    saved: list[Any] = []
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(wr.Report, "save", lambda self, draft=False: saved.append((self, draft)))
    monkeypatch.setattr(wr.Report, "url", "https://wandb.example/report")
    return saved


def test_with_a_login_the_report_is_saved(logged_in: list[Any], capsys: pytest.CaptureFixture) -> None:
    main(["pruning", "--draft"])
    ((report, draft),) = logged_in
    assert draft
    assert (report.entity, report.project) == ("me", "pruning")
    (grid, _) = (block for block in report.blocks if isinstance(block, wr.PanelGrid))
    assert (grid.runsets[0].entity, grid.runsets[0].project) == ("me", "pruning")
    assert list(grid.panels[0].y) == ["prune/end/val_f1"]
    assert capsys.readouterr().out == "saved as a draft: https://wandb.example/report\n"


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize(
    ("arguments", "summaries", "message"),
    [
        (["other"], ({},), r"W&B gives no runs of me/other \(ValueError: could not find project me/other\). Check"),
        (["pruning"], (), r"me/pruning has no runs yet. Log some, or sync offline ones"),
        (["pruning"], ({"loss": 1.0}, {"prune/end/sparsity": 0.5}), r"none of the 2 runs in me/pruning has a metric"),
        (["pruning", "--metric", "x"], None, r"no run in me/pruning has metric 'x'; they have: val_f1\."),
        (["pruning", "--title", "x" * 129], None, r"title has 129 characters; W&B takes up to 128"),
        (["pruning", "--runs", "nowhere"], None, r"no runs to report on: .*nowhere"),
    ],
)
def test_what_cannot_be_shown_is_named(
    arguments: list[str], summaries: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if summaries is not None:
        monkeypatch.setattr(Api, "summaries", summaries)
    with pytest.raises(ConfigError, match=message):
        main(arguments)


def test_a_refusal_by_wandb_is_told(logged_in: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, draft: bool = False) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(wr.Report, "save", refuse)
    with pytest.raises(ConfigError, match=r"W&B did not take the report \(PermissionError: read only\)"):
        main(["pruning"])
    assert logged_in == []


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"project='': expected some text"):
        main(["team/", "--offline"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "wandb_workspaces.reports.v2")
    with pytest.raises(
        ConfigError, match=r"need the package wandb-workspaces .*pip install 'lightning-prune\[wandb-report\]'"
    ):
        main(["pruning"])

"""The commands channels, models and export: what they print and write, and that bad input is one clear line."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune import Budget, RemovalPlan, compact, plan_removal, save_compact, trace_channels
from lightning_prune.channels import ChannelGraph
from lightning_prune.cli import main
from lightning_prune.commands import models as models_command
from lightning_prune.reports.coverage import CoverageTable, ZooModel, check_model

HERE = "tests.unit.test_commands"


def small(width: int = 8) -> nn.Module:
    """What --model names by its dotted path."""
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3))


def stack(blocks: int = 12) -> nn.Module:
    """Many groups that are alike."""
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(blocks)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers)


def softmax_only() -> nn.Module:
    """Nothing of it can leave."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Softmax(1), nn.Conv2d(8, 4, 1))


NUMBER = 5


def test_channels_prints_groups_costs_and_what_stays(capsys: pytest.CaptureFixture[str]) -> None:
    main(["channels", "--model", f"{HERE}:small", "--shape", "1x3x8x8", "--budget", "channels=0.25"])
    text = capsys.readouterr().out
    assert "8 channels that can leave -> 2 (25.0% kept)" in text
    assert "it is an output of the model" in text
    row = next(line for line in text.splitlines() if line.startswith("│") and "│ 0" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][:6] == ["1", "8", "2", "0", "2", "-"]


def test_groups_that_are_alike_share_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    main(["channels", "--model", f"{HERE}.stack", "--pixels", "8"])
    text = capsys.readouterr().out
    assert "12 groups" in text
    rows = [line for line in text.splitlines() if line.startswith("│") and "Conv" not in line and "*" in line]
    assert len(rows) == 1
    assert rows[0].strip("│ ").startswith("11")


def test_channels_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["channels", "--model", f"{HERE}:small", "--init-args", '{"width": 6}', "--pixels", "8", "--json",
          "--budget", "channels=0.5"])  # fmt: skip
    content = json.loads(capsys.readouterr().out)
    parameters = 6 * 27 + 6 + 4 * 6 * 9 + 4
    assert content["costs"] == {"channels": 6, "params": parameters, "macs": 6 * 27 * 36 + 4 * 6 * 9 * 16}
    assert content["kept"]["channels"] == 3
    (group,) = content["groups"]
    assert (group["made_by"], group["read_by"], group["size"], group["kept"]) == (["0"], ["2"], 6, 3)
    assert group["params_saved_by_half"] == round(3 * (27 + 1 + 36) / parameters, 6)
    assert [f["name"] for f in content["frozen"]] == ["2.weight"]


def test_channels_of_a_name_with_all_members(capsys: pytest.CaptureFixture[str]) -> None:
    main(["channels", "--model", "resnet18", "--pixels", "32", "--all"])
    text = capsys.readouterr().out
    assert "layer4.1.conv2.weight, axis 0" in text


def test_channels_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main(["channels", "--model", "recipes/quickstart.yaml"])
    assert "channels that can leave" in capsys.readouterr().out


def test_weights_of_a_compact_file_make_the_model_narrow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = small(), torch.rand(1, 3, 8, 8)
    compact(model, plan_removal(trace_channels(model, inputs), Budget(channels=0.5)), inputs)
    save_compact(model, tmp_path / "small.safetensors")
    arguments = ["--model", f"{HERE}:small", "--pixels", "8", "--weights", str(tmp_path / "small.safetensors")]
    main(["channels", *arguments])
    assert "4 channels that can leave" in capsys.readouterr().out
    main(["export", *arguments, "--output", str(tmp_path / "small.pt2"), "--dynamic-batch"])
    assert "at batch sizes 1, 4" in capsys.readouterr().out
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    others = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(loaded(others), model(others))


def test_weights_of_a_checkpoint(tmp_path: Path) -> None:
    model = small()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    main(["export", "--model", f"{HERE}:small", "--pixels", "8", "--weights", str(tmp_path / "last.ckpt"),
          "--output", str(tmp_path / "small.pt2")])  # fmt: skip
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    torch.testing.assert_close(loaded(torch.ones(1, 3, 8, 8)), model(torch.ones(1, 3, 8, 8)))


BAD = [
    (["channels", "--model", "resnet19"], "near it are resnet"),
    (["channels", "--model", "nowhere.at:all"], "cannot import 'all' from 'nowhere.at'"),
    (["channels", "--model", f"{HERE}:absent"], "cannot import 'absent'"),
    (["channels", "--model", f"{HERE}:NUMBER"], "is a int; expected a class or function"),
    (["channels", "--model", f"{HERE}:small", "--init-args", "[1]"], "expected a JSON object"),
    (["channels", "--model", f"{HERE}:small", "--init-args", '{"depth": 1}'], "could not be built (TypeError"),
    (["channels", "--model", "builtins:dict"], "gave a dict; expected an nn.Module"),
    (["channels", "--model", f"{HERE}:small", "--shape", "3xx8"], "expected positive sizes"),
    (["channels", "--model", f"{HERE}:small", "--pixels", "0"], "expected a positive number"),
    (["channels", "--model", f"{HERE}:small", "--pixels", "1"], "cannot be run with these example inputs"),
    (["channels", "--model", f"{HERE}:small", "--pixels", "8", "--budget", "half"], "expected channels=X"),
    (["channels", "--model", f"{HERE}:small", "--pixels", "8", "--budget", "macs=2"], "must lie in (0, 1]"),
    (["channels", "--model", f"{HERE}:softmax_only", "--pixels", "8", "--budget", "macs=0.5"], "no channel of this"),
    (["channels", "--model", f"{HERE}:small", "--weights", "absent.ckpt"], "there is no such file"),
    (["channels", "--model", f"{HERE}:small", "--weights", "pyproject.toml"], "no file that torch.save has written"),
    (["channels", "--model", "absent.yaml"], "is no recipe with a model"),
    (["export", "--model", f"{HERE}:small", "--output", "net.txt"], "ends in .onnx or .pt2"),
    (["export", "--model", f"{HERE}:small", "--output", "net.pt2", "--opset", "18"], "--opset belongs to ONNX"),
    (["models", "--only", "nothing/*"], "no network has such a name"),
    (["models", "--resume"], "--resume needs --output"),
    (["models", "--only", "torchvision/resnet18", "--output", "README.md", "--resume"], "is no coverage table"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a)[:60] for a, _ in BAD])
def test_bad_input_is_one_clear_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert message in error
    assert len(error.strip().splitlines()) == 1


def _entry(name: str, build: object = small, **more: object) -> ZooModel:
    return ZooModel(f"own/{name}", "own", build, lambda: torch.rand(2, 3, 8, 8), **more)  # type: ignore[arg-type]


def test_a_killed_run_of_models_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[str] = []

    def builder(name: str, stop: bool = False) -> object:
        def build() -> nn.Module:
            built.append(name)
            if stop:
                raise KeyboardInterrupt
            return small()

        return build

    table = tmp_path / "COVERAGE.md"
    monkeypatch.setattr(models_command, "zoo", lambda: [_entry("a", builder("a")), _entry("b", builder("b", True))])
    with pytest.raises(KeyboardInterrupt):
        main(["models", "--output", str(table)])
    assert "own/a" in table.read_text()
    first = next(line for line in table.read_text().splitlines() if "own/a" in line)
    built.clear()
    monkeypatch.setattr(models_command, "zoo", lambda: [_entry("a", builder("a")), _entry("b", builder("b"))])
    capsys.readouterr()
    main(["models", "--output", str(table), "--resume"])
    assert set(built) == {"b"}
    text = table.read_text()
    assert "## own (2 of 2 with a result)" in text
    assert first in text.splitlines()
    printed = capsys.readouterr().out
    assert "1 of 2 networks have a result" in printed
    assert "own/b | 2x3x8x8 | 0.500" in printed


def test_failures_are_rows_and_tried_again(tmp_path: Path) -> None:
    def broken() -> nn.Module:
        raise ValueError("a | b\nc")

    table = CoverageTable(tmp_path / "t.md", "T", "n", resume=False)
    table.add("own", check_model(_entry("x", broken), Budget(channels=0.5)))
    assert "| own/x | 2x3x8x8 |  |  |  |  |  |  | **no result:** ValueError: a / b c |" in table.path.read_text()
    again = CoverageTable(table.path, "T", "n", resume=True)
    assert not again.has_result(_entry("x"))
    again.add("own", check_model(_entry("x"), Budget(channels=0.5)))
    assert CoverageTable(table.path, "T", "n", resume=True).has_result(_entry("x"))


def test_a_row_says_what_was_reached() -> None:
    row = check_model(_entry("x"), Budget(channels=0.5))
    assert (row.failure, row.channels, row.dtype) == ("", 0.5, "float64")
    assert row.params == (4 * 28 + 4 * 36 + 4) / (8 * 28 + 4 * 72 + 4)
    assert row.error < 1e-12
    assert "it is an output of the model: 2.weight" in row.frozen


def test_a_network_of_which_nothing_can_leave_has_a_row_that_says_so() -> None:
    row = check_model(_entry("x", softmax_only), Budget(channels=0.5))
    assert (row.failure, row.channels, row.macs) == ("", 1, 1)
    assert row.cells()[5] == ""
    assert row.cells()[-1].startswith("no channel can leave exactly; softmax is taken along it: 0.weight")


@pytest.mark.parametrize("fault", ["check", "still", "reload"])
def test_the_checks_behind_a_row_can_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each promise of a row, broken once."""
    import lightning_prune.reports.coverage as coverage

    if fault == "check":  # other channels are read than those that were made
        real = coverage.plan_removal

        def wrong(graph: ChannelGraph, budget: Budget) -> RemovalPlan:
            plan = real(graph, budget)
            plan.keep["2.weight"][1] = sorted(set(range(8)) - set(plan.keep["2.weight"][1]))
            return plan

        monkeypatch.setattr(coverage, "plan_removal", wrong)
    if fault == "still":
        monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    if fault == "reload":
        real_load = coverage.load_compact
        monkeypatch.setattr(coverage, "load_compact", lambda model, path: _shifted(real_load(model, path)))
    failure = check_model(_entry("x"), Budget(channels=0.5)).failure
    expected = {"check": "differs from its masked parent", "still": "did not move", "reload": "gives other outputs"}
    assert expected[fault] in failure


def _shifted(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[0].bias.add_(1)  # type: ignore[index]
    return model


def test_the_networks_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "--list"])
    names = capsys.readouterr().out.split()
    assert len(names) == len(set(names))
    assert sum(name.startswith("torchvision/") for name in names) >= 80 + 6 + 12 + 9 + 2
    assert {"torchvision/vit_h_14", "torchvision/raft_small", "torchvision/maxvit_t"} <= set(names)


def test_models_prints_the_table_that_comes_with_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models"])
    assert "## torchvision classification (80 of 80 with a result)" in capsys.readouterr().out

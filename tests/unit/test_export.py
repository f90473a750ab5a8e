"""Exported files: what is written computes what the model computes, or nothing is written."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Budget, ConfigError, ExportError, compact, export_onnx, export_program, plan_removal
from lightning_prune import trace_channels as trace
from lightning_prune.channels.equality import random_tensors

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters, about torch's own internals
INPUTS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    values = random_tensors(model, torch.float32, 1)
    with torch.no_grad():
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            tensor.copy_(values[name])
    return model


class Two(nn.Module):
    """Two inputs, one by name; two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
        return {"sum": self.a(x) + y, "product": self.a(x) * y}


class Batch(nn.Module):
    """Holds the batch size that it was exported with, by plain Python."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean() if x.shape[0] == 2 else x.sum()


def _run_onnx(path: Path, inputs: Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]


def test_onnx_of_a_compact_model_gives_its_outputs(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = _net().train()
    compact(model, plan_removal(trace(model, INPUTS), Budget(channels=0.5)), INPUTS)
    path = tmp_path / "net.onnx"
    report = export_onnx(model, path, INPUTS, dynamic_batch=True)
    assert model.training
    assert report.batches == (2, 1, 5)
    assert (report.path, report.size, report.error < 1e-5) == (path, path.stat().st_size, True)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    stored = onnx.load(path)
    onnx.checker.check_model(stored, full_check=True)
    assert [entry.version for entry in stored.opset_import if entry.domain in ("", "ai.onnx")] == [report.opset]
    assert {tuple(t.dims) for t in stored.graph.initializer if len(t.dims) == 4} == {(4, 3, 3, 3)}
    others = torch.rand(7, 3, 8, 8)
    expected = model.eval()(others).detach().numpy()
    np.testing.assert_allclose(_run_onnx(path, others), expected, rtol=1e-4, atol=1e-5)


def test_a_program_of_a_compact_model_gives_its_outputs(tmp_path: Path) -> None:
    model = _net()
    compact(model, plan_removal(trace(model, INPUTS), Budget(channels=0.5)), INPUTS)
    path = tmp_path / "net.pt2"
    report = export_program(model, path, INPUTS, dynamic_batch=True)
    assert (report.kind, report.batches, report.size) == ("program", (2, 1, 5), path.stat().st_size)
    others = torch.rand(7, 3, 8, 8)
    with open(path, "rb") as file:
        loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(others), model.eval()(others))


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
def test_named_inputs_and_several_outputs(name: str, tmp_path: Path) -> None:
    export: Any = export_onnx if name.endswith(".onnx") else export_program
    if export is export_onnx:
        pytest.importorskip("onnxruntime")
    report = export(Two(), tmp_path / name, {"x": torch.rand(3, 3), "y": torch.rand(3, 4)}, dynamic_batch=True)
    assert report.batches == (3, 1, 6)


def test_without_a_dynamic_batch_the_batch_is_that_of_the_example(tmp_path: Path) -> None:
    report = export_program(Batch(), tmp_path / "net.pt2", INPUTS)
    assert report.batches == (2,)


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_a_failure_leaves_the_earlier_file_alone(export: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.out"
    path.write_text("earlier")
    with pytest.raises(ExportError, match="Nothing was written"):
        export(Batch(), path, INPUTS, dynamic_batch=True)  # one branch is right for the exported batch only
    assert path.read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["net.out"]


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_a_file_that_computes_something_else_is_not_kept(
    export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    model, module = _net(), sys.modules["lightning_prune.export"]
    asked = module.call_model

    def other(called: nn.Module, inputs: Any) -> Any:
        return asked(called, inputs) * (1.01 if called is model else 1.0)

    monkeypatch.setattr(module, "call_model", other)
    with pytest.raises(ExportError, match=r"differs from the model by 0\.0099"):
        export(model, tmp_path / "net.out", INPUTS)
    assert list(tmp_path.iterdir()) == []


def test_outputs_of_zero_show_nothing(tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    with pytest.raises(ExportError, match="every output of the model is 0"):
        export_program(model, tmp_path / "net.pt2", torch.rand(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"needs onnxruntime.*lightning-prune\[export\]"):
        export_onnx(_net(), tmp_path / "net.onnx", INPUTS)


def test_a_dynamic_batch_needs_inputs_that_share_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got shapes \(2, 3\), \(3, 4\)"):
        export_program(Two(), tmp_path / "net.pt2", {"x": torch.rand(2, 3), "y": torch.rand(3, 4)}, dynamic_batch=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write"):
        export_program(_net(), tmp_path / "file" / "net.pt2", INPUTS)

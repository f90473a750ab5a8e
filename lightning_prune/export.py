"""A model as an ONNX file or a ``torch.export`` file, kept only if it computes what the model computes."""

import importlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError, ExportError
from lightning_prune.files import atomic_write
from lightning_prune.running import call_model, map_tensors, output_tensors

OPSET = 20
"""ONNX operator set that files are written in if no other is asked for: torch's own choice since 2.6 or later."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_BYTES = 2 * 2**30 - 2**20  # an ONNX file is one protobuf message, of at most 2 GiB


@dataclass
class ExportReport:
    """What was written.

    Attributes:
        path: The file.
        kind: ``"onnx"`` or ``"program"``.
        size: Bytes.
        error: Largest difference from the model's outputs over each output's scale, over all inputs tried.
        batches: Batch sizes at which file and model were compared.
        opset: ONNX operator set; None for a program.
    """

    path: Path
    kind: str
    size: int
    error: float
    batches: tuple[int, ...]
    opset: int | None = None


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    opset: int | None = None,
    dynamic_batch: bool = False,
    tolerance: float | None = None,
) -> ExportReport:
    """Write a model as one ONNX file, run the written file in onnxruntime, and keep it only if it gives the same.

    The file holds the model in eval mode; the model's own modes come back as they were. File and model are compared on
    the example inputs and on random ones of the same shapes, with a dynamic batch also at other batch sizes.

    Args:
        model: Any module, such as one that :func:`compact` shrank.
        path: The file; what was there before stays if anything fails.
        example_inputs: As for :func:`trace_channels`.
        opset: ONNX operator set; by default torch's.
        dynamic_batch: Whether axis 0 of every input tensor may have any size.
        tolerance: Largest difference allowed over an output's scale; by default 1e-4 for float32 outputs.

    Returns:
        What was written, with the error found.

    Raises:
        ConfigError: onnx, onnxscript or onnxruntime is not installed, or inputs that cannot have a dynamic batch.
        ExportError: The model cannot be exported, or the file computes something else.
        WriteError: The system could not write.

    Limits:
        Files over 2 GiB are refused (ONNX keeps larger weights in other files, which cannot appear together at once).
        Parts of the model that depend on the values of the inputs are exported as the example inputs take them.
    """
    runtime = _require("export_onnx", "onnxruntime", "onnx", "onnxscript")["onnxruntime"]
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    if size > _BYTES:
        raise ConfigError(f"the model holds {size:,} bytes, more than the 2 GiB of one ONNX file; use export_program.")
    args, kwargs, shapes = _arguments(example_inputs, dynamic_batch)
    opset = OPSET if opset is None else opset
    with _as_in_evaluation(model), atomic_write(path) as temporary:
        program = _attempt(
            "ONNX",
            lambda: torch.onnx.export(
                model, args, kwargs=kwargs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
            ),
        )
        assert program is not None
        _attempt("ONNX", lambda: program.save(str(temporary), external_data=False))
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = _attempt(
            "ONNX",
            lambda: runtime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"]),
        )
        names = [entry.name for entry in session.get_inputs()]

        def run(inputs: Any) -> list[Tensor]:
            given = dict(zip(names, _tensors(inputs), strict=True))
            arrays = {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}
            return [torch.from_numpy(array) for array in session.run(None, arrays)]

        error, batches = _verify(model, run, example_inputs, dynamic_batch, tolerance, str(path))
    path = Path(path)
    return ExportReport(path, "onnx", path.stat().st_size, error, batches, opset)


def export_program(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    dynamic_batch: bool = False,
    tolerance: float | None = None,
) -> ExportReport:
    """Write a model as a ``torch.export`` file, load the written file, and keep it only if it gives the same.

    Load it with ``torch.export.load(path).module()``; the model's code is not needed there.

    Args:
        model: Any module, such as one that :func:`compact` shrank.
        path: The file, by habit ``*.pt2``; what was there before stays if anything fails.
        example_inputs: As for :func:`trace_channels`.
        dynamic_batch: Whether axis 0 of every input tensor may have any size.
        tolerance: Largest difference allowed over an output's scale; by default 1e-4 for float32 outputs.

    Returns:
        What was written, with the error found.

    Raises:
        ConfigError: Inputs that cannot have a dynamic batch.
        ExportError: The model cannot be exported, or the file computes something else.
        WriteError: The system could not write.
    """
    args, kwargs, shapes = _arguments(example_inputs, dynamic_batch)
    with _as_in_evaluation(model), atomic_write(path) as temporary:
        program = _attempt(
            "torch.export", lambda: torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        )
        with open(temporary, "wb") as file:
            _attempt("torch.export", lambda: torch.export.save(program, file))
        written = io.BytesIO(temporary.read_bytes())
        loaded = _attempt("torch.export", lambda: torch.export.load(written).module())
        error, batches = _verify(
            model, lambda inputs: output_tensors(call_model(loaded, inputs)), example_inputs, dynamic_batch, tolerance,
            str(path),
        )  # fmt: skip
    path = Path(path)
    return ExportReport(path, "program", path.stat().st_size, error, batches)


def _require(function: str, *packages: str) -> dict[str, Any]:
    """Import optional packages, or say how to get them."""
    missing = [package for package in packages if not _imports(package)]
    if missing:
        raise ConfigError(
            f"{function} needs {', '.join(missing)}, which cannot be imported; "
            "pip install 'lightning-prune[export]' brings all that it needs."
        )
    return {package: importlib.import_module(package) for package in packages}


def _imports(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


@contextmanager
def _as_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and exporters that keep their progress to themselves; all back as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        model.eval()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters about torch's own internals
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module, mode in modes:
            module.training = mode


def _attempt(what: str, step: Callable[[], Any]) -> Any:
    try:
        return step()
    except Exception as error:  # exporters and runtimes raise many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = error.__cause__
        reason = f"{type(error).__name__}: {' '.join(lines)[:400]}"
        reason += f" Caused by {type(cause).__name__}: {str(cause)[:300]}" if cause is not None else ""
        raise ExportError(
            f"{what} cannot hold this model with these example inputs ({reason}). Nothing was written."
        ) from error


def _tensors(inputs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(found.append, inputs)
    return found


def _arguments(example_inputs: Any, dynamic_batch: bool) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional and keyword arguments, and which axes are dynamic."""
    if dynamic_batch:
        tensors = _tensors(example_inputs)
        if any(t.dim() == 0 for t in tensors) or len({t.shape[0] for t in tensors}) != 1:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "none"
            raise ConfigError(
                f"dynamic_batch=True needs input tensors that share their size along axis 0; got shapes {shapes}."
            )
        example_inputs = _with_batch(example_inputs, max(2, tensors[0].shape[0]), 0)  # a size of 1 is taken as fixed
    if isinstance(example_inputs, dict):
        args, kwargs = (), dict(example_inputs)
    else:
        args, kwargs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {}
    if not dynamic_batch:
        return args, kwargs, None
    batch = torch.export.Dim("batch", min=1)
    shapes = map_tensors(lambda t: {0: batch}, kwargs or args)
    return args, kwargs, _fill(shapes)


def _fill(shapes: Any) -> Any:
    """Arguments that are no tensors have no shape."""
    if isinstance(shapes, dict):
        if set(shapes) == {0}:
            return shapes
        return {key: _fill(value) for key, value in shapes.items()}
    if isinstance(shapes, (list, tuple)):
        return type(shapes)(_fill(value) for value in shapes)
    return None


def _with_batch(inputs: Any, size: int, seed: int | None) -> Any:
    """The inputs repeated, or cut, to a batch size; with a seed, floating tensors are drawn anew in their range."""
    generator = torch.Generator().manual_seed(seed or 0)

    def change(tensor: Tensor) -> Tensor:
        times = math.ceil(size / tensor.shape[0]) if tensor.dim() else 1
        result = torch.cat([tensor] * times)[:size] if tensor.dim() else tensor
        if seed is None or not tensor.is_floating_point() or not tensor.numel():
            return result.clone()
        low, high = (float(v) for v in (tensor.min(), tensor.max()))
        drawn = torch.rand(result.shape, generator=generator) * ((high - low) or 1.0) + low
        return drawn.to(tensor.device, tensor.dtype)

    return map_tensors(change, inputs)


def _verify(
    model: nn.Module,
    run: Callable[[Any], Sequence[Tensor]],
    example_inputs: Any,
    dynamic_batch: bool,
    tolerance: float | None,
    path: str,
) -> tuple[float, tuple[int, ...]]:
    """Compare what was written with the model: the error, and the batch sizes tried."""
    tensors = _tensors(example_inputs)
    own = tensors[0].shape[0] if tensors and tensors[0].dim() else 1
    trials = [(own, example_inputs)]
    same_batch = all(t.dim() and t.shape[0] == own for t in tensors)
    if same_batch:
        sizes = [own, *([1, own + 3] if dynamic_batch else [])]
        trials += [(size, _with_batch(example_inputs, size, seed)) for seed, size in enumerate(sizes, 1)]
    worst = 0.0
    for size, inputs in trials:
        expected = output_tensors(call_model(model, map_tensors(torch.clone, inputs)))
        try:
            found = list(run(map_tensors(torch.clone, inputs)))
        except Exception as error:
            raise ExportError(
                f"what was exported for {path} cannot run at a batch of {size} "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). Nothing was written."
            ) from error
        worst = max(worst, _difference(expected, found, tolerance, path))
    return worst, tuple(dict.fromkeys(size for size, _ in trials))


def _difference(expected: list[Tensor], found: list[Tensor], tolerance: float | None, path: str) -> float:
    if [tuple(t.shape) for t in expected] != [tuple(t.shape) for t in found]:
        raise ExportError(
            f"what was exported for {path} returns shapes {[tuple(t.shape) for t in found]}, the model "
            f"{[tuple(t.shape) for t in expected]}. Nothing was written."
        )
    worst, seen = 0.0, False
    for a, b in zip(expected, found, strict=True):
        allowed = tolerance if tolerance is not None else TOLERANCE.get(a.dtype, 0.0)
        one, other = a.detach().cpu().double(), b.detach().cpu().double()
        if one.numel() == 0:
            continue
        scale = float(one.abs().max())
        seen |= scale > 0
        error = float((one - other).abs().max()) / (scale or 1.0)
        if not error <= allowed:
            raise ExportError(
                f"what was exported for {path} differs from the model by {error:.3g} of the output's scale, allowed is "
                f"{allowed:.0e} for {a.dtype}. Nothing was written; another opset or export_program may do better."
            )
        worst = max(worst, error)
    if not seen:
        raise ExportError(
            f"every output of the model is 0 for these inputs, so nothing was compared and {path} was not written. "
            "Load trained weights, or give other example inputs."
        )
    return worst

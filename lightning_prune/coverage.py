"""Run the channel engine on whole model zoos and write what it reached as a table."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.channels.budget import Budget
from lightning_prune.channels.compact import compact
from lightning_prune.channels.equality import random_tensors
from lightning_prune.channels.plan import plan_removal
from lightning_prune.channels.trace import trace_channels
from lightning_prune.compact_files import load_compact, save_compact
from lightning_prune.errors import PruneError
from lightning_prune.files import atomic_write
from lightning_prune.running import call_model, output_tensors


@dataclass
class CoverageRow:
    """What was reached on one model; fractions are kept of the original.

    Attributes:
        model: Its name.
        pixels: Side of the square input.
        channels: Fraction of the prunable channels kept.
        params: Fraction of the parameters kept.
        macs: Fraction of the MACs kept.
        error: Relative error of the equality check (float64).
        seconds: Trace, plan and removal, without the check.
        check_seconds: The equality check.
        frozen: What may not leave and why, the commonest reasons first.
        failure: Why there is no result, or "".
    """

    model: str
    pixels: int
    channels: float = 1.0
    params: float = 1.0
    macs: float = 1.0
    error: float = float("nan")
    seconds: float = 0.0
    check_seconds: float = 0.0
    frozen: str = ""
    failure: str = ""


def check_model(
    name: str, build: Callable[[], nn.Module], example_inputs: Tensor, budget: Budget, *, train: bool = True
) -> CoverageRow:
    """Remove channels from one model and check all that is promised of the result.

    The compact model must equal its masked parent, take a training step in which every parameter that has a gradient
    moves, and be equal after saving and loading into a fresh model.

    Args:
        name: Name for the table.
        build: Makes a fresh model.
        example_inputs: (batch, channels, height, width).
        budget: What to keep.
        train: Whether to take the training step.

    Returns:
        The row; a failure of any of these is recorded in it.
    """
    row = CoverageRow(name, example_inputs.shape[-1])
    torch.manual_seed(0)
    try:
        model = build()
        start = time.perf_counter()
        graph = trace_channels(model, example_inputs)
        plan = plan_removal(graph, budget)
        planned = time.perf_counter()
        reasons = Counter(f.reason for f in graph.frozen)
        row.frozen = "; ".join(f"{reason} ({n})" for reason, n in reasons.most_common(4))
        del graph
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        if train:
            _step(model, optimizer, example_inputs)
        report = compact(model, plan, example_inputs, optimizer)
        row.seconds = planned - start + report.surgery_seconds
        row.check_seconds, row.error = report.check_seconds, report.error
        row.channels, row.params, row.macs = (report.kept(w) for w in ("channels", "params", "macs"))
        if train:
            _step(model, optimizer, example_inputs)
        _reload(model, build, example_inputs)
    except (PruneError, RuntimeError, AssertionError) as error:
        row.failure = f"{type(error).__name__}: {error}"
    return row


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any) -> None:
    model.train()
    optimizer.zero_grad()
    # A target other than 0, since networks that start at 0 would have no gradient there.
    loss = sum(
        (out.float() - 1).square().mean() for out in output_tensors(call_model(model, inputs)) if out.requires_grad
    )
    assert isinstance(loss, Tensor), "no output of the model can be trained"
    loss.backward()
    rate = optimizer.param_groups[0]["lr"]
    before = {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if p.grad is not None and float(rate * p.grad.abs().max()) > 1e-6 * float(p.detach().abs().max())
    }
    optimizer.step()
    model.eval()
    after = dict(model.named_parameters())
    still = [n for n, p in before.items() if torch.equal(p, after[n])]
    assert before, "no parameter has a gradient that float32 could show"
    assert not still, f"parameters with a gradient did not move: {still[:3]}"


def _reload(model: nn.Module, build: Callable[[], nn.Module], inputs: Any) -> None:
    names = random_tensors(model, torch.float32, 5)
    with torch.no_grad():
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            tensor.copy_(names[name])
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compact.safetensors"
        save_compact(model, path)
        loaded = load_compact(build(), path).eval()
    with torch.no_grad():
        for a, b in zip(
            output_tensors(call_model(model, inputs)), output_tensors(call_model(loaded, inputs)), strict=True
        ):
            assert torch.equal(a, b), "the loaded model gives other outputs"


def write_table(rows: Iterable[CoverageRow], path: str | Path, title: str, note: str) -> None:
    """Write rows as a Markdown table, atomically."""
    lines = [f"# {title}", "", note, ""]
    lines += ["| model | pixels | channels | params | MACs | equality error | seconds | check | what stays, and why |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        if row.failure:
            failure = row.failure.replace("|", "/").replace("\n", " ")[:200]
            lines.append(f"| {row.model} | {row.pixels} | | | | | | | **no result:** {failure} |")
            continue
        lines.append(
            f"| {row.model} | {row.pixels} | {row.channels:.3f} | {row.params:.3f} | {row.macs:.3f} | "
            f"{row.error:.1e} | "
            f"{row.seconds:.2f} | {row.check_seconds:.2f} | {row.frozen.replace('|', '/')} |"
        )
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def torchvision_models() -> list[str]:
    """Names of torchvision's classification models, without the quantised ones."""
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def torchvision_builder(name: str) -> Callable[[], nn.Module]:
    """A function that builds one of them with random weights."""
    import torchvision

    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return lambda: torchvision.models.get_model(name, **options)


def input_size(name: str, smallest: int = 96) -> int:
    """Side of the input: as small as the model takes, but at least ``smallest``."""
    if name.startswith(("vit_", "maxvit")):
        return 518 if name == "vit_h_14" else 224
    return max(smallest, {"inception_v3": 299, "alexnet": 96, "googlenet": 96}.get(name, 0))

"""Run the channel engine on whole networks, and write what it reached as a table that a killed run goes on with."""

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.channels.budget import Budget
from lightning_prune.channels.compact import compact
from lightning_prune.channels.equality import random_tensors
from lightning_prune.channels.groups import FrozenAxis
from lightning_prune.channels.planning import plan_removal
from lightning_prune.channels.trace import ChannelGraph, trace_channels
from lightning_prune.compact_files import load_compact, save_compact
from lightning_prune.errors import FileFormatError
from lightning_prune.files import atomic_write
from lightning_prune.running import call_model, map_tensors, output_tensors

Loss = Callable[[nn.Module], Tensor]
COLUMNS = ("model", "input", "channels", "params", "MACs", "error", "plan s", "compact s", "what stays, and why")
SHOWN_REASONS = 5
LONGEST_REASON = 110
NOTHING = "no channel can leave exactly"
EXPLAINED = 0.3
"""Rows that keep more of their MACs say how these split by how many widths shrink."""


@dataclass(frozen=True)
class ZooModel:
    """One network of the coverage table.

    Attributes:
        name: ``"library/name"``.
        section: Heading of the table it stands in.
        build: Makes a fresh network with random weights.
        inputs: Makes example inputs, as for :func:`trace_channels`.
        loss: What the training step minimises, for networks whose outputs in training need targets. None: the squared
            distance of all outputs from 1.
        most_macs: Largest fraction of the MACs that may stay with half of the channels.
        note: What the table says about it besides: a twin of reduced depth, a wrapper around a part.
    """

    name: str
    section: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    loss: Loss | None = None
    most_macs: float = 1.0
    note: str = ""


@dataclass
class CoverageRow:
    """What was reached on one network; fractions are kept of the original.

    Attributes:
        model: Its name.
        inputs: Shapes of its example inputs.
        channels: Fraction of the prunable channels kept.
        params: Fraction of the parameters kept.
        macs: Fraction of the MACs kept.
        error: Relative error of the equality check.
        dtype: Precision of that check.
        plan_seconds: CPU time of trace and plan.
        compact_seconds: CPU time of the equality check and the removal.
        frozen: What may not leave and why, the commonest reasons first.
        shares: How the MACs split by how many of their widths shrink.
        note: See :class:`ZooModel`.
        failure: Why there is no result, or "".
    """

    model: str
    inputs: str
    channels: float = 1.0
    params: float = 1.0
    macs: float = 1.0
    error: float = float("nan")
    dtype: str = ""
    plan_seconds: float = 0.0
    compact_seconds: float = 0.0
    frozen: str = ""
    shares: str = ""
    note: str = ""
    failure: str = ""

    def cells(self) -> list[str]:
        """The row's cells, in the order of ``COLUMNS``."""
        if self.failure:
            why = "; ".join(part for part in (_plain(self.failure, 300), self.note, self.frozen) if part)
            return [self.model, self.inputs, *[""] * 6, f"**no result:** {why}"]
        error = f"{self.error:.1e}" + (f" ({self.dtype})" if self.dtype != "float64" else "") if self.dtype else ""
        numbers = [f"{self.channels:.3f}", f"{self.params:.3f}", f"{self.macs:.3f}", error]
        stays = "; ".join(
            part for part in (self.note, self.frozen, self.shares if self.macs > EXPLAINED else "") if part
        )
        return [self.model, self.inputs, *numbers, f"{self.plan_seconds:.2f}", f"{self.compact_seconds:.2f}", stays]


def _plain(text: str, longest: int) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= longest else text[: longest - 3] + "..."


def check_model(entry: ZooModel, budget: Budget) -> CoverageRow:
    """Remove channels from one network and check all that is promised of the result.

    The compact model must equal its masked parent, take a training step in which every parameter whose gradient
    float32 can show moves (another step, with momentum, is taken before the removal), and be equal, bit for bit, after
    saving and loading into a fresh model.

    Args:
        entry: The network.
        budget: What to keep.

    Returns:
        The row; whatever fails is recorded in it.
    """
    torch.manual_seed(0)
    inputs = entry.inputs()
    row = CoverageRow(entry.name, shapes_text(inputs), note=entry.note)
    try:
        model = entry.build()
        start = time.process_time()
        graph = trace_channels(model, inputs)
        row.frozen, row.shares = frozen_text(graph.frozen), shares_text(graph)
        if not graph.groups:
            row.note = NOTHING
            return row
        plan = plan_removal(graph, budget)
        planned = time.process_time()
        del graph
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        _step(model, optimizer, inputs, entry.loss)
        begun = time.process_time()
        report = compact(model, plan, inputs, optimizer)
        row.plan_seconds, row.compact_seconds = planned - start, time.process_time() - begun
        row.error, row.dtype = report.error, report.dtype
        row.channels, row.params, row.macs = (report.kept(w) for w in ("channels", "params", "macs"))
        _step(model, optimizer, inputs, entry.loss)
        del optimizer
        _reload(model, entry.build, inputs)
    except Exception as error:  # a table of what works must name what does not, whatever went wrong
        row.failure = f"{type(error).__name__}: {error}"
    gc.collect()  # recordings hold cycles, and the next network may need the memory
    return row


def shapes_text(inputs: Any) -> str:
    """Shapes of all input tensors, such as ``"2x3x64x64"``."""
    found: list[str] = []
    map_tensors(lambda t: found.append("x".join(map(str, t.shape))), inputs)
    distinct = list(dict.fromkeys(found))
    return ", ".join(f"{found.count(s)} of {s}" if found.count(s) > 1 else s for s in distinct)


def frozen_text(frozen: list[FrozenAxis]) -> str:
    """Why channels stay: the commonest reasons, each with how many axes it holds and the first of them."""
    by_reason: dict[str, list[str]] = {}
    for axis in frozen:
        by_reason.setdefault(_plain(axis.reason, LONGEST_REASON), []).append(axis.name)
    ordered = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    parts = [f"{reason}: {f'{len(n)}, first ' if len(n) > 1 else ''}{n[0]}" for reason, n in ordered[:SHOWN_REASONS]]
    if len(ordered) > SHOWN_REASONS:
        parts.append(f"{len(ordered) - SHOWN_REASONS} more reasons for {sum(len(n) for _, n in ordered[5:])} axes")
    return "; ".join(parts)


def shares_text(graph: ChannelGraph) -> str:
    """How many of the MACs belong to products of which none, one or both widths lose channels.

    With half of every width, these keep all, a half and a quarter: why networks of many depthwise, first and last
    layers keep more than a quarter.
    """
    shares = [0.0, 0.0, 0.0]
    grouping = graph.grouping
    for product in graph.labels.products:
        shrinking = [bool(grouping.removable[grouping.component[array]].any()) for array in product.arrays]
        shares[min(sum(shrinking), 2)] += product.constant * math.prod(array.size for array in product.arrays)
    total = sum(shares) or 1.0
    none, one, two = (f"{share / total:.0%}" for share in shares)
    return f"MACs of which no width shrinks {none}, one {one}, both {two}"


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any, loss: Loss | None) -> None:
    model.train()
    optimizer.zero_grad()
    value = _distance(model, inputs) if loss is None else loss(model)
    value.backward()
    rate, momentum = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
    before = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        update, state = parameter.grad, optimizer.state.get(parameter, {})
        if state.get("momentum_buffer") is not None:
            update = update + momentum * state["momentum_buffer"]
        if float(rate * update.abs().max()) > 1e-6 * float(parameter.detach().abs().max()):
            before[name] = parameter.detach().clone()
    optimizer.step()
    model.eval()
    after = dict(model.named_parameters())
    still = [n for n, p in before.items() if torch.equal(p, after[n])]
    assert before, "no parameter has a gradient that float32 could show"
    assert not still, f"parameters with a gradient did not move: {still[:3]}"


def _distance(model: nn.Module, inputs: Any) -> Tensor:
    # From 1 and not from 0, since networks that start at 0 would have no gradient there.
    outputs = [out for out in output_tensors(call_model(model, inputs)) if out.requires_grad]
    assert outputs, "no output of the model can be trained"
    return torch.stack([(out.float() - 1).square().mean() for out in outputs]).sum()


def _reload(model: nn.Module, build: Callable[[], nn.Module], inputs: Any) -> None:
    tensors = random_tensors(model, torch.float32, 5)
    with torch.no_grad():
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            tensor.copy_(tensors[name])
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compact.safetensors"
        save_compact(model, path)
        loaded = load_compact(build(), path).eval()
    with torch.no_grad():
        pairs = zip(_outputs(model, inputs), _outputs(loaded, inputs), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "the loaded model gives other outputs"


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(0)  # for forward passes that draw random numbers in eval mode too
    return output_tensors(call_model(model, map_tensors(torch.clone, inputs)))


class CoverageTable:
    """The coverage table as a Markdown file that is its own state: rows are written as they come, atomically.

    Args:
        path: The file.
        title: Its heading.
        note: Text under the heading.
        resume: Whether rows that the file has already are kept.

    Raises:
        FileFormatError: The file that is there is no coverage table.
    """

    def __init__(self, path: str | Path, title: str, note: str, *, resume: bool) -> None:
        self.path, self.title, self.note = Path(path), title, note
        self.lines: dict[str, dict[str, str]] = {}
        if resume and self.path.exists():
            for section, name, line in _rows(self.path):
                self.lines.setdefault(section, {})[name] = line

    def has_result(self, entry: ZooModel) -> bool:
        """Whether there is a row with a result; failures are tried again."""
        line = self.lines.get(entry.section, {}).get(entry.name)
        return line is not None and "**no result:**" not in line

    def add(self, section: str, row: CoverageRow) -> None:
        """Put a row in its section, in the place of an earlier one of that name, and write the file."""
        self.lines.setdefault(section, {})[row.model] = "| " + " | ".join(row.cells()) + " |"
        self.write()

    def write(self) -> None:
        """Write the file."""
        text = [f"# {self.title}", "", self.note]
        for section, lines in self.lines.items():
            results = sum("**no result:**" not in line for line in lines.values())
            text += ["", f"## {section} ({results} of {len(lines)} with a result)", ""]
            text += ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join(["---"] * len(COLUMNS)) + " |"]
            text += lines.values()
        with atomic_write(self.path) as temporary:
            temporary.write_text("\n".join(text) + "\n", encoding="utf-8")


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Section, model and whole line of each row of a table that :class:`CoverageTable` wrote."""
    section, header = "", "| " + " | ".join(COLUMNS) + " |"
    text = path.read_text(encoding="utf-8")
    if header not in text:
        raise FileFormatError(f"{path} is no coverage table with the columns {', '.join(COLUMNS)}; give another file.")
    for line in text.splitlines():
        if line.startswith("## "):
            section = line[3:].rpartition(" (")[0]
        elif line.startswith("| ") and line != header and not line.startswith("| ---"):
            yield section, line.split("|")[1].strip(), line

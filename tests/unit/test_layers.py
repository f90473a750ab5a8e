"""Which module may import which, what `import lightning_prune` costs, and what it offers."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_prune

PACKAGE = Path(lightning_prune.__file__).parent

LAYERS: list[set[str]] = [
    {"errors", "times", "files", "environment", "progress", "counted", "compiling"}
    | {"prunable", "running", "wrappers", "counting", "ranking", "patterns"}
    | {"sharding", "sharded_ranking"},
    {"masks", "scores", "named_scores", "actions", "selection", "settling", "record", "costs"},
    {"channels", "learned"},
    {
        "acceleration",
        "compressed",
        "compiled_rows",
        "compiled_vectors",
        "connectivity",
        "checkpoint",
        "compact_files",
        "export",
    },
    {"resume"},  # Lightning is known from here up
    {"callbacks"},
    {"experiments", "recipes", "reports"},
    {"instability", "sweep"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
MODULES = sorted(
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.name != "__init__.py"
)

PUBLIC = [
    "Accelerated",
    "accelerate",
    "CostProfiler",
    "CollapseWarning",
    "EarlyBird",
    "mask_distance",
    "Latency",
    "LatencyComparison",
    "compare_latency",
    "measure_latency",
    "Costs",
    "MeasurementError",
    "count_costs",
    "Budget",
    "ChannelPruner",
    "ChannelSelection",
    "load_compact_checkpoint",
    "RemovalPlan",
    "compact",
    "load_compact",
    "plan_removal",
    "save_compact",
    "trace_channels",
    "BudgetError",
    "ConfigError",
    "EqualityError",
    "ErrorRate",
    "LinearPath",
    "RoundConnectivity",
    "linear_mode_connectivity",
    "ExportError",
    "ExportReport",
    "export_onnx",
    "export_program",
    "FileFormatError",
    "HRankPruner",
    "IterativeMagnitudePruner",
    "LearnedSupermask",
    "LRRewind",
    "MaskMismatchError",
    "MaskSet",
    "NoEffectWarning",
    "Position",
    "PruneError",
    "PruneEvent",
    "ResumeError",
    "RunRecord",
    "SelectionError",
    "feature_ranks",
    "SlimmingPruner",
    "SlimmingRegularizer",
    "Ticket",
    "TicketWriter",
    "TrainingCost",
    "TraceError",
    "TrainTime",
    "WandbReporter",
    "WeightRewind",
    "WriteError",
    "load_ticket",
    "prunable_parameters",
    "save_ticket",
    "Supermask",
    "SupermaskScorer",
    "mask_weights",
    "supermask",
    "score_weights",
    "select",
]


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Every import of a module: what is imported, with dots, and whether inside a function."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{'.' * node.level}{node.module or ''}.{alias.name}", inside) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (
                (a.value, inside) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def violations(module: str, source: str) -> list[str]:
    """What is wrong with the imports of ``module`` (a path within the package)."""
    room = Path(module).parts[0].removesuffix(".py")
    if room not in LEVEL:
        return [f"{room} stands in no layer: give it one in LAYERS"]
    found = []
    in_folder = "/" in module
    for name, inside in imports(source):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if name.startswith("."):
            found.append(f"{name}: relative")
        elif top in LIGHTNING and LEVEL[room] < LEVEL["resume"]:
            found.append(f"{name}: Lightning below layer 4")
        elif top == "wandb" and (room != "reports" or not inside):
            found.append(f"{name}: outside a function of reports/")
        elif top == "lightning_prune" and other != room:
            if other not in LEVEL:
                found.append(f"{name}: no module of a layer")
            elif LEVEL[other] > LEVEL[room]:
                found.append(f"{name}: from a higher layer")
            elif LEVEL[other] == LEVEL[room] and (in_folder or not (PACKAGE / f"{other}.py").exists()):
                found.append(f"{name}: from another folder of its own layer")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_lies_below_it(module: str) -> None:
    assert violations(module, (PACKAGE / module).read_text(encoding="utf-8")) == []


def test_there_are_modules_to_check() -> None:
    assert {"masks.py", "callbacks/magnitude.py", "cli.py"} <= set(MODULES)
    everything = [name for module in MODULES for name, _ in imports((PACKAGE / module).read_text(encoding="utf-8"))]
    assert sum(name.startswith("lightning_prune.") for name in everything) > 50
    assert any(name.startswith("lightning.") for name in everything)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("files.py", "from lightning_prune.masks import MaskSet"),
        ("masks.py", "from lightning_prune import select"),
        ("masks.py", "import lightning_prune"),
        ("masks.py", "from lightning_prune.costs import flops"),
        ("costs/flops.py", "from lightning_prune.masks import MaskSet"),
        ("costs/flops.py", "def f():\n    from lightning_prune.callbacks import magnitude"),
        ("channels/groups.py", "from lightning_prune import callbacks"),
        ("record.py", "import lightning.pytorch as pl"),
        ("record.py", "if TYPE_CHECKING:\n    from lightning import Trainer"),
        ("checkpoint.py", "import importlib\nimportlib.import_module('lightning.pytorch')"),
        ("experiments/a.py", "from lightning_prune.reports import b"),
        ("resume/state.py", "from lightning_prune.callbacks import events"),
        ("callbacks/costs.py", "import wandb"),
        ("callbacks/costs.py", "def f():\n    import wandb"),
        ("reports/a.py", "import wandb"),
        ("callbacks/a.py", "from .b import c"),
        ("attic.py", ""),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("selection.py", "from lightning_prune.masks import MaskSet\nfrom lightning_prune.errors import PruneError"),
        ("channels/groups.py", "from lightning_prune.channels.trace import x\nfrom lightning_prune.costs import flops"),
        ("callbacks/a.py", "import lightning.pytorch as pl\nfrom lightning_prune.resume import ResumeState"),
        ("reports/a.py", "def f():\n    import wandb.sdk"),
        ("cli.py", "import lightning_prune.experiments"),
    ],
)
def test_a_right_import_is_let_through(module: str, source: str) -> None:
    assert violations(module, source) == []


PROBE = """
import json, sys, time
begin = time.perf_counter()
import lightning
middle = time.perf_counter()
before = set(sys.modules)
import lightning_prune
end = time.perf_counter()
{extra}
import torch
new = {{name.partition(".")[0] for name in set(sys.modules) - before}} - {{name.partition(".")[0] for name in before}}
print(json.dumps({{
    "new": sorted(new - set(sys.stdlib_module_names)),
    "seconds": [middle - begin, end - middle],
    "cuda": torch.cuda.is_initialized(),
}}))
"""


def probe(extra: str = "") -> dict:
    code = PROBE.format(extra=extra)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_import_brings_in_nothing_heavy() -> None:
    found = probe()
    assert set(found["new"]) <= {"lightning_prune", "safetensors"}
    assert not found["cuda"]
    lightning, ours = found["seconds"]
    print(f"import lightning {lightning:.2f} s, then import lightning_prune {ours:.2f} s")
    assert ours < max(1.0, lightning)


def test_the_probe_sees_what_is_heavy() -> None:
    assert {"sklearn", "wandb"} <= set(probe("import sklearn, wandb")["new"])


def test_the_public_names() -> None:
    assert sorted(lightning_prune.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(lightning_prune, name).__doc__, name


def test_errors_are_ours() -> None:
    errors = [getattr(lightning_prune, name) for name in PUBLIC if name.endswith("Error")]
    assert len(errors) > 5
    assert all(issubclass(error, lightning_prune.PruneError) for error in errors)
    assert issubclass(lightning_prune.NoEffectWarning, UserWarning)

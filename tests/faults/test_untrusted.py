"""Damaged and hostile files of every kind are refused with one clear error: nothing runs, nothing else is touched."""

import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import (
    FileFormatError,
    MaskMismatchError,
    MaskSet,
    PruneError,
    RemovalPlan,
    RunRecord,
    load_compact,
    load_compact_checkpoint,
    load_ticket,
)
from lightning_prune.cli import check_checkpoint
from lightning_prune.commands.target import load_weights
from lightning_prune.files import check_archive, load_archive
from lightning_prune.resume import AtomicCheckpointIO
from tests.faults import fuzz

ROOT = Path(__file__).parents[2]

READERS: dict[str, Callable[[Path], Any]] = {
    "ticket": load_ticket,
    "masks": MaskSet.load,
    "compact model": lambda path: load_compact(nn.Linear(2, 2), path),
    "record": RunRecord.read,
    "checkpoint": load_archive,
    "checkpoint of the Trainer": AtomicCheckpointIO().load_checkpoint,
    "checkpoint of the command line": check_checkpoint,
    "checkpoint of a compact model": lambda path: load_compact_checkpoint(nn.Linear(2, 2), path),  # type: ignore[type-var]
    "weights": lambda path: load_weights(nn.Linear(2, 2), path),
    "compact weights": lambda path: load_weights(nn.Linear(2, 2), _renamed(path)),
}


def _renamed(path: Path) -> Path:
    other = path.with_suffix(".safetensors")
    return path.rename(other) if path.exists() else other


FORMS: dict[str, Callable[[Any, Path], Any]] = {
    "pickle": lambda bomb, path: path.write_bytes(pickle.dumps(bomb)),
    "torch": lambda bomb, path: torch.save({"state_dict": {}, "bomb": bomb}, path),
    "torch, old": lambda bomb, path: torch.save(bomb, path, _use_new_zipfile_serialization=False),
    "nothing": lambda bomb, path: path.write_bytes(b""),
    "no such file": lambda bomb, path: None,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_what_is_in_a_file(reader: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    FORMS[form](fuzz.Bomb(tmp_path / "exploded"), path)
    with pytest.raises(FileFormatError) as caught:
        READERS[reader](path)
    assert len(str(caught.value)) < 1500
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_works(tmp_path: Path) -> None:
    FORMS["torch"](fuzz.Bomb(tmp_path / "exploded"), tmp_path / "x")
    torch.load(tmp_path / "x", weights_only=False)
    assert (tmp_path / "exploded").exists()


def test_an_archive_that_would_unpack_to_more_than_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(2**20)}}, path)
    check_archive(path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "y", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert (tmp_path / "y").stat().st_size < 2**16
    with pytest.raises(FileFormatError, match="it is compressed"):
        load_archive(tmp_path / "y")


BLOCK: dict[str, Any] = {"block": "b", "module": "conv1", "adds": []}


def plan(**parts: Any) -> str:
    whole = fuzz._small()[1].to_json()
    return json.dumps(whole | parts)


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({"attributes": {"conv1": {"forward": 1}}}, MaskMismatchError),
        ({"attributes": {"conv1": {"__class__": 1}}}, FileFormatError),
        ({"attributes": {"conv1": {"padding_mode": "os.system"}}}, FileFormatError),
        ({"attributes": {"conv1": {"weight": 3}}}, MaskMismatchError),
        ({"attributes": {"absent": {"groups": 3}}}, MaskMismatchError),
        ({"keep": {"conv1.weight": {"0": [99]}}}, FileFormatError),
        ({"keep": {"conv1.weight": {"0": [0, 0]}}}, FileFormatError),
        ({"keep": {"conv1.weight": {"9": [0]}}}, FileFormatError),
        ({"keep": {"../x": {"0": [0]}}}, FileFormatError),
        ({"replaced": {"conv1": "os.system"}}, MaskMismatchError),
        (
            {"left": [{"block": "b", "module": "conv1", "adds": [], "parts": {"conv1": ["zero", 10**9]}}]},
            FileFormatError,
        ),
        ({"left": [{"block": "b", "module": "conv1", "adds": [], "parts": {"x": ["zero", 0]}}]}, MaskMismatchError),
        *(
            ({"left": [{"block": "b", "module": "conv1", "adds": adds, "parts": {}}]}, FileFormatError)
            for adds in ([["x", 0]], [[0, 2]], [[0]], [7], 7)
        ),
        ({"shapes": {"conv1.weight": [2**70]}}, FileFormatError),
    ],
    ids=lambda value: f"{value!r:.50}" if isinstance(value, dict) else "",
)
def test_plans_that_would_do_something_else(parts: dict[str, Any], error: type[PruneError]) -> None:
    RemovalPlan.from_json(plan()).apply_(fuzz.network())
    model = fuzz.network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error):
        RemovalPlan.from_json(plan(**parts)).apply_(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=json_values, at=st.sampled_from(["whole", "rounds", "method", "timing", "costs", "row", "seed"]))
def test_any_json_in_a_record(content: Any, at: str, tmp_path: Path) -> None:
    record: Any = fuzz._record().state_dict()
    if at == "row":
        record["rounds"][1] = content
    record = content if at == "whole" else record | ({at: content} if at in record else {})
    try:
        read = RunRecord.from_state_dict(record)
    except PruneError:
        return
    assert repr(read.state_dict()) == repr(RunRecord.from_state_dict(read.state_dict()).state_dict())


def run_fuzz(*words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.faults.fuzz", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="bounds memory as Linux does")
def test_a_few_hundred_files() -> None:
    done = run_fuzz("--count", "60", "--seed", "5")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "0 files did anything else" in done.stdout
    assert done.stdout.count(" refused, ") == len(fuzz.TARGETS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_files() -> None:
    done = run_fuzz("--count", "1500", "--seed", "11")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_mutations_change_something() -> None:
    rng = random.Random(0)
    data = bytes(range(256))
    changed = [fuzz.mutate_bytes(data, rng) for _ in range(100)]
    assert sum(other != data for other in changed) > 90
    content = fuzz._record().state_dict()
    assert sum(repr(fuzz.mutate_content(content, rng)) != repr(content) for _ in range(100)) > 80

"""Reads thousands of damaged and hostile files: each must be refused with one clear error, or read right.

``python -m tests.faults.fuzz --count 2000 --seed 0`` (``--help`` for more)

Every reader runs under bounds on memory and time, and under an audit hook that sees what Python does: files written
outside the fuzzed folder, processes, connections. Prints a table; exit code 1 with the file kept where a reader did
anything else than read or refuse.
"""

import argparse
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from lightning_prune import (
    Budget,
    MaskSet,
    PruneError,
    RemovalPlan,
    Ticket,
    compact,
    load_compact,
    load_ticket,
    plan_removal,
    save_compact,
    save_ticket,
    trace_channels,
)
from lightning_prune.callbacks.plans import read_plans
from lightning_prune.cli import main as command
from lightning_prune.files import FORMAT_KEY, _checksum, _serialize, load_archive
from lightning_prune.record import Arm, Round, RunRecord
from lightning_prune.reports.page import page_of
from lightning_prune.reports.runs import choose_metric, group_runs
from lightning_prune.reports.sweep.page import sweep_page
from lightning_prune.reports.sweep.result import analyse
from lightning_prune.reports.sweep.tables import content, markdown
from tests._helpers.sweeps import arm_of
from tests.faults.cases import Images

ROOT = Path(__file__).parents[2]
SECONDS, BYTES = 20, 2**30  # for one file: time, and memory on top of what the process has

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**100, -(2**63), 1.5, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "__class__", "__reduce__", "forward", "weight", "NaN", [], {}, [[]], [None], {"": None}, "\0", "é",
    [2**40], ["x"] * 100, {"x": {"x": {"x": 1}}}, "x" * 10_000, "a.b.c", ".", "..", "%s%s%n", "${HOME}", 10**400,
]  # fmt: skip
"""Values that stand where others should."""


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, insert or overwrite."""
    if not data:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(64)))
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, kind = rng.randrange(len(content) or 1), rng.randrange(6)
        if kind == 0:
            content[at : at + 1] = bytes([(content[at] if content else 0) ^ (1 << rng.randrange(8))])
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at : at + rng.randrange(1, 32)]
        elif kind == 3:
            content[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 32)))
        elif kind == 4:
            content[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"[[[[[[[[", b"99999999"))
        else:
            content[at:at] = content[: rng.randrange(1, 256)]
        if not content:
            break
    return bytes(content)


def mutate_content(content: Any, rng: random.Random) -> Any:
    """A copy of plain content with one or a few places changed: other values, missing, repeated or renamed parts."""
    content = _copy(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(_places(content))
        if not places:
            return rng.choice(ODD)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("x", "../x", "__class__", "", "weight", "conv1.weight"))] = holder.pop(key)
        elif kind == 2 and isinstance(holder, list):
            holder.extend([holder[key]] * rng.choice((1, 1000)))
        elif kind == 3 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice((-1, 1, 2**40))
        elif kind == 4:
            holder[key] = _copy(rng.choice(places)[0])
        else:
            holder[key] = _copy(rng.choice(ODD))
    return content


def _copy(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _copy(value) for key, value in content.items()}
    return [_copy(value) for value in content] if isinstance(content, list | tuple) else content


def _places(content: Any) -> Any:
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(pairs):
        yield content, key
        yield from _places(value)


@dataclass
class Target:
    """One kind of file: a good one, and what reads it; ``spoil`` makes a bad one of it."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    spoil: Callable[[Path, random.Random], None]
    share: float = 1.0
    """Of the count: slow readers get fewer files."""


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Images().eval()


INPUTS = torch.zeros(2, 1, 3, 4)


def _small() -> tuple[nn.Module, RemovalPlan]:
    model = network()
    plan = plan_removal(trace_channels(model, INPUTS), Budget(channels=0.5))
    compact(model, plan, INPUTS)
    return model, plan


def _record() -> RunRecord:
    record = RunRecord({"IterativeMagnitudePruner": {"fraction": 0.2}}, seed=0, environment={"torch": "2"})
    for number in range(3):
        row = Round(
            round=number, step=number, epoch=number, steps=1, kept=9 - number, total=9, digest="d", ticket="tickets/x",
            per_layer={"w": (9 - number, 9)}, metrics={"val_acc": 0.5}, costs={"params": (9, 9)},
        )  # fmt: skip
        record.add_round(row, 1.0)
    return record


def _bytes_of(path: Path, rng: random.Random) -> None:
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))


def _json_of(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        _bytes_of(path, rng)
    else:
        path.write_text(json.dumps(mutate_content(json.loads(path.read_text()), rng)))


def _tensors_of(path: Path, rng: random.Random) -> None:
    """Bytes, or parts of a file with its checksum made right again, as someone who knows the format can."""
    if rng.random() < 0.4:
        _bytes_of(path, rng)
        return
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()[FORMAT_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if rng.random() < 0.3:
        name = rng.choice(sorted(tensors))
        odd = [torch.zeros(0), torch.zeros((), dtype=torch.int64), tensors[name].to(torch.float16), torch.ones(3, 2)]
        odd += [torch.full_like(tensors[name], 7), tensors[name].reshape(-1)[:1]]
        tensors[rng.choice((name, f"{name}x", "../x", "mask/x", ""))] = rng.choice(odd).clone()
    else:
        content = mutate_content(content, rng)
    if isinstance(content, dict):
        content.pop("checksum", None)
        content["checksum"] = _checksum(tensors, content)
    path.write_bytes(_serialize(tensors, {FORMAT_KEY: json.dumps(content)}))


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return exec, (f"import pathlib; pathlib.Path({self.path!r}).touch()",)


def _archive_of(path: Path, rng: random.Random) -> None:
    kind = rng.random()
    if kind < 0.5:
        _bytes_of(path, rng)
    elif kind < 0.8:
        content = torch.load(path, weights_only=True)
        parts = mutate_content({k: v for k, v in content.items() if k != "state_dict"}, rng)
        torch.save(content | parts if isinstance(parts, dict) else parts, path)
    elif kind < 0.9:
        bomb = {"state_dict": {}, "x": Bomb(path.with_name("exploded"))}
        if rng.random() < 0.5:
            path.write_bytes(pickle.dumps(bomb))
        else:
            torch.save(bomb, path, _use_new_zipfile_serialization=rng.random() < 0.5)
    else:  # compressed, or with names that lead elsewhere
        with zipfile.ZipFile(path) as old:
            records = {name: old.read(name) for name in old.namelist()}
        how = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(path, "w", how) as new:
            for name, data in records.items():
                new.writestr(rng.choice((name, name, f"../../{name}", f"/{name}")), data)
            new.writestr("archive/data/99", b"\0" * rng.choice((10, 2**26)))


def _recipe_of(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        _bytes_of(path, rng)
    else:
        path.write_text(yaml.safe_dump(mutate_content(yaml.safe_load(path.read_text()), rng)))


def _read_ticket(path: Path) -> None:
    load_ticket(path).apply_(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))


def _make_ticket(path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    save_ticket(path, Ticket(MaskSet({"0.weight": torch.rand(3, 4) > 0.5}), model.state_dict(), {"round": 1}))


def _read_record(path: Path) -> None:
    record = RunRecord.read(path)
    if record.rounds:
        metric = choose_metric([record])
        page_of(group_runs([record], metric), metric)


def _make_arm(path: Path) -> None:
    around = {"before": {"val_acc": 0.9}, "after_cut": {"val_acc": 0.3}}
    path.write_text(json.dumps(arm_of(ratio=0.6, commands=(("a", "b"),), **around).to_json()))


def _read_arm(path: Path) -> None:
    arm = Arm.read(path)
    others = [arm_of("small", kind="scratch", ratio=0.7), arm_of("dense", kind="dense", budget=None, value=0.9)]
    for metric in arm.metrics:
        result = analyse([arm, *others], metric)
        sweep_page(result), markdown(result), json.dumps(content(result), allow_nan=False)


def _read_plan(path: Path) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        RemovalPlan.from_json(path.read_text(errors="replace")).apply_(model)
    except PruneError:
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before), "refused, but the model was changed"
        raise


def _make_checkpoint(path: Path) -> None:
    model, plan = _small()
    plans = {"version": 1, "plans": {"": [plan.to_json()]}}
    torch.save({"state_dict": model.state_dict(), "lightning_prune_plans": plans, "epoch": 1}, path)


def _read_checkpoint(path: Path) -> None:
    content = load_archive(path)
    if isinstance(content, dict):
        for plans in read_plans(content, str(path)).values():
            for plan in plans:
                plan.apply_(network())


def _read_recipe(path: Path) -> None:
    stdout, sys.stdout = sys.stdout, open(path.with_suffix(".out"), "w")  # noqa: SIM115
    stderr, sys.stderr = sys.stderr, sys.stdout
    argv, sys.argv = sys.argv, ["lightning-prune"]
    try:
        command(["fit", "--config", str(path), "--print_config"])
    except SystemExit as error:
        if error.code:
            raise PruneError("refused") from error
    finally:
        sys.stdout.close()
        sys.stdout, sys.stderr, sys.argv = stdout, stderr, argv


def _save_plan(path: Path) -> None:
    path.write_text(json.dumps(_small()[1].to_json()))


TARGETS: dict[str, Target] = {
    "ticket": Target(_make_ticket, _read_ticket, _tensors_of),
    "masks": Target(lambda p: MaskSet({"w": torch.rand(3, 5) > 0.5}).save(p), MaskSet.load, _tensors_of),
    "compact model": Target(
        lambda p: save_compact(_small()[0], p), lambda p: load_compact(network(), p), _tensors_of, 0.5
    ),
    "plan": Target(_save_plan, _read_plan, _json_of),
    "record": Target(lambda p: p.write_text(json.dumps(_record().state_dict())), _read_record, _json_of, 0.5),
    "arm": Target(_make_arm, _read_arm, _json_of, 0.5),
    "checkpoint": Target(_make_checkpoint, _read_checkpoint, _archive_of, 0.5),
    "recipe": Target(
        lambda p: p.write_bytes((ROOT / "recipes" / "quickstart.yaml").read_bytes()), _read_recipe, _recipe_of, 0.05
    ),
}


class Watcher:
    """An audit hook that notes what a reader must not do; it cannot be taken off again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.active = str(folder), list[str](), False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, mode, flags = (*args, None, None)[:3]
            writes = isinstance(mode, str) and any(c in mode for c in "wax+")
            writes = writes or (isinstance(flags, int) and flags & 0o1103 and mode is None)
            if writes and isinstance(path, str | bytes | Path) and not self._ours(path):
                self.seen.append(f"wrote {path!r}")
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree"):
            if not all(self._ours(path) for path in args[:2] if isinstance(path, str | bytes | Path)):
                self.seen.append(f"{event} {args!r:.200}")
        elif event in ("os.system", "subprocess.Popen", "os.exec", "os.fork", "socket.connect") or (
            event == "ctypes.dlopen" and "/" in str(args[0])  # torch looks for the system's libraries by name
        ):
            self.seen.append(f"{event} {args!r:.200}")

    def _ours(self, path: str | bytes | Path) -> bool:
        text = path.decode() if isinstance(path, bytes) else str(path)
        return str(Path(text).absolute()).startswith((f"{self.folder}{os.sep}", "/dev/null"))


def attempt(target: Target, path: Path, watcher: Watcher) -> str:
    """Read one file: ``"read"``, ``"refused"``, or what went wrong."""
    watcher.seen = []
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    watcher.active = True
    try:
        target.read(path)
        outcome = "read"
    except PruneError as error:
        outcome = "refused" if len(str(error)) < 3000 else f"a message of {len(str(error))} characters"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error!s:.300}"
    finally:
        watcher.active = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    if path.with_name("exploded").exists():
        return "code in the file was run"
    return watcher.seen[0] if watcher.seen else outcome


def check_watcher(watcher: Watcher, home: Path) -> None:
    """See that it sees what it is there for."""
    path = home / "probe"
    path.touch()

    def outcome(read: Callable[[Path], Any]) -> str:
        return attempt(Target(path.touch, read, lambda *_: None), path, watcher)  # type: ignore[arg-type]

    assert outcome(lambda _: None) == "read"
    assert outcome(lambda p: p.with_name("beside").touch()) == "read"
    assert outcome(lambda p: open(p.parent.with_suffix(".outside"), "w").close()).startswith("wrote")
    assert outcome(lambda p: os.remove(p.parent.with_suffix(".outside"))).startswith("os.remove")
    assert outcome(lambda _: os.system("true")).startswith("os.system")
    assert outcome(lambda _: 1 / 0).startswith("ZeroDivisionError")
    assert outcome(lambda p: p.with_name("exploded").touch()) == "code in the file was run"
    (home / "exploded").unlink()


def _too_slow(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def bound_memory() -> None:
    """Allow so much memory on top of what the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES,) * 2)


def main() -> None:
    """Fuzz every kind of file; print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="files of each kind; slow kinds get fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], choices=TARGETS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    good = {name: home / f"{name.replace(' ', '_')}.good" for name in TARGETS}
    watcher = Watcher(home)
    check_watcher(watcher, home)
    for name, target in TARGETS.items():
        target.make(good[name])
        target.read(good[name])  # imports what is imported once
        outcome = attempt(target, good[name], watcher)
        assert outcome == "read", f"{name}: the good file gives {outcome!r}"
    bound_memory()
    signal.signal(signal.SIGALRM, _too_slow)
    wrong = 0
    for name in given.only or TARGETS:
        target, rng, found = TARGETS[name], random.Random(given.seed), {"read": 0, "refused": 0}
        begin = time.monotonic()
        for number in range(max(1, int(given.count * target.share))):
            path = home / f"{name.replace(' ', '_')}.bad"
            path.write_bytes(good[name].read_bytes())
            target.spoil(path, rng)
            outcome = attempt(target, path, watcher)
            if outcome in found:
                found[outcome] += 1
                continue
            wrong += 1
            kept = home / f"{name.replace(' ', '_')}.{number}"
            kept.write_bytes(path.read_bytes())
            path.with_name("exploded").unlink(missing_ok=True)
            print(f"{name} {number}: {outcome}  ({kept})")
        print(f"{name}: {found['refused']} refused, {found['read']} read ({time.monotonic() - begin:.0f} s)")
        sys.stdout.flush()
    print(f"{wrong} files did anything else")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

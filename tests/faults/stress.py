"""Kills real runs at random moments and resumes them until they are done: all must end as an undisturbed one.

``python -m tests.faults.stress --kills 4 --rounds 1 --seed 0`` (``--help`` for more)

One process imports everything once and forks a child for every run. The children train; this process waits for a
random while and sends SIGKILL. After each kill every file in the run folder is read. Prints a table; exit code 1 and
the folder left in place where anything differed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_prune import RunRecord, load_ticket
from lightning_prune.files import check_archive, read_json, read_tensors
from tests.faults.cases import CASES, HIDDEN, RUN, TOGETHER, Case, Killer, fit, newest

ALL = CASES | HIDDEN
LEFT_ALONE = 60.0  # seconds that a process may go on after another of its run was killed


def fork(work: Callable[[], Any], log: Path) -> int:
    """Run ``work`` in a child of this process, its output in ``log``; the child's number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """The exit code of a child (negative: the signal that ended it), or ``None`` where it goes on after that long."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def _join(rank: int, world: int, port: int) -> None:
    """Let this process be one of several that torchrun has started."""
    if world > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0",
            "GROUP_RANK": "0", "WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
            "TORCHELASTIC_RUN_ID": "none",
        }  # fmt: skip


def start(case: Case, folder: Path, world: int, seed: int, kill_at: int = 0, victim: int = 0) -> list[int]:
    """Start a run, or resume it; with ``kill_at`` process ``victim`` kills itself after that many batches."""
    checkpoint = newest(folder)
    if checkpoint is None and folder.exists():
        shutil.rmtree(folder)  # killed before its first checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def work(rank: int) -> None:
        _join(rank, world, port)
        killer = [Killer(kill_at)] if kill_at and rank == victim else []
        fit(case, folder, checkpoint, *killer, seed=seed, world=world)

    return [fork(lambda rank=rank: work(rank), folder.parent / f"{folder.name}.{rank}.log") for rank in range(world)]


def finish(children: Sequence[int], seconds: float = 300) -> list[int | None]:
    """Wait for every process of a run; one that goes on for longer is killed and counts as ``None``."""
    codes = [wait(child, seconds) for child in children]
    for child, code in zip(children, codes, strict=True):
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return codes


def check_files(folder: Path) -> int:
    """Read every file of a run; how many there were. Raises what the reader raises."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith((".tmp", "end.pt"))]
    for path in found:
        if path.suffix == ".ckpt":
            check_archive(path)
            torch.load(path, weights_only=True)
        elif path.name == "record.json":
            RunRecord.read(path)
        elif path.suffix == ".json":
            read_json(path, "a file of this run")
        elif path.suffix == ".safetensors":
            try:
                load_ticket(path)
            except Exception:
                read_tensors(path, kind="compact", version=1)
    return len(found)


def difference(a: Any, b: Any, where: str = "end") -> str | None:
    """Where two results differ first."""
    if isinstance(a, torch.Tensor):
        equal = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return None if equal and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) else where
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"
        return next((found for k in a if (found := difference(a[k], b[k], f"{where}.{k}"))), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} entries"
        pairs = enumerate(zip(a, b, strict=True))
        return next((found for i, (x, y) in pairs if (found := difference(x, y, f"{where}[{i}]"))), None)
    return None if repr(a) == repr(b) else f"{where}: {a!r:.60} and {b!r:.60}"


def compare(whole: Path, killed: Path) -> str | None:
    """How the two runs' ends differ: state, record, and every file that others read."""
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (whole, killed)]
    recorded = (whole / RUN / "record.json").exists()  # where something is cut
    records = (
        [RunRecord.read(folder / RUN) for folder in (whole, killed)] if recorded else [RunRecord({}), RunRecord({})]
    )
    contents = [record.comparable() | {"costs": record.costs} for record in records]
    found = difference(*ends) or difference(*contents, "record")
    if found:
        return found
    names = [
        {path.relative_to(folder / RUN) for kind in ("*.safetensors", "*.json") for path in (folder / RUN).rglob(kind)}
        for folder in (whole, killed)
    ]
    if names[0] != names[1]:
        return f"files: {sorted(map(str, names[0] ^ names[1]))}"
    for name in sorted(names[0]):
        if name.name != "record.json" and (whole / RUN / name).read_bytes() != (killed / RUN / name).read_bytes():
            return f"{name} has other bytes"
    return None


class Undisturbed:
    """A run that nobody killed, once for each case."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.seed = home, seed
        self.seconds: dict[str, float] = {}

    def run(self, name: str, world: int) -> tuple[Path, float]:
        folder = self.home / f"{_short(name)}-{world}-whole"
        if folder.name not in self.seconds:
            begin = time.monotonic()
            codes = finish(start(ALL[name], folder, world, self.seed))
            assert codes == [0] * world, (name, codes, _logs(folder))
            self.seconds[folder.name] = time.monotonic() - begin
        return folder, self.seconds[folder.name]


def stress(
    name: str, world: int, undisturbed: Undisturbed, rng: random.Random, kills: int, by_batches: bool, at: int = 0
) -> dict[str, Any]:
    """Kill one run up to ``kills`` times, let it end, compare."""
    case = ALL[name]
    folder = undisturbed.home / f"{_short(name)}-{world}-{rng.randrange(10**6)}"
    result: dict[str, Any] = {"case": name, "processes": world, "killed": 0, "files": 0, "resumed": [], "problem": None}
    try:
        whole, seconds = undisturbed.run(name, world)
        for _ in range(kills):
            victim = rng.randrange(world)
            if by_batches:
                children = start(case, folder, world, undisturbed.seed, at or rng.randrange(3, 14), victim)
            else:
                children = start(case, folder, world, undisturbed.seed)
                code = wait(children[victim], rng.uniform(0.05, 0.8) * seconds)
                if code is None:
                    os.kill(children[victim], signal.SIGKILL)
                elif code:
                    raise RuntimeError(f"exit code {code}: {_logs(folder)}")
                else:
                    finish(children[:victim] + children[victim + 1 :])
                    break
            codes = finish(children, LEFT_ALONE)
            if codes[victim] == 0:
                break
            assert codes[victim] == -signal.SIGKILL, (codes, _logs(folder))
            assert None not in codes, f"a process went on {LEFT_ALONE} s after another was killed"
            result["killed"] += 1
            result["files"] += check_files(folder)
            checkpoint = newest(folder)
            result["resumed"].append(None if checkpoint is None else checkpoint.name)
        if not (folder / "end.pt").exists():
            codes = finish(start(case, folder, world, undisturbed.seed))
            assert codes == [0] * world, (codes, _logs(folder))
        check_files(folder)
        result["problem"] = compare(whole, folder)
    except Exception as error:
        result["problem"] = f"{type(error).__name__}: {error}"
    if result["problem"] is None:
        shutil.rmtree(folder)
    else:
        result["folder"] = str(folder)
    return result


_NOT_COMPARED = ("timing", "environment", "ModelCheckpoint", "seconds")


def _plain(content: Any) -> Any:
    """What two checkpoints of one moment share: all but durations, versions and paths."""
    if isinstance(content, dict):
        left = {k: v for k, v in content.items() if not any(part in str(k) for part in _NOT_COMPARED)}
        return {key: _plain(value) for key, value in left.items()}
    return [_plain(value) for value in content] if isinstance(content, list | tuple) else content


def every_checkpoint(name: str, undisturbed: Undisturbed) -> dict[str, Any]:
    """Resume a run from each of its checkpoints; each must write the later ones once more, and end the same."""
    result: dict[str, Any] = {"case": name, "processes": 1, "killed": 0, "checkpoints": 0, "problem": None}
    try:
        whole, _ = undisturbed.run(name, 1)
        files = sorted((whole / RUN / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        contents = {path.name: _plain(torch.load(path, weights_only=True)) for path in files}
        end = torch.load(whole / "end.pt", weights_only=True)
        result["checkpoints"] = len(files)
        for path in files:
            again = undisturbed.home / f"{_short(name)}-again"
            shutil.rmtree(again, ignore_errors=True)
            again.mkdir()
            codes = finish([fork(lambda p=path, a=again: fit(ALL[name], a, p), undisturbed.home / "again.0.log")])
            assert codes == [0], _logs(again)
            found = difference(end, torch.load(again / "end.pt", weights_only=True))
            for later in (again / RUN / "checkpoints").glob("*.ckpt"):
                content = _plain(torch.load(later, weights_only=True))
                found = found or difference(contents.get(later.name), content, later.name)
            if found:
                raise AssertionError(f"resumed from {path.name}: {found}")
    except Exception as error:
        result["problem"] = f"{type(error).__name__}: {error}"
    return result


def _short(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-700:] for path in sorted(folder.parent.glob(f"{folder.name}.*.log")))


def main() -> None:
    """Run the matrix; print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="at most so many kills of one run")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", choices=("seconds", "batches"), default="seconds")
    parser.add_argument("--kill-at", type=int, default=0, metavar="BATCH", help="instead of a random batch")
    parser.add_argument("--only", action="append", default=[], choices=ALL, metavar="CASE")
    parser.add_argument("--processes", type=int, action="append", choices=(1, 2))
    parser.add_argument("--every-checkpoint", action="store_true", help="kill nothing: resume from each checkpoint")
    parser.add_argument("--json", type=Path, help="where results are written")
    given = parser.parse_args()
    torch.set_num_threads(1)
    home = Path(tempfile.mkdtemp(prefix="stress-"))
    undisturbed, rng = Undisturbed(home, given.seed), random.Random(given.seed)
    results = []
    for _ in range(given.rounds):
        for world in (1,) if given.every_checkpoint else given.processes or (1, 2):
            for name in given.only or (CASES if world == 1 else TOGETHER):
                begin = time.monotonic()
                if given.every_checkpoint:
                    result = every_checkpoint(name, undisturbed)
                else:
                    by_batches = given.moments == "batches" or given.kill_at > 0
                    result = stress(name, world, undisturbed, rng, given.kills, by_batches, given.kill_at)
                results.append(result)
                took = time.monotonic() - begin
                print(f"{name} ({world}): {result['killed']} kills, {result['problem'] or 'equal'} ({took:.0f} s)")
                sys.stdout.flush()
    wrong = [result for result in results if result["problem"]]
    killed = sum(result["killed"] for result in results)
    print(f"{killed} kills, {len(results)} runs, {len(results) - len(wrong)} ended bit for bit as undisturbed ones")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    if not wrong:
        shutil.rmtree(home)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

"""What a result was measured on: versions, device, source state."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe_environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """Versions, device and source state, for the record. Never fails: what cannot be found out is None.

    Args:
        device: The device that the run trains on; the CPU if left out.
    """
    device = torch.device(device or "cpu")
    commit = _git("rev-parse", "HEAD")
    changes = None if commit is None else _git("status", "--porcelain", "--untracked-files=no")
    return {
        **package_versions(),
        "platform": platform.platform(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "git_commit": commit,
        "git_changed": None if changes is None else bool(changes),
    }


def package_versions() -> dict[str, str | None]:
    """Versions of Python, torch, Lightning and this library; None for what is not installed as a package."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": _version("lightning") or _version("pytorch-lightning"),
        "lightning_prune": _version("lightning-prune"),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "cpu"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the current folder; None without git, without a repository, or after 5 seconds."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],  # so that a look takes no lock that the user's git waits for
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

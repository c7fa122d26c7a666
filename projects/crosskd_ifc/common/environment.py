"""On what a run was done, for the record beside its results."""

import json
import os
import platform
import re
import subprocess
from importlib import metadata
from typing import Any, Dict

import torch

from ..version import __version__

_QUIET: Dict[str, Any] = {"stderr": subprocess.DEVNULL, "text": True}


def versions() -> Dict[str, str]:
    """Versions of Python, torch, torchvision, detectron2 and this project, the last two with their
    commits where known."""

    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "detectron2"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    commit = _detectron2_commit()
    if commit:
        found["detectron2"] += f" ({commit[:7]})"
    commit = _own_commit()
    found["crosskd_ifc"] = f"{__version__} ({commit})" if commit else __version__
    return found


def hardware(device: str, threads: int) -> str:
    """One line: CPU cores, their model, threads of a run (0: torch's choice), and GPUs if
    ``device`` is one.

    Args:
        device: MODEL.DEVICE.
        threads: CPU threads of the run.
    """
    cores = os.cpu_count() or 1
    line = f"{cores} {_cpu_model()}CPU core{'s' if cores > 1 else ''}"
    if threads:
        line += f" ({threads} for a run)"
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return f"{line}, no GPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{line}, " + ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names))


def device_fault(device: str) -> str:
    """What keeps a MODEL.DEVICE from being used on this machine, or ""."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        return "expected cpu, cuda or cuda:0"
    if kind == "cuda" and not torch.cuda.is_available():
        return "but there is no GPU here"
    return ""


def _cpu_model() -> str:
    """The processor's name and a space; "" where there is no /proc."""
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    except OSError:
        return ""
    return f"{names[0]} " if names and names[0] else ""


def _own_commit() -> str:
    """Of the checkout that this package lies in, with a "+" if its code has changes; "" if it is in
    none."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short=7", "HEAD"], **_QUIET)
        # A virtual environment can lie in the checkout of another project.
        subprocess.check_output([*git, "ls-files", "--error-unmatch", __file__], **_QUIET)
        code = [":/projects", ":/configs", ":/tools"]
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", *code]
        changed = subprocess.check_output(status, **_QUIET)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.strip() + ("+" if changed.strip() else "")


def _detectron2_commit() -> str:
    try:
        package = metadata.distribution("detectron2")
    except metadata.PackageNotFoundError:
        return ""
    # tools/install_detectron2.py notes it in the summary, pip where it installed from.
    note = re.search(r"commit ([0-9a-f]{7,40})", package.metadata["Summary"] or "")
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    return note.group(1) if note else origin.get("vcs_info", {}).get("commit_id", "")

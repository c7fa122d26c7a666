"""On what a run was done, for the record beside its results."""

import json
import os
import platform
import re
from importlib import metadata
from typing import Dict

import torch


def versions() -> Dict[str, str]:
    """Versions of Python, torch, torchvision and detectron2 (with its commit, where known)."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "detectron2"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    commit = _detectron2_commit()
    if commit:
        found["detectron2"] += f" ({commit[:7]})"
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


def _cpu_model() -> str:
    """The processor's name and a space; "" where there is no /proc."""
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    except OSError:
        return ""
    return f"{names[0]} " if names and names[0] else ""


def _detectron2_commit() -> str:
    try:
        package = metadata.distribution("detectron2")
    except metadata.PackageNotFoundError:
        return ""
    # tools/install_detectron2.py notes it in the summary, pip where it installed from.
    note = re.search(r"commit ([0-9a-f]{7,40})", package.metadata["Summary"] or "")
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    return note.group(1) if note else origin.get("vcs_info", {}).get("commit_id", "")

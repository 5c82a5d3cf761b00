"""What stands beside every measured number: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_PACKAGES = ("torch", "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "opencv-contrib-python", "numpy", "webdataset")

#: Folders of results: writing one does not change the code that makes the next.
_RESULTS = ("benchmarks/results", "docs/experiments")


def describe() -> dict[str, Any]:
    """{machine, versions, commit} of this process."""
    return {"machine": _machine(), "versions": _versions(), "commit": _commit()}


def _machine() -> dict[str, Any]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "gpus": gpus, "system": platform.system()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a distribution"
    return found


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", *(f":!{folder}" for folder in _RESULTS))
        return (git("rev-parse", "HEAD") or "unknown") + (" with changes" if changed else "")
    except FileNotFoundError:  # a machine without git
        return "unknown"

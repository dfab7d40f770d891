"""Facts about the machine that belong beside a result: an allow-list, never ``os.environ``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = ("tiltflow", "torch", "numpy", "safetensors", "tqdm", "matplotlib", "scikit-learn")
"""Packages whose versions are recorded."""


def environment(device: torch.device | None = None) -> dict[str, str | int | None]:
    """Python, platform, torch, device, versions, commit of the library, processors, threads."""
    on_gpu = device is not None and device.type == "cuda"
    facts: dict[str, str | int | None] = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": str(device or "cpu"),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }
    for package in PACKAGES:
        try:
            facts[f"package {package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[f"package {package}"] = None
    return facts


def commit() -> str | None:
    """The library's git commit, with ``+`` where files differ; ``None`` outside a clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--", "src") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True, text=True, timeout=5, check=True,
    )  # fmt: skip
    return done.stdout.strip()

"""Checkpoints that are whole or absent: safetensors written atomically, read with suspicion."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tiltflow.errors import CheckpointError

_KEY = "tiltflow"
_VERSION = 1


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either its old content or all of the new one.

    A temporary file in the same directory is written, flushed to the disk and renamed: a kill or a
    full disk at any moment leaves the old file as it was.

    Raises:
        CheckpointError: if the file cannot be written, e.g. because the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(
            f"{path} could not be written ({error.strerror or error}). The last good checkpoint "
            "is intact: free some space, then run the same command again to continue from it."
        ) from error


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Save tensors and a few strings as one safetensors file, atomically.

    Args:
        path: the file; its directory is made if needed.
        tensors: any shapes, dtypes and devices.
        metadata: strings for the header, e.g. the hash of the backbone a delta belongs to.

    Raises:
        CheckpointError: if the file cannot be written; what was there before is intact.
    """
    # Clones, because safetensors refuses tensors that share memory (tied weights, views).
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    header = {"version": _VERSION, "sha256": checksum(plain), "metadata": dict(metadata or {})}
    # One entry: safetensors writes several in random order, and equal contents would differ.
    write_atomic(path, save(plain, {_KEY: json.dumps(header, sort_keys=True)}))


def load_tensors(
    path: str | Path, expected: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Load what ``save_tensors`` wrote, onto the CPU.

    Args:
        path: the file.
        expected: tensors of the names and shapes the file must have, e.g. a ``state_dict``.

    Raises:
        CheckpointError: if the file is missing, damaged, not of this library, or of another model.
    """
    tensors, header = _read(Path(path))
    if checksum(tensors) != header.get("sha256"):
        raise CheckpointError(
            f"{path} is damaged: its content does not match its own checksum. Restore it from a "
            "copy, or delete it and resume from an earlier checkpoint."
        )
    if expected is not None:
        compare(Path(path), tensors, expected)
    return tensors


def load_published(
    path: str | Path, expected: Mapping[str, Tensor], digests: Mapping[str, str]
) -> dict[str, Tensor]:
    """Load weights that others published as safetensors, onto the CPU.

    Foreign files have no checksum of their own, so that only files with a known one are read; a
    file that ``save_tensors`` wrote is read as by ``load_tensors``, e.g. such weights after
    training.

    Args:
        path: the file.
        expected: tensors of the names and shapes the file must have, e.g. a ``state_dict``.
        digests: what is known: SHA-256 of the file -> its name.

    Raises:
        CheckpointError: if the file is missing, damaged, unknown, or of another model.
    """
    tensors, entry = _opened(Path(path))
    if entry is not None:
        return load_tensors(path, expected)
    compare(Path(path), tensors, expected)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if digest not in digests:
        raise CheckpointError(
            f"{path} has the names and shapes of {', '.join(digests.values())}, but other content "
            f"(SHA-256 {digest[:12]}...): it is damaged, or another training. Restore it from a "
            "copy; weights of your own are read if adapters.checkpoint.save_tensors wrote them."
        )
    return tensors


def load_metadata(path: str | Path) -> dict[str, str]:
    """The strings that ``save_tensors`` was given; raises like ``load_tensors``."""
    metadata = _read(Path(path))[1].get("metadata", {})
    return {str(k): str(v) for k, v in metadata.items()}


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, independent of the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, header = _opened(path)
    if header is None:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one of tiltflow's; load foreign weights "
            "through the adapter of their model."
        )
    if header.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has format version {header.get('version')}, this version of tiltflow reads "
            f"{_VERSION}."
        )
    return tensors, header


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of any safetensors file, and this library's header if it has one."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the path of the checkpoint.")
    try:
        with safe_open(str(path), framework="pt") as file:
            entry = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = None if entry is None else dict(json.loads(entry))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); it is damaged or something "
            "else. Restore it from a copy, or resume from an earlier checkpoint."
        ) from error
    return tensors, header


def compare(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ``CheckpointError`` unless a file's tensors have the expected names and shapes."""
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"lacks {_some(missing)}")
        if extra:
            parts.append(f"has {_some(extra)} that nobody asked for")
        raise CheckpointError(f"{path} {' and '.join(parts)}; it belongs to another model.")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: '{name}' has shape {tuple(tensors[name].shape)}, the model needs "
                f"{tuple(tensor.shape)}; the checkpoint belongs to a model of another size."
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable; directories cannot be opened on Windows."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

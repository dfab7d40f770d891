"""Samples on disk: tensors with their conditions, and molecules as files that others read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tiltflow.adapters.checkpoint import load_tensors, save_tensors, write_atomic
from tiltflow.adapters.molecule_files import write_sdf, write_xyz
from tiltflow.evaluation import of_molecules
from tiltflow.gallery import gallery_page
from tiltflow.molecules import Layout, Molecules
from tiltflow.types import Cond, cond_to

CONDITION = "cond."
"""Before the names of conditions among the tensors of a file."""


def stored(points: Tensor, cond: Cond | None, keep: int | None = None) -> dict[str, Tensor]:
    """The first ``keep`` points with those of their conditions that are tensors, as a file of
    samples names them."""
    found = {k: v[:keep] for k, v in (cond or {}).items() if isinstance(v, Tensor)}
    return {"points": points[:keep], **{f"{CONDITION}{k}": v for k, v in found.items()}}


def read_molecules(path: Path, layout: Layout) -> Molecules:
    """The molecules of a file of samples."""
    tensors = load_tensors(path)
    cond: dict[str, Tensor] = {
        key.removeprefix(CONDITION): tensor
        for key, tensor in tensors.items()
        if key.startswith(CONDITION)
    }
    return layout.decode(tensors["points"], cond)


def write_samples(
    path: Path, points: Tensor, rewards: Tensor | None, cond: Cond | None, layout: Layout | None
) -> list[str]:
    """A file of tensors, ``points``, ``weights``, ``rewards`` and ``cond.*``; of molecules, beside
    it .xyz, .sdf and .html. If ``path`` is one of these three, the tensors are in .safetensors.

    Returns:
        what was written, a line for each file.

    Raises:
        CheckpointError: if a file cannot be written.
    """
    n = len(points)
    tensors = stored(points, cond) | {"weights": points.new_full((n,), 1 / n)}
    if rewards is not None:
        tensors["rewards"] = rewards
    if layout is not None and path.suffix in (".xyz", ".sdf", ".html"):
        path = path.with_suffix(".safetensors")
    save_tensors(path, tensors)
    if layout is None:
        return [str(path)]
    return [str(path), *_write_molecules(path, layout, points, rewards, cond)]


def _write_molecules(
    path: Path, layout: Layout, points: Tensor, rewards: Tensor | None, cond: Cond | None
) -> list[str]:
    molecules = layout.decode(points.detach().cpu(), cond_to(cond, "cpu"))
    properties: Mapping[str, Tensor] = {} if rewards is None else {"reward": rewards.cpu()}
    xyz = write_xyz(molecules, path.with_suffix(".xyz"), properties)
    sdf = write_sdf(molecules, path.with_suffix(".sdf"), properties)
    numbers, note = of_molecules(molecules)
    page = gallery_page(path.stem, molecules, None if rewards is None else rewards.cpu(),
                        numbers, note)  # fmt: skip
    write_atomic(path.with_suffix(".html"), page.encode())
    return [str(xyz), str(sdf), str(path.with_suffix(".html"))]

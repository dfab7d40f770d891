"""Checkpoints: whole or absent, and nobody else's."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tiltflow.adapters.checkpoint import (
    checksum,
    load_metadata,
    load_tensors,
    save_tensors,
    write_atomic,
)
from tiltflow.errors import CheckpointError


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 4, generator=generator)
    return {
        "a": a,
        "view": a.T,
        "shared": a,
        "half": a.bfloat16(),
        "double": a.double(),
        "step": torch.tensor(7),
        "mask": a > 0,
        "empty": torch.empty(0, 2),
    }


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    """load(save(x)) = x for every dtype, views, shared memory, scalars and empty tensors."""
    path = tmp_path / "new" / "delta.safetensors"
    save_tensors(path, tensors(), {"backbone": "abc"})
    loaded = load_tensors(path, tensors())
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert load_metadata(path) == {"backbone": "abc"}
    assert [p.name for p in path.parent.iterdir()] == ["delta.safetensors"]


def test_checksum_sees_names_shapes_and_single_bits() -> None:
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    flipped = {"a": torch.zeros(4), "b": torch.tensor([1.0, 1.0 + 2**-23])}
    assert checksum(base) == checksum(dict(reversed(base.items())))
    assert checksum(base) != checksum(flipped)
    assert checksum(base) != checksum({"a": torch.zeros(2, 2), "b": torch.ones(2)})
    assert checksum(base) != checksum({"b": torch.zeros(4), "a": torch.ones(2)})


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, part: float) -> None:
    path = tmp_path / "c.safetensors"
    save_tensors(path, tensors())
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(CheckpointError, match=r"c\.safetensors.*damaged"):
        load_tensors(path)


def test_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_tensors(path, tensors())
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="does not match its own checksum"):
        load_tensors(path)


def test_missing_foreign_and_random_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tensors(tmp_path / "no.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not one of tiltflow's"):
        load_tensors(tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("certainly not a checkpoint")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_tensors(tmp_path / "text.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tensors(tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_tensors(path, {"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="lacks 'c' and has 'b'"):
        load_tensors(path, {"a": torch.zeros(2), "c": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"'b' has shape \(3,\), the model needs \(4,\)"):
        load_tensors(path, {"a": torch.zeros(2), "b": torch.zeros(4)})


def test_equal_contents_are_equal_files(tmp_path: Path) -> None:
    """Bytes depend on content only: not on the order of names, not on the process."""
    metadata = {"b": "1", "a": "2", "c": "3"}
    save_tensors(tmp_path / "one", tensors(), metadata)
    swapped = dict(reversed(tensors().items()))
    save_tensors(tmp_path / "two", swapped, dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


class FullDisk(io.BytesIO):
    """Takes a few bytes, then fails as a full disk does."""

    def write(self, data: Any) -> int:
        super().write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("stage", ["write", "fsync", "rename"])
def test_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Whatever fails, the old file stays, no temporary one does, and the message says so."""
    path = tmp_path / "c.safetensors"
    save_tensors(path, {"a": torch.zeros(2)})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if stage == "write":
            patch.setattr(Path, "open", lambda self, mode: FullDisk())
        elif stage == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "replace", fail)
        with pytest.raises(
            CheckpointError, match=r"No space left.*last good checkpoint is intact"
        ):
            save_tensors(path, {"a": torch.ones(2)})
    assert torch.equal(load_tensors(path)["a"], torch.zeros(2))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_stale_temporary_file_does_not_matter(tmp_path: Path) -> None:
    """What a kill left behind is overwritten by the next write."""
    (tmp_path / ".state.json.tmp").write_bytes(b"half a fi")
    write_atomic(tmp_path / "state.json", b"{}")
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]

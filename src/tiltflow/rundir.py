"""The run directory: what a run leaves behind, and what it continues from after a kill.

::

    config.toml        resolved; itself a valid run file
    environment.json   an allow-list of facts about the machine
    metrics.jsonl      append-only, one object per line; the same bits on every run of one config
    timing.jsonl       wall and CPU seconds, which are not
    checkpoints/       iteration_0000/{delta.safetensors, solution.json}, baseline/..., latest/...;
                       of a merge gate_0000/..., gate_0000_solve_0000/...
    samples/           safetensors
    report.json, report.html

Every checkpoint knows how long ``metrics.jsonl`` was when it was made. Continuing from it cuts the
file to that length, and the lines that follow are written again, identically.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

from torch import Tensor

from tiltflow.adapters.checkpoint import load_metadata, load_tensors, save_tensors, write_atomic
from tiltflow.context import Snapshot
from tiltflow.errors import CheckpointError, ConfigError
from tiltflow.problem import Result
from tiltflow.runfile import Plain, first_differences, parse_toml, write_toml

_NOT_A_RUN = (
    "{path} exists, but is not a run directory (it has no config.toml). Choose another with --out."
)


@final
@dataclass(frozen=True)
class Solved:
    """A finished solve: what was trained, how it ended, and where the metrics were."""

    tensors: Mapping[str, Tensor]
    result: Result
    stats: Mapping[str, float]
    notes: Mapping[str, Any]
    offset: int


@final
class RunDirectory:
    """Files of one run, with names and formats in one place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.environment = path / "config.toml", path / "environment.json"
        self.metrics, self.timing = path / "metrics.jsonl", path / "timing.jsonl"
        self.report, self.html = path / "report.json", path / "report.html"
        self.checkpoints, self.samples = path / "checkpoints", path / "samples"
        self.latest = self.checkpoints / "latest" / "snapshot.safetensors"

    @staticmethod
    def existing(path: Path) -> RunDirectory:
        """A directory that must hold a run."""
        if not (path / "config.toml").is_file():
            raise ConfigError(f"{path} is not a run directory: it has no config.toml.")
        return RunDirectory(path)

    def claim(self, resolved: Plain) -> bool:
        """Make the directory for a config, or check that it is of this config already.

        Returns:
            whether there was a run to continue.

        Raises:
            ConfigError: if it holds something else; names the first keys that differ.
        """
        if self.config.is_file():
            self.check_same(resolved)
            return True
        if self.path.exists() and any(not p.name.startswith(".") for p in self.path.iterdir()):
            raise ConfigError(_NOT_A_RUN.format(path=self.path))
        write_atomic(self.config, write_toml(resolved).encode())
        return False

    def read_config(self) -> Plain:
        """The resolved config."""
        try:
            return parse_toml(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise CheckpointError(
                f"{self.config} is damaged ({error}). Start again with another --out."
            ) from None

    def check_same(self, resolved: Plain) -> None:
        """Raise ``ConfigError`` unless the directory's config is this one."""
        # Compared as read back from TOML, so that neither spelling nor rounding counts.
        ours = parse_toml(write_toml(resolved))
        differences = first_differences(ours, self.read_config())
        if differences:
            told = "; ".join(f"{k} is {b!r} there and {a!r} here" for k, a, b in differences)
            raise ConfigError(
                f"{self.path} holds a run of another config: {told}. Choose another --out, or "
                "delete that directory."
            )

    def lock(self) -> IO[str] | None:
        """Hold the directory until the process ends, or raise if another process holds it."""
        try:
            import fcntl
        except ImportError:  # Windows: two processes in one directory are then not noticed
            return None
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self.path / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(
                f"Another process is working in {self.path}. Wait for it, or choose another --out."
            ) from None
        except OSError:  # a file system without locks
            pass
        return file

    # metrics and timing

    def append(self, file: Path, record: Mapping[str, Any]) -> None:
        """Add one line to ``metrics`` or ``timing``."""
        try:
            with file.open("ab") as out:
                out.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise CheckpointError(
                f"{file} could not be written ({error.strerror or error}). The last good "
                "checkpoint is intact: free some space, then run the same command again."
            ) from error

    def offset(self) -> int:
        """Length of ``metrics.jsonl`` in bytes."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def sync_metrics(self) -> None:
        """Bring the metrics to the disk: no checkpoint may know more lines than there are."""
        if os.name == "posix" and self.metrics.exists():
            with self.metrics.open("rb") as file:
                os.fsync(file.fileno())

    def cut(self, offset: int) -> None:
        """Shorten ``metrics.jsonl`` to what a checkpoint knew of."""
        if self.offset() < offset:
            raise CheckpointError(
                f"{self.metrics} is shorter than when the last checkpoint was made; it was "
                "changed by something else. Start again with another --out."
            )
        if self.metrics.exists():
            os.truncate(self.metrics, offset)

    def records(self, file: Path) -> list[dict[str, Any]]:
        """The lines of ``metrics`` or ``timing``; a last line cut short by a kill is ignored."""
        return list(_lines(file))

    # checkpoints

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """Keep a moment of a training: one file, renamed into place."""
        self.sync_metrics()
        state = {
            "address": list(snapshot.address), "update": snapshot.update, "offset": self.offset(),
        }  # fmt: skip
        save_tensors(self.latest, snapshot.tensors, {"state": json.dumps(state)})

    def load_snapshot(self) -> tuple[Snapshot, int] | None:
        """The last snapshot and the length of the metrics then, if there is one."""
        if not self.latest.exists():
            return None
        tensors = load_tensors(self.latest)
        try:
            state = json.loads(load_metadata(self.latest)["state"])
            address = tuple(str(part) for part in state["address"])
            return Snapshot(address, int(state["update"]), tensors), int(state["offset"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{self.latest} is not a snapshot of a run. Delete it to continue from the last "
                "finished iteration."
            ) from None

    def save_solved(self, name: str, solved: Solved) -> None:
        """Keep a finished solve: a directory, renamed into place."""
        target, temporary = self.checkpoints / name, self.checkpoints / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        self.sync_metrics()
        save_tensors(temporary / "delta.safetensors", solved.tensors)
        state = {
            "result": solved.result.name, "stats": dict(solved.stats),
            "notes": dict(solved.notes), "offset": solved.offset,
        }  # fmt: skip
        write_atomic(temporary / "solution.json", json.dumps(state, indent=1).encode())
        try:
            temporary.replace(target)
        except OSError as error:
            raise CheckpointError(
                f"{target} could not be written ({error.strerror or error}). Free some space, "
                "then run the same command again."
            ) from error

    def load_solved(self, name: str, expected: Mapping[str, Tensor]) -> Solved | None:
        """A finished solve, if there is one; ``expected`` are tensors of the right shapes."""
        folder = self.checkpoints / name
        if not folder.exists():
            return None
        tensors = load_tensors(folder / "delta.safetensors", expected)
        return _solved(folder, tensors)

    def ends(self, prefix: str) -> list[int]:
        """How long the metrics were after each finished solve whose name begins so."""
        folders = sorted(self.checkpoints.glob(f"{prefix}*"))
        return [_solved(folder, {}).offset for folder in folders]

    def read_json(self, file: Path) -> Any:
        """A JSON file of this directory, or ``None`` where there is none."""
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} is damaged ({error}). Delete it and run again."
            ) from None

    def write_json(self, file: Path, data: Any) -> None:
        """Write a JSON file, whole or not at all."""
        write_atomic(file, (json.dumps(data, indent=1) + "\n").encode())


def _solved(folder: Path, tensors: Mapping[str, Tensor]) -> Solved:
    try:
        state = json.loads((folder / "solution.json").read_text(encoding="utf-8"))
        return Solved(
            tensors, Result[state["result"]], state["stats"], state["notes"],
            int(state["offset"]),
        )  # fmt: skip
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'solution.json'} is damaged ({error}). Delete {folder} (and later "
            "iterations) to have it computed again."
        ) from None


def iteration_name(number: int) -> str:
    """``iteration_0002``: directory of an outer iteration, counted from 0."""
    return f"iteration_{number:04d}"


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.exists():
        return
    with file.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise CheckpointError(
                        f"{file} is damaged: a line is not JSON. Delete the directory, or choose "
                        "another --out."
                    ) from None

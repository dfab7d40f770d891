"""Keep what a run does: lines in the metrics, snapshots, finished solves, time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import torch
from torch import nn

from tiltflow.algorithms.mirror_descent import Iterate
from tiltflow.algorithms.thresholds import Thresholds
from tiltflow.context import Context, SingleProcess, Snapshot, Step
from tiltflow.experiment import Plan
from tiltflow.flow import FlowModel
from tiltflow.problem import Solution
from tiltflow.rundir import RunDirectory, Solved, iteration_name
from tiltflow.seed import Seed
from tiltflow.tables import TailAware
from tiltflow.types import Estimate

LINES_PER_TRAINING = 200
"""Updates of one training that get a line in the metrics, at most (about)."""


@final
@dataclass(frozen=True)
class Progress:
    """A sign of life: stage (``"iteration 2/6"``, ``"baseline"``, ...), done, total."""

    stage: str
    done: int
    total: int
    stats: Mapping[str, float] = field(default_factory=dict)


def _ignore(progress: Progress) -> None:
    """Default of ``on_progress``."""


@final
@dataclass(frozen=True, kw_only=True)
class Drive:
    """How a run is driven, as opposed to what it computes.

    Args:
        device: where networks live.
        snapshot_seconds: least time between two snapshots.
        on_progress: called often.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    snapshot_seconds: float = 10.0
    on_progress: Callable[[Progress], None] = _ignore


Stage: TypeAlias = Callable[[tuple[str, ...]], tuple[str, str]]
"""Address of a training -> what progress calls it, and the stage that its time is booked on."""


@final
class Journal:
    """What is kept of every kind of run: lines, snapshots, finished solves, progress and time.

    Brings the metrics to the furthest checkpoint first; what follows is written again.

    Args:
        directory: of the run.
        drive: how it is driven.
        nets: whose evaluations are counted.
        ends: how long the metrics were after each finished solve.
        stage: names of trainings.
    """

    def __init__(
        self,
        directory: RunDirectory,
        drive: Drive,
        *,
        nets: Iterable[nn.Module],
        ends: Sequence[int],
        stage: Stage,
    ) -> None:
        self.directory, self.drive, self.stage = directory, drive, stage
        self.stopwatch = Stopwatch(directory, nets)
        self.resume = self._cut(max(ends, default=0))
        # Until the training of the snapshot comes up, everything that happens (a refused attempt,
        # say) has been recorded by the process before.
        self.silent = self.resume is not None
        self.saved_at = time.monotonic()

    def _cut(self, offset: int) -> Snapshot | None:
        """Bring the metrics to the furthest checkpoint; its snapshot where it is one."""
        snapshot, latest = None, self.directory.load_snapshot()
        # A snapshot from before the last finished solve has nothing left to say.
        if latest is not None and latest[1] > offset:
            snapshot, offset = latest
        self.directory.cut(offset)
        return snapshot

    def context(self, seed: Seed, precision: str) -> Context:
        """The root context of all solves."""
        backend = SingleProcess(self.drive.device, precision)
        return Context(seed.child("run"), backend, self.resume, self.on_step)

    def on_step(self, step: Step) -> None:
        """A sign of life of a training: progress, a line, a snapshot."""
        if self.silent and self.resume is not None:
            self.silent = step.address != self.resume.address
        shown, booked = self.stage(step.address)
        self.drive.on_progress(Progress(shown, step.update, step.total, step.stats))
        if self.silent:
            return
        every = max(1, step.total // LINES_PER_TRAINING)
        if step.update % every == 0 or step.update in (1, step.total):
            self.line(
                kind="update", at="/".join(step.address[1:]), update=step.update,
                stats={k: v for k, v in step.stats.items() if not k.endswith("seconds")},
            )  # fmt: skip
        late = time.monotonic() - self.saved_at >= self.drive.snapshot_seconds
        # Not after the last update: a resumed training should have a step left to speak up with.
        if step.snapshot is not None and late and step.update < step.total:
            self.directory.save_snapshot(step.snapshot())
            self.stopwatch.lap(booked)
            self.saved_at = time.monotonic()

    def passed(self, address: tuple[str, ...]) -> None:
        """A training is over: what follows the one of the snapshot has not been recorded yet."""
        if self.resume is not None and address == self.resume.address:
            self.silent = False

    def save(self, name: str, solution: Solution[FlowModel], notes: Mapping[str, Any]) -> None:
        """Keep a finished solve; what the next one records comes after it."""
        tensors = solution.model.trainable.state_dict()
        self.directory.save_solved(
            name,
            Solved(tensors, solution.result, solution.stats, notes, self.directory.offset()),
        )
        self.silent = False

    def line(self, **record: Any) -> None:
        """A line of the metrics."""
        self.directory.append(self.directory.metrics, plain_json(record))


@final
class Recorder:
    """Turns callbacks of outer loops into lines and finished solves."""

    def __init__(self, plan: Plan, directory: RunDirectory, drive: Drive) -> None:
        self.plan = plan
        self.solved = finished_iterations(plan, directory)
        self.baseline = directory.load_solved(
            "baseline", plan.pretrained.model.trainable.state_dict()
        )
        self.iteration = len(self.solved)
        self.journal = Journal(
            directory, drive, nets=[plan.pretrained.model.net], stage=self._stage,
            ends=[s.offset for s in (*self.solved, self.baseline) if s is not None],
        )  # fmt: skip

    def context(self) -> Context:
        """The root context of all solves."""
        return self.journal.context(self.plan.seed, self.plan.experiment.precision)

    def on_iterate(self, number: int, iterate: Iterate[FlowModel]) -> None:
        solution = iterate.solution
        notes = {
            "way": "plan" if self.plan.planned else "steps",
            "rate": plain_json(iterate.rate), "objective": plain_json(iterate.objective),
            "stationarity": plain_json(iterate.stationarity),
            "step_kl": plain_json(iterate.step_kl), "result": solution.result.name,
        }  # fmt: skip
        self._finished("iteration", number, solution, notes)

    def on_round(self, number: int, found: Thresholds, solution: Solution[FlowModel]) -> None:
        notes = {"way": "tail_aware", "result": solution.result.name}
        self._finished("round", number, solution, notes)

    def _finished(
        self, kind: str, number: int, solution: Solution[FlowModel], notes: Mapping[str, Any]
    ) -> None:
        self.journal.line(kind=kind, number=number, **notes, stats=dict(solution.stats))
        self.journal.save(iteration_name(number), solution, notes)
        self.journal.stopwatch.lap("training")
        self.iteration = number + 1

    def on_baseline(self, solution: Solution[FlowModel], notes: Mapping[str, Any]) -> None:
        self.journal.silent = False
        self.journal.line(kind="baseline", **notes, stats=dict(solution.stats))
        self.journal.save("baseline", solution, notes)
        self.journal.stopwatch.lap("baseline")

    def _stage(self, address: tuple[str, ...]) -> tuple[str, str]:
        if "baseline" in address:
            return "baseline", "baseline"
        if self.plan.planned:
            return f"round {self.iteration + 1}", "training"
        algorithm = self.plan.experiment.algorithm
        if isinstance(algorithm, TailAware):
            return f"round {self.iteration + 1}/{algorithm.max_rounds}", "training"
        total = algorithm.num_iterations
        return f"iteration {min(self.iteration + 1, total)}/{total}", "training"


def finished_iterations(plan: Plan, directory: RunDirectory) -> list[Solved]:
    """The finished iterations, without a gap."""
    found: list[Solved] = []
    while True:
        solved = directory.load_solved(
            iteration_name(len(found)), plan.pretrained.model.trainable.state_dict()
        )
        if solved is None:
            return found
        found.append(solved)


def plain_json(value: Any) -> Any:
    """Plain data: estimates as tables, numbers that JSON does not know as ``null``."""
    if isinstance(value, Estimate):
        return plain_json(dataclasses.asdict(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(v) for v in value]
    return value


@final
class Stopwatch:
    """Wall seconds, CPU seconds and network evaluations, lap by lap, into ``timing.jsonl``."""

    def __init__(self, directory: RunDirectory, nets: Iterable[nn.Module]) -> None:
        self._directory, self._counter = directory, [0]
        for net in nets:
            count_evaluations(net, self._counter)
        self._last = self._now()

    def _now(self) -> tuple[float, float, int]:
        return time.monotonic(), time.process_time(), self._counter[0]

    def lap(self, stage: str) -> None:
        """Book the time since the last lap on a stage."""
        now = self._now()
        wall, cpu, evaluations = (a - b for a, b in zip(now, self._last, strict=True))
        self._last = now
        self._directory.append(
            self._directory.timing,
            {"stage": stage, "wall_seconds": wall, "cpu_seconds": cpu, "evaluations": evaluations},
        )


def count_evaluations(net: nn.Module, counter: list[int]) -> None:
    """Add the batch size of each forward call of ``net`` (and of its copies) to ``counter[0]``."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counter[0] += len(inputs[0])

    net.register_forward_hook(hook)

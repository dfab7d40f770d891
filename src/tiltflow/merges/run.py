"""Merge what a run file says, in a directory, so that a kill at any moment loses only seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from tiltflow.algorithms.lowerings import Job, Keeper, Lowered, untrained
from tiltflow.algorithms.merging import merge
from tiltflow.context import Context
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel, freeze
from tiltflow.merges.plan import MergePlan, check
from tiltflow.problem import Solution
from tiltflow.recorder import Drive, Journal
from tiltflow.run import record_environment
from tiltflow.rundir import RunDirectory, Solved


@final
@dataclass(frozen=True)
class MergeOutcome:
    """What a run made.

    Attributes:
        gates: by their texts (``MergePlan.written``), from the bottom to the top.
        jobs: what each of them was made from.
    """

    gates: Mapping[str, Lowered]
    jobs: Mapping[str, Job]

    @property
    def root(self) -> str:
        """Text of the whole circuit."""
        return list(self.gates)[-1]

    @property
    def model(self) -> FlowModel:
        """The result."""
        return self.gates[self.root].model


def train(plan: MergePlan, directory: RunDirectory, drive: Drive) -> MergeOutcome:
    """Make all gates; continues where an earlier process stopped.

    The directory must be claimed and locked by the caller.

    Raises:
        CheckpointError: if a checkpoint is damaged or the disk is full.
    """
    check(plan)
    record_environment(directory, drive.device)
    keeper = _Recorder(plan, directory, drive)
    context = keeper.journal.context(plan.seed, plan.experiment.precision)
    return _merged(plan, context, keeper)


def restore(plan: MergePlan, directory: RunDirectory) -> MergeOutcome:
    """The models of a finished run.

    Raises:
        ConfigError: if a gate has not been made yet.
    """
    return _merged(plan, Context(plan.seed.child("run")), _Archive(plan, directory))


def _merged(plan: MergePlan, context: Context, keeper: _Archive | _Recorder) -> MergeOutcome:
    experiment = plan.experiment
    merged = merge(
        plan.root, plan.models, context=context, settings=experiment.merging, start=plan.start,
        lowerings=experiment.chosen, conditions=plan.conditions, keeper=keeper,
    )  # fmt: skip
    # The keeper was asked for the same gates in the same order.
    gates = dict(zip(keeper.jobs, merged.gates.values(), strict=True))
    return MergeOutcome(gates, keeper.jobs)


def gate_name(number: int) -> str:
    """``gate_0002``: directory of a gate, counted from 0, from the bottom to the top."""
    return f"gate_{number:04d}"


def _number(job: Job) -> int:
    """Gate k is made at the address ``gate/k``."""
    return int(job.context.seed.path[-1])


def _solve_name(job: Job, number: int) -> str:
    return f"{gate_name(_number(job))}_solve_{number:04d}"


def _kept(directory: RunDirectory, name: str, job: Job) -> tuple[FlowModel, Solved] | None:
    """A model that was kept under a name, with its moments."""
    if not (directory.checkpoints / name).exists():
        return None
    model = untrained(job)
    solved = directory.load_solved(name, model.trainable.state_dict())
    assert solved is not None
    model.trainable.load_state_dict(dict(solved.tensors))
    moments = solved.notes["moments"]
    if moments is not None:
        times, table = moments
        model = model.with_moments((tuple(times), tuple(table)))
    return freeze(model), solved


def _gate(directory: RunDirectory, job: Job) -> Lowered | None:
    kept = _kept(directory, gate_name(_number(job)), job)
    return None if kept is None else Lowered(kept[0], job.lowering, dict(kept[1].stats))


@final
class _Archive(Keeper):
    """All gates of a finished run."""

    def __init__(self, plan: MergePlan, directory: RunDirectory) -> None:
        self.plan, self.directory, self.jobs = plan, directory, dict[str, Job]()

    def gate(self, key: str, job: Job) -> Lowered:
        self.jobs[self.plan.written(job.gate)] = job
        found = _gate(self.directory, job)
        if found is None:
            raise ConfigError(
                f"{self.directory.path} has not made {list(self.jobs)[-1]} yet. Run "
                "`tiltflow run` on it first."
            )
        return found


@final
class _Recorder(Keeper):
    """Keeps gates and solved problems in the run directory."""

    def __init__(self, plan: MergePlan, directory: RunDirectory, drive: Drive) -> None:
        self.plan, self.directory, self.jobs = plan, directory, dict[str, Job]()
        self.total = len(plan.gates)
        self.journal = Journal(
            directory, drive, stage=self._stage, ends=directory.ends("gate_"),
            nets=[each.model.net for each in plan.pretrained.values()],
        )  # fmt: skip

    def gate(self, key: str, job: Job) -> Lowered | None:
        self.jobs[self.plan.written(job.gate)] = job
        return _gate(self.directory, job)

    def made(self, key: str, job: Job, lowered: Lowered) -> None:
        notes = {"gate": self._current, "lowering": job.lowering}
        solution = Solution(lowered.model, stats=lowered.stats)
        self._keep("gate", gate_name(_number(job)), solution, notes)

    def solve(self, job: Job, number: int) -> Solution[FlowModel] | None:
        kept = _kept(self.directory, _solve_name(job, number), job)
        return None if kept is None else Solution(kept[0], kept[1].result, kept[1].stats)

    def solved(self, job: Job, number: int, solution: Solution[FlowModel]) -> None:
        notes = {"gate": self._current, "number": number, "result": solution.result.name}
        self._keep("solve", _solve_name(job, number), solution, notes)

    def _keep(
        self, kind: str, name: str, solution: Solution[FlowModel], notes: dict[str, Any]
    ) -> None:
        self.journal.line(kind=kind, **notes, stats=dict(solution.stats))
        self.journal.save(name, solution, {**notes, "moments": solution.model.moments})
        self.journal.stopwatch.lap(notes["gate"])

    def _stage(self, address: tuple[str, ...]) -> tuple[str, str]:
        return f"gate {len(self.jobs)}/{self.total}, {self._current}", self._current

    @property
    def _current(self) -> str:
        """The gate that is being made."""
        return list(self.jobs)[-1]

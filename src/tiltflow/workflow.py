"""Tuning and merging behind one interface, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from tiltflow import experiment, inspection, results, run
from tiltflow.config import Table
from tiltflow.flow import FlowModel
from tiltflow.merge_tables import MERGED, MergeExperiment
from tiltflow.merges import inspection as merge_inspection
from tiltflow.merges import plan as merge_plan
from tiltflow.merges import results as merge_results
from tiltflow.merges import run as merge_run
from tiltflow.merges.plan import MergePlan
from tiltflow.merges.run import MergeOutcome, gate_name
from tiltflow.models import Pretrained
from tiltflow.potential import Potential
from tiltflow.recorder import Drive
from tiltflow.run import Outcome
from tiltflow.rundir import RunDirectory


@final
@dataclass(frozen=True)
class Workflow:
    """What can be done with a run file of one kind.

    Attributes:
        prepare: a resolved file -> its plan, with models loaded.
        check: raises if the plan cannot be carried out.
        train, restore: make the models of a run, or load those of a finished one.
        evaluate: measures them and writes ``report.json``.
        describe: what the run would be, as text.
        models: all models that samples can be drawn of, by name.
        result: the name of the most interesting one.
        reward: what samples are valued by, if anything.
        states: the model that says what conditions samples have, and what they show.
    """

    prepare: Callable[[Table, torch.device | None], Any]
    check: Callable[[Any], object]
    train: Callable[[Any, RunDirectory, Drive], Any]
    restore: Callable[[Any, RunDirectory], Any]
    evaluate: Callable[[Any, Any, RunDirectory, Drive], dict[str, Any]]
    describe: Callable[[Table, Any], str]
    models: Callable[[Any, Any], Mapping[str, FlowModel]]
    result: str
    reward: Callable[[Any], Potential | None]
    states: Callable[[Any], Pretrained]


def workflow_of(tree: Table) -> Workflow:
    """The workflow of a resolved run file."""
    if tree.constructor is MergeExperiment:
        return Workflow(
            merge_plan.prepare, merge_plan.check, merge_run.train, merge_run.restore,
            merge_results.evaluate, merge_inspection.describe, _merged_models, MERGED,
            lambda plan: plan.experiment.evaluate.reward, lambda plan: plan.judge,
        )  # fmt: skip
    return Workflow(
        experiment.prepare, run.check, run.train, run.restore, results.evaluate,
        inspection.describe, _tuned_models, "tuned", lambda plan: plan.reward,
        lambda plan: plan.pretrained,
    )  # fmt: skip


def _tuned_models(plan: experiment.Plan, outcome: Outcome) -> dict[str, FlowModel]:
    models = {"tuned": outcome.tuned.model, "pretrained": plan.pretrained.model}
    return models if outcome.baseline is None else models | {"baseline": outcome.baseline.model}


def _merged_models(plan: MergePlan, outcome: MergeOutcome) -> dict[str, FlowModel]:
    gates = {gate_name(k): each.model for k, each in enumerate(outcome.gates.values())}
    return {MERGED: outcome.model} | plan.models | gates

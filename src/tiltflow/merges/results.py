"""The evaluation of a merge, as plain data: ``report.json``, everything that the report shows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from torch import Tensor

from tiltflow.adapters.checkpoint import save_tensors
from tiltflow.algorithms.evidence import Evidence, gate_evidence
from tiltflow.algorithms.lowerings import Job
from tiltflow.errors import ConfigError
from tiltflow.evaluation import class_shares, of_molecules
from tiltflow.merges.exact import distances
from tiltflow.merges.findings import findings
from tiltflow.merges.plan import MergePlan
from tiltflow.merges.run import MergeOutcome, gate_name
from tiltflow.operators import Circuit, Gate, drawn
from tiltflow.recorder import Drive, Progress, Stopwatch, plain_json
from tiltflow.results import cost
from tiltflow.rundir import RunDirectory
from tiltflow.runfile import nearest, write_toml
from tiltflow.sample_files import stored
from tiltflow.types import Cond, Estimate

Numbers = dict[str, Estimate]
Drawn = tuple[Tensor, Cond | None]
"""Points and their conditions."""

FEW = 4
"""Means and variances are reported of states of so many dimensions at most."""


@final
@dataclass(frozen=True)
class Measured:
    """What was found out about a merge.

    Attributes:
        evidence: of each gate, by its text.
        exact: by gate, the distance to its closed form, or why it is not known.
        samples: points of each model and each gate, by name or text, and their conditions.
        numbers: of each of them, by metric.
        shares: of each of them, by class.
    """

    evidence: Mapping[str, Evidence]
    exact: Mapping[str, Estimate | str]
    samples: Mapping[str, Drawn]
    numbers: Mapping[str, Numbers]
    shares: Mapping[str, Numbers]


def evaluate(
    plan: MergePlan, outcome: MergeOutcome, directory: RunDirectory, drive: Drive
) -> dict[str, Any]:
    """Measure every gate and its parts; write samples, lines of the metrics and ``report.json``.

    Returns:
        the content of ``report.json``.

    Raises:
        ConfigError: if ``[expect]`` names a metric that does not exist.
    """
    nets = [each.model.net for each in plan.pretrained.values()]
    stopwatch = Stopwatch(directory, nets)
    measured = _measured(plan, outcome, drive)
    expectations = _expectations(plan, outcome, measured)
    for name, each in measured.numbers.items():
        directory.append(
            directory.metrics, {"kind": "evaluation", "model": name, "numbers": plain_json(each)}
        )
    keep = plan.experiment.evaluate.keep
    for name, (points, cond) in measured.samples.items():
        path = directory.samples / f"{file_name(outcome, name)}.safetensors"
        save_tensors(path, stored(points, cond, keep))
    stopwatch.lap("evaluation")
    report = _assemble(plan, outcome, measured, directory, expectations)
    directory.write_json(directory.report, report)
    return report


def file_name(outcome: MergeOutcome, name: str) -> str:
    """Of a model's or a gate's samples, without suffix."""
    keys = list(outcome.jobs)
    return gate_name(keys.index(name)) if name in outcome.jobs else f"model_{name}"


def _measured(plan: MergePlan, outcome: MergeOutcome, drive: Drive) -> Measured:
    settings, evidence, samples = (
        plan.experiment.evaluate,
        dict[str, Evidence](),
        dict[str, Drawn](),
    )
    for k, (key, job) in enumerate(outcome.jobs.items()):
        drive.on_progress(Progress("evaluation", k, len(outcome.jobs)))
        evidence[key] = gate_evidence(
            job.gate, outcome.gates[key].model, job.models, sampler=settings.sampler,
            count=settings.num_samples, seed=plan.seed.child("evaluation", k),
            conditions=plan.conditions,
        )  # fmt: skip
        own = evidence[key]
        parts = zip(own.part_samples, own.part_cond, strict=True)
        for name, drawn_part in zip(part_names(plan, job), parts, strict=True):
            samples.setdefault(name, drawn_part)
        samples[key] = own.samples, own.cond
    exact = distances(plan, outcome)
    shares = _shares(plan, samples)
    numbers = {name: _numbers(plan, *each) for name, each in samples.items()}
    for name, of_classes in shares.items():
        numbers[name] |= {f"share.{label}": share for label, share in of_classes.items()}
    for key in outcome.jobs:
        numbers[key] |= _of_gate(plan, key, outcome, evidence[key], exact[key])
    order = [*plan.root.names, *outcome.jobs]
    return Measured(
        evidence, exact, {n: samples[n] for n in order}, {n: numbers[n] for n in order},
        {n: shares[n] for n in order if n in shares},
    )  # fmt: skip


def part_names(plan: MergePlan, job: Job) -> list[str]:
    """What the parts of a gate are called: models by name, gates by their texts."""
    return [plan.written(part) for part in job.gate.parts]


def _numbers(plan: MergePlan, points: Tensor, cond: Cond | None) -> Numbers:
    """Of samples of any model."""
    out: Numbers = {}
    reported, flat = plan.experiment.evaluate.reward, points.flatten(1).double().cpu()
    if reported is not None:
        out["reward"] = Estimate.of(reported.value(points, cond).cpu())
    for name, judge in plan.judge.judges.items():
        out[f"{name}.mean"] = Estimate.of(judge.value(points, cond).cpu())
    if plan.judge.layout is not None:
        return out | of_molecules(plan.judge.layout.decode(points, cond))[0]
    if flat.shape[1] <= FEW:
        for i, x in enumerate(flat.T):
            out[f"mean.{i}"], out[f"variance.{i}"] = Estimate.of(x), _variance(x)
    return out


def _variance(x: Tensor) -> Estimate:
    square = (x - x.mean()) ** 2
    n = len(x)
    return Estimate(float(square.sum()) / (n - 1), float(square.std()) / math.sqrt(n), n)


def _shares(plan: MergePlan, samples: Mapping[str, Drawn]) -> dict[str, Numbers]:
    classify, names = plan.judge.classify, plan.judge.classes
    if classify is None:
        return {}
    return {name: class_shares(classify(points), names) for name, (points, _) in samples.items()}


def _of_gate(
    plan: MergePlan, key: str, outcome: MergeOutcome, evidence: Evidence, exact: Estimate | str
) -> Numbers:
    out = {"objective": evidence.objective}
    if evidence.reward is not None:
        out["own_reward"] = evidence.reward
    names = part_names(plan, outcome.jobs[key])
    out |= {f"kl_to.{n}": kl for n, kl in zip(names, evidence.kl_to_parts, strict=True)}
    out |= {f"kl_from.{n}": kl for n, kl in zip(names, evidence.kl_from_parts, strict=True)}
    if not isinstance(exact, str):
        out["total_variation"] = exact
    apart = outcome.gates[key].stats.get("apart")
    return out if apart is None else out | {"apart": Estimate(apart)}


def _expectations(
    plan: MergePlan, outcome: MergeOutcome, measured: Measured
) -> list[dict[str, Any]]:
    known, verdicts = dict(measured.numbers[outcome.root]), []
    for name, numbers in measured.numbers.items():
        known |= {f"{name}.{metric}": estimate for metric, estimate in numbers.items()}
    for name, expected in plan.experiment.expect.items():
        if name not in known:
            raise ConfigError(f"expect.{name}: there is no such metric. {nearest(name, known)}")
        off = abs(known[name].value - expected.value)
        verdicts.append({
            "metric": name, "value": expected.value, "within": expected.within,
            "from": expected.from_, "measured": plain_json(known[name]),
            "met": bool(off <= expected.within),
        })  # fmt: skip
    return verdicts


def _assemble(
    plan: MergePlan,
    outcome: MergeOutcome,
    measured: Measured,
    directory: RunDirectory,
    expectations: list[dict[str, Any]],
) -> dict[str, Any]:
    solves = [r for r in directory.records(directory.metrics) if r["kind"] == "solve"]
    gates = [_gate(plan, outcome, measured, key) for key in outcome.jobs]
    for gate in gates:
        gate["solves"] = [r["result"] for r in solves if r["gate"] == gate["text"]]
    layout = plan.judge.layout
    report: dict[str, Any] = plain_json({
        "name": plan.experiment.name,
        "circuit": plan.experiment.circuit, "drawn": drawn(plan.root),
        "tree": _tree(plan, plan.root), "root": outcome.root,
        "models": list(plan.root.names), "start": plan.experiment.start,
        "picture": plan.judge.picture, "layout": None if layout is None else asdict(layout),
        "classes": list(plan.judge.classes),
        "judges": list(plan.judge.judges),
        "reward": _text(plan.experiment.evaluate.reward),
        "files": {name: file_name(outcome, name) for name in measured.samples},
        "gates": gates, "numbers": measured.numbers, "shares": measured.shares,
        "expectations": expectations, "cost": cost(directory),
        "config": write_toml(plan.resolved),
    })  # fmt: skip
    report["findings"] = [dataclasses.asdict(f) for f in findings(report)]
    return report


def _gate(plan: MergePlan, outcome: MergeOutcome, measured: Measured, key: str) -> dict[str, Any]:
    """A gate's entry of the report."""
    job, evidence, exact = outcome.jobs[key], measured.evidence[key], measured.exact[key]
    gate, names = job.gate, part_names(plan, job)
    kind = type(gate).__name__
    rows = zip(names, gate.weights, gate.shares, evidence.kl_to_parts, evidence.kl_from_parts,
               strict=True)  # fmt: skip
    return {
        "text": key, "gate": kind, "lowering": job.lowering,
        "chosen": kind.lower() in plan.experiment.lowerings,
        "guided": gate.reward is not None, "reward_name": plan.reward_name(gate),
        "reward_text": _text(gate.reward), "own_reward": evidence.reward,
        "objective": evidence.objective,
        "parts": [
            {"name": n, "weight": weight, "share": share, "kl_to": to, "kl_from": from_}
            for n, weight, share, to, from_ in rows
        ],
        "total_variation": None if isinstance(exact, str) else exact,
        "no_closed_form": exact if isinstance(exact, str) else None,
        "stats": dict(outcome.gates[key].stats),
    }  # fmt: skip


def _tree(plan: MergePlan, node: Circuit) -> dict[str, Any]:
    """The circuit as nested tables, for drawing."""
    if not isinstance(node, Gate):
        return {"name": str(node), "parts": []}
    parts = [
        {**_tree(plan, part), "share": share}
        for part, share in zip(node.parts, node.shares, strict=True)
    ]
    return {"name": type(node).__name__, "text": plan.written(node), "parts": parts,
            "reward": plan.reward_name(node)}  # fmt: skip


def _text(value: object) -> str | None:
    return None if value is None else str(value)

"""The evaluation of a run, as plain data: ``report.json``, everything that the report shows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tiltflow.adapters.checkpoint import save_tensors
from tiltflow.density import Empirical
from tiltflow.diagnosis import Facts, Finding, diagnose
from tiltflow.errors import ConfigError
from tiltflow.evaluation import (
    Drawn,
    class_shares,
    compare,
    draw,
    measure,
    of_molecules,
    tilt,
)
from tiltflow.experiment import Plan
from tiltflow.flow import FlowModel
from tiltflow.metrics import bootstrap_interval
from tiltflow.potential import Potential
from tiltflow.problem import Solution
from tiltflow.recorder import Drive, Progress, Stopwatch, finished_iterations, plain_json
from tiltflow.rewards.single_points import SinglePoints
from tiltflow.run import Outcome, energies_of
from tiltflow.rundir import RunDirectory
from tiltflow.runfile import nearest, write_toml
from tiltflow.sample_files import stored
from tiltflow.tables import TailAware
from tiltflow.types import Access, Estimate

Numbers = Mapping[str, Estimate]


def evaluate(
    plan: Plan, outcome: Outcome, directory: RunDirectory, drive: Drive
) -> dict[str, Any]:
    """Measure every model of a run; write samples, lines of the metrics and ``report.json``.

    Returns:
        the content of ``report.json``.

    Raises:
        ConfigError: if ``[expect]`` names a metric that does not exist.
    """
    stopwatch = Stopwatch(directory, [plan.pretrained.model.net])
    models = {"pretrained": plan.pretrained.model, "tuned": outcome.tuned.model}
    if outcome.baseline is not None:
        models["baseline"] = outcome.baseline.model
    drawn = {name: _draw(plan, name, model, drive) for name, model in models.items()}
    numbers = {name: _numbers(plan, each, drawn["pretrained"]) for name, each in drawn.items()}
    energies = energies_of(plan)
    note = _molecules(plan, drawn, numbers, energies, drive)
    numbers["tuned"] |= _achieved(plan, outcome.tuned, drawn["tuned"])
    numbers["tuned"] |= _of_thresholds(plan, outcome.tuned, numbers["tuned"])
    if outcome.baseline is not None and outcome.baseline_rate is not None:
        numbers["baseline"] |= _baseline_tilt(plan, outcome.baseline_rate, drawn["baseline"])
    shares = _shares(plan, drawn)
    expectations = _expectations(plan, numbers)
    findings = _findings(plan, outcome, directory, numbers, shares)
    for name, each in numbers.items():
        directory.append(
            directory.metrics, {"kind": "evaluation", "model": name, "numbers": plain_json(each)}
        )
    for name, each_drawn in drawn.items():
        _save_samples(directory, name, each_drawn, plan.experiment.evaluate.keep)
    stopwatch.lap("evaluation")
    report = _assemble(plan, outcome, directory, numbers, shares, expectations, findings)
    report["molecule_note"] = note
    report["xtb_failures"] = {} if energies is None else dict(energies.counts)
    report["intervals"] = {name: _intervals(plan, each) for name, each in drawn.items()}
    if isinstance(plan.experiment.algorithm, TailAware):
        report["tail_aware"] = _two_stages(plan, plan.experiment.algorithm, report)
    directory.write_json(directory.report, report)
    return report


def _draw(plan: Plan, name: str, model: FlowModel, drive: Drive) -> Drawn:
    settings = plan.experiment.evaluate
    sampler = settings.sampler

    def on_batch(done: int) -> None:
        drive.on_progress(Progress(f"evaluation of {name}", done, settings.num_samples))

    return draw(
        model, plan.pretrained.model, plan.reward, plan.pretrained.judges,
        sampler=sampler,
        path_sampler=sampler if sampler.kernel.memoryless else plan.training_sampler,
        count=settings.num_samples, seed=plan.seed.child("evaluation"),
        conditions=plan.conditions, on_batch=on_batch,
    )  # fmt: skip


def _numbers(plan: Plan, drawn: Drawn, before: Drawn) -> dict[str, Estimate]:
    levels = plan.experiment.evaluate.levels
    own = measure(drawn, levels)
    return own if drawn is before else own | compare(drawn, before, levels)


def _molecules(
    plan: Plan,
    drawn: Mapping[str, Drawn],
    numbers: Mapping[str, dict[str, Estimate]],
    energies: SinglePoints | None,
    drive: Drive,
) -> str | None:
    """Add ``molecules.*`` where samples are molecules; returns why there are none, if so."""
    layout, note = plan.pretrained.layout, None
    if layout is None:
        return None
    for k, (name, each) in enumerate(drawn.items()):
        drive.on_progress(Progress("molecules", k, len(drawn)))
        found, why = of_molecules(layout.decode(each.points, each.cond), energies)
        numbers[name].update(found)
        note = why or note
    return note


def _achieved(plan: Plan, tuned: Solution[FlowModel], drawn: Drawn) -> dict[str, Estimate]:
    """Tilt towards the optimum of the objective, delta F / weight at the tuned density.

    It is known where the divergences are all from the pre-trained model (the optimum is then a
    tilt of it) and where the utility's first variation has values.
    """
    objective = plan.experiment.objective
    anchored = all(
        getattr(term.functional, "prior", None) is plan.prior for term in objective.divergences
    )
    density = Empirical(drawn.points, cond=drawn.cond)
    if not (anchored and objective.weight > 0):
        return {}
    if Access.VALUE not in objective.utility.offers(Access.NONE):
        return {}
    target = (1 / objective.weight) * objective.utility.first_variation(density)
    return tilt(drawn, target)


def _of_thresholds(
    plan: Plan, tuned: Solution[FlowModel], numbers: Numbers
) -> dict[str, Estimate]:
    """What a tail-aware run planned, and what the tuned model made of it."""
    if not isinstance(plan.experiment.algorithm, TailAware):
        return {}
    stats, weight, kl = tuned.stats, plan.experiment.objective.weight, numbers["path_kl"]
    known = {k: Estimate(v) for k, v in stats.items() if k.startswith(("threshold", "plan_"))}
    known["plan_utility"] = Estimate(stats["plan_objective"] + stats["weight"] * stats["plan_kl"])
    for name, key in (("utility", "tail"), ("drive", "drive"), ("tail_mass", "tail_mass")):
        if key in stats:
            known[name] = Estimate(stats[key], stats[f"{key}_error"], int(stats["fresh"]))
    # The utility and the KL are measured on different samples.
    error = math.hypot(known["utility"].standard_error, weight * kl.standard_error)
    count = known["utility"].count
    known["objective"] = Estimate(known["utility"].value - weight * kl.value, error, count)
    return {f"tail_aware.{name}": estimate for name, estimate in known.items()}


def _two_stages(plan: Plan, settings: TailAware, report: Mapping[str, Any]) -> dict[str, Any]:
    """Stage 1 beside what was measured after stage 2, for ``report.json``."""
    stats, numbers = report["solves"]["tuned"]["stats"], report["numbers"]["tuned"]
    return {
        "thresholds": [v for k, v in stats.items() if k.startswith("threshold")],
        "level": stats.get("level_mass"), "tail_mass": numbers.get("tail_aware.tail_mass"),
        "drive": numbers["tail_aware.drive"],
        "planned": {k: stats[f"plan_{k}"] for k in ("objective", "kl")}
        | {"utility": numbers["tail_aware.plan_utility"]["value"]},
        "measured": {"objective": numbers["tail_aware.objective"], "kl": numbers["path_kl"],
                     "utility": numbers["tail_aware.utility"]},
        "weight": plan.experiment.objective.weight, "reached_weight": stats["weight"],
        "beyond": stats["beyond"], "bank": stats["bank"], "active": stats["active"],
        "bank_error": stats["bank_error"],
        "rounds": stats["rounds"], "max_rounds": settings.max_rounds,
        "settled": bool(stats["settled"]),
    }  # fmt: skip


def _intervals(plan: Plan, drawn: Drawn) -> dict[str, tuple[float, float]]:
    """95 % intervals of the tail means at the first level, by the bootstrap."""
    level, seed = plan.experiment.evaluate.levels[0], plan.seed.child("evaluation", "bootstrap")
    left = bootstrap_interval(drawn.rewards, level, "left", seed=seed)
    right = bootstrap_interval(drawn.rewards, 1 - level, "right", seed=seed)
    return {"tails.left_cvar": left, "tails.right_cvar": right}


def _baseline_tilt(plan: Plan, rate: float, drawn: Drawn) -> dict[str, Estimate]:
    baseline = plan.experiment.baseline
    assert baseline is not None
    target: Potential = rate * baseline.utility.first_variation(plan.prior)
    return tilt(drawn, target)


def _shares(plan: Plan, drawn: Mapping[str, Drawn]) -> dict[str, dict[str, Estimate]]:
    classify, names = plan.pretrained.classify, plan.pretrained.classes
    if classify is None:
        return {}
    return {name: class_shares(classify(each.points), names) for name, each in drawn.items()}


def flat(numbers: Mapping[str, Numbers]) -> dict[str, Estimate]:
    """All numbers by name: those of the tuned model bare, those of others with a prefix."""
    out = dict(numbers["tuned"])
    for model, each in numbers.items():
        out |= {f"{model}.{name}": estimate for name, estimate in each.items()}
    return out


def _expectations(plan: Plan, numbers: Mapping[str, Numbers]) -> list[dict[str, Any]]:
    known, verdicts = flat(numbers), []
    for name, expected in plan.experiment.expect.items():
        if name not in known:
            raise ConfigError(f"expect.{name}: there is no such metric. {nearest(name, known)}")
        measured = known[name]
        verdicts.append({
            "metric": name, "value": expected.value, "within": expected.within,
            "from": expected.from_, "measured": plain_json(measured),
            "met": bool(abs(measured.value - expected.value) <= expected.within),
        })  # fmt: skip
    return verdicts


def _findings(
    plan: Plan,
    outcome: Outcome,
    directory: RunDirectory,
    numbers: Mapping[str, Numbers],
    shares: Mapping[str, Numbers],
) -> list[Finding]:
    updates = [r for r in directory.records(directory.metrics) if r["kind"] == "update"]
    # How many samples had a gradient is known of updates only; the last one of the main solve.
    last = [r["stats"] for r in updates if str(r["at"]).startswith("iteration")][-1:]
    active = {k: v for stats in last for k, v in stats.items() if k == "active"}
    facts = Facts(
        before=numbers["pretrained"], after=numbers["tuned"],
        shares_before=shares.get("pretrained", {}), shares_after=shares.get("tuned", {}),
        result=outcome.tuned.result, stats={**active, **outcome.tuned.stats},
        num_samples=plan.experiment.evaluate.num_samples,
        judges=tuple(plan.pretrained.judges), baseline=numbers.get("baseline"),
    )  # fmt: skip
    return diagnose(facts)


def _save_samples(directory: RunDirectory, name: str, drawn: Drawn, keep: int) -> None:
    tensors = stored(drawn.points, drawn.cond, keep) | {"rewards": drawn.rewards}
    save_tensors(directory.samples / f"{name}.safetensors", tensors)


def _assemble(
    plan: Plan,
    outcome: Outcome,
    directory: RunDirectory,
    numbers: Mapping[str, Numbers],
    shares: Mapping[str, Numbers],
    expectations: list[dict[str, Any]],
    findings: list[Finding],
) -> dict[str, Any]:
    solves = {
        name: {"result": each.result.name, "says": each.result.value, "stats": dict(each.stats)}
        for name, each in (("tuned", outcome.tuned), ("baseline", outcome.baseline))
        if each is not None
    }
    layout = plan.pretrained.layout
    report: dict[str, Any] = plain_json({
        "name": plan.experiment.name,
        "objective": str(plan.objective),
        "utility": str(plan.experiment.objective.utility),
        "reward": str(plan.reward),
        "solver": type(plan.experiment.solver).__name__,
        "levels": list(plan.experiment.evaluate.levels),
        "picture": plan.pretrained.picture,
        "layout": None if layout is None else dataclasses.asdict(layout),
        "classes": list(plan.pretrained.classes),
        "judges": list(plan.pretrained.judges),
        "numbers": numbers, "shares": shares, "solves": solves,
        "baseline_rate": outcome.baseline_rate,
        "iterations": [
            {**s.notes, "stats": s.stats} for s in finished_iterations(plan, directory)
        ],
        "expectations": expectations,
        "findings": [dataclasses.asdict(f) for f in findings],
        "cost": cost(directory),
        "config": write_toml(plan.resolved),
    })  # fmt: skip
    return report


def cost(directory: RunDirectory) -> dict[str, dict[str, float]]:
    """Wall seconds, CPU seconds and network evaluations by stage, over all processes of a run."""
    total: dict[str, dict[str, float]] = {}
    for lap in directory.records(directory.timing):
        stage = total.setdefault(str(lap["stage"]), {})
        for key, value in lap.items():
            if key != "stage":
                stage[key] = stage.get(key, 0) + value
    return total

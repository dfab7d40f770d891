"""The tables of docs/tfft.md on starvation, digits and solvers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from tfft_digits import CLASSES, STEPS
from tfft_hard import CURES
from tfft_solvers import BUDGETS, COMPARED, ON_DIGITS
from tfft_tables import said, winner, with_gap
from toys import Record, Store, of_seeds, table

SOLVERS = {"adjoint": "Adjoint Matching", "weighted": "Weighted Matching"}
FIRST_SOLVED = f"weighted-{BUDGETS[0]}/{COMPARED[0].name}/{COMPARED[0].weight:g}"


def starvation(store: Store) -> list[str]:
    """The refusal, and each cure."""
    best, rows, traces = store.known["exact"]["result"], [], []
    names = {name: f"`{_options(name)}`" for name in CURES}
    found = dict[str, list[Record]]()
    for name in CURES:
        seeds = of_seeds(store, name)
        runs = [run for run in seeds if "failed" not in run]
        found |= {name: with_gap(runs, best)} if runs else {}
        errors = [run["failed"] for run in seeds if "failed" in run]
        traces += [
            f"- {names[name]}: {len(errors)} of {len(seeds)} seeds ended with: {error}"
            for error in errors[:1]
        ]
    for name, runs in found.items():
        rows.append([
            names[name], said(runs, "threshold"), said(runs, "mass_sampler", 4),
            said(runs, "mass_ode", 4), said(runs, "tail"), said(runs, "kl"),
            said(runs, "objective"), said(runs, "gap", 1), said(runs, "evaluations", 1, 1e-6),
        ])  # fmt: skip
        if any(len(run["trace"]) > 1 for run in runs):
            each = [_trace(run["trace"], "threshold", ".2f") for run in runs]
            text = f"- {names[name]}: thresholds {'; '.join(each)}"
            if CURES[name].get("ease", "weight") == "weight":
                each = [_trace(run["trace"], "weight", ".3g") for run in runs]
                text += f"; weights {'; '.join(each)}"
            traces.append(text + ".")
    exact = ["exact", f"{best['threshold']:.2f}", "0.1000", "0.1000", f"{best['tail']:.2f}",
             f"{best['kl']:.2f}", f"{best['objective']:.2f}", "0.0", ""]  # fmt: skip
    head = ["options", "threshold", "P(r > y*), sampler", "ODE", "tail mean", "KL", "G",
            "gap, %", "million evaluations"]  # fmt: skip
    refusal = of_seeds(store, "refused")[0]["text"]
    return [
        "Without any option it is refused:", "", f"> {refusal}", "",
        *table(head, [*rows, exact]), f"Largest G: {winner(found, names)}.", "", *traces, "",
    ]  # fmt: skip


def _trace(rounds: Sequence[Record], key: str, form: str) -> str:
    return " → ".join(format(each[key], form) for each in rounds if key in each)


def _options(name: str) -> str:
    options = dict(CURES[name])
    other = ["WeightedMatching()"] if options.pop("solver", "") else []
    return ", ".join([*other, *(f"{key}={value!r}" for key, value in options.items())])


def digits(store: Store) -> list[str]:
    """Both tasks."""
    names = {
        "pretrained": "pre-trained", "tail": "tail-aware",
        "weighted": "tail-aware, Weighted Matching", "mean": "mean reward, matched KL",
        "plan": "FDC, planned", "steps": f"FDC, K = {STEPS}",
    }  # fmt: skip
    titles = {"readable": "Left tail of readability", "rare": "Right tail of the rarest class"}
    lines = list[str]()
    for task, title in titles.items():
        found = {m: of_seeds(store, f"{m}/{task}") for m in names}
        if not found["tail"]:
            continue
        start = found["pretrained"][0]
        label, rows, judged = start["label"], [], dict[str, list[Record]]()
        for method, name in names.items():
            if not found[method]:
                continue
            runs = [
                _shared(r, p) for r, p in zip(found[method], found["pretrained"], strict=False)
            ]
            keys = ("reward_tail", "reward_mean", "judge_tail", "judge_mean", "path_kl")
            judged[method] = runs
            rows.append([
                name, *(said(runs, k, 3) for k in keys), said(runs, "objective", 3),
                said(runs, "own", 3), said(runs, "least"), said(runs, "evaluations", 2, 1e-6),
            ])  # fmt: skip
        head = ["", "tail mean", "mean", "tail, judge", "mean, judge", "path KL",
                "G with the path KL", f"share of class {label}", "least share ratio",
                "million evaluations"]  # fmt: skip
        lines += [
            f"### {title}", "", f"The weight is {start['weight']:.3f} nats.", "",
            *table(head, rows), f"Largest G: {winner(judged, names)}. {_felt(found['tail'])}", "",
        ]  # fmt: skip
    return lines


def _felt(runs: Sequence[Record]) -> str:
    """Where the optimum is, and how much of the first roll-outs knows of it."""
    return (
        f"The tilt that was asked for is {said(runs, 'plan_kl', 3)} nats away and has G = "
        f"{said(runs, 'plan_objective', 3)} on the bank; {said(runs, 'active', 1, 100)} % of the "
        f"first roll-outs feel its hinge."
    )


def _shared(run: Record, before: Record) -> Record:
    """With the objective, the share of the rarest class, and the least ratio of a class's."""
    ratios = [run["shares"][c] / before["shares"][c] for c in range(CLASSES)]
    worth = run["reward_tail"] - run["weight"] * run["path_kl"]
    far = math.hypot(run["reward_tail_error"], run["weight"] * run["path_kl_error"])
    known = {"evaluations": 0, "own": run["shares"][run["label"]], "least": min(ratios)}
    return known | {"objective": worth, "objective_error": far} | run


def solvers(store: Store) -> list[str]:
    """Gap against evaluations."""
    rows, verdicts = [], []
    for case in COMPARED:
        key = f"{case.name}/{case.weight:g}"
        if f"exact/{key}" not in store.known:
            continue
        best, within = store.known[f"exact/{key}"]["result"], dict[str, tuple[float, str]]()
        for name, title in SOLVERS.items():
            for updates in BUDGETS:
                runs = of_seeds(store, f"{name}-{updates}/{key}")
                runs = with_gap([r for r in runs if "failed" not in r], best)
                if not runs:
                    continue
                rows.append([
                    case.title, title, str(updates), said(runs, "gap", 1), said(runs, "kl"),
                    said(runs, "tail_mass", 3), said(runs, "evaluations", 2, 1e-6),
                    said(runs, "cpu", 0),
                ])  # fmt: skip
                if statistics.fmean(r["gap"] for r in runs) <= 5 and title not in within:
                    spent = 1e-6 * statistics.fmean(r["evaluations"] for r in runs)
                    within[title] = (spent, f"{title} ({spent:.1f} million)")
        order = [text for _, text in sorted(within.values())]
        verdicts.append(f"- {case.title}: gap of at most 5 %: {', '.join(order) or 'neither'}.")
    head = ["case", "solver", "updates", "gap, %", "KL", "tail mass", "million evaluations",
            "CPU-s"]  # fmt: skip
    return [*table(head, rows), *verdicts, "", *_solvers_on_digits(store)]


def _solvers_on_digits(store: Store) -> list[str]:
    rows = list[list[str]]()
    for name, title in SOLVERS.items():
        for updates in ON_DIGITS:
            runs = of_seeds(store, f"digits-{name}-{updates}")
            if runs:
                runs = [_shared(run, run) for run in runs]
                keys = ("reward_tail", "judge_tail", "path_kl", "objective", "tail_mass")
                rows.append([
                    title, str(updates), *(said(runs, k, 3) for k in keys),
                    said(runs, "evaluations", 2, 1e-6), said(runs, "cpu", 0),
                ])  # fmt: skip
    head = ["left tail of readability", "updates", "tail mean", "tail, judge", "path KL",
            "G with the path KL", "tail mass", "million evaluations", "CPU-s"]  # fmt: skip
    return table(head, rows) if rows else []

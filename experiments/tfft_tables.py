"""The tables of docs/tfft.md, and what they say, from the results of ``tfft.py``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from tfft_plane import COSTS, STEPS, WEIGHTS
from tfft_toys import CASES
from toys import Record, Store, of_seeds, table

METHODS = {
    "tail": "tail-aware", "mean": "mean reward",
    **{f"steps-{k}": f"FDC, K = {k}" for k in STEPS},
}  # fmt: skip
"""Of the frontier."""


def error(records: Sequence[Record], key: str) -> float:
    """Standard error of a mean over seeds; of the one measurement where there is one seed."""
    values = [r[key] for r in records]
    if len(values) < 2:
        return float(records[0].get(f"{key}_error", 0.0))
    return statistics.stdev(values) / math.sqrt(len(values))


def said(records: Sequence[Record], key: str, digits: int = 2, scale: float = 1.0) -> str:
    """``mean ± standard error`` of a number that was measured or counted."""
    mean = scale * statistics.fmean(r[key] for r in records)
    far = scale * error(records, key)
    return f"{mean:.{digits}f} ± {far:.{digits}f}" if far > 0 else f"{mean:.{digits}f}"


def with_gap(records: Sequence[Record], best: Record, prefix: str = "") -> list[Record]:
    """The records with the part of the possible gain that was not made, in percent."""
    gain = best["objective"] - best["before"]
    return [
        r | {
            f"{prefix}gap": 100 * (best["objective"] - r[f"{prefix}objective"]) / gain,
            f"{prefix}gap_error": 100 * r.get(f"{prefix}objective_error", 0.0) / gain,
        }
        for r in records
    ]  # fmt: skip


# --- cost ----------------------------------------------------------------------------------------


def cost(store: Store) -> list[str]:
    """Evaluations and CPU-seconds over those of the mean with the same seed."""
    mean, rows, ratios = of_seeds(store, "mean"), [], {}
    for case in COSTS:
        pairs = [
            r | {
                "times": r["evaluations"] / m["evaluations"], "cpu_times": r["cpu"] / m["cpu"],
                "outside": (r["evaluations"] - r["inside"]) / m["evaluations"],
                "training": r["inside"] / m["evaluations"],
            }
            for r, m in zip(of_seeds(store, case.name), mean, strict=False)
        ]  # fmt: skip
        ratios[case.title] = statistics.fmean(p["times"] for p in pairs)
        rows.append([
            case.title, *(said(pairs, k) for k in ("times", "training", "outside", "cpu_times")),
            said(pairs, "active", 3), said(pairs, "tail_mass", 3), f"{case.utility.mass:.1f}",
        ])  # fmt: skip
    head = ["tail", "evaluations", "of them training", "bank and statistics", "CPU-seconds",
            "active", "tail mass", "to be"]  # fmt: skip
    cheap = [f"{name}: {ratio:.2f}" for name, ratio in ratios.items() if ratio <= 1.15]
    dear = [f"{name}: {ratio:.2f}" for name, ratio in ratios.items() if ratio > 1.15]
    lines = [f"The mean reward takes {said(mean, 'evaluations', 2, 1e-6)} million evaluations."]
    lines += [f"At most 1.15 times that: {', '.join(cheap) or 'none'}."]
    lines += [f"More: {', '.join(dear)}."] if dear else []
    return [*table(head, rows), *lines, ""]


# --- densities -----------------------------------------------------------------------------------


def densities(store: Store) -> list[str]:
    """How far tuned laws are from the exact ones, and what the bank alone loses."""
    first, second, gaps = [], [], []
    for case in CASES:
        best = store.known[f"exact/{case.name}"]["result"]
        runs = with_gap(with_gap(of_seeds(store, case.name), best), best, "bank_")
        gaps.append(statistics.fmean(r["gap"] for r in runs))
        first.append([
            case.title, f"{best['before']:.3f}", f"{best['objective']:.3f}",
            said(runs, "objective", 3), said(runs, "gap", 1), said(runs, "bank_gap", 1),
            said(runs, "kl"), f"{best['kl']:.2f}",
        ])  # fmt: skip
        second.append([
            case.title, f"{best['threshold']:.3f}", said(runs, "threshold", 3),
            f"{case.utility.mass:.1f}", said(runs, "mass_sampler", 4), said(runs, "mass_ode", 4),
            said(runs, "tv", 3), said(runs, "bank_tv", 3), f"{runs[0]['tv_before']:.3f}",
        ])  # fmt: skip
    close = sum(g <= 5 for g in gaps)
    head = ["case", "G before", "G*", "G", "gap, %", "gap of the bank, %", "KL", "KL*"]
    more = ["case", "y*", "threshold", "level", "tail mass, sampler", "tail mass, ODE",
            "TV", "TV of the bank", "TV before"]  # fmt: skip
    return [
        *table(head, first), *table(more, second),
        f"{close} of {len(gaps)} mean gaps are at most 5 %; the largest is {max(gaps):.1f} %. "
        f"{_near_level(store)}", "",
    ]  # fmt: skip


def _near_level(store: Store) -> str:
    """How many trainings have a tail mass within 10 % of the level, by each sampler."""
    said_of = []
    for name, label in (("ode", "the ODE"), ("sampler", "the training sampler")):
        off = [
            abs(r[f"mass_{name}"] / case.utility.mass - 1)
            for case in CASES
            for r in of_seeds(store, case.name)
        ]
        near = sum(each <= 0.1 for each in off)
        said_of.append(
            f"{near} of {len(off)} by {label} (the farthest {100 * max(off):.0f} % off)"
        )
    return f"Trainings whose tail mass is within 10 % of the level: {', '.join(said_of)}."


# --- frontier ------------------------------------------------------------------------------------


def frontier_points(store: Store, side: str) -> Iterator[tuple[str, float, list[Record]]]:
    """Method, weight and runs of all points that there are."""
    for weight in sorted(WEIGHTS[side]):
        for method in METHODS:
            runs = of_seeds(store, f"{method}/{side}/{weight:g}")
            if runs:
                yield method, weight, runs


def frontier(store: Store) -> list[str]:
    """All points, and who wins where."""
    lines, won, clear, count = list[str](), 0, 0, 0
    for side in WEIGHTS:
        rows, verdicts = [], []
        for weight in sorted(WEIGHTS[side]):
            here = {m: r for m, w, r in frontier_points(store, side) if w == weight}
            if not here:
                continue
            best = store.known[f"exact/{side}/{weight:g}"]["result"]
            here = {m: with_gap(r, best) for m, r in here.items()}
            rows += [_frontier_row(store, side, weight, m, r) for m, r in here.items()]
            if len(here) == len(METHODS):
                verdict = winner(here, METHODS)
                verdicts.append(f"- Weight {weight:g}: {verdict}.")
                first = verdict.startswith(f"**{METHODS['tail']}**")
                count, won = count + 1, won + first
                clear += first and "within the errors" not in verdict
        head = ["method", "weight", "tail mean", "KL", "G", "gap, %", "exact steps, %",
                "million evaluations", "CPU-s"]  # fmt: skip
        lines += [
            f"### {side.capitalize()} tail",
            "",
            *table(head, rows),
            *verdicts,
            *([""] if verdicts else []),
        ]
    if count:
        lines += [
            f"The tail-aware method has the largest G at {won} of {count} weights, at {clear} of "
            "them by more than two standard errors.", "",
        ]  # fmt: skip
    return lines


def _frontier_row(
    store: Store, side: str, weight: float, method: str, runs: list[Record]
) -> list[str]:
    _, _, steps = method.partition("-")
    missing = ""
    if steps:
        known = store.known[f"rate/{steps}/{side}/{weight:g}"]["result"]
        missing = f"{100 * known['missing']:.1f}"
    return [
        METHODS[method], f"{weight:g}", said(runs, "tail"), said(runs, "kl"),
        said(runs, "objective", 3), said(runs, "gap", 1), missing,
        said(runs, "evaluations", 2, 1e-6), said(runs, "cpu", 0),
    ]  # fmt: skip


def winner(here: Mapping[str, Sequence[Record]], names: Mapping[str, str]) -> str:
    """The largest objective, and how far ahead of the best of the others it is."""
    worth = {m: statistics.fmean(r["objective"] for r in runs) for m, runs in here.items()}
    first, second = sorted(worth, key=lambda m: -worth[m])[:2]
    sigma = math.hypot(_spread(here[first]), _spread(here[second]))
    ahead = worth[first] - worth[second]
    sure = "" if ahead > 2 * sigma else ", within the errors"
    return f"**{names[first]}**, {ahead:.3f} ± {sigma:.3f} ahead of {names[second]}{sure}"


def _spread(runs: Sequence[Record]) -> float:
    """Standard error of a mean objective: of the measurements, or over seeds if that is more."""
    one = math.sqrt(sum(r["objective_error"] ** 2 for r in runs)) / len(runs)
    return max(one, error(runs, "objective"))

"""The report's part about trainings and, of a tail-aware run, about its two stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiltflow import plots
from tiltflow.html_page import MISSING, image, number, section, table


def two_stages(data: Mapping[str, Any]) -> str:
    """What stage 1 of a tail-aware run planned, beside what was measured; else nothing."""
    found: Mapping[str, Any] | None = data.get("tail_aware")
    if found is None:
        return ""
    planned, measured, level = found["planned"], found["measured"], found["level"]
    rows: list[tuple[str, str, str]] = []
    if level is not None:
        rows.append(("part of the samples beyond the threshold", f"{level:.4g}",
                     number(found["tail_mass"])))  # fmt: skip
    elif found["thresholds"]:
        rows.append(("mean slope of u at the threshold", "1", number(found["drive"])))
    rows += [
        (label, f"{planned[key]:.4g}", number(measured[key]))
        for label, key in (
            ("utility", "utility"), ("KL from pre-trained, nats", "kl"),
            (f"utility less {found['weight']:.4g} KL", "objective"),
        )
    ]  # fmt: skip
    many = "s" if found["max_rounds"] > 1 else ""
    what = "mean slope of u" if level is None else "tail mass"
    note = (
        f"{_thresholds(found)} on {found['bank']:,.0f} samples, of which {found['beyond']:,.0f} "
        f"({found['active']:.1%}) had a gradient to train with. That the bank is finite leaves an "
        f"error of {found['bank_error']:.1%} in the {what}. {found['rounds']:.0f} of at most "
        f"{found['max_rounds']} training{many}. A perfect one would measure what was planned."
    )
    if found["reached_weight"] != found["weight"]:
        note += f" The weight that was trained for is {found['reached_weight']:.4g}."
    shown = table(["", "planned", "tuned"], [("", row) for row in rows], note)
    return section("Threshold and tail", shown)


def _thresholds(found: Mapping[str, Any]) -> str:
    numbers = ", ".join(f"{y:.4g}" for y in found["thresholds"])
    if not numbers:
        return "There is no threshold; the plan was made"
    many = "s" if len(found["thresholds"]) > 1 else ""
    return f"The threshold{many} {numbers} {'were' if many else 'was'} found"


def training(data: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The trainings: curves, and a row for each."""
    parts = []
    if plots.available():
        updates = [r for r in records if r["kind"] == "update"]
        for fig in (plots.iterations_figure(data["iterations"]), plots.training_figure(updates)):
            if fig is not None:
                parts.append(image(plots.png(fig), "Training curves"))
    if "tail_aware" in data:
        return section("Training", *parts, _rounds(data))
    rows = [("", _iteration(k, i)) for k, i in enumerate(data["iterations"])]
    header = [
        "training", "rate or steps", "objective", "stationarity", "KL of the step", "gap",
        "solver",
    ]  # fmt: skip
    note = (
        "Objective and stationarity (0: optimal) are estimated on the iteration's own bank. Gap: "
        "nats between what the solver reached and the exact optimum of its step, by its own "
        "account. Curves: blue, from light to dark, the iterations; orange the baseline."
    )
    return section("Training", *parts, table(header, rows, note))


def _iteration(k: int, i: Mapping[str, Any]) -> list[str]:
    cells = [i["stationarity"], i["step_kl"], i["stats"].get("gap")]
    shown = [MISSING if c is None else f"{c:.3g}" for c in cells]
    planned = i["stats"].get("plan_iterations")
    step = f"{planned:.0f} on a bank" if i["rate"] is None else f"{i['rate']:.4g}"
    return [str(k + 1), step, number(i["objective"]), *shown, i["result"]]


def _rounds(data: Mapping[str, Any]) -> str:
    """A table of the trainings of a tail-aware run."""
    header = ["training", "weight of the KL", "threshold", "objective planned", "KL planned",
              "path-KL", "with a gradient", "tail / planned", "gap", "solver"]  # fmt: skip
    rows = []
    for k, each in enumerate(data["iterations"]):
        stats = each["stats"]
        thresholds = [v for name, v in stats.items() if name.startswith("threshold")]
        cells = [stats["weight"], *(thresholds[:1] or [None]), stats["plan_objective"],
                 stats["plan_kl"], stats.get("path_kl"), stats["active"], stats["drive"],
                 stats.get("gap")]  # fmt: skip
        shown = [MISSING if c is None else f"{c:.3g}" for c in cells]
        rows.append(("", [str(k + 1), *shown, each["result"]]))
    note = (
        "Tail / planned: the part of the tuned model's samples beyond the threshold (in general "
        "the mean slope there) over what it should be, where it is farthest from 1. Gap: nats "
        "between what the solver reached and its exact optimum, by its own account."
    )
    return table(header, rows, note)

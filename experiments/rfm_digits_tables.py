"""The section of docs/rfm.md on digits, and its picture, from results only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rfm_digits_models import Sizes
from toys import Record, Store, mean_of, of_seeds, table

from tiltflow import plots
from tiltflow.adapters.digits import CLASSES, SIDE

COMMON, ONLY_A = (4, 5), range(4)

STEPS = 40
"""Of both samplers."""

UNIONS = {"or": ("a | b", 0.5), "unbalanced": ("0.3*a | 0.7*b", 0.3)}
"""Text of each union, and the share of a."""

NAMES = {
    "model/a": "a", "model/b": "b", "law/and": "geometric mean, by weights",
    "weighted/and": "`weighted`", "one_shot/and": "`one_shot`", "feynman_kac/and": "`FeynmanKac`",
    "averaging/and": "`Averaging`", "model/direct": "trained on 4 and 5",
    "distilled/or": "`distilled`", "superposition/or": "`Superposition`",
    "distilled/unbalanced": "`distilled`", "superposition/unbalanced": "`Superposition`",
    "thinned/minus": "`a - b`", "thinned/strict": "`a - 3e6*b`",
}  # fmt: skip

CLASS_ROWS = {
    "model/a": "a", "model/b": "b", "weighted/and": "a & b, `weighted`",
    "one_shot/and": "a & b, `one_shot`", "feynman_kac/and": "a & b, `FeynmanKac`",
    "averaging/and": "a & b, `Averaging`", "distilled/or": "a \\| b, `distilled`",
    "distilled/unbalanced": "0.3\\*a \\| 0.7\\*b, `distilled`",
    "thinned/minus": "a - b", "thinned/strict": "a - 3e6\\*b",
}  # fmt: skip

PICTURED = {
    "model/a": "a: trained on 0 to 5", "model/b": "b: trained on 4 to 9",
    "weighted/and": "a & b", "distilled/or": "a | b",
}  # fmt: skip

SETUP = """\
Two networks of the shipped architecture, trained on the 8x8 digits 0 to 5 (a) and 4 to 9 (b); \
a third, which merging does not see, on 4 and 5. Training digits get a little noise, half a grey \
level: borders are always paper, and without it there are no log-densities. Classes are those of \
the shipped judge, which no training sees; an image is *confident* where its best class has \
probability {threshold:g} or more, as {confident:.0f} % of the training digits are, and \
{noisy:.0f} % with the noise. SDE and ODE are 40 steps of the default kernel and of Heun. All \
numbers are of fresh samples; ± is the standard error over seeds of the merging, with the same \
a and b."""

ABOUT_AND = """\
*Common*: share of 4 and 5 among confident samples. *Spread*: root mean squared distance of \
confident 4s and 5s from their mean image. *4 of 4, 5*: share of 4 among confident ones. The \
geometric mean by weights is of samples of the ODEs of a and b with their log-densities."""

ABOUT_OR = """\
Shares of the ten classes against those of the mixture, from fresh samples of a and b: z is the \
difference over the standard error of both sides, for each class and seed, and for the mean over \
seeds. *Largest difference* is of that mean, in per cent of samples. *Confident* is of all \
samples; *of the mixture*, what it should be."""

ABOUT_MINUS = """\
A contrast weights a's samples with p_a / (p_a + c p_b). Two learned densities differ by several \
nats even on classes that both have seen, each being larger on its own samples, so that c = 1 \
removes few of the 4s and 5s; c = 3e6, 15 nats, lies between the two kinds of classes."""


def _settings() -> str:
    s = Sizes()
    return (
        f"Settings: a, b and fits as the shipped model, learning rate 2e-3, EMA 0.999, batches of "
        f"256; {s.updates} updates for each model, {s.fit} after an intersection or a contrast, "
        f"{s.unite} on {s.mixture} samples for a union. `weighted`: {s.bank} samples, "
        f"{s.likelihood_steps} steps of `Likelihood`. `one_shot`: "
        f"{s.control} updates on roll-outs of {s.paths} at 2e-3, refitted to {s.refit} samples."
    )


def section(store: Store) -> str:
    """The section in Markdown; empty where nothing was run."""
    if "data" not in store.known or not of_seeds(store, "fresh"):
        return ""
    known = store.known["data"]["result"]
    setup = SETUP.format(
        threshold=known["threshold"], confident=100 * known["confident"],
        noisy=100 * known["confident_noisy"],
    )  # fmt: skip
    minutes = store.seconds() / 60
    return "\n".join([
        setup, "", _settings(), "",
        "![Samples of a, b, a & b and a | b](images/rfm_digits.png)", "",
        "*The first samples of each model by the SDE, seed 0, none left out.*", "",
        "### What both draw", "", ABOUT_AND, "", *_intersections(store),
        "### What either draws", "", ABOUT_OR, "", *_unions(store),
        "### What a draws and b does not", "", ABOUT_MINUS, "", *_contrasts(store),
        "### Classes", "", "Per cent of all samples by the SDE.", "", *_classes(store),
        f"`python experiments/rfm.py digits`: {minutes:.0f} CPU-minutes, "
        f"{len(of_seeds(store, 'fresh'))} seeds.", "",
    ])  # fmt: skip


def common(look: Record) -> float:
    """Share of 4 and 5 among confident samples."""
    return float(sum(look["clear"][c] for c in COMMON))


def four(look: Record) -> float:
    """Share of 4 among confident 4s and 5s."""
    return float(look["clear"][4] / max(common(look), 1e-12))


# --- tables --------------------------------------------------------------------------------------


def _looks(store: Store, key: str) -> list[tuple[str, list[Record], list[Record]]]:
    """(sampler, looks, records) of a method, seed by seed."""
    records = of_seeds(store, key)
    return [
        (name, [r[name] for r in records], records)
        for name in ("sde", "ode")
        if records and name in records[0]
    ]


def _intersections(store: Store) -> list[str]:
    rows, met, missed = [], list[str](), list[str]()
    for key in list(NAMES)[:8]:
        for sampler, looks, records in _looks(store, key):
            shares = [common(look) for look in looks]
            cpu = [r["cpu"] for r in records if "cpu" in r]
            rows.append([
                f"{NAMES[key]}, {sampler.upper()}", mean_of(shares, 1, 100),
                mean_of([look["confident"] for look in looks], 1, 100),
                mean_of([four(look) for look in looks], 1, 100),
                mean_of([look["spread"] for look in looks], 2),
                _evaluations(records[0], sampler),
                mean_of(cpu, 0),
            ])  # fmt: skip
            if key.endswith("/and") and not key.startswith("law"):
                (met if statistics.fmean(shares) >= 0.9 else missed).append(
                    f"{NAMES[key]} ({sampler.upper()})"
                )
    head = ["", "common, %", "confident, %", "4 of 4, 5, %", "spread", "evaluations per sample",
            "CPU-seconds of merging"]  # fmt: skip
    said = f"At least 90 % common: {', '.join(met) or 'none'}."
    said += f" Less: {', '.join(missed)}." if missed else ""
    return [*table(head, rows), said, "", *_overlap(store)]


def _evaluations(record: Record, sampler: str) -> str:
    """Of networks, per sample: Heun's steps take two each, but the last, which takes one."""
    each = record.get("evaluations")
    return "" if each is None else str(each if sampler == "sde" else 2 * each - each // STEPS)


def _overlap(store: Store) -> list[str]:
    """-log of the overlap by each method."""
    found = []
    for key, name in (("weighted/and", "apart"), ("one_shot/and", "apart"),
                      ("feynman_kac/and", "log_z")):  # fmt: skip
        values = [abs(r["stats"][name]) for r in of_seeds(store, key) if name in r["stats"]]
        found += [f"{NAMES[key]} {mean_of(values, 2)}"] if values else []
    return [
        f"-log of the overlap of a and b, in nats: {', '.join(found)}. Two models that agreed on "
        "4 and 5 and shared nothing else would have log 3 = 1.10. `weighted` weighs samples of "
        "the SDE with densities of the ODE; `FeynmanKac` compares paths, which differ more than "
        "their ends; `one_shot` compares them until t = 0.9, and includes what training lacks.",
        "",
    ]  # fmt: skip


def deviations(look: Record, parts: Record, share: float) -> tuple[list[float], list[float]]:
    """Differences of shares from the mixture's, and standard errors of both sides, by class."""
    differences, errors = [], []
    for c in range(CLASSES):
        own, a, b = (each["shares"][c] for each in (look, parts["a"], parts["b"]))
        differences.append(own - share * a - (1 - share) * b)
        variance = _variance(own, look["effective"])
        variance += share**2 * _variance(a, parts["a"]["effective"])
        errors.append(math.sqrt(variance + (1 - share) ** 2
                                * _variance(b, parts["b"]["effective"])))  # fmt: skip
    return differences, errors


def _variance(share: float, count: float) -> float:
    p = (share * count + 1) / (count + 2)  # a class that was not seen has an error, too
    return p * (1 - p) / count


def _unions(store: Store) -> list[str]:
    parts, rows = of_seeds(store, "fresh"), []
    for gate, (text, share) in UNIONS.items():
        wanted = [share * p["a"]["confident"] + (1 - share) * p["b"]["confident"] for p in parts]
        for method in ("distilled", "superposition"):
            key = f"{method}/{gate}"
            for sampler, looks, records in _looks(store, key):
                name = f"{text}, {NAMES[key]}, {sampler.upper()}"
                rows.append([
                    name.replace("|", "\\|").replace("*", "\\*"),
                    *_against(looks, parts, share),
                    mean_of([look["confident"] for look in looks], 1, 100),
                    mean_of(wanted, 1, 100),
                    mean_of([r["cpu"] for r in records if "cpu" in r], 0),
                ])  # fmt: skip
    head = ["", "z at most 3", "largest z", "of the mean", "largest difference, %",
            "confident, %", "of the mixture, %", "CPU-seconds of merging"]  # fmt: skip
    return table(head, rows)


def _against(looks: Sequence[Record], parts: Sequence[Record], share: float) -> list[str]:
    """Shares against those of the mixture, over all classes and seeds."""
    seeds = [deviations(*pair, share) for pair in zip(looks, parts, strict=False)]
    each = [abs(d) / e for ds, es in seeds for d, e in zip(ds, es, strict=True)]
    total = [abs(sum(ds)) for ds in zip(*(ds for ds, _ in seeds), strict=True)]
    errors = [math.hypot(*es) for es in zip(*(es for _, es in seeds), strict=True)]
    pooled = max(d / e for d, e in zip(total, errors, strict=True))
    return [
        f"{sum(z <= 3 for z in each)} of {len(each)}", f"{max(each):.1f}", f"{pooled:.1f}",
        f"{100 * max(total) / len(seeds):.2f}",
    ]  # fmt: skip


def _contrasts(store: Store) -> list[str]:
    rows = []
    for key in ("model/a", "thinned/minus", "thinned/strict"):
        for sampler, looks, _ in _looks(store, key):
            only = [sum(look["clear"][c] for c in ONLY_A) for look in looks]
            rows.append([
                f"{NAMES[key]}, {sampler.upper()}", mean_of(only, 1, 100),
                mean_of([look["confident"] for look in looks], 1, 100),
            ])  # fmt: skip
    return table(["", "0 to 3 among confident, %", "confident, %"], rows)


def _classes(store: Store) -> list[str]:
    rows = []
    for key, name in CLASS_ROWS.items():
        looks = [r["sde"] for r in of_seeds(store, key)]
        if looks:
            rows.append([name, *(
                f"{100 * statistics.fmean(look['shares'][c] for look in looks):.1f}"
                for c in range(CLASSES)
            )])  # fmt: skip
    return table(["", *map(str, range(CLASSES))], rows)


# --- picture -------------------------------------------------------------------------------------


def picture(store: Store, home: Path) -> None:
    """Write images/rfm_digits.png, if matplotlib is there and the models were run."""
    rows = {}
    for key, title in PICTURED.items():
        records = of_seeds(store, key)
        if records and "drawn" in records[0]:
            rows[title] = torch.tensor(records[0]["drawn"])
    if len(rows) < len(PICTURED) or not plots.available():
        return
    fig = plots.figure(9.4, 0.75 * len(rows))
    for axes, (title, points) in zip(fig.subplots(len(rows), 1), rows.items(), strict=True):
        plots.show_pictures(axes, points, (SIDE, SIDE), len(points), title)
    (home / "images").mkdir(parents=True, exist_ok=True)
    (home / "images" / "rfm_digits.png").write_bytes(plots.png(fig))

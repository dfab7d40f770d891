"""The section and the picture of ``rfm_images.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rfm_images_lab import PREFERRED
from torch import Tensor
from toys import Record, Store, table

from tiltflow import plots

Pair = list[float]
"""A value and its standard error."""

TITLES = {
    "parts": "the parts, one model per sample",
    "superposition": "both models at each step (`Superposition`)",
    "balanced": "one network, 1 : 1",
    "taught": "one network, 1 : 1, taught",
    "unbalanced": "one network, 3 : 1",
    "guided": "one network, guided",
}
EVALUATIONS = {"parts": "1", "superposition": "2"}
"""Networks per step, where not one for all samples."""

FASHION = {"balanced": 0.5, "taught": 0.5, "unbalanced": 0.25}
"""The share of fashion that the gate asks for."""


COLUMNS = 16
"""Images in a row of the picture, of which every method has two."""


def draw(sheets: Mapping[str, Tensor], path: Path) -> None:
    """Rows of images, ink on paper, in 16 shades for the size of the file."""
    fig = plots.figure(5.6, 0.95 * len(sheets))
    rows = fig.subplots(len(sheets), 1)
    for axes, (title, pixels) in zip(rows, sheets.items(), strict=True):
        plots.show_pictures(axes, (15 * pixels).round() / 7.5 - 1, (28, 28), COLUMNS, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plots.png(fig))


def section(store: Store) -> str:
    """Markdown of the results of the largest setting there is; "" where nothing was run."""
    for setting in ("full", "cpu", "quick"):
        if f"{setting}/guided/0" in store.known:
            return "\n".join(_Results(store, setting).lines())
    return ""


class _Results:
    """The results of a setting, first seed."""

    def __init__(self, store: Store, setting: str) -> None:
        self.store, self.setting = store, setting
        self.rows = {name: self.of(name) for name in TITLES}

    def of(self, name: str) -> Record:
        result: Record = self.store.known[f"{self.setting}/{name}/0"]["result"]
        return result

    def lines(self) -> list[str]:
        return [
            "## Images: digits or clothes", "",
            *self.intro(), *self.quality(), *self.verdicts(), "", *self.classes(),
            *self.guided(), "", "![Samples](images/rfm_images.png)", "", *self.cost(),
        ]  # fmt: skip

    def intro(self) -> list[str]:
        given, parts = self.of("setting"), self.rows["parts"]
        return [
            "Two published U-Nets of 28x28 images, of MNIST and of Fashion-MNIST, with one "
            "architecture, one noise schedule, and images of zero mean as states, as one network, "
            f"from {given['bank']} samples of each part ({given['steps']} ancestral steps) and "
            f"{given['batch']} images per update:",
            "",
            f"- *1 : 1*: `merge`, {given['updates']} updates of flow matching from the digits' "
            "network;",
            f"- *1 : 1, taught*: not in the library. {given['taught']} updates towards what the "
            "part that a sample came from predicts, instead of towards the noise that was drawn: "
            "the same minimiser, a target of less variance;",
            f"- *3 : 1* and *guided*: the regression of `merge`, {given['again']} updates from "
            "the network of 1 : 1.",
            "",
            f"Measured on {parts['count']} fresh samples of each:",
            "",
            "- *fashion*: what a discriminator calls clothes; it was trained on the parts' "
            f"samples and is right on {_pc(parts['right'][0])} of other digits and "
            f"{_pc(parts['right'][1])} of other clothes. *Neither*: it is less than 95 % sure.",
            "- *clear*: of the digits, those of which a classifier is more than 90 % sure; "
            f"of MNIST's own test digits {_pc(parts['real']['clear'])}.",
            "- *FD*: Frechet distances of that classifier's features, to 5000 real digits, and "
            "of both halves to those of `Superposition`, whose samples have the law of the "
            f"parts' and were not trained on. From {min(parts['compared'])} samples each, which "
            "biases all alike, and nothing where there are fewer; real digits have "
            f"{_pm(parts['real']['to_real'], 0)} from as many.",
            "- *error*: mean square of the predicted less the drawn noise, times 1000, on digits "
            "and clothes of `Superposition`; not above the parts' for a network that is done.",
            "",
        ]

    def quality(self) -> list[str]:
        head = [
            "", "networks per step", "ms per sample", "fashion", "neither", "clear",
            "FD real digits", "FD digits", "FD fashion", "error",
        ]  # fmt: skip
        rows = []
        for name, row in self.rows.items():
            enough = [n == max(self.rows["parts"]["compared"]) for n in row["compared"]]
            distances = [
                _pm(row[key], 0) if key in row and fair else ""
                for key, fair in zip(("to_digits", "to_fashion"), enough, strict=True)
            ]
            rows.append([
                TITLES[name], EVALUATIONS.get(name, "1"), f"{row['milliseconds']:.0f}",
                _pc(row["fashion"]), _pc(row["undecided"]), _pc(row["clear"]),
                _pm(row["to_real"], 0), *distances,
                ", ".join(f"{1000 * e:.1f}" for e in row.get("losses", [])),
            ])  # fmt: skip
        return table(head, rows)

    def verdicts(self) -> list[str]:
        """What was asked for, and whether it came."""
        said = ["*Met*: within three standard errors, or better.", ""]
        for name, target in FASHION.items():
            z = _z(self.rows[name]["fashion"], [target, 0.0])
            said.append(
                f"- Shares, {TITLES[name]}: {_pc(self.rows[name]['fashion'])} fashion of "
                f"{100 * target:.0f} % asked for: {_verdict(abs(z) < 3, z)}."
            )
        agrees, sure = self.of("superposition")["agrees"], self.of("superposition")["certainty"]
        said.append(
            "- `Superposition` knows which model each sample belongs to (mean posterior of the "
            f"likelier one {sure:.4f}); the discriminator agrees on {_pc(agrees)}."
        )
        return [*said, "", *self.compared()[:-1]]

    def compared(self) -> list[str]:
        """Whether one network is as good as the parts."""
        head = ["as good as the parts?", *(TITLES[name] for name in ("balanced", "taught"))]
        rows = []
        for key, what, better in (
            ("clear", "clear digits", 1), ("to_real", "FD real digits", -1),
            ("to_digits", "FD digits", -1), ("to_fashion", "FD fashion", -1),
            ("undecided", "neither", -1),
        ):  # fmt: skip
            zs = [
                _z(self.rows[name][key], self.rows["parts"][key])
                for name in ("balanced", "taught")
            ]
            rows.append([what, *(_verdict(better * z > -3, z) for z in zs)])
        return table(head, rows)

    def classes(self) -> list[str]:
        head = ["digits, %", *map(str, range(10))]
        rows = [
            [TITLES[name], *(f"{100 * p:.1f} ± {100 * e:.1f}" for p, e in row["classes"])]
            for name, row in self.rows.items()
        ]
        return table(head, rows)

    def guided(self) -> list[str]:
        promised, row = self.of("promised"), self.rows["guided"]
        share = _product(row["classes"][PREFERRED], [1 - row["fashion"][0], row["fashion"][1]])
        z = _z(row["reward"], promised["reward"])
        return [
            f"**Guided**: the reward f is the classifier's probability of a {PREFERRED}, and "
            f"A = 1. The bank has E f = {_pm(promised['before'], 3)}; weights A / (nu - f) "
            f"promise {_pm(promised['reward'], 3)} (effective size "
            f"{promised['effective']:.0f}), with {_pc(promised['share'])} fives among all "
            f"samples and {_pc(promised['fashion'])} fashion. The trained network has E f = "
            f"{_pm(row['reward'], 3)}, {_pc(share)} fives and {_pc(row['fashion'])} fashion: "
            f"{_verdict(abs(z) < 3, z)}."
        ]

    def cost(self) -> list[str]:
        seconds = {
            what: self.store.seconds(f"{self.setting}/{what}")
            for what in ("superposition", "train-balanced", "train-taught", "balanced")
        }
        # The bank may have been there when its entry was made.
        seconds["bank"] = self.of("bank")["seconds"]
        rest = self.store.seconds(f"{self.setting}/") - self.store.seconds(f"{self.setting}/bank")
        whole = rest + seconds["bank"]
        return [
            f"CPU-seconds on one core: samples of both parts {seconds['bank']:.0f}, the training "
            f"by `merge` {seconds['train-balanced']:.0f} with the calibration that ends it, the "
            f"taught one {seconds['train-taught']:.0f}, samples of a network "
            f"{seconds['balanced']:.0f}, those of `Superposition` "
            f"{seconds['superposition']:.0f}; everything {whole / 60:.0f} minutes, on a busy "
            "machine. One seed; errors are those of samples. `python experiments/rfm_images.py "
            "--full --device cuda` is the setting for a GPU: 30,000 samples of each part, 100 "
            "steps, 20,000 updates of 256 images."
            + ("" if self.setting == "full" else " It has not been run."),
            "",
        ]


def _pm(pair: Pair, digits: int) -> str:
    return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def _pc(pair: Pair, digits: int = 1) -> str:
    return f"{_pm([100 * p for p in pair], digits)} %"


def _z(a: Pair, b: Pair) -> float:
    return (a[0] - b[0]) / max(math.hypot(a[1], b[1]), 1e-12)


def _product(a: Pair, b: Pair) -> Pair:
    return [a[0] * b[0], math.hypot(a[0] * b[1], a[1] * b[0])]


def _verdict(met: bool, z: float) -> str:
    return f"{'met' if met else '**missed**'} ({z:+.1f} standard errors)"

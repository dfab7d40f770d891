"""Every lowering and every training-free sampler of ``rfm.py`` on the same gates of networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rfm_plane import FINE as FINE_NODES
from rfm_plane import (
    FRESH,
    LAWS,
    PANELS,
    PRETRAINING,
    Panel,
    binned,
    bins_of,
    fitted,
    law_of,
    merging,
    network,
    shortened,
)
from tfft_tables import said
from toys import Record, Store, of_seeds, table

from tiltflow.algorithms import Averaging, Descent, FeynmanKac, Superposition, TrainingFree, merge
from tiltflow.algorithms.lowerings import Merging
from tiltflow.context import Context
from tiltflow.density import Bank
from tiltflow.flow import FlowModel
from tiltflow.kernel import Heun
from tiltflow.operators import Interpolation
from tiltflow.recorder import count_evaluations
from tiltflow.sample import Sampler
from tiltflow.seed import Seed

Models = Mapping[str, FlowModel]
DESCENT, STEPS = Descent(), Sampler()
GATES = {panel.name: panel for panel in PANELS}


@dataclass(frozen=True)
class Way:
    """A row: a lowering with its settings, or a sampler without training.

    Args:
        panel: whose gate.
        says: the row's label.
        lowering: of the gate; none for samplers.
        descent: settings of mirror descent.
        updates: of each control problem; the panels' number by default.
        sampler: without training.
        steps: where a sampler takes its steps.
        power: of an interpolation.
    """

    panel: str
    says: str
    lowering: str = ""
    descent: Descent = DESCENT
    updates: int | None = None
    sampler: TrainingFree | None = None
    steps: Sampler = STEPS
    power: int = 2

    def settings(self, quick: bool) -> Merging:
        """The panels' settings, with these."""
        given = merging(quick)
        updates = None if quick else self.updates
        if updates is not None:
            training = replace(given.solver.training, num_updates=updates)
            given = replace(given, solver=replace(given.solver, training=training))
        descent = self.descent
        if quick and self.lowering:
            descent = replace(descent, num_iterations=1, num_samples=300)
        return replace(given, descent=descent)


FIVE = Descent(num_iterations=5, rate=0.4)
WAYS = {
    "and/one_shot": Way("and", "`one_shot`, refitted", "one_shot"),
    "and/weighted": Way("and", "`weighted`", "weighted"),
    "and/particles": Way("and", "`particles`", "particles"),
    "and/terminal": Way("and", "`terminal`, 1 exact step", "terminal"),
    "and/terminal5": Way("and", "`terminal`, 5 steps", "terminal", FIVE, 200),
    "and/trajectory": Way("and", "`trajectory`, 5 steps, refitted", "trajectory",
                          Descent(num_iterations=5, rate=0.2), 200),
    "and/end_term": Way("and", "`trajectory` with the end term", "trajectory",
                        Descent(num_iterations=5, rate=0.2, end_term=True), 200),
    "and/averaging": Way("and", "`Averaging`, SDE", sampler=Averaging()),
    "and/averaging_ode": Way("and", "`Averaging`, ODE", sampler=Averaging(),
                             steps=Sampler(Heun(), 20)),
    "and/feynman_kac": Way("and", "`FeynmanKac`", sampler=FeynmanKac()),
    "and-reward/one_shot": Way("and-reward", "`one_shot`, refitted", "one_shot"),
    "and-reward/weighted": Way("and-reward", "`weighted`", "weighted"),
    "and-reward/particles": Way("and-reward", "`particles`", "particles"),
    "and-reward/terminal": Way("and-reward", "`terminal`, 1 exact step", "terminal"),
    "and-reward/trajectory": Way("and-reward", "`trajectory`, 5 steps, refitted", "trajectory",
                                 Descent(num_iterations=5, rate=0.2), 200),
    "and-reward/feynman_kac": Way("and-reward", "`FeynmanKac`", sampler=FeynmanKac()),
    "or-unbalanced/distilled": Way("or-unbalanced", "`distilled`", "distilled"),
    "or-unbalanced/terminal": Way("or-unbalanced", "`terminal`, 20 steps with critics",
                                  "terminal", Descent(num_iterations=20, rate=0.2), 100),
    "or-unbalanced/superposition": Way("or-unbalanced", "`Superposition`",
                                       sampler=Superposition()),
    "or-unbalanced/mean": Way("or-unbalanced", "`Superposition(mean=True)`",
                              sampler=Superposition(mean=True)),
    "between/transported": Way("between", "`transported`", "transported"),
    "between/terminal": Way("between", "`terminal`, W_2^2, 20 steps", "terminal",
                            Descent(num_iterations=20, rate=0.2, num_samples=1000), 100),
    "between/terminal_w1": Way("between", "`terminal`, W_1, 20 steps", "terminal",
                               Descent(num_iterations=20, rate=0.2, num_samples=1000), 100,
                               power=1),
}  # fmt: skip
"""By name in the store."""


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """All rows, seed by seed."""
    home, training = store.path.parent / "pretrained", shortened(PRETRAINING, quick)

    def models() -> Models:
        # Loaded anew for each row, so that each counts its own evaluations.
        return {
            name: fitted(name, law, network(k, quick), home, training)
            for k, (name, law) in enumerate(LAWS.items())
        }

    for seed in seeds:
        for name, way in WAYS.items():
            store.get(f"{name}/{seed}", lambda w=way, s=seed: one(w, models(), s, quick))


def one(way: Way, models: Models, seed: int, quick: bool) -> Record:
    """A row: distance from the optimum, and network evaluations."""
    panel, counter = GATES[way.panel], [0]
    used = [models[name] for name in panel.circuit.names]
    for model in used:
        count_evaluations(model.net, counter)
    count = 500 if quick else FRESH
    if way.sampler is not None:
        drawn = way.sampler.draw(
            panel.circuit, used, count, seed=Seed(60).child(seed), sampler=way.steps
        )
        found = distance(panel, drawn.bank)
        effective = drawn.stats.get("effective_ancestors", count)
        return found | {"training": 0, "sampling": counter[0] / count, "effective": effective}
    gate = panel.circuit
    if way.power == 1:
        gate = Interpolation(*gate.parts, weights=gate.weights, power=1)
    merged = merge(
        gate, models, context=Context(Seed(61).child(seed)), settings=way.settings(quick),
        lowerings={type(gate): way.lowering},
    ).model  # fmt: skip
    spent, counter[0] = counter[0], 0
    sampler = Sampler()
    bank = Bank.equal(sampler.sample(merged, count, seed=Seed(62).child(seed)))
    sampling = counter[0] / count
    p, _ = law_of(merged, quick)
    found = distance(panel, bank) | {"tv": p.total_variation(panel.exact())}
    return found | {"training": spent, "sampling": sampling, "effective": count}


def distance(panel: Panel, bank: Bank) -> Record:
    """Total variation of samples from the optimum, both in bins, and what bins cannot show."""
    exact = bins_of(panel.exact(FINE_NODES))
    chosen = torch.multinomial(
        bank.weights.double(), len(bank.points), replacement=True,
        generator=Seed(63).generator(),
    )  # fmt: skip
    equal = float(bank.weights.max()) < 1.001 * float(bank.weights.min())
    points = bank.points if equal else bank.points[chosen]
    return {"binned": float((binned(points) - exact).abs().sum()) / 2}


# --- the section ---------------------------------------------------------------------------------


TEXT = """
The same trained networks as in the panels; every way of making a gate. TV: of the ODE's density
from the exact optimum. Binned: of {fresh:,} samples (of the SDE, or of the sampler itself) in 30 x
30 bins; that many exact samples have {floor}. Evaluations: forward calls of networks times
samples; training counts those of sampling parts, roll-outs, adjoints and regressions alike (many
of them have a backward pass as well), not those of small critics. Per sample: as long as the
result is used.
"""


def section(store: Store) -> str:
    """The table of all rows."""
    if not any(of_seeds(store, name) for name in WAYS):
        return ""
    floors = [found["result"]["floor"] for key, found in store_of_panels(store)
              if key.removeprefix("exact/") in {way.panel for way in WAYS.values()}]  # fmt: skip
    floor = f"{min(floors):.3f} to {max(floors):.3f}" if floors else "some distance too"
    head = ["gate", "way", "TV", "binned TV", "evaluations, training, millions", "per sample",
            "seeds"]  # fmt: skip
    lines = ["## All lowerings, and sampling without training", ""]
    lines += [*TEXT.format(fresh=FRESH, floor=floor).strip().splitlines(), ""]
    return "\n".join([*lines, *table(head, list(rows(store)))])


def store_of_panels(store: Store) -> Iterator[tuple[str, Record]]:
    """What the panels know of their optima, if they were run."""
    known = Store(store.path.parent / "panels.json").known
    return (item for item in known.items() if item[0].startswith("exact/"))


def rows(store: Store) -> Iterator[list[str]]:
    """One row for each way."""
    for name, way in WAYS.items():
        runs = of_seeds(store, name)
        if not runs:
            continue
        tv = said(runs, "tv", 3) if "tv" in runs[0] else ""
        yield [
            GATES[way.panel].title, way.says, tv, said(runs, "binned", 3),
            f"{sum(r['training'] for r in runs) / len(runs) / 1e6:.1f}",
            f"{runs[0]['sampling']:.0f}", str(len(runs)),
        ]  # fmt: skip

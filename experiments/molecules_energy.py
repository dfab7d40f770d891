"""Energies of the published model: expected reward, FDC for the right CVaR, and TFFT."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import molecules_lab as lab
import molecules_texts as texts
import torch
from molecules_lab import Setting
from torch import Tensor
from toys import Record, Store

from tiltflow.algorithms import mirror_descent, tail_aware
from tiltflow.context import Context
from tiltflow.density import FlowDensity
from tiltflow.divergences import KL
from tiltflow.flow import FlowModel
from tiltflow.guidance import guided
from tiltflow.kernel import Ancestral
from tiltflow.metrics import right_cvar
from tiltflow.metrics.molecules import formation_energies
from tiltflow.molecules import Molecules
from tiltflow.problem import ControlProblem, Solution
from tiltflow.rewards import Standardised, XTBEnergy
from tiltflow.rewards.single_points import SinglePoints
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.training import Training
from tiltflow.utilities import RightCVaR

SMALL = Setting("cpu", steps=50, rollouts=8, trajectories=32, fresh=192, bank=128)
FULL = Setting("gpu", steps=100, rollouts=40, trajectories=128, fresh=10_000, bank=10_000)

ATOMS = 12
"""In every molecule: energies per atom of molecules of one size are compared, and a constant
number of atoms has one normaliser."""

LEVEL = 0.8
"""The tail is the best fifth."""

WEIGHT = 0.02
"""Of the KL for the tails, in standard deviations of the reward under the model per nat."""

LATE = 0.12
"""Part of the steps, nearest to the data, that are tuned: earlier the predicted molecule is none
that a quantum-chemical program could be asked about."""

ITERATIONS = 2
"""Of FDC."""

KCAL = 627.509
"""kcal/mol per Hartree."""

METHODS = ("expected reward", "FDC", "TFFT", "expected reward at the same KL")


@dataclass
class Task:
    """Model, reward and solver of one seed."""

    chosen: Setting
    seed: Seed

    @functools.cached_property
    def points(self) -> SinglePoints:
        return SinglePoints("GFN2-xTB")

    @functools.cached_property
    def plain(self) -> FlowModel:
        return lab.edm().with_atoms(ATOMS)

    @functools.cached_property
    def reward(self) -> Standardised:
        """Minus the formation energy per atom, in its standard deviations under the model."""
        energy = XTBEnergy(lab.edm().layout, per="formation_per_atom", points=self.points)
        return Standardised.under(energy, self.density(self.plain, Seed(0).child("bank")))

    @functools.cached_property
    def model(self) -> FlowModel:
        return guided(self.plain, self.reward, since=1 - LATE)

    @property
    def sampler(self) -> Sampler:
        return Sampler(Ancestral(), self.chosen.steps, batch_size=lab.BATCH)

    def density(self, model: FlowModel, seed: Seed) -> FlowDensity:
        return FlowDensity(model, sampler=self.sampler, num_samples=self.chosen.bank, seed=seed)

    def solver(self, share: float = 1.0) -> AdjointMatching:
        """``share`` of all roll-outs."""
        rollouts = max(1, round(share * self.chosen.rollouts))
        return AdjointMatching(
            sampler=self.sampler, num_trajectories=self.chosen.trajectories, late=LATE, early=0.0,
            use_values=False, num_evaluate=lab.BATCH if self.chosen.fresh > lab.BATCH else 4,
            training=Training(num_updates=20 * rollouts, learning_rate=1e-2, ema=0.9),
        )  # fmt: skip

    def context(self, name: str) -> Context:
        return Context(self.seed.child(name))


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """The model itself, then every method, seed by seed."""
    chosen = lab.setting(quick, SMALL, FULL)
    store.get(f"{chosen.name}/pre-trained/0", lambda: told(Task(chosen, Seed(0)), None))
    for seed in seeds:
        task = Task(chosen, Seed(seed).child("energy"))
        for name in METHODS:
            store.get(
                f"{chosen.name}/{name}/{seed}",
                lambda task=task, name=name, seed=seed: tuned(store, task, name, seed),
            )


def tuned(store: Store, task: Task, name: str, seed: int) -> Record:
    """One method, trained and measured."""
    if name == "expected reward at the same KL":
        pick = f"{task.chosen.name}/{{}}/{seed}"
        tails = [store.known[pick.format(n)]["result"]["path_kl"][0] for n in ("FDC", "TFFT")]
        mean = store.known[pick.format("expected reward")]["result"]["path_kl"][0]
        # The KL of a gentle tilt grows with the square of its rate.
        weight = WEIGHT * math.sqrt(mean / max(sum(tails) / len(tails), 1e-6))
        return told(task, expected(task, weight).model) | {"weight": weight}
    solve = {"expected reward": expected, "FDC": fdc, "TFFT": tfft}[name]
    return told(task, solve(task, WEIGHT).model) | {"weight": WEIGHT}


def expected(task: Task, weight: float) -> Solution[FlowModel]:
    problem = ControlProblem(task.model, (1 / weight) * task.reward)
    return task.solver().solve(problem, task.context("expected"))


def fdc(task: Task, weight: float) -> Solution[FlowModel]:
    """Mirror descent: the hinge at the current quantile, in anchored steps of equal rates."""
    prior = task.density(task.model, task.seed.child("prior"))
    objective = RightCVaR(task.reward, LEVEL) - weight * KL(prior)
    rates = [1 / (weight * ITERATIONS)] * ITERATIONS
    return mirror_descent(
        objective, task.model, task.solver(1 / ITERATIONS), rates,
        density=task.density, context=task.context("fdc"), prior=prior,
    )  # fmt: skip


def tfft(task: Task, weight: float) -> Solution[FlowModel]:
    """One training for the hinge at the best threshold of the bank."""
    return tail_aware(
        RightCVaR(task.reward, LEVEL), task.model, task.solver(), weight=weight,
        prior=task.density(task.model, task.seed.child("prior")), context=task.context("tfft"),
        bank_size=task.chosen.bank, anyway=True,
    )  # fmt: skip


def told(task: Task, model: FlowModel | None) -> Record:
    """What is told of molecules, with energies in kcal/mol per atom and in the units of the
    reward, failures left out and counted."""
    found, molecules = lab.measured(
        model or task.plain,
        task.plain,
        task.chosen.fresh,
        steps=task.chosen.steps,
        seed=Seed(1).child("energy"),
        conditions=None,
        points=task.points,
    )
    energies = formation(task, molecules)
    rewards = -energies[energies.isfinite()]
    tail = right_cvar(rewards, LEVEL)
    reward = task.reward
    found["mean"] = [
        KCAL * float(rewards.mean()),
        KCAL * float(rewards.std()) / len(rewards) ** 0.5,
    ]
    found["tail"] = [KCAL * tail.value, KCAL * tail.standard_error]
    found["spread"] = [KCAL * reward.std, 0.0]
    return found


def formation(task: Task, molecules: Molecules) -> Tensor:
    return formation_energies(molecules, task.points)


TOLD = {"mean": 2, "tail": 2, "xtb_failed": 3} | lab.TOLD

HEADER = (
    "| | mean (kcal/mol per atom) | best fifth | xTB failed | atoms stable | molecules stable "
    "| valid | valid and connected | unique of valid | Vendi | path KL (nats) |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def section(store: Store) -> str:
    """Tables of means over seeds, and differences at the same KL."""
    parts = lab.tables(store, ("pre-trained", *METHODS), TOLD, HEADER)
    names = dict.fromkeys(key.split("/")[0] for key in store.known)
    gains = [f"`{name}`: {line}" for name in names for line in compared(store, name)]
    return "\n".join([texts.ENERGY.strip(), "", *parts, "\n\n".join(gains)]) if parts else ""


def compared(store: Store, name: str) -> list[str]:
    """Differences of the tail at the same KL, seed by seed, with their error."""
    equal, lines = lab.by_seed(store, f"{name}/{METHODS[3]}/"), []
    for method in ("FDC", "TFFT"):
        found = lab.by_seed(store, f"{name}/{method}/")[: len(equal)]
        if not found:
            continue
        gains = torch.tensor(
            [a["tail"][0] - b["tail"][0] for a, b in zip(found, equal, strict=True)]
        )
        error = f" ± {float(gains.std()) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
        lines.append(
            f"Best fifth under {method} less that under expected reward at the same KL: "
            f"{float(gains.mean()):.2f}{error} kcal/mol per atom."
        )
    return lines

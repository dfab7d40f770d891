"""Validity of the published model: expected reward, and the left CVaR for reliability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import molecules_lab as lab
import molecules_texts as texts
from molecules_lab import Setting
from toys import Record, Store

from tiltflow.algorithms import tail_aware
from tiltflow.context import Context
from tiltflow.density import FlowDensity
from tiltflow.flow import FlowModel
from tiltflow.guidance import guided
from tiltflow.metrics import left_cvar
from tiltflow.problem import ControlProblem
from tiltflow.rewards import ValidityGap
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.training import Training
from tiltflow.types import Estimate
from tiltflow.utilities import LeftCVaR

SMALL = Setting("cpu", steps=100, rollouts=10, trajectories=32, fresh=256, bank=128)
FULL = Setting("gpu", steps=201, rollouts=40, trajectories=128, fresh=10_000, bank=10_000)

LATE = 0.2
"""Part of the steps, nearest to the data, that are tuned: validity is decided there, by
hundredths of an Angstrom; earlier steps say little of it."""

RATES = {"expected reward": 6000.0, "left CVaR": 550.0}
"""1 / weight of the KL, for a reward that is about -1 where one bond is clearly wrong."""

CLIP = 16.0
"""Adjoints are heavy-tailed where paths part; shorter targets than this stop short of the rate."""

REACH = 1.0
"""Angstrom: the scale of the reward along whose gradient is guided. It pulls at pieces that are
far apart, where that of the reward itself is flat."""

LEVEL = 0.5
"""The worse half."""


@dataclass
class Task:
    """The tuned models of one seed."""

    chosen: Setting
    seed: Seed

    @property
    def solver(self) -> AdjointMatching:
        return AdjointMatching(
            sampler=self.chosen.sampler, num_trajectories=self.chosen.trajectories,
            late=LATE, early=0.0, use_values=False, num_evaluate=2, clip=CLIP,
            training=Training(
                num_updates=20 * self.chosen.rollouts, learning_rate=2e-2, ema=0.9
            ),
        )  # fmt: skip

    def tuned(self, method: str) -> FlowModel:
        edm, reward = lab.edm(), ValidityGap(lab.edm().layout)
        along = (1 / reward.scale) * ValidityGap(edm.layout, scale=REACH, margin=0.03)
        model = guided(edm.model, along, since=1 - LATE)
        context = Context(self.seed.child(method))
        if method == "expected reward":
            problem = ControlProblem(model, RATES[method] * reward, edm.sizes)
            return self.solver.solve(problem, context).model
        prior = FlowDensity(
            model, sampler=self.chosen.sampler, num_samples=self.chosen.bank,
            seed=self.seed.child("prior"), conditions=edm.sizes,
        )  # fmt: skip
        return tail_aware(
            LeftCVaR(reward, LEVEL),
            model,
            self.solver,
            weight=1 / (RATES[method] * LEVEL),
            prior=prior,
            context=context,
            bank_size=self.chosen.bank,
            anyway=True,
            tail_samples=round(self.chosen.bank * LEVEL),
        ).model


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """The model itself with as many steps, then both utilities, seed by seed, on the noise of the
    seed."""
    chosen = lab.setting(quick, SMALL, FULL)
    for seed in seeds:
        task = Task(chosen, Seed(seed).child("validity"))
        store.get(f"{chosen.name}/pre-trained/{seed}", lambda task=task: told(task, None))
        for method in RATES:
            store.get(
                f"{chosen.name}/{method}/{seed}",
                lambda task=task, method=method: told(task, task.tuned(method)),
            )


def told(task: Task, model: FlowModel | None) -> Record:
    """What is told of molecules, and the reward: its mean and that of the worse half."""
    edm = lab.edm()
    found, molecules = lab.measured(
        model or edm.model, edm.model, task.chosen.fresh, steps=task.chosen.steps,
        seed=task.seed.child("fresh"), conditions=edm.sizes,
    )  # fmt: skip
    rewards = ValidityGap(edm.layout).value(*edm.layout.encode(molecules))
    mean, worse = Estimate.of(rewards), left_cvar(rewards, LEVEL)
    found["reward"] = [mean.value, mean.standard_error]
    found["worse_half"] = [worse.value, worse.standard_error]
    return found


TOLD = {"reward": 3, "worse_half": 3} | lab.TOLD

HEADER = lab.header("reward", "its worse half")


def section(store: Store) -> str:
    """A table of means over seeds for each setting, and the seeds."""
    parts = lab.tables(store, ("pre-trained", *RATES), TOLD, HEADER)
    rows = [
        lab.row(key, entry["result"], TOLD)
        for key, entry in store.known.items()
        if "pre-trained" not in key
    ]
    return "\n".join([texts.VALIDITY.strip(), "", *parts, HEADER, *rows]) if parts else ""

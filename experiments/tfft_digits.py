"""The digit flow of ``tfft.py``: its least readable images, and its rarest class."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from tfft_toys import counting, planning
from torch import Tensor, nn
from toys import Record, Store

from tiltflow.adapters.digits import (
    CLASSES,
    load_digit_classifier,
    load_digit_judge,
    load_digits_flow,
)
from tiltflow.algorithms import Planning, mirror_descent, plan_and_tune, tail_aware
from tiltflow.context import Context
from tiltflow.density import FlowDensity, Reweighted
from tiltflow.divergences import KL
from tiltflow.evaluation import matching_rate
from tiltflow.flow import FlowModel
from tiltflow.functional import Functional
from tiltflow.guidance import guided
from tiltflow.metrics import left_cvar, right_cvar
from tiltflow.potential import Potential, Reward, remembering
from tiltflow.problem import ControlProblem, Solution, Solver
from tiltflow.rewards import Readability
from tiltflow.sample import Sampler, calibrated, path_kl
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching, BankSolver, WeightedMatching
from tiltflow.training import Training
from tiltflow.types import Cond, Estimate
from tiltflow.utilities import LeftCVaR, RightCVaR

TEMPERATURE = 2.0
"""Of both rewards: at 1 they saturate, and a mean is nearly a tail mean (docs/digits.md)."""

UPDATES, STEPS = 400, 4
"""Of each method in all; trainings of Flow Density Control, which share them."""

BANK, FRESH, PATHS = 10_000, 6000, 2048

MATCHES = 3
"""Trainings that the mean may take to come as far as the tail's model; the last one counts."""


@final
@dataclass(frozen=True, eq=False)
class ClassLog(Reward):
    """log softmax(logits / TEMPERATURE) of one class, in nats.

    Args:
        net: (B, 64) -> logits (B, 10).
        label: of the class.
    """

    net: nn.Module
    label: int

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return torch.log_softmax(self.net(x) / TEMPERATURE, 1)[:, self.label]


@functools.cache
def shipped() -> FlowModel:
    """The pre-trained model."""
    return calibrated(load_digits_flow(), seed=Seed(0))


@functools.cache
def bank_points() -> Tensor:
    """Pre-trained samples that units and the rare class are read from."""
    return Sampler().sample(shipped(), BANK, seed=Seed(5))


@functools.cache
def rarest() -> int:
    """The class that the model draws least often."""
    drawn = torch.bincount(Readability().class_of(bank_points()), minlength=CLASSES)
    return int(drawn.argmin())


@dataclass(frozen=True)
class Task:
    """A tail of a reward of digits.

    Args:
        name: key in the store.
        deviations: weight of the KL in standard deviations of the reward.
        utility: the tail.
        guide: the reward whose gradient is the learned guidance's direction.
        judge: the same reward by a network that no training sees.
    """

    name: str
    deviations: float
    utility: LeftCVaR | RightCVaR
    guide: Potential
    judge: Potential

    @functools.cached_property
    def weight(self) -> float:
        """Of the KL, in units of the reward."""
        return self.deviations * float(self.utility.reward.value(bank_points()).double().std())

    def tail(self, values: Tensor) -> Estimate:
        """Of rewards, or of the judge's."""
        tail = left_cvar if isinstance(self.utility, LeftCVaR) else right_cvar
        return tail(values, self.utility.level)

    def model(self) -> FlowModel:
        """The shipped flow with a learned guidance to train."""
        return guided(shipped(), self.guide)

    def prior(self, seed: int) -> FlowDensity:
        """The pre-trained law by the training sampler; without the guidance, which is zero then
        but costs a gradient at every step."""
        return FlowDensity(shipped(), num_samples=BANK // 5, seed=Seed(12).child(seed))

    def objective(self, prior: Any) -> Functional:
        """What Flow Density Control maximises."""
        return self.utility - self.weight * KL(prior)


@functools.cache
def tasks() -> tuple[Task, ...]:
    """Both tails."""
    few = load_digit_classifier()
    few.members = nn.ModuleList(list(few.members)[:1])
    label, judge = rarest(), load_digit_judge()
    return (
        Task(
            "readable", 1.0, LeftCVaR(Readability(TEMPERATURE), 0.1),
            Readability(TEMPERATURE, members=1), Readability(TEMPERATURE, judge),
        ),
        Task(
            "rare", 0.5, RightCVaR(ClassLog(load_digit_classifier(), label), 0.9),
            ClassLog(few, label), ClassLog(judge, label),
        ),
    )  # fmt: skip


def adjoint(quick: bool, updates: int = UPDATES) -> AdjointMatching:
    """The settings of digits_reliability.toml."""
    number = 20 if quick else updates
    training = Training(num_updates=number, learning_rate=3e-3, ema=0.98)
    return AdjointMatching(training=training, use_values=False)


def weighted(quick: bool, updates: int = UPDATES) -> WeightedMatching:
    """The same training, on two banks."""
    training = adjoint(quick, updates).training
    return WeightedMatching(training=training, rounds=2, num_samples=512 if quick else 4096)


# --- methods -------------------------------------------------------------------------------------


def digits(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """Both tasks with all methods."""
    for seed in seeds:
        for task in tasks()[: 1 if quick else None]:
            store.get(
                f"pretrained/{task.name}/{seed}",
                lambda t=task, s=seed: looked(t, shipped(), None, s, quick),
            )
            tail = store.get(
                f"tail/{task.name}/{seed}",
                lambda t=task, s=seed: measured(t, s, quick, lambda m: tuned(t, m, s, quick)),
            )
            methods: dict[str, Callable[[FlowModel], Solution[FlowModel]]] = {
                "weighted": lambda m, t=task, s=seed: tuned(t, m, s, quick, weighted(quick)),
                "mean": lambda m, t=task, s=seed, k=tail["path_kl"]: matched(t, m, k, s, quick),
                "plan": lambda m, t=task, s=seed: by_plan(t, m, s, quick),
                "steps": lambda m, t=task, s=seed: stepped(store, t, m, s, quick),
            }
            for name, work in methods.items():
                store.get(
                    f"{name}/{task.name}/{seed}",
                    lambda t=task, s=seed, w=work: measured(t, s, quick, w),
                )


def tuned(
    task: Task, model: FlowModel, seed: int, quick: bool, solver: Solver[FlowModel] | None = None
) -> Solution[FlowModel]:
    """Tail-aware fine-tuning."""
    return tail_aware(
        task.utility, model, solver or adjoint(quick), weight=task.weight, prior=task.prior(seed),
        context=Context(Seed(seed)), bank_size=2000 if quick else BANK, anyway=quick,
    )  # fmt: skip


def matched(
    task: Task, model: FlowModel, distance: float, seed: int, quick: bool
) -> Solution[FlowModel]:
    """The mean reward, at the path KL of the tail's model."""
    reward, context = task.utility.reward, Context(Seed(seed))
    values = reward.value(task.prior(seed).at_least(BANK).bank.points)
    rate = matching_rate(values, distance)
    for attempt in range(1 if quick else MATCHES):
        problem = ControlProblem(model, rate * reward)
        solution = adjoint(quick).solve(problem, context.child("mean", attempt))
        missed = distance / max(solution.stats["path_kl"], 1e-9)
        if 0.93 < missed < 1.07:
            break
        if attempt + 1 < MATCHES:
            rate *= min(max(missed**0.8, 0.3), 3.0)
    return replace(solution, stats={**solution.stats, "rate": rate, "rounds": attempt + 1.0})


def by_plan(task: Task, model: FlowModel, seed: int, quick: bool) -> Solution[FlowModel]:
    """Flow Density Control on a bank, one training."""
    prior = task.prior(seed)
    settings = Planning(bank_size=500, max_iterations=2) if quick else Planning(bank_size=BANK)
    return plan_and_tune(
        task.objective(prior), model, adjoint(quick), prior=prior, context=Context(Seed(seed)),
        settings=settings,
    )  # fmt: skip


def stepped(
    store: Store, task: Task, model: FlowModel, seed: int, quick: bool
) -> Solution[FlowModel]:
    """Flow Density Control with a training per step, which share the updates."""
    prior = task.prior(seed)
    found = store.get(f"rate/{task.name}", lambda: rate_of(task))
    return mirror_descent(
        task.objective(prior), model, adjoint(quick, UPDATES // STEPS), [found["rate"]] * STEPS,
        prior=prior, context=Context(Seed(seed)),
        density=lambda m, where: FlowDensity(m, num_samples=BANK // 5, seed=where),
    )  # fmt: skip


def rate_of(task: Task) -> Record:
    """The constant rate after whose exact steps, on a bank, the objective is largest."""
    law = task.prior(99).at_least(BANK)
    start = Reweighted(law.bank, law.log)
    objective, found = task.objective(start), []
    with remembering(start.bank.points):
        for part in planning.PARTS:
            rate = part / task.weight
            end = mirror_descent(
                objective, start, BankSolver(), [rate] * STEPS, prior=start, context=Context(),
                density=lambda p, where: p,
            ).model  # fmt: skip
            found.append((objective.value(end).value, rate))
    worth, rate = max(found)
    return {"rate": rate, "part": rate * task.weight, "objective": worth}


# --- measures ------------------------------------------------------------------------------------


def measured(
    task: Task, seed: int, quick: bool, work: Callable[[FlowModel], Solution[FlowModel]]
) -> Record:
    """What a method makes of the model, and its cost."""
    model, counter = counting(task.model())
    begin = time.process_time()
    solution = work(model)
    found: Record = {"evaluations": counter[0], "cpu": time.process_time() - begin}
    keys = ("threshold", "active", "tail_mass", "plan_kl", "plan_objective", "rate", "rounds")
    found |= {k: solution.stats[k] for k in keys if k in solution.stats}
    found["outcome"] = solution.result.name
    return found | looked(task, solution.model, task.model(), seed, quick)


def looked(
    task: Task, model: FlowModel, reference: FlowModel | None, seed: int, quick: bool
) -> Record:
    """Tails and means by the reward and by the judge, class shares, path KL; equal noise."""
    count = 1000 if quick else FRESH
    x = Sampler().sample(model, count, seed=Seed(seed).child("fresh"))
    classes = Readability().class_of(x)
    found: Record = {
        "weight": task.weight, "label": rarest(),
        "shares": (torch.bincount(classes, minlength=CLASSES) / count).tolist(),
        "judged_shares": (
            torch.bincount(Readability(1.0, load_digit_judge()).class_of(x), minlength=CLASSES)
            / count
        ).tolist(),
    }  # fmt: skip
    for name, reward in (("reward", task.utility.reward), ("judge", task.judge)):
        values = reward.value(x)
        for key, each in (("tail", task.tail(values)), ("mean", Estimate.of(values))):
            found |= {f"{name}_{key}": each.value, f"{name}_{key}_error": each.standard_error}
    far = Estimate(0.0, 0.0, 0)
    if reference is not None:
        far = path_kl(
            model, reference, sampler=Sampler(), count=512 if quick else PATHS,
            seed=Seed(seed).child("paths"),
        )  # fmt: skip
    return found | {"path_kl": far.value, "path_kl_error": far.standard_error}

"""Gaussians on the line of ``rfm.py``: lowerings of gates against closed forms."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt

import rfm_texts as texts
import torch
from tfft_tables import said
from torch import Tensor
from toys import Record, Store, of_seeds, table

from tiltflow.algorithms import averaged, merge
from tiltflow.algorithms.lowerings import LOWERINGS, Merging
from tiltflow.analytic import gaussian
from tiltflow.context import Context
from tiltflow.density import Quadrature
from tiltflow.flow import FlowModel
from tiltflow.kernel import EulerMaruyama, Heun
from tiltflow.operators import Gate, Interpolation, Intersection, Prior, Union
from tiltflow.potential import Differentiable, Potential
from tiltflow.ratio import Likelihood
from tiltflow.rewards.points import Quadratic
from tiltflow.sample import Sampler, calibrated
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching

Moments = tuple[float, float]
"""Mean and standard deviation."""

NORMALS: tuple[Moments, Moments] = ((0.0, 1.0), (0.0, 0.5))
APART: tuple[Moments, Moments] = ((-1.0, 0.8), (1.5, 0.5))
SIDES: tuple[Moments, Moments] = ((-2.0, 0.6), (2.0, 0.6))

FRESH, STEPS, LATE = 20_000, 200, 0.995
"""Samples, fine steps of either sampler, and the time shortly before the end that is looked at."""

SAMPLERS = {
    "sde": Sampler(EulerMaruyama(), STEPS),
    "ode": Sampler(Heun(), STEPS),
    "own": Sampler(),
}
"""Fine ones, and the one of the training."""


@dataclass(frozen=True)
class Case:
    """An intersection of two Gaussians, which is a Gaussian.

    Args:
        name: key in the store.
        title: for pages.
        parts: mean and standard deviation of each.
        weights: of the gate, with A = 1.
        curvature: c of the reward -c x^2 / 2.
        all: whether all lowerings are compared, not only the default.
    """

    name: str
    title: str
    parts: tuple[Moments, Moments]
    weights: tuple[float, float]
    curvature: float = 0.0
    all: bool = False

    @property
    def gate(self) -> Gate:
        """The intersection."""
        reward = Quadratic(0.0, self.curvature) if self.curvature else None
        return Intersection(Prior("a"), Prior("b"), weights=self.weights, reward=reward)

    @property
    def exact(self) -> Moments:
        """Precisions add; the mean is weighted by them."""
        precisions = [w / std**2 for w, (_, std) in zip(self.weights, self.parts, strict=True)]
        total = sum(precisions) + self.curvature
        weighted = sum(p * mean for p, (mean, _) in zip(precisions, self.parts, strict=True))
        return weighted / total, total**-0.5

    @property
    def late(self) -> float:
        """Variance of the exact law, noised to the late time."""
        return LATE**2 * self.exact[1] ** 2 + (1 - LATE) ** 2


CASES = (
    Case("half", "N(0, 1) & N(0, 1/4)", NORMALS, (0.5, 0.5), all=True),
    Case("shares", "0.3 N(0, 1) & 0.7 N(0, 1/4)", NORMALS, (0.3, 0.7)),
    Case("reward", "N(0, 1) & N(0, 1/4), f/A = -x²/2", NORMALS, (0.5, 0.5), 1.0),
    Case("apart", "0.3 N(-1, 0.64) & 0.7 N(1.5, 0.25)", APART, (0.3, 0.7)),
)

FIRST = next(iter(LOWERINGS[Intersection]))

BOUNDED: Potential = Differentiable(lambda x: x[:, 0].tanh())
UNIONS: dict[str, Gate] = {
    "union": Union(Prior("a"), Prior("b"), weights=(0.5, 0.5)),
    "union-reward": Union(Prior("a"), Prior("b"), weights=(0.5, 0.5), reward=BOUNDED),
}
LINE = Interpolation(Prior("a"), Prior("b"), weights=(0.3, 0.7))
BETWEEN: Moments = (0.3 * -1.0 + 0.7 * 1.5, 0.3 * 0.8 + 0.7 * 0.5)


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """All cases."""
    for seed in seeds:
        for case in CASES:
            for name in methods(case):
                store.get(
                    f"{name}/{case.name}/{seed}",
                    lambda c=case, n=name, s=seed: intersected(c, n, s, quick),
                )
        for name in UNIONS:
            store.get(f"{name}/{seed}", lambda n=name, s=seed: united(n, s, quick))
        store.get(f"between/{seed}", lambda s=seed: between(s, quick))


def methods(case: Case) -> tuple[str, ...]:
    """What is compared; an average of velocities leaves a reward out."""
    first = () if case.curvature else ("averaging",)
    return (*first, *(LOWERINGS[Intersection] if case.all else (FIRST,)))


def models(parts: Sequence[Moments]) -> dict[str, FlowModel]:
    """Exact flows with corrections to train, calibrated: 40 steps of Euler's method would move
    the mean of N(-2, 0.36) by 0.05."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            name: calibrated(gaussian([mean], std).flow(), seed=Seed(62).child(name))
            for name, (mean, std) in zip("ab", parts, strict=True)
        }


def settings(quick: bool) -> Merging:
    """The defaults, but 1000 updates of a control problem."""
    given, solver = Merging(), AdjointMatching()
    training = replace(solver.training, num_updates=20 if quick else 1000)
    given = replace(given, solver=replace(solver, training=training))
    if not quick:
        return given
    fitting = replace(given.training, num_updates=20)
    return replace(given, training=fitting, bank_size=500, chunk=250, likelihood_steps=4)


def made(gate: Gate, parts: Sequence[Moments], name: str, seed: int, quick: bool) -> FlowModel:
    """A gate by a lowering."""
    chosen = {Intersection: name} if isinstance(gate, Intersection) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return merge(
            gate, models(parts), context=Context(Seed(seed)), settings=settings(quick),
            lowerings=chosen,
        ).model  # fmt: skip


def intersected(case: Case, name: str, seed: int, quick: bool) -> Record:
    """Moments by each sampler, at the end and shortly before."""
    if name == "averaging":
        model = averaged(list(models(case.parts).values()), case.gate.shares)
    else:
        model = made(case.gate, case.parts, name, seed, quick)
    return moments(model, seed, quick)


def moments(model: FlowModel, seed: int, quick: bool) -> Record:
    """Mean, standard deviation and variance by each sampler."""
    found: Record = {}
    for k, (name, sampler) in enumerate(SAMPLERS.items()):
        path = sampler.simulate(model, 200 if quick else FRESH, seed=Seed(61).child(seed, k))
        x = path.states[-1][:, 0].double()
        found |= {f"mean_{name}": float(x.mean()), f"std_{name}": float(x.std())}
        found |= {f"variance_{name}": float(x.var())}
        if abs(float(path.times[-2]) - LATE) < 1e-9:
            found[f"late_{name}"] = float(path.states[-2].double().var())
    return found


def united(name: str, seed: int, quick: bool) -> Record:
    """Total variation of the density of the model's ODE to the exact one."""
    axis = [torch.linspace(-6, 6, 101 if quick else 601, dtype=torch.float64)]
    exact = UNIONS[name].exact([Quadrature.of(axis, gaussian([m], s).log) for m, s in SIDES])
    law = law_of(made(UNIONS[name], SIDES, "", seed, quick), axis, quick)
    plain = UNIONS["union"].exact([Quadrature.of(axis, gaussian([m], s).log) for m, s in SIDES])
    right = float(law.probabilities[axis[0] > 0].sum())
    return {
        "tv": law.total_variation(exact), "right": right, "plain": plain.total_variation(exact),
        "exact": float(exact.probabilities[axis[0] > 0].sum()),
    }  # fmt: skip


def law_of(model: FlowModel, axis: list[Tensor], quick: bool) -> Quadrature:
    """The density of a model's ODE."""
    log = Likelihood(model, 5 if quick else 40)
    return Quadrature.of(axis, lambda x: log.value(x.float()).double())


def between(seed: int, quick: bool) -> Record:
    """Moments of a Wasserstein barycentre."""
    return moments(made(LINE, APART, "", seed, quick), seed, quick)


# --- the section ---------------------------------------------------------------------------------


def section(store: Store) -> str:
    """Moments against closed forms, and densities against exact ones."""
    if not of_seeds(store, f"averaging/{CASES[0].name}"):
        return ""
    lines = ["## Gaussians on the line", "", *texts.GAUSSIANS.strip().splitlines(), ""]
    lines += [*_first(store), *_others(store), *_unions(store)]
    return "\n".join(lines)


def _first(store: Store) -> list[str]:
    case, rows = CASES[0], list[list[str]]()
    for name in methods(case):
        runs = of_seeds(store, f"{name}/{case.name}")
        if runs:
            keys = ("late_sde", "late_ode", "variance_sde", "variance_ode", "variance_own")
            rows.append([f"`{name}`", *(said(runs, key, 4) for key in keys), str(len(runs))])
    known = averages(case.gate.shares, case.parts)
    keys = ("late_sde", "late_ode", "variance_sde", "variance_ode")
    rows.append(["averaging, in continuous time", *(f"{known[k]:.4f}" for k in keys), "", ""])
    end = f"{case.exact[1] ** 2:.4f}"
    rows.append(["exact", f"{case.late:.4f}", f"{case.late:.4f}", end, end, end, ""])
    head = [f"variance of {case.title}", f"SDE, t = {LATE:g}", f"ODE, t = {LATE:g}", "SDE, t = 1",
            "ODE, t = 1", "SDE, 40 steps", "seeds"]  # fmt: skip
    noise = sqrt(2 / FRESH) * case.exact[1] ** 2
    said_of = f"A variance of {FRESH} samples near {end} has a standard error of {noise:.4f}."
    return [*table(head, rows), said_of, ""]


def averages(shares: Sequence[float], parts: Sequence[Moments], nodes: int = 40_001) -> Record:
    """Variances under averaged velocities of centred Gaussians, in continuous time: of the SDE,
    dV/dt = (4 a - 2/t) V + 2 (1 - t) / t from V = 1 with a = sum_i w_i V_i' / (2 V_i), and of the
    ODE, prod_i V_i^{w_i}; at the late time and at the end."""
    grid, found, v = torch.linspace(0.0, 1.0, nodes, dtype=torch.float64), Record(), 1.0
    step = float(grid[1])
    late = round(LATE * (nodes - 1))
    for k, t in enumerate(grid[1:].tolist(), start=1):
        middle = t - step / 2
        noised = [(middle * std) ** 2 + (1 - middle) ** 2 for _, std in parts]
        slopes = [2 * middle * std**2 - 2 * (1 - middle) for _, std in parts]
        a = sum(w * d / (2 * n) for w, d, n in zip(shares, slopes, noised, strict=True))
        # Implicit, because the coefficients are infinite at t = 0.
        v = (v + step * 2 * (1 - middle) / middle) / (1 - step * (4 * a - 2 / middle))
        if k in (late, nodes - 1):
            name = "late" if k == late else "variance"
            ends = [(t * std) ** 2 + (1 - t) ** 2 for _, std in parts]
            ode = prod(n**w for w, n in zip(shares, ends, strict=True))
            found |= {f"{name}_sde": v, f"{name}_ode": ode}
    return found


def _others(store: Store) -> list[str]:
    rows = list[list[str]]()
    for case in CASES[1:]:
        for name in methods(case):
            if runs := of_seeds(store, f"{name}/{case.name}"):
                rows.append([case.title, f"`{name}`", *_moments(runs), str(len(runs))])
        mean, std = case.exact
        rows.append([case.title, "exact", *_exactly(mean, std), ""])
    if runs := of_seeds(store, "between"):
        title = "interpolation, 0.3 N(-1, 0.64), 0.7 N(1.5, 0.25)"
        rows.append([title, "`transported`", *_moments(runs), str(len(runs))])
        rows.append([title, "exact", *_exactly(*BETWEEN), ""])
    head = ["", "", "mean, SDE", "mean, ODE", "std, SDE", "std, ODE", "variance, SDE",
            "variance, ODE", "seeds"]  # fmt: skip
    return table(head, rows)


def _moments(runs: Sequence[Record]) -> list[str]:
    return [said(runs, f"{key}_{way}", 4) for key in ("mean", "std", "variance")
            for way in ("sde", "ode")]  # fmt: skip


def _exactly(mean: float, std: float) -> list[str]:
    return [f"{value:.4f}" for value in (mean, std, std**2) for _ in range(2)]


def _unions(store: Store) -> list[str]:
    rows = list[list[str]]()
    for name, title in (("union", "union"), ("union-reward", "union with reward tanh(x), A = 1")):
        if runs := of_seeds(store, name):
            known = runs[0]
            rows.append([
                title, said(runs, "tv", 4), f"{known['plain']:.4f}", said(runs, "right", 4),
                f"{known['exact']:.4f}", str(len(runs)),
            ])  # fmt: skip
    head = ["N(-2, 0.36) and N(2, 0.36)", "TV to the optimum", "TV of the mixture to it",
            "mass of x > 0", "exact", "seeds"]  # fmt: skip
    return table(head, rows) if rows else []

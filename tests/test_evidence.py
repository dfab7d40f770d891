"""Evidence of gates against closed forms: two Gaussians, and exact merged models."""

from __future__ import annotations

import math

import pytest
import torch

from tiltflow.algorithms import gate_evidence
from tiltflow.algorithms.evidence import Evidence
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.density import Mixture, Quadrature
from tiltflow.divergences import ForwardKL
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel
from tiltflow.kernel import EulerMaruyama, Heun
from tiltflow.operators import Contrast, Gate, Interpolation, Intersection, Prior, Union
from tiltflow.potential import Differentiable
from tiltflow.sample import Sampler
from tiltflow.schedule import Cosine
from tiltflow.seed import Seed
from tiltflow.types import Estimate

A, B = Prior("a"), Prior("b")
NARROW = gaussian([0.0], 0.5)
WIDE = gaussian([0.0], 1.0)
LINE = torch.linspace(-8, 8, 4001, dtype=torch.float64)


def evidence(gate: Gate, law: GaussianMixture, count: int = 2500) -> Evidence:
    parts = [WIDE.flow(hidden=(8,)), NARROW.flow(hidden=(8,))]
    return gate_evidence(
        gate, law.flow(hidden=(8,)), parts,
        sampler=Sampler(EulerMaruyama(), 80), count=count, seed=Seed(3),
    )  # fmt: skip


def kl(variance: float, other: float) -> float:
    """Of centred normals."""
    return 0.5 * (variance / other - 1 - math.log(variance / other))


def near(found: Estimate, exact: float, slack: float) -> None:
    """Within 4.5 standard errors and what steps of finite size cost."""
    assert abs(found.value - exact) < 4.5 * found.standard_error + slack


def objective(gate: Gate, law: GaussianMixture) -> float:
    """By quadrature."""
    grids = [Quadrature([LINE], each.log.value(LINE[:, None])) for each in (WIDE, NARROW, law)]
    value = gate.objective(grids[:2]).value(grids[2]).value
    if isinstance(gate, Union):
        # whose objective has the mixture: it lacks what does not depend on p
        mixture = Mixture(grids[:2], gate.shares)
        value -= sum(
            w * ForwardKL(p).value(mixture).value
            for w, p in zip(gate.weights, grids[:2], strict=True)
        )
    return value


REWARD = Differentiable(lambda x: 0.3 * x[:, 0].cos())


@pytest.mark.parametrize("reward", [None, REWARD])
@pytest.mark.parametrize("kind", [Intersection, Union, Interpolation, Contrast])
def test_objective_and_distances(kind: type[Gate], reward: Differentiable | None) -> None:
    law = gaussian([0.0], math.sqrt(0.4))
    gate = kind(A, B, weights=(1.0, 2.0), reward=reward)
    found = evidence(gate, law, 1000 if kind is Interpolation else 2500)
    near(found.objective, objective(gate, law), 0.02)
    for i, variance in enumerate((1.0, 0.25)):
        near(found.kl_to_parts[i], kl(0.4, variance), 0.01)
        near(found.kl_from_parts[i], kl(variance, 0.4), 0.02)
    assert (found.reward is None) == (reward is None)
    if found.reward is not None:
        near(found.reward, 0.3 * math.exp(-0.2), 0.002)
    assert len(found.part_samples) == 2
    assert float(found.part_samples[1].std()) == pytest.approx(0.5, abs=0.05)


def test_the_optimum_has_the_highest_objective() -> None:
    """Signs: variance 0.4 beats both parts at an intersection, the mixture at a union."""
    laws = [gaussian([0.0], math.sqrt(v)) for v in (0.4, 1.0, 0.25)]
    both = [evidence(A & B, law, 1000).objective.value for law in laws]
    assert both[0] > max(both[1:])
    assert both[0] == pytest.approx(math.log(0.8), abs=0.02)  # 2 log int sqrt(p_1 p_2)
    mixture = GaussianMixture([[0.0], [0.0]], torch.tensor([1.0, 0.5]))
    either = [evidence(A | B, law, 1000).objective.value for law in (mixture, WIDE, NARROW)]
    assert either[0] > max(either[1:])


def test_other_schedules_and_refusals() -> None:
    parts: list[FlowModel] = [WIDE.flow(hidden=(8,)), NARROW.flow(Cosine(), hidden=(8,))]
    model = gaussian([0.0], math.sqrt(0.4)).flow(hidden=(8,))
    options = {"count": 2000, "seed": Seed(0)}
    found = gate_evidence(A & B, model, parts, sampler=Sampler(EulerMaruyama(), 80), **options)  # type: ignore[arg-type]
    near(found.kl_to_parts[1], kl(0.4, 0.25), 0.01)
    with pytest.raises(ConfigError, match="2 parts, not 1"):
        gate_evidence(A & B, model, parts[:1], sampler=Sampler(), **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="memoryless"):
        gate_evidence(A & B, model, parts, sampler=Sampler(Heun()), **options)  # type: ignore[arg-type]

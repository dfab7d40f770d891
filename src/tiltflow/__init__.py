"""tiltflow: adapt pre-trained flow and diffusion models at the level of their density.

The public API, re-exported lazily (PEP 562): ``import tiltflow`` costs nothing, and ``tiltflow
--help`` does not wait for torch. Rewards other than ``Readability`` live in ``tiltflow.rewards``
(one of them is called ``Linear``, like the schedule), metrics in ``tiltflow.metrics``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiltflow.algorithms import Fixed, Iterate, PathKLBound, RateRule, mirror_descent
    from tiltflow.analytic import GaussianMixture, gaussian, ring
    from tiltflow.context import Backend, Context, SingleProcess, Snapshot, Step
    from tiltflow.delta import MLP, Correction, Delta, Full
    from tiltflow.density import Bank, Density, Empirical, FlowDensity, Mixture, Quadrature
    from tiltflow.divergences import KL
    from tiltflow.errors import (
        CapabilityError,
        CheckpointError,
        ConfigError,
        NonFiniteError,
        ShapeError,
        TiltflowError,
        UnsupportedError,
    )
    from tiltflow.flow import ControlledProcess, FlowModel, Prediction, Process
    from tiltflow.functional import Functional
    from tiltflow.kernel import (
        Ancestral,
        Deterministic,
        EulerMaruyama,
        Heun,
        Kernel,
        LinearKernel,
        MomentMatched,
        Regridded,
        Transition,
    )
    from tiltflow.matching import distil, fit_flow
    from tiltflow.potential import (
        BlackBox,
        Decoded,
        Differentiable,
        Hinge,
        Potential,
        Rate,
        Reward,
        StepReward,
    )
    from tiltflow.problem import (
        ControlProblem,
        PathProblem,
        PathSolver,
        Result,
        Solution,
        Solver,
    )
    from tiltflow.rewards import Readability
    from tiltflow.sample import Sampler, Trajectory, adapted, calibrated, path_kl
    from tiltflow.schedule import Cosine, Linear, Schedule, Tabulated, VariancePreserving
    from tiltflow.seed import Seed
    from tiltflow.solvers import AdjointMatching, GaussianSolver, GridSolver
    from tiltflow.space import Euclidean, Masked, Space, ZeroMean
    from tiltflow.training import Training
    from tiltflow.types import Access, Cond, Conditions, Estimate
    from tiltflow.utilities import (
        EntropicRisk,
        Entropy,
        ExpectedReward,
        LeftCVaR,
        MeanVariance,
        RightCVaR,
    )

__version__ = "0.1.0"

_HOMES = {
    "algorithms": "Fixed Iterate PathKLBound RateRule mirror_descent",
    "analytic": "GaussianMixture gaussian ring",
    "context": "Backend Context SingleProcess Snapshot Step",
    "delta": "Correction Delta Full MLP",
    "density": "Bank Density Empirical FlowDensity Mixture Quadrature",
    "divergences": "KL",
    "errors": "CapabilityError CheckpointError ConfigError NonFiniteError ShapeError "
    "TiltflowError UnsupportedError",
    "flow": "ControlledProcess FlowModel Prediction Process",
    "functional": "Functional",
    "kernel": "Ancestral Deterministic EulerMaruyama Heun Kernel LinearKernel MomentMatched "
    "Regridded Transition",
    "matching": "distil fit_flow",
    "potential": "BlackBox Decoded Differentiable Hinge Potential Rate Reward StepReward",
    "problem": "ControlProblem PathProblem PathSolver Result Solution Solver",
    "rewards": "Readability",
    "sample": "Sampler Trajectory adapted calibrated path_kl",
    "schedule": "Cosine Linear Schedule Tabulated VariancePreserving",
    "seed": "Seed",
    "solvers": "AdjointMatching GaussianSolver GridSolver",
    "space": "Euclidean Masked Space ZeroMean",
    "training": "Training",
    "types": "Access Cond Conditions Estimate",
    "utilities": "EntropicRisk Entropy ExpectedReward LeftCVaR MeanVariance RightCVaR",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'tiltflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tiltflow.{_HOME[name]}"), name)
    globals()[name] = value  # so that this function is asked once per name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "KL",
    "MLP",
    "Access",
    "AdjointMatching",
    "Ancestral",
    "Backend",
    "Bank",
    "BlackBox",
    "CapabilityError",
    "CheckpointError",
    "Cond",
    "Conditions",
    "ConfigError",
    "Context",
    "ControlProblem",
    "ControlledProcess",
    "Correction",
    "Cosine",
    "Decoded",
    "Delta",
    "Density",
    "Deterministic",
    "Differentiable",
    "Empirical",
    "EntropicRisk",
    "Entropy",
    "Estimate",
    "Euclidean",
    "EulerMaruyama",
    "ExpectedReward",
    "Fixed",
    "FlowDensity",
    "FlowModel",
    "Full",
    "Functional",
    "GaussianMixture",
    "GaussianSolver",
    "GridSolver",
    "Heun",
    "Hinge",
    "Iterate",
    "Kernel",
    "LeftCVaR",
    "Linear",
    "LinearKernel",
    "Masked",
    "MeanVariance",
    "Mixture",
    "MomentMatched",
    "NonFiniteError",
    "PathKLBound",
    "PathProblem",
    "PathSolver",
    "Potential",
    "Prediction",
    "Process",
    "Quadrature",
    "Rate",
    "RateRule",
    "Readability",
    "Regridded",
    "Result",
    "Reward",
    "RightCVaR",
    "Sampler",
    "Schedule",
    "Seed",
    "ShapeError",
    "SingleProcess",
    "Snapshot",
    "Solution",
    "Solver",
    "Space",
    "Step",
    "StepReward",
    "Tabulated",
    "TiltflowError",
    "Training",
    "Trajectory",
    "Transition",
    "UnsupportedError",
    "VariancePreserving",
    "ZeroMean",
    "adapted",
    "calibrated",
    "distil",
    "fit_flow",
    "gaussian",
    "mirror_descent",
    "path_kl",
    "ring",
]

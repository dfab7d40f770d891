"""tiltflow: adapt pre-trained flow and diffusion models at the level of their density.

The public API, re-exported lazily (PEP 562): ``import tiltflow`` costs nothing, and ``tiltflow
--help`` does not wait for torch. Rewards other than ``Readability`` live in ``tiltflow.rewards``
(one of them is called ``Linear``, like the schedule), metrics in ``tiltflow.metrics``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiltflow.algorithms import (
        Attempt,
        Averaging,
        Descent,
        Evidence,
        FeynmanKac,
        Fixed,
        Iterate,
        Keeper,
        LineSearch,
        Lowered,
        Merged,
        Merging,
        PathKLBound,
        Planned,
        Planning,
        RateRule,
        Superposition,
        TrainingFree,
        averaged,
        discover_modes,
        gate_evidence,
        merge,
        mirror_descent,
        optimal_thresholds,
        plan,
        plan_and_tune,
        tail_aware,
    )
    from tiltflow.analytic import GaussianMixture, gaussian, ring
    from tiltflow.context import Backend, Context, SingleProcess, Snapshot, Step
    from tiltflow.delta import MLP, Correction, Delta, Full
    from tiltflow.density import (
        Bank,
        Density,
        Empirical,
        FlowDensity,
        Mixture,
        Quadrature,
        Reweighted,
    )
    from tiltflow.divergences import (
        KL,
        MMD,
        ChiSquare,
        EnergyDistance,
        ForwardKL,
        Hellinger,
        JensenShannon,
        Renyi,
        Wasserstein,
    )
    from tiltflow.errors import (
        CapabilityError,
        CheckpointError,
        ConfigError,
        NonFiniteError,
        ShapeError,
        TiltflowError,
        UnsupportedError,
    )
    from tiltflow.features import Coordinates, FeatureMap, Features, Monomials
    from tiltflow.flow import ControlledProcess, FlowModel, Prediction, Process
    from tiltflow.functional import Exponential, Functional, Hinges, Quadratic, Shape, SoftHinge
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
    from tiltflow.lora import LoRA, with_lora
    from tiltflow.matching import distil, fit_flow
    from tiltflow.operators import (
        Circuit,
        Contrast,
        Gate,
        Interpolation,
        Intersection,
        Prior,
        Union,
        circuit,
        drawn,
    )
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
    from tiltflow.ratio import (
        ExactRatio,
        Likelihood,
        LogisticRatio,
        PathRatio,
        RatioEstimator,
        WassersteinCritic,
        path_log_density,
    )
    from tiltflow.rewards import Readability
    from tiltflow.sample import Sampler, Trajectory, adapted, calibrated, path_kl
    from tiltflow.schedule import Cosine, Linear, Schedule, Tabulated, VariancePreserving
    from tiltflow.seed import Seed
    from tiltflow.similarity import (
        CosineSimilarity,
        GaussianSimilarity,
        InverseMultiquadric,
        LaplaceSimilarity,
        NegativeDistance,
        Similarity,
    )
    from tiltflow.solvers import (
        AdjointMatching,
        BankSolver,
        DirectBackprop,
        GaussianSolver,
        GridSolver,
        WeightedMatching,
    )
    from tiltflow.space import Euclidean, Masked, Space, ZeroMean
    from tiltflow.training import Training
    from tiltflow.types import Access, Cond, Conditions, Estimate
    from tiltflow.utilities import (
        CertaintyEquivalent,
        EntropicRisk,
        Entropy,
        ExpectedReward,
        KernelDiversity,
        LeftCVaR,
        LogBarrier,
        MeanVariance,
        MomentMatching,
        MutualInformation,
        OptimalDesign,
        RightCVaR,
        SpectralRisk,
    )
    from tiltflow.views import conditioned, rescheduled

__version__ = "0.1.0"

_HOMES = {
    "algorithms": "Attempt Averaging Descent Evidence FeynmanKac Fixed Iterate Keeper LineSearch "
    "Lowered Merged Merging PathKLBound Planned Planning RateRule Superposition TrainingFree "
    "averaged discover_modes gate_evidence merge mirror_descent optimal_thresholds plan "
    "plan_and_tune tail_aware",
    "analytic": "GaussianMixture gaussian ring",
    "context": "Backend Context SingleProcess Snapshot Step",
    "delta": "Correction Delta Full MLP",
    "density": "Bank Density Empirical FlowDensity Mixture Quadrature Reweighted",
    "divergences": "KL MMD ChiSquare EnergyDistance ForwardKL Hellinger JensenShannon Renyi "
    "Wasserstein",
    "errors": "CapabilityError CheckpointError ConfigError NonFiniteError ShapeError "
    "TiltflowError UnsupportedError",
    "features": "Coordinates FeatureMap Features Monomials",
    "flow": "ControlledProcess FlowModel Prediction Process",
    "functional": "Exponential Functional Hinges Quadratic Shape SoftHinge",
    "kernel": "Ancestral Deterministic EulerMaruyama Heun Kernel LinearKernel MomentMatched "
    "Regridded Transition",
    "lora": "LoRA with_lora",
    "matching": "distil fit_flow",
    "operators": "Circuit Contrast Gate Interpolation Intersection Prior Union circuit drawn",
    "potential": "BlackBox Decoded Differentiable Hinge Potential Rate Reward StepReward",
    "problem": "ControlProblem PathProblem PathSolver Result Solution Solver",
    "ratio": "ExactRatio Likelihood LogisticRatio PathRatio RatioEstimator WassersteinCritic "
    "path_log_density",
    "rewards": "Readability",
    "sample": "Sampler Trajectory adapted calibrated path_kl",
    "schedule": "Cosine Linear Schedule Tabulated VariancePreserving",
    "seed": "Seed",
    "similarity": "CosineSimilarity GaussianSimilarity InverseMultiquadric LaplaceSimilarity "
    "NegativeDistance Similarity",
    "solvers": "AdjointMatching BankSolver DirectBackprop GaussianSolver GridSolver "
    "WeightedMatching",
    "space": "Euclidean Masked Space ZeroMean",
    "training": "Training",
    "types": "Access Cond Conditions Estimate",
    "utilities": "CertaintyEquivalent EntropicRisk Entropy ExpectedReward KernelDiversity "
    "LeftCVaR LogBarrier MeanVariance MomentMatching MutualInformation OptimalDesign RightCVaR "
    "SpectralRisk",
    "views": "conditioned rescheduled",
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
    "MMD",
    "Access",
    "AdjointMatching",
    "Ancestral",
    "Attempt",
    "Averaging",
    "Backend",
    "Bank",
    "BankSolver",
    "BlackBox",
    "CapabilityError",
    "CertaintyEquivalent",
    "CheckpointError",
    "ChiSquare",
    "Circuit",
    "Cond",
    "Conditions",
    "ConfigError",
    "Context",
    "Contrast",
    "ControlProblem",
    "ControlledProcess",
    "Coordinates",
    "Correction",
    "Cosine",
    "CosineSimilarity",
    "Decoded",
    "Delta",
    "Density",
    "Descent",
    "Deterministic",
    "Differentiable",
    "DirectBackprop",
    "Empirical",
    "EnergyDistance",
    "EntropicRisk",
    "Entropy",
    "Estimate",
    "Euclidean",
    "EulerMaruyama",
    "Evidence",
    "ExactRatio",
    "ExpectedReward",
    "Exponential",
    "FeatureMap",
    "Features",
    "FeynmanKac",
    "Fixed",
    "FlowDensity",
    "FlowModel",
    "ForwardKL",
    "Full",
    "Functional",
    "Gate",
    "GaussianMixture",
    "GaussianSimilarity",
    "GaussianSolver",
    "GridSolver",
    "Hellinger",
    "Heun",
    "Hinge",
    "Hinges",
    "Interpolation",
    "Intersection",
    "InverseMultiquadric",
    "Iterate",
    "JensenShannon",
    "Keeper",
    "Kernel",
    "KernelDiversity",
    "LaplaceSimilarity",
    "LeftCVaR",
    "Likelihood",
    "LineSearch",
    "Linear",
    "LinearKernel",
    "LoRA",
    "LogBarrier",
    "LogisticRatio",
    "Lowered",
    "Masked",
    "MeanVariance",
    "Merged",
    "Merging",
    "Mixture",
    "MomentMatched",
    "MomentMatching",
    "Monomials",
    "MutualInformation",
    "NegativeDistance",
    "NonFiniteError",
    "OptimalDesign",
    "PathKLBound",
    "PathProblem",
    "PathRatio",
    "PathSolver",
    "Planned",
    "Planning",
    "Potential",
    "Prediction",
    "Prior",
    "Process",
    "Quadratic",
    "Quadrature",
    "Rate",
    "RateRule",
    "RatioEstimator",
    "Readability",
    "Regridded",
    "Renyi",
    "Result",
    "Reward",
    "Reweighted",
    "RightCVaR",
    "Sampler",
    "Schedule",
    "Seed",
    "Shape",
    "ShapeError",
    "Similarity",
    "SingleProcess",
    "Snapshot",
    "SoftHinge",
    "Solution",
    "Solver",
    "Space",
    "SpectralRisk",
    "Step",
    "StepReward",
    "Superposition",
    "Tabulated",
    "TiltflowError",
    "Training",
    "TrainingFree",
    "Trajectory",
    "Transition",
    "Union",
    "UnsupportedError",
    "VariancePreserving",
    "Wasserstein",
    "WassersteinCritic",
    "WeightedMatching",
    "ZeroMean",
    "adapted",
    "averaged",
    "calibrated",
    "circuit",
    "conditioned",
    "discover_modes",
    "distil",
    "drawn",
    "fit_flow",
    "gate_evidence",
    "gaussian",
    "merge",
    "mirror_descent",
    "optimal_thresholds",
    "path_kl",
    "path_log_density",
    "plan",
    "plan_and_tune",
    "rescheduled",
    "ring",
    "tail_aware",
    "with_lora",
]

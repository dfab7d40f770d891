"""Closed forms: how far merged models are from the exact optima of their gates, on a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tiltflow.analytic import GaussianMixture
from tiltflow.density import Quadrature
from tiltflow.errors import TiltflowError
from tiltflow.flow import FlowModel, device_of
from tiltflow.merges.plan import MergePlan, Signature, signature
from tiltflow.merges.run import MergeOutcome
from tiltflow.operators import Circuit, Gate, Prior
from tiltflow.ratio import Likelihood
from tiltflow.types import Estimate

REACH = 5.0
"""The grid reaches so many of the largest standard deviations beyond the outermost means."""
NODES, FEWEST = 2.0, 61
"""Nodes per thinnest standard deviation, and per dimension at least."""
MOST_NODES = {1: 2001, 2: 141}
"""Nodes per dimension, at most."""
OUTSIDE = 1e-3
"""Mass at the grid's edge from which on the grid is too small."""


def distances(plan: MergePlan, outcome: MergeOutcome) -> dict[str, Estimate | str]:
    """By gate, the total variation between the merged model's density (of its ODE) and the exact
    optimum over exact parts; or why it is not known.

    The parts of a gate are the exact ones, not the merged ones: errors of gates below count.
    """
    densities = {name: plan.pretrained[name].exact for name in plan.root.names}
    known = {name: density for name, density in densities.items() if density is not None}
    steps = plan.experiment.evaluate.likelihood_steps
    why = ""
    if steps == 0:
        why = "evaluate.likelihood_steps is 0"
    elif len(known) < len(densities):
        unknown = [name for name in densities if name not in known]
        why = f"the density of {', '.join(unknown)} is not known"
    elif any(density.means.shape[1] > 2 for density in known.values()):
        why = "a grid has one or two dimensions"
    if why:
        return dict.fromkeys(outcome.jobs, why)
    axes = _axes(list(known.values()))
    exact = _exact(plan.root, {name: Quadrature.of(axes, d.log) for name, d in known.items()})
    return {
        key: _distance(exact[signature(job.gate)], outcome.gates[key].model, steps)
        for key, job in outcome.jobs.items()
    }


def _axes(densities: Sequence[GaussianMixture]) -> list[Tensor]:
    """One grid for all: wide enough for the widest, fine enough for the thinnest."""
    thin = min(float(d.stds.min()) for d in densities)
    wide = REACH * max(float(d.stds.max()) for d in densities)
    means = torch.cat([d.means for d in densities])
    low, high = means.min(0).values - wide, means.max(0).values + wide
    most = MOST_NODES[means.shape[1]]
    counts = [min(most, max(FEWEST, math.ceil(NODES * float(w) / thin))) for w in high - low]
    return [
        torch.linspace(float(a), float(b), n, dtype=torch.float64)
        for a, b, n in zip(low, high, counts, strict=True)
    ]


def _exact(root: Circuit, priors: Mapping[str, Quadrature]) -> dict[Signature, Quadrature | str]:
    """The exact optimum of every node from the bottom up, or why it is not known."""
    found: dict[Signature, Quadrature | str] = {}
    for node in root.walk():
        if isinstance(node, Prior):
            found[signature(node)] = priors[node.name]
        elif isinstance(node, Gate):
            found[signature(node)] = _of_gate(node, [found[signature(p)] for p in node.parts])
    return found


def _of_gate(gate: Gate, parts: Sequence[Quadrature | str]) -> Quadrature | str:
    for part, known in zip(gate.parts, parts, strict=True):
        if isinstance(known, str):
            return known if isinstance(part, Prior) else f"that of its part {part} is not: {known}"
    try:
        exact = gate.exact([part for part in parts if isinstance(part, Quadrature)])
    except TiltflowError as error:
        return str(error)
    mass = exact.probabilities.reshape(exact.table.shape)
    inner = mass[tuple(slice(1, -1) for _ in exact.axes)]
    if 1 - float(inner.sum()) > OUTSIDE:
        return "the optimum reaches beyond the grid on which the parts live"
    return exact


def _distance(exact: Quadrature | str, model: FlowModel, steps: int) -> Estimate | str:
    if isinstance(exact, str):
        return exact
    nodes = exact.nodes.float().to(device_of(model))
    try:
        log = Likelihood(model, steps).value(nodes)
    except TiltflowError as error:
        return str(error)
    own = Quadrature(exact.axes, log.double().cpu().reshape(exact.table.shape))
    return Estimate(exact.total_variation(own))

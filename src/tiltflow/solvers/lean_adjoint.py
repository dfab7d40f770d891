"""On-policy roll-outs of a tuned model with the lean adjoint of the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.context import Backend
from tiltflow.errors import NonFiniteError, UnsupportedError
from tiltflow.flow import FlowModel, device_of
from tiltflow.kernel import Coefficients, LinearKernel
from tiltflow.potential import Potential, StepReward
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.types import Access, Cond, index_cond


@final
@dataclass(frozen=True)
class Steps:
    """The numbers of every step of a grid, (K,) each.

    ``t``, ``s``: times. ``coefficients``: of the kernel. ``on_x``, ``on_output``: end point of the
    network, on_x x + on_output output. ``beta2``: beta(t)^2, the unit of a correction. ``weight``:
    on_endpoint^2 / (2 variance), which turns |d endpoint|^2 into a KL in nats; 0 without noise.
    """

    t: Tensor
    s: Tensor
    coefficients: Coefficients
    on_x: Tensor
    on_output: Tensor
    beta2: Tensor
    weight: Tensor

    @staticmethod
    def of(sampler: Sampler, process: FlowModel, like: Tensor) -> Steps:
        """In float64 first, because differences of alphas cancel."""
        times, kernel = sampler.times, sampler.kernel.resolved(process)
        if not isinstance(kernel, LinearKernel) or not kernel.memoryless:
            raise UnsupportedError(
                f"Training needs a memoryless kernel with one evaluation per step, not "
                f"{type(kernel).__name__}: with another noise level the tilt is biased. Use "
                "EulerMaruyama or Ancestral to train, and any kernel to sample afterwards."
            )
        t, s = times[:-1], times[1:]
        c = kernel.coefficients(process.schedule, t, s)
        on_x, on_output = process.affine(t)
        weight = torch.where(c.variance > 0, c.on_endpoint**2 / (2 * c.variance), 0.0)
        numbers = (v.to(like) for v in (c.on_state, c.on_endpoint, c.variance))
        return Steps(
            t.to(like), s.to(like), Coefficients(*numbers), on_x.to(like), on_output.to(like),
            (process.schedule.beta(t) ** 2).to(like), weight.to(like),
        )  # fmt: skip


@final
@dataclass(frozen=True)
class Rollout:
    """Paths of the tuned model and what the reference says along them.

    Attributes:
        states: (K+1, B, *event).
        adjoints: (K+1, B, *event); a_K = grad phi, a_k = J(mean_k)^T a_{k+1} + grad f_k.
        frozen: (K, B, *event), end points of the reference's network without its delta.
        reference: (K, B, *event), end points of the reference.
        tuned: (K, B, *event), end points of the tuned model.
        log_weight: (B,), phi + running - log dP_tuned / dP_reference, or ``None`` without values.
        kl: (B,), path KL of each trajectory, sum |m_tuned - m_ref|^2 / (2 v).
        value: (B,) terminal values, or ``None``.
    """

    states: Tensor
    adjoints: Tensor
    frozen: Tensor
    reference: Tensor
    tuned: Tensor
    kl: Tensor
    log_weight: Tensor | None
    value: Tensor | None
    cond: Cond | None = None


def rollout(
    tuned: FlowModel,
    reference: FlowModel,
    steps: Steps,
    terminal: Potential,
    count: int,
    *,
    seed: Seed,
    backend: Backend,
    running: StepReward | None = None,
    cond: Cond | None = None,
    chunk: int | None = None,
) -> Rollout:
    """Simulate ``tuned`` and carry the adjoint back through ``reference`` (methods, 2.4.2)::

        x_{k+1} ~ N(mean_tuned(x_k), v_k)
        a_K = grad phi(x_K),   a_k = (d mean_reference / d x_k)^T a_{k+1} + grad f_k(x_k)

    There is no graph through the roll-out; each step keeps only the graph of its own reference
    mean, of at most ``chunk`` trajectories at a time.
    """
    generator = seed.generator(device_of(tuned))
    size = chunk or count
    parts = []
    for start in range(0, count, size):
        index = torch.arange(start, min(start + size, count))
        path = _Path(tuned, reference, steps, backend, index_cond(cond, index))
        path.forward(len(index), generator)
        parts.append(path.backward(terminal, running))
    if len(parts) == 1:
        return parts[0]
    return _joined(parts, cond)


class _Path:
    """One chunk of trajectories: forward simulation, then the adjoint."""

    def __init__(
        self,
        tuned: FlowModel,
        reference: FlowModel,
        steps: Steps,
        backend: Backend,
        cond: Cond | None,
    ) -> None:
        self.tuned, self.reference, self.steps = tuned, reference, steps
        self.backend, self.cond = backend, cond
        self.shared = tuned.net is reference.net
        self.beta2 = steps.beta2.tolist()
        self.on_x, self.on_output = steps.on_x.tolist(), steps.on_output.tolist()
        # Per step: the state (a leaf), the reference's mean with its graph, and three end points.
        self.leaves: list[Tensor] = []
        self.graphs: list[Tensor] = []
        self.endpoints: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, count: int, generator: torch.Generator) -> None:
        c, space, num_steps = self.steps.coefficients, self.reference.space, len(self.steps.t)
        shape = (num_steps + 1, *space.shape(count, self.cond))
        noise = torch.randn(shape, generator=generator, device=generator.device)
        x = space.project(noise[-1], self.cond)
        self.kl, self.log_ratio = x.new_zeros(count), x.new_zeros(count)
        # Numbers, not tensors: a third of the time of small models went into indexing these.
        rows = zip(
            c.on_state.tolist(), c.on_endpoint.tolist(), c.variance.sqrt().tolist(), strict=True
        )
        for k, (on_state, on_endpoint, deviation) in enumerate(rows):
            leaf = x.detach().requires_grad_()
            frozen, endpoint, tuned = self._endpoints(leaf, k)
            with torch.enable_grad():
                graph = torch.add(leaf * on_state, endpoint, alpha=on_endpoint)
            shift = (tuned - endpoint.detach()) * on_endpoint
            z = space.project(noise[k], self.cond)
            if deviation > 0:  # a noiseless step is shared by both laws and has no density
                scaled = shift / deviation
                self.kl += 0.5 * space.inner(scaled, scaled)
                self.log_ratio += space.inner(scaled, z)
            x = torch.add(graph.detach() + shift, z, alpha=deviation)
            self.leaves.append(leaf)
            self.graphs.append(graph)
            self.endpoints.append((frozen, endpoint.detach(), tuned))
        self.log_ratio += self.kl
        self.end = x
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError("adjoint matching", "roll-out", "the state", "Lower the rate.")

    def _endpoints(self, leaf: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """End points: frozen network, reference (with graph), tuned model."""
        t, x = self.steps.t[k].expand(len(leaf)), leaf.detach()
        beta2 = self.beta2[k]
        with self.backend.autocast():
            with torch.enable_grad():
                frozen = self._network(self.reference, leaf, t, k)
                shift = self.reference.correction(leaf, t, self.cond)
                endpoint = frozen if shift is None else torch.add(frozen, shift, alpha=beta2)
            with torch.no_grad():
                base = frozen.detach() if self.shared else self._network(self.tuned, x, t, k)
                shift = self.tuned.correction(x, t, self.cond)
                tuned = base if shift is None else torch.add(base, shift, alpha=beta2)
        return frozen.detach(), endpoint, tuned

    def _network(self, model: FlowModel, x: Tensor, t: Tensor, k: int) -> Tensor:
        """``frozen_endpoint`` from precomputed numbers."""
        out = model.output(x, t, self.cond) * self.on_output[k]
        out = torch.add(out, x, alpha=self.on_x[k]) if self.on_x[k] != 0.0 else out
        return model.space.project(out, self.cond)

    def backward(self, terminal: Potential, running: StepReward | None) -> Rollout:
        value = None
        if terminal.offers is Access.BOTH:
            value, adjoint = terminal.value_and_grad(self.end, self.cond)
        else:
            adjoint = terminal.grad(self.end, self.cond)
        adjoint = self.reference.space.project(adjoint, self.cond)
        adjoints, gain = [adjoint], value
        for k in reversed(range(len(self.graphs))):
            leaf = self.leaves[k]
            (adjoint,) = torch.autograd.grad(self.graphs.pop(), leaf, adjoint)
            if running is not None:
                t, s = (v[k].expand(len(leaf)) for v in (self.steps.t, self.steps.s))
                adjoint = adjoint + running.grad(leaf.detach(), t, s, self.cond)
                if gain is not None:
                    gain = gain + running.value(leaf.detach(), t, s, self.cond)
            # The network also has slopes in directions that leave the space.
            adjoint = self.reference.space.project(adjoint, self.cond)
            adjoints.append(adjoint)
        stacked = torch.stack(adjoints[::-1])
        if not bool(torch.isfinite(stacked).all()):
            raise NonFiniteError("adjoint matching", "backward pass", "the adjoint")
        states = torch.stack([leaf.detach() for leaf in self.leaves] + [self.end])
        frozen, reference, tuned = (torch.stack(e) for e in zip(*self.endpoints, strict=True))
        weight = None if gain is None else gain - self.log_ratio
        return Rollout(
            states, stacked, frozen, reference, tuned, self.kl, weight, value, self.cond
        )  # fmt: skip


def _joined(parts: list[Rollout], cond: Cond | None) -> Rollout:
    def along(name: str, axis: int) -> Tensor:
        return torch.cat([getattr(p, name) for p in parts], axis)

    known = parts[0].log_weight is not None
    return Rollout(
        along("states", 1), along("adjoints", 1), along("frozen", 1), along("reference", 1),
        along("tuned", 1), along("kl", 0), along("log_weight", 0) if known else None,
        along("value", 0) if known else None, cond,
    )  # fmt: skip

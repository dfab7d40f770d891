"""On-policy roll-outs of a tuned model with the lean adjoint of the reference."""

from __future__ import annotations

import math
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
from tiltflow.types import Access, Cond, index_cond, joined_cond


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
        adjoints: (K+1, B, *event); a_K = grad phi, a_k = J(mean_k)^T a_{k+1} + grad f_k. Zero
            where they were not carried.
        frozen: (K, B, *event), end points of the reference's network without its delta.
        reference: (K, B, *event), end points of the reference.
        tuned: (K, B, *event), end points of the tuned model.
        log_weight: (B,), phi + running - log dP_tuned / dP_reference, or ``None`` without values.
        kl: (B,), path KL of each trajectory, sum |m_tuned - m_ref|^2 / (2 v).
        value: (B,) terminal values, or ``None``.
        importance: (B,) of mean one, what each trajectory stands for, or ``None`` for one each;
            see ``kept``.
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
    carried: Carried | None = None
    importance: Tensor | None = None


@final
@dataclass(frozen=True)
class Carried:
    """The trajectories ``index`` (M,) whose adjoint is known at the steps before ``first``."""

    first: int
    index: Tensor


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
    carry: tuple[int, float] = (0, 1.0),
    oversample: int = 1,
    behaviour: FlowModel | None = None,
) -> Rollout:
    """Simulate ``tuned`` and carry the adjoint back through ``reference`` (methods, 2.4.2)::

        x_{k+1} ~ N(mean_tuned(x_k), v_k)
        a_K = grad phi(x_K),   a_k = (d mean_reference / d x_k)^T a_{k+1} + grad f_k(x_k)

    There is no graph through the roll-out; each step keeps only the graph of its own reference
    mean, of at most ``chunk`` trajectories at a time. ``carry = (first, fraction)``: before the
    step ``first``, only a random fraction of the trajectories carries its adjoint on
    (not with a running reward, which every step needs).

    ``oversample``: so many times more trajectories are simulated, without graphs, of which
    ``kept`` chooses; ``cond`` then has ``oversample * count`` entries.

    ``behaviour``: the model whose steps the states take instead of ``tuned``'s. ``kl`` and
    ``log_weight`` then are those of ``tuned`` along paths that are not its own.
    """
    generator = seed.generator(device_of(tuned))
    size, parts = chunk or count, []
    for start in range(0, count, size):
        number = min(size, count - start)
        index = torch.arange(oversample * start, oversample * (start + number))
        path = _Path(tuned, reference, steps, backend, index_cond(cond, index), behaviour)
        path.carry(*carry, number, generator)
        path.forward(len(index), generator, graphs=oversample == 1)
        if oversample > 1:
            path.keep(*kept(terminal.active(path.end, path.cond), number, path.end, generator))
        parts.append(path.backward(terminal, running))
    if len(parts) == 1:
        return parts[0]
    return _joined(parts, cond)


def kept(
    active: Tensor, count: int, like: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Which ``count`` of N simulated trajectories to keep, and what each stands for.

    Stratified: of the N_a with a reward gradient as many as there are, up to half of ``count``;
    the rest from the others; with weights (N_h / N) / (n_h / count) per stratum h, so that
    weighted means are unbiased (methods, section 3.7). A thin tail then is a good part of the
    regression, and the weights say how thin it is.

    Args:
        active: (N,) of bool.
        count: number to keep.
        like: (N, *event), for device and dtype.
        generator: of the draw.

    Returns:
        indices (count,), and weights (count,) of mean one.
    """
    total = len(like)
    order = torch.randperm(total, generator=generator, device=generator.device).to(like.device)
    tail, body = order[active[order]], order[~active[order]]
    number = min(len(tail), max(count // 2, count - len(body)))
    tail, rest = tail[:number], body[: count - number]
    share = int(active.sum()) / total
    weights = [
        torch.full((len(part),), mass * count / max(len(part), 1))
        for part, mass in ((tail, share), (rest, 1 - share))
    ]
    return torch.cat([tail, rest]), torch.cat(weights).to(like)


class _Path:
    """One chunk of trajectories: forward simulation, then the adjoint."""

    def __init__(
        self,
        tuned: FlowModel,
        reference: FlowModel,
        steps: Steps,
        backend: Backend,
        cond: Cond | None,
        behaviour: FlowModel | None = None,
    ) -> None:
        self.tuned, self.reference, self.steps = tuned, reference, steps
        self.behaviour = behaviour
        self.backend, self.cond = backend, cond
        self.shared = tuned.net is reference.net
        c = steps.coefficients
        # Numbers, not tensors: a third of the time of small models went into indexing these.
        self.on_state, self.on_endpoint = c.on_state.tolist(), c.on_endpoint.tolist()
        self.deviation = c.variance.sqrt().tolist()
        self.on_x, self.on_output = steps.on_x.tolist(), steps.on_output.tolist()
        self.beta2 = steps.beta2.tolist()
        # Per step: the state (a leaf), the reference's outputs with their graph, its end points
        # without and with its delta, and those of the tuned model.
        self.leaves: list[Tensor] = []
        self.graphs: list[tuple[Tensor, Tensor | None] | None] = []
        self.asked: list[tuple[Tensor, Tensor]] = []
        self.own: list[Tensor] = []
        self.carried: Carried | None = None
        self.importance: Tensor | None = None
        self.noise: list[Tensor] = []
        self.end = torch.empty(0)

    def carry(self, first: int, fraction: float, count: int, generator: torch.Generator) -> None:
        """Decide which trajectories carry their adjoint beyond the late steps."""
        number = min(count, max(2, math.ceil(fraction * count)))
        if first > 0 and number < count:
            order = torch.randperm(count, generator=generator, device=generator.device)
            self.carried = Carried(first, order[:number].sort().values)

    def keep(self, index: Tensor, importance: Tensor) -> None:
        """Forget all other trajectories."""
        self.importance, self.cond = importance, index_cond(self.cond, index)
        self.leaves = [leaf.detach()[index].requires_grad_() for leaf in self.leaves]
        self.own = [own[index] for own in self.own]
        self.asked = [(frozen[index], reference[index]) for frozen, reference in self.asked]
        self.noise, self.end = [z[index] for z in self.noise], self.end[index]
        if not self.asked:
            for k, leaf in enumerate(self.leaves):
                self._ask(leaf, self.steps.t[k].expand(len(leaf)), k, self._late(k))

    @torch.no_grad()
    def forward(self, count: int, generator: torch.Generator, graphs: bool = True) -> None:
        """Simulate; ``graphs=False`` leaves the graphs of the late steps to ``backward``, and the
        reference, unless the tuned model shares its network, to ``keep``."""
        space, num_steps = self.reference.space, len(self.steps.t)
        shape = (num_steps + 1, *space.shape(count, self.cond))
        noise = torch.randn(shape, generator=generator, device=generator.device)
        self.noise = [space.project(z, self.cond) for z in noise]
        times = self.steps.t[:, None].expand(num_steps, count).unbind()
        x = self.noise.pop()
        for k, (t, z) in enumerate(zip(times, self.noise, strict=True)):
            leaf = x.requires_grad_()
            self.leaves.append(leaf)
            if graphs or self.shared:
                self._ask(leaf, t, k, graphs and self._late(k))
            tuned = self._tuned(leaf, t, k)
            if self.behaviour is not None:
                with self.backend.autocast():
                    tuned = self.behaviour.endpoint(leaf, t, self.cond)
            x = torch.add(leaf * self.on_state[k], tuned, alpha=self.on_endpoint[k])
            x = torch.add(x, z, alpha=self.deviation[k])
        self.end = x
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError("adjoint matching", "roll-out", "the state", "Lower the rate.")

    def _late(self, k: int) -> bool:
        return self.carried is None or k >= self.carried.first

    def _ask(self, leaf: Tensor, t: Tensor, k: int, graph: bool) -> None:
        """Keeps frozen and reference end points of a step, with a graph where it is late."""
        with self.backend.autocast():
            with torch.set_grad_enabled(graph):
                out, shift = self._outputs(leaf, t, k, self.cond)
            with torch.no_grad():
                frozen = self._frozen(out, leaf, k, self.cond)
        self.graphs.append((out, shift) if graph else None)
        with torch.no_grad():
            self.asked.append((frozen, self._corrected(frozen, shift, k)))

    def _tuned(self, leaf: Tensor, t: Tensor, k: int) -> Tensor:
        """Keeps and returns the tuned model's end points of a step."""
        with self.backend.autocast():
            if self.shared:
                base = self.asked[k][0]
            else:
                base = self._frozen(self.tuned.output(leaf, t, self.cond), leaf, k, self.cond)
            shift = self.tuned.correction(leaf, t, self.cond, base)
        self.own.append(self._corrected(base, shift, k))
        return self.own[k]

    def _corrected(self, frozen: Tensor, shift: Tensor | None, k: int) -> Tensor:
        return frozen if shift is None else torch.add(frozen, shift, alpha=self.beta2[k])

    def _outputs(
        self, x: Tensor, t: Tensor, k: int, cond: Cond | None
    ) -> tuple[Tensor, Tensor | None]:
        out, sees = self.reference.output(x, t, cond), self.reference.delta.sees_endpoint
        frozen = self._frozen(out, x, k, cond) if sees else None
        return out, self.reference.correction(x, t, cond, frozen)

    def _frozen(self, out: Tensor, x: Tensor, k: int, cond: Cond | None) -> Tensor:
        """``frozen_endpoint`` from the network's output and precomputed numbers."""
        out = out * self.on_output[k]
        out = torch.add(out, x, alpha=self.on_x[k]) if self.on_x[k] != 0.0 else out
        return self.reference.space.project(out, cond)

    def backward(self, terminal: Potential, running: StepReward | None) -> Rollout:
        value = None
        if terminal.offers is Access.BOTH:
            value, adjoint = terminal.value_and_grad(self.end, self.cond)
        else:
            adjoint = terminal.grad(self.end, self.cond)
        space = self.reference.space
        adjoint = space.project(adjoint, self.cond)
        adjoints, gain = [adjoint], value
        if running is not None and Access.VALUE not in running.offers:
            gain = None
        first = 0 if self.carried is None else self.carried.first
        for k in reversed(range(first, len(self.leaves))):
            leaf = self.leaves[k]
            # A network also has slopes in directions that leave the space.
            pulled = self._pulled_back(adjoint, leaf, self._graph(leaf, k), k)
            adjoint = space.project(pulled, self.cond)
            if running is not None:
                t, s = (v[k].expand(len(leaf)) for v in (self.steps.t, self.steps.s))
                slope = running.grad(leaf.detach(), t, s, self.cond)
                adjoint = adjoint + space.project(slope, self.cond)
                if gain is not None:
                    gain = gain + running.value(leaf.detach(), t, s, self.cond)
            adjoints.append(adjoint)
        stacked = torch.stack(adjoints[::-1])
        if self.carried is not None:
            stacked = torch.cat([self._early(adjoint, self.carried), stacked])
        if not bool(torch.isfinite(stacked).all()):
            raise NonFiniteError("adjoint matching", "backward pass", "the adjoint")
        return self._recorded(stacked, value, gain)

    def _graph(self, leaf: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """The reference's outputs at a step with their graph, which is freed with its last use."""
        graph, self.graphs[k] = self.graphs[k], None
        if graph is None:
            with self.backend.autocast(), torch.enable_grad():
                graph = self._outputs(leaf, self.steps.t[k].expand(len(leaf)), k, self.cond)
        return graph

    def _early(self, adjoint: Tensor, carried: Carried) -> Tensor:
        """Adjoints before the late steps: of the carried trajectories; zero for the others."""
        first, index = carried.first, carried.index
        states = torch.stack(self.leaves[:first]).detach()[:, index].unbind()
        cond, space, parts = index_cond(self.cond, index), self.reference.space, []
        part = adjoint[index]
        for k in reversed(range(first)):
            leaf, t = states[k].requires_grad_(), self.steps.t[k].expand(len(index))
            with self.backend.autocast():
                graph = self._outputs(leaf, t, k, cond)
            part = space.project(self._pulled_back(part, leaf, graph, k), cond)
            parts.append(part)
        early = adjoint.new_zeros(first, *adjoint.shape)
        early[:, index] = torch.stack(parts[::-1])
        return early

    def _pulled_back(
        self, adjoint: Tensor, leaf: Tensor, graph: tuple[Tensor, Tensor | None], k: int
    ) -> Tensor:
        """(d mean_reference / d x)^T adjoint, for an adjoint in the space.

        mean = on_state x + on_endpoint (on_x x + on_output out + beta^2 shift): only the outputs
        of networks need autograd.
        """
        (out, shift), gain = graph, self.on_endpoint[k]
        result: Tensor = adjoint * (self.on_state[k] + gain * self.on_x[k])
        pairs = [(out, gain * self.on_output[k])]
        if shift is not None:
            pairs.append((shift, gain * self.beta2[k]))
        pairs = [(y, factor) for y, factor in pairs if y.requires_grad]
        if pairs:
            outputs, cotangents = zip(*[(y, adjoint * c) for y, c in pairs], strict=True)
            (pulled,) = torch.autograd.grad(outputs, leaf, cotangents, allow_unused=True)
            result = result if pulled is None else result + pulled
        return result

    @torch.no_grad()
    def _recorded(self, adjoints: Tensor, value: Tensor | None, gain: Tensor | None) -> Rollout:
        """Everything in stacks, with the KL and the log-ratio of the path laws."""
        frozen, reference = (torch.stack(e) for e in zip(*self.asked, strict=True))
        tuned = torch.stack(self.own)
        states = torch.stack([*self.leaves, self.end]).detach()
        # In standard deviations; a noiseless step is shared by both laws and has weight 0.
        scale = (2 * self.steps.weight).sqrt()
        shift = (tuned - reference).flatten(2) * scale[:, None, None]
        kl = 0.5 * shift.square().sum((0, 2))
        ratio = kl + (shift * torch.stack(self.noise).flatten(2)).sum((0, 2))
        weight = None if gain is None else gain - ratio
        return Rollout(
            states, adjoints, frozen, reference, tuned, kl, weight, value, self.cond,
            self.carried, self.importance,
        )  # fmt: skip


def _joined(parts: list[Rollout], cond: Cond | None) -> Rollout:
    def along(name: str, axis: int) -> Tensor:
        return torch.cat([getattr(p, name) for p in parts], axis)

    known, carried, start = parts[0].log_weight is not None, parts[0].carried, 0
    if parts[0].importance is not None:  # of the trajectories that were kept
        conds = [part.cond for part in parts if part.cond is not None]
        cond = joined_cond(conds) if conds else None
    if carried is not None:
        index = []
        for part in parts:
            count = part.states.shape[1]
            # A last chunk of one or two trajectories is carried whole.
            local = torch.arange(count) if part.carried is None else part.carried.index
            index.append(local.to(carried.index.device) + start)
            start += count
        carried = Carried(carried.first, torch.cat(index))
    return Rollout(
        along("states", 1), along("adjoints", 1), along("frozen", 1), along("reference", 1),
        along("tuned", 1), along("kl", 0), along("log_weight", 0) if known else None,
        along("value", 0) if known else None, cond, carried,
        None if parts[0].importance is None else along("importance", 0),
    )  # fmt: skip

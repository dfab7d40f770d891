"""Likelihoods of flow models: log p by the probability-flow ODE."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from tiltflow.density import Density, FlowDensity
from tiltflow.errors import ConfigError, NonFiniteError, UnsupportedError
from tiltflow.flow import FlowModel, Process
from tiltflow.potential import Potential
from tiltflow.ratio.estimator import ExactRatio, LogRatio, RatioEstimator
from tiltflow.ratio.memo import Memo
from tiltflow.schedule import Schedule
from tiltflow.seed import Seed
from tiltflow.types import Access, Cond, index_cond

CLOSE = 1e-6
"""Noise level beta / alpha below which a time counts as noiseless."""


@final
@dataclass(frozen=True, eq=False)
class Likelihood(Potential):
    """log p(x) of a flow model in nats, normalised, for FlowDensity(model, log=Likelihood(model)).

    The probability-flow ODE is followed from x at t = 1 back to the noise at t = 0 (Chen et al.,
    arXiv 1806.07366; Song et al., arXiv 2011.13456, section 4.3)::

        log p_1(x) = log N(x_0; 0, I) - int_0^1 div v(x_t, t) dt

    in the variables that suit it: the angle a with alpha = r sin a, beta = r cos a, and u = x / r,

        du/da = cos(a) endpoint - sin(a) noise = (endpoint - sin(a) u) / cos(a)

    which is bounded at both ends, the same for every schedule, and constant on N(0, 1) data. At
    t = 1, where noise prediction is 0/0, the exact value is known: the noise is independent of the
    data, E[X_0 | X_1] = 0. No time near 1 is cut off. Heun's method, with nodes that lie closer
    towards the data, where thin data turn fast.

    Errors are of second order in 1 / num_steps: 0.002 nats on average (0.004 sample by sample) at
    40 steps on a ring of Gaussians with standard deviation 0.25, see docs/benchmarks/ratios.md. It
    is the density of the model's ODE; a sampler's own error comes on top. On data much thinner
    than 1 / num_steps more steps are needed, and on data on a manifold log p does not exist.

    Offers VALUE, and GRAD: the model's score at ``score_time``, which costs one evaluation.

    Args:
        model: the model.
        num_steps: steps of the ODE; each costs two evaluations and one trace.
        trace: ``"exact"``: one vector-Jacobian product per dimension. ``"hutchinson"``: z^T J z
            with random signs z; unbiased for log p, with an error of its own in each sample. The
            signs of a sample are a hash of seed and sample, so that the value is a function of x
            and errors of different samples are independent.
        probes: sign vectors per sample and step, for Hutchinson's trace; they cost one product
            each.
        score_time: time at which the score is read (see ``FlowDensity``).
        seed: stream of the signs.
        batch_size: samples that are in memory at once.

    Raises:
        ConfigError: for arguments out of range.
        UnsupportedError: for a ``ControlledProcess``, whose ODE has another law.
        NonFiniteError: where the model is not finite along the way.
    """

    model: FlowModel
    num_steps: int = 40
    trace: Literal["exact", "hutchinson"] = "exact"
    probes: int = 1
    score_time: float = 0.99
    seed: Seed = field(default_factory=lambda: Seed(0).child("likelihood"))
    batch_size: int = 4096
    _memo: Memo[Tensor] = field(default_factory=Memo, init=False, repr=False)

    def __post_init__(self) -> None:
        _require_flow(self.model)
        checks = {
            "num_steps": self.num_steps >= 1,
            "trace": self.trace in ("exact", "hutchinson"),
            "probes": self.probes >= 1,
            "score_time": 0 < self.score_time < 1,
            "batch_size": self.batch_size >= 1,
        }
        for name, fine in checks.items():
            if not fine:
                raise ConfigError(f"Likelihood: {name}={getattr(self, name)!r} is out of range.")

    @property
    def offers(self) -> Access:
        return Access.BOTH

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self._memo.of(x, cond, lambda: self._computed(x, cond), _versions(self.model))

    @torch.no_grad()
    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.model.score(x, self.score_time, cond)

    @torch.no_grad()
    def _computed(self, x: Tensor, cond: Cond | None) -> Tensor:
        indices = torch.split(torch.arange(len(x)), self.batch_size)
        parts = [self._batch(x[i[0] : i[-1] + 1], index_cond(cond, i)) for i in indices]
        return torch.cat(parts) if parts else x.new_zeros(0)

    def _batch(self, x: Tensor, cond: Cond | None) -> Tensor:
        """log p(x), (B, *event) -> (B,)."""
        times, angles = grid(self.model.schedule, self.num_steps)
        ode = _Ode(self, times, angles, self._probes(x, cond), cond)
        space = self.model.space
        dimension = space.dimension(len(x), cond).to(x.device).double()
        u, integral = x / ode.radius(self.num_steps), torch.zeros_like(dimension)
        slope, divergence = ode.field(u, self.num_steps)
        for k in reversed(range(self.num_steps)):
            h = float(angles[k + 1] - angles[k])
            ahead = ode.slope(u - h * slope, k)
            u = u - 0.5 * h * (slope + ahead)
            slope, before = ode.field(u, k)
            integral = integral + 0.5 * h * (divergence + before)
            divergence = before
            if not bool(torch.isfinite(u).all() & torch.isfinite(integral).all()):
                raise NonFiniteError(
                    "likelihood", k, "the state",
                    "The model returned NaN or diverged at this time step; check its weights, its "
                    "schedule and what it predicts.",
                )  # fmt: skip
        noise = (u * ode.radius(0)).double()
        scale = math.log(ode.radius(0)) - math.log(ode.radius(self.num_steps))
        log_noise = -0.5 * space.inner(noise, noise) - 0.5 * math.log(2 * math.pi) * dimension
        return (log_noise + dimension * scale - integral).to(x.dtype)

    def _probes(self, x: Tensor, cond: Cond | None) -> Tensor | None:
        """Sign vectors on the space, (probes, B, *event), or ``None`` for the exact trace."""
        if self.trace == "exact":
            return None
        space = self.model.space
        each = (signs(x, self.seed.child(i)) for i in range(self.probes))
        return torch.stack([space.project(z, cond) for z in each])

    def __str__(self) -> str:
        return "log p (likelihood of the model)"


@final
@dataclass(frozen=True)
class _Ode:
    """du/da and its divergence at the nodes of a grid."""

    owner: Likelihood
    times: Tensor
    angles: Tensor
    probes: Tensor | None
    cond: Cond | None

    def radius(self, k: int) -> float:
        """r at node k."""
        schedule, t = self.owner.model.schedule, self.times[k]
        return math.hypot(float(schedule.alpha(t)), float(schedule.beta(t)))

    def slope(self, u: Tensor, k: int) -> Tensor:
        """du/da at node k, (B, *event)."""
        cos, sin = math.cos(self.angles[k]), math.sin(self.angles[k])
        if cos < CLOSE:
            return torch.zeros_like(u)
        return (self._endpoint(u * self.radius(k), k) - sin * u) / cos

    def field(self, u: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """du/da at node k and its divergence on the space, (B, *event) and (B,) in float64."""
        cos, sin, r = math.cos(self.angles[k]), math.sin(self.angles[k]), self.radius(k)
        dimension = self.owner.model.space.dimension(len(u), self.cond).to(u.device).double()
        if cos < CLOSE:
            return torch.zeros_like(u), torch.zeros_like(dimension)
        with torch.enable_grad():
            x = (r * u).detach().requires_grad_()
            endpoint = self._endpoint(x, k)
        trace = self._trace(endpoint, x).double()
        return (endpoint.detach() - sin * u) / cos, (r * trace - sin * dimension) / cos

    def _endpoint(self, x: Tensor, k: int) -> Tensor:
        return self.owner.model.endpoint(x, self.times[k].to(x).expand(len(x)), self.cond)

    def _trace(self, endpoint: Tensor, x: Tensor) -> Tensor:
        """Trace over the space of the Jacobian of ``endpoint`` in ``x``, (B,)."""
        space, total = self.owner.model.space, torch.zeros_like(x.flatten(1)[:, 0])
        if not endpoint.requires_grad:  # a constant
            return total
        count = x[0].numel() if self.probes is None else len(self.probes)
        for i in range(count):
            if self.probes is None:
                # tr(P J) = sum_i <J^T P e_i, e_i>, with P the projection onto the space
                unit = x.new_zeros(x.shape)
                unit.flatten(1)[:, i] = 1
                probe = space.project(unit, self.cond)
            else:
                unit = probe = self.probes[i]
            (pulled,) = torch.autograd.grad(
                endpoint, x, probe, retain_graph=i < count - 1, materialize_grads=True
            )
            total = total + space.inner(pulled, unit)
        return total if self.probes is None else total / count


def grid(schedule: Schedule, num_steps: int) -> tuple[Tensor, Tensor]:
    """Times and angles of the ODE from t = 0 to t = 1, (num_steps + 1,) each, float64.

    The angle is first + (last - first) (1 - (1 - k / K)^1.5). Uniform angles are three times less
    accurate on data of standard deviation 0.05 and three times more on that of 4; the exponent 2
    is better by half on the first and worse by half on the second.
    """
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    first, last = torch.atan2(schedule.alpha(ends), schedule.beta(ends)).tolist()
    position = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    angles = first + (last - first) * (1 - (1 - position) ** 1.5)
    low, high = torch.zeros_like(angles), torch.ones_like(angles)
    for _ in range(60):
        middle = 0.5 * (low + high)
        early = schedule.alpha(middle) * angles.cos() < schedule.beta(middle) * angles.sin()
        low, high = torch.where(early, middle, low), torch.where(early, high, middle)
    times = 0.5 * (low + high)
    times[0], times[-1] = 0.0, 1.0
    return times, angles


def signs(x: Tensor, seed: Seed) -> Tensor:
    """Random signs of the shape of x, a function of each sample's bits and of the seed."""
    bits = x.detach().flatten(1).double().view(torch.int64)
    place = _mixed(torch.arange(bits.shape[1], device=x.device) + seed.number)
    key = _mixed((_mixed(bits) ^ place).sum(1, keepdim=True))
    positive = _mixed(key + place) >= 0
    return torch.where(positive, 1.0, -1.0).to(x).reshape(x.shape)


def _mixed(z: Tensor) -> Tensor:
    """A mixing function of 64-bit integers (multiply and shift, twice), with wrap-around."""
    for factor in (-0x61C8864680B583EB, 0x2545F4914F6CDD1D):
        z = z * factor
        z = z ^ ((z >> 29) & 0x7FFFFFFFF)  # the shift of a negative number brings in ones
    return z


def _require_flow(process: Process) -> None:
    if not isinstance(process, FlowModel):
        raise UnsupportedError(
            f"Likelihood follows the probability-flow ODE, which a {type(process).__name__} does "
            "not have: refit it as a flow with matching.distil."
        )


def _versions(model: FlowModel) -> tuple[int, ...]:
    """Changes when a parameter is changed in place, as by an optimiser."""
    modules = (model.net, model.trainable)
    tensors = (t for m in modules for t in (*m.parameters(), *m.buffers()))
    return tuple(-1 if t.is_inference() else t._version for t in tensors)


@final
@dataclass(frozen=True, eq=False)
class PathRatio(RatioEstimator):
    """log p - log q, where a flow model's unknown log-density is its ``Likelihood``.

    Logs whose difference is known (tracked ratios, closed forms) are used as they are: then it is
    ``ExactRatio``. Gradients are differences of scores at each density's ``score_time``.

    Args:
        num_steps, trace, probes: of the ``Likelihood``.
        clip: of the ``ExactRatio``.
    """

    num_steps: int = 40
    trace: Literal["exact", "hutchinson"] = "exact"
    probes: int = 1
    clip: float | None = None

    def offers(self, p: Density, q: Density) -> Access:
        return ExactRatio(self.clip).offers(*self._knowing(p, q))

    def log_ratio(self, p: Density, q: Density) -> LogRatio:
        return ExactRatio(self.clip).log_ratio(*self._knowing(p, q))

    def _knowing(self, p: Density, q: Density) -> tuple[Density, Density]:
        if Access.VALUE in (p.log - q.log).offers:
            return p, q
        return self._known(p), self._known(q)

    def _known(self, p: Density) -> Density:
        if Access.VALUE in p.log.offers or not isinstance(p, FlowDensity):
            return p
        log = Likelihood(
            p.model, self.num_steps, self.trace, self.probes, p.score_time,
            p.seed.child("likelihood"),
        )  # fmt: skip
        return p.with_log(log)


__all__ = ["Likelihood", "PathRatio"]

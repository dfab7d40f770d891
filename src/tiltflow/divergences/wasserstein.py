"""Wasserstein distances: how far mass must move, in the metric of one's choice."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, final

from torch import Tensor

from tiltflow.density import Bank, Density
from tiltflow.divergences.two_banks import TwoBanks, require_alike
from tiltflow.errors import ConfigError
from tiltflow.functional import Curvature, Functional, per_density
from tiltflow.potential import Potential
from tiltflow.ratio import WassersteinCritic
from tiltflow.seed import Seed
from tiltflow.transport import Entropic, Ground, Power, Transport, exact, line, sinkhorn, thinned
from tiltflow.types import Access, Estimate

Method = Literal["auto", "exact", "sinkhorn", "critic"]


class Critic(Protocol):
    """Something that learns a Kantorovich potential of W_1, such as ``WassersteinCritic``."""

    def fit(self, p: Density, q: Density) -> Potential:
        """phi with E_p phi - E_q phi near W_1(p, q)."""
        ...


@final
@dataclass(frozen=True, eq=False)
class _Moved:
    """The potential of p's side, and the cost."""

    potential: Potential
    cost: Estimate


@final
@dataclass(frozen=True, eq=False)
class Wasserstein(Functional):
    """The least cost of moving p onto the prior q, W_1 or W_2^2::

        D[p] = inf over couplings of E d(X, Y)^power        delta D = f, Kantorovich's potential
        power 1: |A^-1 grad f| <= 1                         power 2: grad f = 2 A^2 (x - T(x))

    with X ~ p, Y ~ q, the ground metric d(x, y) = |A (x - y)| and T the optimal map from p to q
    (methods, sections 3.3 and 3.5). Both are convex in p; W_2 itself, the root, is not. Samples
    of both are all that is needed. The potential is frozen at p, defined everywhere, and has
    values and gradients.

    The methods:

    - ``"exact"``: in one dimension the closed form, in O(N log N); otherwise a linear program,
      which needs POT (``pip install 'tiltflow[ot]'``), with potentials extended by the
      c-transform. Its cost in D dimensions is too high by about N^(-power / D).
    - ``"sinkhorn"``: the Sinkhorn divergence, smooth and 0 at p = q. For power 1 it is far below
      W_1 unless ``epsilon`` is small, where it is noisy: for power 2 only, if there is a choice.
    - ``"critic"``: a trained network, power 1 only. Its cost is that of its potential.
    - ``"auto"``: exact in one dimension, on grids, and for power 1; else sinkhorn. Measured in
      docs/benchmarks/transport.md.

    The standard error is that of the influence functions (f and g) on both banks. Bias is not in
    it, and decides where p is near q: that of samples makes the cost too high, that of entropy
    (structure finer than ``epsilon``) too low. In more than one dimension banks are thinned to
    ``max_points``; the error is then that of what is left.

    Args:
        prior: q; its bank is used.
        power: 1 for W_1, 2 for W_2^2.
        metric: the diagonal of A, one positive number per entry of a state; all 1 by default.
        method: see above.
        epsilon: of ``"sinkhorn"``, as a fraction of the median cost between samples of the prior.
        tolerance: of ``"sinkhorn"``: how far the marginals of the plan may be off.
        max_points: of each bank, for all methods but the closed form and the critic.
        critic: of ``"critic"``; by default a ``WassersteinCritic`` with this metric.
        seed: stream of the thinning.
    """

    prior: Density
    power: Power = 1
    metric: Sequence[float] | Tensor | None = None
    method: Method = "auto"
    epsilon: float = 0.05
    tolerance: float = 1e-4
    max_points: int = 2000
    critic: Critic | None = None
    seed: Seed = field(default_factory=lambda: Seed(0).child("wasserstein"))

    def __post_init__(self) -> None:
        _ = self._ground, self._entropic  # refuses bad numbers
        if self.method not in ("auto", "exact", "sinkhorn", "critic"):
            raise ConfigError(
                f"Wasserstein: method={self.method!r} must be auto, exact, sinkhorn or critic."
            )
        if self.method == "critic" and self.power != 1:
            raise ConfigError(
                "Wasserstein: a critic learns the potential of W_1 only; use power=1, or another "
                "method."
            )
        if self.critic is not None and self.method != "critic":
            raise ConfigError("Wasserstein: a critic is given; say method='critic' to use it.")
        if self.max_points < 2:
            raise ConfigError(f"Wasserstein: max_points={self.max_points} must be at least 2.")

    @functools.cached_property
    def _ground(self) -> Ground:
        return Ground.of(self.power, self.metric)

    @functools.cached_property
    def _entropic(self) -> Entropic:
        return Entropic(self.epsilon, self.tolerance)

    @property
    def curvature(self) -> Curvature:
        return "convex"

    @property
    def priors(self) -> tuple[Density, ...]:
        return (self.prior,)

    def offers(self, log: Access) -> Access:
        return Access.BOTH

    def value(self, p: Density) -> Estimate:
        """The cost, with standard error.

        Raises:
            CapabilityError: if POT is needed and not installed.
            ConfigError: if a grid is too large, or the prior's samples are all alike (sinkhorn).
            ShapeError: if states of p, of the prior and the metric do not fit.
            UnsupportedError: if a solver does not converge.
        """
        return self._moved(p).cost

    def first_variation(self, p: Density) -> Potential:
        """Kantorovich's potential of p's side; raises like ``value``."""
        return self._moved(p).potential

    @per_density
    def _moved(self, p: Density) -> _Moved:
        on_p, on_q = p.bank, self.prior.bank
        require_alike(on_p, on_q, "Wasserstein")
        if self.method == "critic":
            return self._learned(p, on_p, on_q)
        on_line = math.prod(on_p.points.shape[1:]) == 1
        method = self._method(on_line, on_p.exact and on_q.exact)
        if not (on_line and method == "exact"):
            on_p, on_q = (thinned(b, self.max_points, self.seed) for b in (on_p, on_q))
        out = self._solved(on_p, on_q, method, on_line)
        return _Moved(out.first, _estimate(out, on_p, on_q))

    def _method(self, on_line: bool, on_grid: bool) -> Method:
        if self.method != "auto":
            return self.method
        return "exact" if on_line or on_grid or self.power == 1 else "sinkhorn"

    def _solved(self, p: Bank, q: Bank, method: Method, on_line: bool) -> Transport:
        if method == "sinkhorn":
            return sinkhorn(p, q, self._ground, self._entropic)
        return line(p, q, self._ground) if on_line else exact(p, q, self._ground)

    def _learned(self, p: Density, on_p: Bank, on_q: Bank) -> _Moved:
        critic = self.critic
        if critic is None:
            critic = WassersteinCritic(metric=self._ground.metric)
        potential = critic.fit(p, self.prior)
        cost = float(p.expect(potential.value)) - float(self.prior.expect(potential.value))
        return _Moved(potential, _estimate(Transport(cost, potential, -potential), on_p, on_q))

    def __str__(self) -> str:
        name = "Wasserstein" if self.power == 1 else "Wasserstein^2"
        return f"{name}({type(self.prior).__name__})"


def _estimate(out: Transport, p: Bank, q: Bank) -> Estimate:
    """The cost, with the error of the influence functions of both banks."""
    count = 0 if p.exact else len(p.points)
    if p.exact and q.exact:
        return Estimate(out.cost)
    banks = TwoBanks.of(p, q, "Wasserstein")
    f, g = (side.value(banks.points).double() for side in (out.first, out.second))
    return Estimate(out.cost, banks.error(f, g), count)


__all__ = ["Wasserstein"]

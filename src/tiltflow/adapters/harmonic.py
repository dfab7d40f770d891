"""Conformer flows: harmonic priors as white noise in other coordinates, and ETFlow's path.

A flow of conformers often starts from x_0 ~ N(0, S) with S the pseudo-inverse of a graph's
Laplacian, so that bonded atoms start close to each other (Jing et al., EigenFold, arXiv
2304.02198; Hassan et al., ETFlow, arXiv 2410.22388). This library's base is white noise on a
subspace. With x = L z and L L^T = S both are one::

    x_t = alpha x_1 + beta x_0   <=>   z_t = alpha z_1 + beta z_0,   z_0 ~ N(0, I), zero mean
    velocity_z, endpoint_z, noise_z = L^+ (those of x at L z),       score_z = L^T score_x
    reward_z(z) = r(L z),                                            its gradient L^T grad r

The change of variables is invertible on the subspace, so that tilts and KLs are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel, Prediction
from tiltflow.potential import Potential
from tiltflow.schedule import Schedule
from tiltflow.space import ZeroMean
from tiltflow.types import Access, Cond


@final
@dataclass(frozen=True)
class HarmonicPrior:
    """p(x_0) ~ exp(-stiffness / 2 sum_{edges} |x_i - x_j|^2) on states of zero mean.

    Args:
        edges: pairs of atoms, e.g. the bonds; together they must connect all atoms.
        atoms: their number N.
        stiffness: in 1 / Angstrom^2; the mean squared length of the bond of a tree is
            3 / stiffness.

    Raises:
        ConfigError: if an edge is not a pair of atoms, or the graph is not connected.
    """

    edges: Sequence[tuple[int, int]]
    atoms: int
    stiffness: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple((int(i), int(j)) for i, j in self.edges))
        if self.atoms < 2 or self.stiffness <= 0:
            raise ConfigError("HarmonicPrior: atoms >= 2 and stiffness > 0 are needed.")
        bad = [e for e in self.edges if e[0] == e[1] or not all(0 <= i < self.atoms for i in e)]
        if bad:
            raise ConfigError(
                f"HarmonicPrior: edge {bad[0]} is not a pair of different atoms of {self.atoms}."
            )
        if float(self._spectrum[0][1]) < 1e-9 * float(self._spectrum[0][-1]):
            raise ConfigError(
                "HarmonicPrior: the edges do not connect all atoms, so that parts of the molecule "
                "could be anywhere; add edges between the parts."
            )

    @functools.cached_property
    def laplacian(self) -> Tensor:
        """The matrix of sum |x_i - x_j|^2 over the edges, (N, N), float64."""
        out = torch.zeros(self.atoms, self.atoms, dtype=torch.float64)
        for i, j in {(min(e), max(e)) for e in self.edges}:
            out[i, i] += 1
            out[j, j] += 1
            out[i, j] -= 1
            out[j, i] -= 1
        return out

    @functools.cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.laplacian)
        return values, vectors

    @functools.cached_property
    def root(self) -> Tensor:
        """L, symmetric, (N, N): L L^T is the covariance of each coordinate."""
        return self._power(-0.5)

    @functools.cached_property
    def inverse(self) -> Tensor:
        """L^+, its inverse on vectors of zero mean, (N, N)."""
        return self._power(0.5)

    def _power(self, exponent: float) -> Tensor:
        values, vectors = self._spectrum
        # The first eigenvalue is the zero of a shift of all atoms.
        scale = (self.stiffness * values[1:]) ** exponent
        return (vectors[:, 1:] * scale) @ vectors[:, 1:].T

    def positions(self, z: Tensor) -> Tensor:
        """x = L z, (B, N, 3) -> (B, N, 3)."""
        return self.root.to(z) @ z

    def whitened(self, x: Tensor) -> Tensor:
        """z = L^+ x, (B, N, 3) -> (B, N, 3)."""
        return self.inverse.to(x) @ x


@final
class Whitened(nn.Module):
    """A network of positions as a network of z = L^+ x.

    Args:
        net: called as ``net(x, t)``, or ``net(x, t, cond)`` where ``takes_cond``.
        prior: of the noise that it was trained with.
        predicts: what it returns.
        takes_cond: whether it takes conditions.
    """

    def __init__(
        self,
        net: nn.Module,
        prior: HarmonicPrior,
        predicts: Prediction,
        *,
        takes_cond: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.prior, self.predicts = net, prior, predicts
        self.takes_cond = takes_cond

    def forward(self, z: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """(B, N, 3), (B,) -> (B, N, 3)."""
        x = self.prior.positions(z)
        out: Tensor = self.net(x, t, cond) if self.takes_cond else self.net(x, t)
        if self.predicts is Prediction.SCORE:
            return self.prior.positions(out)
        return self.prior.whitened(out)


def whitened(
    net: nn.Module,
    schedule: Schedule,
    prior: HarmonicPrior,
    *,
    predicts: Prediction | str,
    takes_cond: bool = False,
) -> FlowModel:
    """The flow model of a network that was trained from a harmonic prior.

    Its states are z = L^+ x: read samples by ``prior.positions``, and give rewards of positions as
    ``OfPositions(reward, prior)``.

    Args:
        net: of positions x (B, N, 3) of zero mean, in this library's time.
        schedule: alpha and beta of x_t = alpha x_1 + beta x_0. ETFlow's ``Bridge`` adds white
            noise to harmonic noise, which is white in no coordinates: with a harmonic prior, only
            models trained without that noise are exact.
        prior: the law of x_0.
        predicts: what the network returns.
        takes_cond: whether it takes conditions.
    """
    predicts = Prediction(predicts)
    space = ZeroMean((prior.atoms, 3), over=(0,))
    return FlowModel(
        Whitened(net, prior, predicts, takes_cond=takes_cond), schedule, space,
        predicts=predicts, takes_cond=takes_cond,
    )  # fmt: skip


@final
@dataclass(frozen=True, eq=False)
class OfPositions(Potential):
    """A potential of positions, as one of z: phi(L z), with gradient L^T grad phi."""

    potential: Potential
    prior: HarmonicPrior

    @property
    def offers(self) -> Access:
        return self.potential.offers

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.potential.value(self.prior.positions(x), cond)

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.prior.positions(self.potential.grad(self.prior.positions(x), cond))

    def _value_and_grad(self, x: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        value, grad = self.potential.value_and_grad(self.prior.positions(x), cond)
        return value, self.prior.positions(grad)

    def __str__(self) -> str:
        return str(self.potential)


@final
@dataclass(frozen=True)
class Bridge(Schedule):
    """ETFlow's path x_t = t x_1 + (1 - t) x_0 + noise sqrt(t (1 - t)) n, n and x_0 white::

        alpha = t,   beta^2 = (1 - t)^2 + noise^2 t (1 - t)

    The two noises add up to one of variance beta^2, and the velocity that ETFlow's network learns,
    E[x_1 - x_0 + (noise sqrt(t (1 - t)))' n | x_t], is the velocity of this path. The slope of
    beta is infinite at t = 1.

    Args:
        noise: ETFlow's sigma.
    """

    noise: float = 0.1

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ConfigError(f"Bridge: noise={self.noise} must not be negative.")

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def beta(self, t: Tensor) -> Tensor:
        return ((1 - t) * (1 - t + self.noise**2 * t)).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_beta(self, t: Tensor) -> Tensor:
        slope = -2 * (1 - t) + self.noise**2 * (1 - 2 * t)
        return slope / (2 * self.beta(t))

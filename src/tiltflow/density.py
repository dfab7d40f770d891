"""Densities: things one can integrate against."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.errors import CapabilityError, ConfigError, ShapeError
from tiltflow.flow import FlowModel
from tiltflow.potential import Potential
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.types import Access, Cond, Conditions, Estimate


@final
@dataclass(frozen=True)
class Bank:
    """Weighted points: points (N, *event), weights (N,) that sum to one, conditions.

    ``exact`` marks quadrature nodes, whose sums have no sampling error.
    """

    points: Tensor
    weights: Tensor
    cond: Cond | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.weights.shape != self.points.shape[:1]:
            raise ShapeError(
                f"Bank: {self.points.shape[0]} points, but weights of shape "
                f"{tuple(self.weights.shape)}."
            )

    @staticmethod
    def equal(points: Tensor, cond: Cond | None = None) -> Bank:
        """Equal weights."""
        n = points.shape[0]
        return Bank(points, points.new_full((n,), 1 / n, dtype=torch.float64), cond)

    @property
    def effective_size(self) -> float:
        """Kish's effective sample size 1 / sum w^2."""
        return float(1 / (self.weights.double() ** 2).sum())


Function = Callable[[Tensor, Cond | None], Tensor]


class Density(abc.ABC):
    """A probability law that functionals integrate against.

    The estimator lives here, not in the functional: ``expect`` is Monte Carlo for samples and
    quadrature for a grid, so a functional is written once and is as exact as its density.
    """

    @property
    @abc.abstractmethod
    def bank(self) -> Bank:
        """Weighted points that represent the law."""

    @property
    @abc.abstractmethod
    def log(self) -> Potential:
        """log p, up to a constant: VALUE is the log-density, GRAD the score."""

    @property
    def event(self) -> tuple[int, ...] | None:
        """Shape of one sample, where it is known without drawing any."""
        return None

    def with_log(self, log: Potential) -> Density:
        """The same law, knowing more of its log-density; itself where ``log`` is exact already."""
        return self

    def at_least(self, num_samples: int) -> Density:
        """The same law with a bank of at least this size, where it can be drawn."""
        return self

    @final
    def expect(self, f: Function) -> Tensor:
        """E_p[f], a scalar tensor in float64."""
        bank = self.bank
        return (bank.weights.double() * f(bank.points, bank.cond).double()).sum()

    @final
    def estimate(self, f: Function) -> Estimate:
        """E_p[f] with its standard error (zero for quadrature)."""
        bank = self.bank
        if bank.exact:
            return Estimate(float(self.expect(f)))
        return Estimate.of(f(bank.points, bank.cond), bank.weights)

    @final
    def quantile(self, f: Function, level: float) -> Tensor:
        """The smallest y with P(f <= y) >= level, a scalar tensor in float64."""
        bank = self.bank
        values, order = f(bank.points, bank.cond).double().sort()
        mass = bank.weights.double()[order].cumsum(0)
        # The last partial sum can fall short of one by rounding.
        index = int(torch.searchsorted(mass, level * float(mass[-1]) * (1 - 1e-12)))
        return values[min(index, len(values) - 1)]


@final
@dataclass(frozen=True, eq=False)
class UnknownLog(Potential):
    """The log-density of a law known by samples only: offers nothing."""

    owner: str

    @property
    def offers(self) -> Access:
        return Access.NONE

    def __str__(self) -> str:
        return f"log {self.owner}"


@final
class Empirical(Density):
    """A law known by (weighted) samples only.

    Args:
        points: (N, *event).
        weights: (N,), normalised here; equal by default.
        cond: conditions of the points.
    """

    def __init__(
        self, points: Tensor, weights: Tensor | None = None, cond: Cond | None = None
    ) -> None:
        if weights is None:
            self._bank = Bank.equal(points, cond)
        else:
            w = weights.double()
            if bool((w < 0).any()) or float(w.sum()) <= 0:
                raise ConfigError("Empirical: weights must be non-negative and not all zero.")
            self._bank = Bank(points, w / w.sum(), cond)
        self._log = UnknownLog("Empirical")

    @property
    def event(self) -> tuple[int, ...]:
        return tuple(self._bank.points.shape[1:])

    @property
    def bank(self) -> Bank:
        return self._bank

    @property
    def log(self) -> Potential:
        return self._log


@final
class Reweighted(Density):
    """A bank of samples of a law, and a tilt of that law by exp(psi) as weights on them.

    Every functional that needs only rewards, features, kernels or transport is exact on it, as
    far as a finite sample can stand for the law; and so is re-weighting it further.

    Args:
        bank: samples of the law.
        log: log-density of the law, up to a constant; may be unknown.
        psi: log-ratio of the tilt, up to a constant; ``None`` for the law itself.
        origin: log-density of the law from which all tilts are counted; ``log`` by default.
    """

    def __init__(
        self,
        bank: Bank,
        log: Potential,
        psi: Potential | None = None,
        origin: Potential | None = None,
    ) -> None:
        self.base, self._law, self.origin = bank, log, log if origin is None else origin
        self._log = log if psi is None else log + psi
        self._bank = bank
        if psi is not None:
            logits = bank.weights.log() + psi.value(bank.points, bank.cond).to(bank.weights)
            self._bank = Bank(bank.points, torch.softmax(logits, 0), bank.cond, bank.exact)

    @property
    def bank(self) -> Bank:
        return self._bank

    @property
    def log(self) -> Potential:
        return self._log

    def tilted(self, psi: Potential) -> Reweighted:
        """This law times exp(psi), with every earlier tilt forgotten."""
        return Reweighted(self.base, self._law, psi, self.origin)

    def original(self, psi: Potential) -> Reweighted:
        """The law of ``origin``, of which this is the tilt by psi, on the same points."""
        logits = self._bank.weights.log() - psi.value(self._bank.points, self._bank.cond)
        weights = torch.softmax(logits.to(self._bank.weights), 0)
        exact = self._bank.exact
        return Reweighted(Bank(self._bank.points, weights, self._bank.cond, exact), self.origin)

    def with_log(self, log: Potential) -> Reweighted:
        other = Reweighted(self.base, self._law, origin=self.origin)
        other._bank, other._log = self._bank, log
        return other


@final
@dataclass(frozen=True, eq=False)
class ModelScore(Potential):
    """The score of a flow model shortly before t = 1: offers GRAD.

    The score diverges like a network error over eta as t -> 1, so it is read at ``time``; x itself
    is passed unchanged (methods, section 1.10).
    """

    model: FlowModel
    time: float

    @property
    def offers(self) -> Access:
        return Access.GRAD

    @torch.no_grad()
    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.model.score(x, self.time, cond)

    def __str__(self) -> str:
        return "log p (score of the model)"


@final
class FlowDensity(Density):
    """The law of a flow model's samples.

    Args:
        model: the model.
        sampler: how samples are made.
        num_samples: size of the bank, drawn on first use.
        seed: stream of the bank.
        conditions: law of the conditions of a conditional model.
        score_time: time at which the score is read; one constant for all scores of an expression.
        log: log-density when more is known than the score, e.g. along a mirror descent.
    """

    def __init__(
        self,
        model: FlowModel,
        *,
        sampler: Sampler | None = None,
        num_samples: int = 4096,
        seed: Seed | None = None,
        conditions: Conditions | None = None,
        score_time: float = 0.99,
        log: Potential | None = None,
    ) -> None:
        if not 0 < score_time < 1:
            raise ConfigError(f"FlowDensity: score_time={score_time} must lie between 0 and 1.")
        self.model, self.sampler = model, sampler or Sampler()
        self.num_samples, self.seed = num_samples, seed or Seed(0).child("density")
        self.conditions, self.score_time = conditions, score_time
        self._log = ModelScore(model, score_time) if log is None else log

    @property
    def event(self) -> tuple[int, ...]:
        return self.model.space.event

    def with_log(self, log: Potential) -> FlowDensity:
        other = self._with(self.num_samples, log)
        if "bank" in self.__dict__:
            other.__dict__["bank"] = self.__dict__["bank"]
        return other

    def at_least(self, num_samples: int) -> FlowDensity:
        return self if self.num_samples >= num_samples else self._with(num_samples, self._log)

    def _with(self, num_samples: int, log: Potential) -> FlowDensity:
        return FlowDensity(
            self.model, sampler=self.sampler, num_samples=num_samples, seed=self.seed,
            conditions=self.conditions, score_time=self.score_time, log=log,
        )  # fmt: skip

    @functools.cached_property
    def bank(self) -> Bank:
        """``num_samples`` samples of the model, drawn once."""
        seed, count = self.seed.child("bank"), self.num_samples
        cond = None if self.conditions is None else self.conditions.draw(count, seed.child("cond"))
        return Bank.equal(self.sampler.sample(self.model, count, seed=seed, cond=cond), cond)

    @property
    def log(self) -> Potential:
        return self._log


@final
class Mixture(Density):
    """sum_i w_i p_i of other densities.

    Args:
        parts: the densities.
        weights: positive numbers, normalised here.
    """

    def __init__(self, parts: Sequence[Density], weights: Sequence[float] | None = None) -> None:
        n = len(parts)
        w = torch.ones(n) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if not parts or w.shape != (len(parts),) or not bool((w > 0).all()):
            raise ConfigError("Mixture: needs one positive weight per part.")
        self.parts, self.weights = tuple(parts), w.double() / w.double().sum()
        self._log = _MixtureLog(tuple(p.log for p in parts), self.weights.log())

    @functools.cached_property
    def bank(self) -> Bank:
        banks = [p.bank for p in self.parts]
        points = torch.cat([b.points for b in banks])
        weights = torch.cat([w * b.weights for w, b in zip(self.weights, banks, strict=True)])
        if any(b.cond is not None for b in banks):
            raise ConfigError("Mixture: conditional densities cannot be mixed.")
        return Bank(points, weights, None, all(b.exact for b in banks))

    @property
    def log(self) -> Potential:
        return self._log


@final
@dataclass(frozen=True, eq=False)
class _MixtureLog(Potential):
    """log sum_i w_i p_i, from normalised log-densities of the parts."""

    parts: tuple[Potential, ...]
    log_weights: Tensor

    @property
    def offers(self) -> Access:
        offered = Access.BOTH
        for part in self.parts:
            offered &= part.offers
        # The score of a mixture needs the responsibilities, i.e. the values.
        return offered if Access.VALUE in offered else Access.NONE

    def _logits(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.log_weights.to(x) + torch.stack([p.value(x, cond) for p in self.parts], 1)

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return torch.logsumexp(self._logits(x, cond), 1)

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        responsibility = torch.softmax(self._logits(x, cond), 1)
        total = torch.zeros_like(x)
        for i, part in enumerate(self.parts):
            r = responsibility[:, i].reshape((-1,) + (1,) * (x.ndim - 1))
            total = total + r * part.grad(x, cond)
        return total


@final
class Quadrature(Density):
    """A density on a regular grid in one or two dimensions: every integral is a sum.

    Args:
        axes: one increasing tensor of nodes per dimension, equally spaced.
        log_density: (n_1, ..., n_d) log-density at the nodes, up to a constant; normalised here.
    """

    def __init__(self, axes: Sequence[Tensor], log_density: Tensor) -> None:
        self.axes = tuple(a.double() for a in axes)
        if tuple(log_density.shape) != tuple(len(a) for a in self.axes) or len(self.axes) > 2:
            raise ShapeError("Quadrature: log_density needs one axis per dimension, at most two.")
        self.cell = 1.0
        for a in self.axes:
            self.cell *= float(a[1] - a[0])
        table = log_density.double()
        self.table = table - torch.logsumexp(table.flatten(), 0) - math.log(self.cell)
        self.nodes = torch.stack(torch.meshgrid(*self.axes, indexing="ij"), -1).flatten(
            0, len(self.axes) - 1
        )
        self._log = GridPotential(self.axes, self.table, self.nodes)

    @property
    def event(self) -> tuple[int, ...]:
        return (len(self.axes),)

    @staticmethod
    def of(axes: Sequence[Tensor], log: Potential | Callable[[Tensor], Tensor]) -> Quadrature:
        """From a log-density, a potential or a function of nodes (N, d)."""
        axes = [a.double() for a in axes]
        nodes = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, len(axes) - 1)
        values = log.value(nodes) if isinstance(log, Potential) else log(nodes)
        return Quadrature(axes, values.reshape([len(a) for a in axes]))

    @property
    def probabilities(self) -> Tensor:
        """Mass of each node, (N,)."""
        return (self.table.flatten() + math.log(self.cell)).exp()

    @property
    def bank(self) -> Bank:
        return Bank(self.nodes, self.probabilities, None, exact=True)

    @property
    def log(self) -> Potential:
        return self._log

    def total_variation(self, other: Quadrature) -> float:
        """Half the L1 distance to another density on the same grid."""
        return float((self.probabilities - other.probabilities).abs().sum()) / 2


@final
@dataclass(frozen=True, eq=False)
class GridPotential(Potential):
    """A function given at the nodes of a grid; exact there, multilinear in between."""

    axes: tuple[Tensor, ...]
    table: Tensor
    nodes: Tensor

    @property
    def offers(self) -> Access:
        return Access.BOTH

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        # Every iterate of a grid run has nodes of its own, equal to these.
        if x is self.nodes or torch.equal(x, self.nodes):
            return self.table.flatten().to(x)
        return _multilinear(self.axes, self.table, x.double()).to(x)

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        spacing = [float(a[1] - a[0]) for a in self.axes]
        slopes = torch.gradient(self.table, spacing=spacing, edge_order=2)
        columns = [_multilinear(self.axes, slope, x.double()) for slope in slopes]
        return torch.stack(columns, -1).to(x)


def _multilinear(axes: Sequence[Tensor], table: Tensor, x: Tensor) -> Tensor:
    """Interpolate ``table`` at x (N, d); constant beyond the edges."""
    cells, fractions = [], []
    for d, axis in enumerate(axes):
        position = (x[:, d] - axis[0]) / (axis[1] - axis[0])
        cell = position.floor().long().clamp(0, len(axis) - 2)
        cells.append(cell)
        fractions.append((position - cell).clamp(0, 1))
    total = torch.zeros_like(x[:, 0])
    for corner in range(2 ** len(axes)):
        bits = [(corner >> d) & 1 for d in range(len(axes))]
        weight = torch.ones_like(total)
        for bit, fraction in zip(bits, fractions, strict=True):
            weight = weight * (fraction if bit else 1 - fraction)
        index = tuple(cell + bit for cell, bit in zip(cells, bits, strict=True))
        total = total + weight * table[index]
    return total


def require_log(density: Density, needs: Access, user: str) -> None:
    """Raise ``CapabilityError`` unless ``density.log`` offers ``needs``; names the remedy."""
    missing = needs & ~density.log.offers
    if missing:
        raise CapabilityError(
            f"{user} needs {needs} of log p, but {type(density).__name__} offers "
            f"{density.log.offers} of it. Use a density with a log-density (an analytic one, a "
            "Quadrature, or a FlowDensity of the model itself)."
        )

"""Functionals of a density, and their algebra: ``objective = utility - weight * divergence``."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tiltflow.density import Density
from tiltflow.functional.certainty import Certainty
from tiltflow.potential import ZERO, Potential
from tiltflow.types import Access, Estimate

T = TypeVar("T")


Curvature = Literal["linear", "concave", "convex", "neither"]
"""Shape of a functional along mixtures (1 - e) p + e q. To be raised, linear and concave ones are
safe: mirror descent finds the global optimum (Flow Density Control, theorem 5.1)."""


class Functional(abc.ABC):
    """A number G[p] attached to a density, to be raised, with its first variation.

    The first variation is the function delta G[p] with::

        G[p + e (q - p)] = G[p] + e * integral delta G[p] (q - p) + o(e)

    up to an additive constant (Flow Density Control, section 3; methods, section 3.2). Whatever in
    it depends on p (quantiles, means, scores) is frozen at that p.

    Functionals form a vector space: ``F + G``, ``F - 0.5 * D``, ``-F``.
    """

    @abc.abstractmethod
    def offers(self, log: Access) -> Access:
        """What the first variation offers where log p offers ``log``; nothing is evaluated."""

    @abc.abstractmethod
    def value(self, p: Density) -> Estimate:
        """G[p] with its standard error (zero for quadrature)."""

    @abc.abstractmethod
    def first_variation(self, p: Density) -> Potential:
        """delta G[p], something to raise."""

    @property
    def curvature(self) -> Curvature:
        """Shape along mixtures of densities."""
        return "neither"

    @property
    def samples_needed(self) -> int:
        """Bank size below which the first variation is noise; 2 where there is no such bound."""
        return 2

    @property
    def priors(self) -> tuple[Density, ...]:
        """Densities that ``p`` is compared with."""
        return ()

    def offers_at(self, p: Density) -> Access:
        """What the first variation at ``p`` offers, before any sample of ``p`` is drawn.

        At least ``offers(p.log.offers)``. A subclass whose first variation contains a difference
        of log-densities says more here, because equal parts of the two cancel.
        """
        return self.offers(p.log.offers)

    def certainties(self) -> tuple[Certainty, ...] | None:
        """This as a sum of optimised certainty equivalents, which ``algorithms.tail_aware``
        solves with one training; ``None`` if it is not one."""
        return None

    def rounded(self, p: Density, part: float) -> Functional:
        """The same with those kinks rounded at which an ascent may be caught; itself where there
        are none, as in all functionals that are concave.

        Args:
            p: a density.
            part: over which part of a reward's standard deviation under ``p``.
        """
        return self

    def value_influence(self, p: Density) -> Tensor:
        """How ``value`` moves with each sample of the bank of ``p``, (N,) float64, up to a
        constant.

        For an average over the bank of a function that the bank itself does not change, that
        function; by default the first variation, which also counts how p changes it.
        """
        return influence(self.first_variation(p), p)

    @property
    def terms(self) -> tuple[tuple[float, Functional], ...]:
        """The objective as (coefficient, functional) pairs; a single functional is one pair."""
        return ((1.0, self),)

    @final
    def __add__(self, other: Functional) -> Combined:
        return Combined((*self.terms, *other.terms))

    @final
    def __sub__(self, other: Functional) -> Combined:
        return self + (-1.0) * other

    @final
    def __mul__(self, scale: float) -> Combined:
        return Combined((float(scale) * c, term) for c, term in self.terms)

    __rmul__ = __mul__

    @final
    def __neg__(self) -> Combined:
        return -1.0 * self

    def __str__(self) -> str:
        return type(self).__name__


@final
class Combined(Functional):
    """sum_i c_i F_i, flattened and with equal (identical) functionals collected.

    Args:
        terms: pairs of a coefficient and a functional that is not itself a ``Combined``.
    """

    def __init__(self, terms: Iterable[tuple[float, Functional]]) -> None:
        collected: dict[int, tuple[float, Functional]] = {}
        for scale, term in terms:
            before = collected.get(id(term), (0.0, term))[0]
            collected[id(term)] = (before + scale, term)
        self._terms = tuple((c, term) for c, term in collected.values() if c != 0.0)

    @property
    def terms(self) -> tuple[tuple[float, Functional], ...]:
        return self._terms

    @property
    def curvature(self) -> Curvature:
        flipped: dict[Curvature, Curvature] = {"concave": "convex", "convex": "concave"}
        shapes = {
            t.curvature if c > 0 else flipped.get(t.curvature, t.curvature) for c, t in self.terms
        } - {"linear"}
        return "linear" if not shapes else shapes.pop() if len(shapes) == 1 else "neither"

    @property
    def samples_needed(self) -> int:
        return max((term.samples_needed for _, term in self.terms), default=2)

    @property
    def priors(self) -> tuple[Density, ...]:
        return tuple(prior for _, term in self.terms for prior in term.priors)

    def certainties(self) -> tuple[Certainty, ...] | None:
        parts = list[Certainty]()
        for scale, term in self.terms:
            mine = term.certainties()
            if mine is None:
                return None
            parts += [part.scaled(scale) for part in mine]
        return tuple(parts)

    def offers(self, log: Access) -> Access:
        offered = Access.BOTH
        for _, term in self.terms:
            offered &= term.offers(log)
        return offered

    def offers_at(self, p: Density) -> Access:
        offered = Access.BOTH
        for _, term in self.terms:
            offered &= term.offers_at(p)
        return offered

    def value(self, p: Density) -> Estimate:
        """sum_i c_i F_i[p].

        The terms are estimated from one bank and their errors are correlated. Where every first
        variation has a value, the error is that of the influence function sum_i c_i delta F_i;
        what a term reports beyond its own influence comes from another bank (e.g. the normaliser
        of a KL) and is added in squares. Otherwise the errors of the terms are added in squares.
        """
        parts = [(c, term.value(p)) for c, term in self.terms]
        total = sum(c * part.value for c, part in parts)
        count = max((part.count for _, part in parts), default=0)
        if math.isinf(total):  # outside a barrier; there is no influence function there
            return Estimate(total, math.inf if count else 0.0, count)
        if all(Access.VALUE in term.offers_at(p) for _, term in self.terms):
            influences = [term.value_influence(p) for _, term in self.terms]
            joint = torch.zeros((), dtype=torch.float64)
            variance = 0.0
            for (c, part), f in zip(parts, influences, strict=True):
                joint = joint + c * f
                variance += c**2 * max(part.standard_error**2 - error_of(f, p) ** 2, 0.0)
            variance += error_of(joint, p) ** 2
        else:
            variance = sum((c * part.standard_error) ** 2 for c, part in parts)
        return Estimate(total, math.sqrt(variance), count)

    def rounded(self, p: Density, part: float) -> Combined:
        """Terms with positive coefficients are; what is lowered, like RightCVaR(cost), is not."""
        terms = [(c, term.rounded(p, part) if c > 0 else term) for c, term in self.terms]
        same = all(a is b for (_, a), (_, b) in zip(terms, self.terms, strict=True))
        return self if same else Combined(terms)

    def first_variation(self, p: Density) -> Potential:
        total = ZERO
        for scale, term in self.terms:
            total = total + scale * term.first_variation(p)
        return total

    def __str__(self) -> str:
        text = ""
        for scale, term in self.terms:
            size = "" if abs(scale) == 1 else f"{abs(scale):.4g} "
            sign = (" - " if text else "-") if scale < 0 else (" + " if text else "")
            text += f"{sign}{size}{term}"
        return text or "0"


F = TypeVar("F", bound=Functional)


def per_density(compute: Callable[[F, Density], T]) -> Callable[[F, Density], T]:
    """A method ``(self, p)`` whose result is kept for as long as both exist.

    For costly parts of a first variation (transport plans, critics, matrices), which a loop asks
    for several times at one density. The result must not hold ``p`` itself, only its bank.
    """
    known: WeakKeyDictionary[F, WeakKeyDictionary[Density, T]] = WeakKeyDictionary()

    @functools.wraps(compute)
    def remembered(self: F, p: Density) -> T:
        mine = known.setdefault(self, WeakKeyDictionary())
        if p not in mine:
            mine[p] = compute(self, p)
        return mine[p]

    return remembered


def influence(variation: Potential, p: Density) -> Tensor:
    """Values of a first variation on the bank of ``p``, (N,) float64."""
    bank = p.bank
    return variation.value(bank.points, bank.cond).double()


def error_of(values: Tensor, p: Density) -> float:
    """Standard error of a functional whose influence function has ``values`` (N,) on the bank.

    sqrt(sum w_i^2 (f_i - mean)^2): the standard deviation of f over the square root of the
    effective number of samples. Zero on quadrature nodes.
    """
    bank = p.bank
    if bank.exact or values.ndim == 0:
        return 0.0
    return Estimate.of(values, bank.weights).standard_error


def spread(values: Tensor, p: Density) -> float:
    """Standard deviation under ``p`` of a function with ``values`` (N,) on its bank."""
    w = p.bank.weights.double().to(values.device)
    return float((w * (values - (w * values).sum()) ** 2).sum().sqrt())

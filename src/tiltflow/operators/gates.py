"""The gates of Reward-Guided Flow Merging (arXiv 2602.08012), and one that it cannot express."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar, final

import torch

from tiltflow.density import Density, Mixture, Quadrature
from tiltflow.divergences import KL, ForwardKL, Wasserstein
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.functional import Functional
from tiltflow.operators.targets import Odds, barycentre, union_weights
from tiltflow.potential import Potential
from tiltflow.ratio import RatioEstimator
from tiltflow.utilities import ExpectedReward

G = TypeVar("G", bound="Gate")


class Circuit(abc.ABC):
    """A pre-trained model by name, or a gate over circuits.

    ``a & b`` intersects, ``a | b`` unites, ``a - b`` is what a makes and b does not. A chain
    ``a & b & c`` is one gate of three equal parts, because Python reads it as ``(a & b) & c``:
    write ``Intersection(a & b, c)`` where exponents are to be 1/4, 1/4 and 1/2, or
    ``circuit("(a & b) & c")``, which sees parentheses.
    """

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[Circuit, ...]:
        """What it is made of."""

    @final
    def walk(self) -> Iterator[Circuit]:
        """All nodes, from the bottom to the top, from left to right."""
        for part in self.parts:
            yield from part.walk()
        yield self

    @final
    @property
    def names(self) -> tuple[str, ...]:
        """Models, each once, in the order in which they first appear."""
        return tuple(dict.fromkeys(p.name for p in self.walk() if isinstance(p, Prior)))

    def __and__(self, other: Circuit) -> Gate:
        return _chained(Intersection, self, other)

    def __or__(self, other: Circuit) -> Gate:
        return _chained(Union, self, other)

    def __sub__(self, other: Circuit) -> Gate:
        return Contrast(self, other)


@final
@dataclass(frozen=True)
class Prior(Circuit):
    """A pre-trained model, by the name that the caller knows it by."""

    name: str

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ConfigError(
                f"Prior: {self.name!r} must be a word of letters, digits and underscores."
            )

    @property
    def parts(self) -> tuple[Circuit, ...]:
        return ()

    def __str__(self) -> str:
        return self.name


class Gate(Circuit, abc.ABC):
    """An operator over several circuits, with weights and an optional reward::

        p*  =  argmax_p  E_p f - sum_i a_i D_i(p, p_i),      A = sum_i a_i,   w_i = a_i / A

    Only the shares w_i matter without a reward; A is the price of leaving the parts, in units
    of f.

    Args:
        parts: at least two circuits.
        weights: a_i, positive; 1 each by default.
        reward: f; none for pure merging.
    """

    symbol: ClassVar[str]
    """Between the parts, or before them in parentheses if it is a word."""

    def __init__(
        self,
        *parts: Circuit,
        weights: Sequence[float] | None = None,
        reward: Potential | None = None,
    ) -> None:
        name = type(self).__name__
        given = tuple(map(float, weights)) if weights is not None else (1.0,) * len(parts)
        if len(parts) < 2 or not all(isinstance(part, Circuit) for part in parts):
            raise ConfigError(
                f"{name} needs at least two circuits, got {parts}. Names of models are wrapped: "
                "Prior('a')."
            )
        if len(given) != len(parts):
            raise ConfigError(
                f"{name}: {len(parts)} parts need as many weights, not {len(given)}."
            )
        if not all(0 < w < math.inf for w in given):
            raise ConfigError(
                f"{name}: weights={given} must be positive and finite; leave a part out instead "
                "of giving it no weight."
            )
        self._parts, self.weights, self.reward, self.chain = tuple(parts), given, reward, False

    @property
    def parts(self) -> tuple[Circuit, ...]:
        return self._parts

    @property
    def total(self) -> float:
        """A, the sum of the weights."""
        return sum(self.weights)

    @property
    def shares(self) -> tuple[float, ...]:
        """w_i, which sum to one."""
        return tuple(w / self.total for w in self.weights)

    @abc.abstractmethod
    def objective(
        self, priors: Sequence[Density], ratio: RatioEstimator | None = None
    ) -> Functional:
        """What the gate maximises, given the densities of its parts.

        Args:
            priors: p_i.
            ratio: how log(pbar / p) of a ``Union`` is known; by default exactly, from values.
        """

    @final
    def exact(self, priors: Sequence[Quadrature]) -> Quadrature:
        """The optimum, given its parts on one grid, in closed form.

        Raises:
            ConfigError: for another number of parts, or parts on different grids.
            UnsupportedError: where no closed form is known.
        """
        self._require(len(priors))
        for p in priors[1:]:
            same = len(p.axes) == len(priors[0].axes) and all(
                torch.equal(a, b) for a, b in zip(p.axes, priors[0].axes, strict=True)
            )
            if not same:
                raise ConfigError(f"{type(self).__name__}: the parts must be on one grid.")
        return self._exact(priors)

    @abc.abstractmethod
    def _exact(self, priors: Sequence[Quadrature]) -> Quadrature: ...

    @final
    def _require(self, count: int) -> None:
        if count != len(self.parts):
            raise ConfigError(f"{self} has {len(self.parts)} parts, but {count} are given.")

    def guided(self: G, reward: Potential) -> G:
        """The same gate with a reward."""
        return type(self)(*self.parts, weights=self.weights, reward=reward)

    def __str__(self) -> str:
        texts = []
        for part, weight in zip(self.parts, self.weights, strict=True):
            grouped = isinstance(part, Gate) and not part.symbol.isalpha()
            grouped = grouped and not (self.symbol.isalpha() and weight == 1)
            inner = f"({part})" if grouped else str(part)
            texts.append(inner if weight == 1 else f"{weight:.12g}*{inner}")
        if self.symbol.isalpha():
            return f"{self.symbol}({', '.join(texts)})"
        return f" {self.symbol} ".join(texts)


def _chained(kind: type[G], left: Circuit, right: Circuit) -> G:
    """Both under a gate; a chain of the same sign that ``left`` began goes on."""
    begun = isinstance(left, kind) and left.chain
    gate = kind(*left.parts, right) if begun else kind(left, right)
    gate.chain = True
    return gate


def _objective(gate: Gate, penalties: Sequence[Functional]) -> Functional:
    """E f less the penalties, each times its weight."""
    terms = [w * d for w, d in zip(gate.weights, penalties, strict=True)]
    loss = sum(terms[1:], terms[0])
    return -loss if gate.reward is None else ExpectedReward(gate.reward) - loss


@final
class Intersection(Gate):
    """AND, what all parts find likely: E f - sum_i a_i KL(p || p_i), with optimum::

        p*  ~  prod_i p_i^{w_i} exp(f / A)                   a weighted geometric mean

    (methods, section 5.2). Not the product of the densities: exponents sum to one. There is no
    mass where any of the parts has none.
    """

    symbol = "&"

    def objective(
        self, priors: Sequence[Density], ratio: RatioEstimator | None = None
    ) -> Functional:
        return _objective(self, [KL(p) for p in priors])

    def _exact(self, priors: Sequence[Quadrature]) -> Quadrature:
        tables = torch.stack([w * p.table for w, p in zip(self.shares, priors, strict=True)])
        merged = Quadrature(priors[0].axes, tables.sum(0))
        return merged if self.reward is None else merged.tilted((1 / self.total) * self.reward)


@final
class Union(Gate):
    """OR, what any part makes: E f - sum_i a_i KL(p_i || p), with optimum::

        p*  =  pbar = sum_i w_i p_i                          a mixture
        p*  =  A pbar / (nu - f),  nu > sup f, int p* = 1    with a reward

    (Proposition 1; methods, section 5.2). All mass of all parts is kept. The reward must be
    bounded above.
    """

    symbol = "|"

    def objective(
        self, priors: Sequence[Density], ratio: RatioEstimator | None = None
    ) -> Functional:
        mixture = Mixture(priors, self.shares)
        loss = self.total * (ForwardKL(mixture) if ratio is None else ForwardKL(mixture, ratio))
        return -loss if self.reward is None else ExpectedReward(self.reward) - loss

    def _exact(self, priors: Sequence[Quadrature]) -> Quadrature:
        mass = sum(w * p.probabilities for w, p in zip(self.shares, priors, strict=True))
        mass = torch.as_tensor(mass)
        if self.reward is not None:
            f = self.reward.value(priors[0].nodes).double()
            mass = mass * union_weights(f, mass, self.total)
        log = mass.clamp(min=1e-300).log()
        return Quadrature(priors[0].axes, log.reshape(priors[0].table.shape))


@final
class Interpolation(Gate):
    """Between the parts: E f - sum_i a_i W_2(p, p_i)^2, whose optimum without a reward is the
    Wasserstein barycentre; in one dimension its quantiles are the mean quantiles of the parts.

    (Methods, section 5.2.) The published distance, W_1, has no unique optimum: with unequal
    weights it is the heaviest part, with equal ones any point of a geodesic; where a descent
    stops is then chosen by its steps. W_2^2 selects one.

    Args:
        power: 2 for W_2^2, 1 for W_1.
        metric: the diagonal of M in the ground metric |M (x - y)|; all 1 by default.
    """

    symbol = "interpolation"

    def __init__(
        self,
        *parts: Circuit,
        weights: Sequence[float] | None = None,
        reward: Potential | None = None,
        power: Literal[1, 2] = 2,
        metric: Sequence[float] | None = None,
    ) -> None:
        super().__init__(*parts, weights=weights, reward=reward)
        if power not in (1, 2):
            raise ConfigError(f"Interpolation: power={power!r} must be 1 (W_1) or 2 (W_2^2).")
        self.power: Literal[1, 2] = power
        self.metric = None if metric is None else tuple(map(float, metric))

    def objective(
        self, priors: Sequence[Density], ratio: RatioEstimator | None = None
    ) -> Functional:
        return _objective(self, [Wasserstein(p, self.power, self.metric) for p in priors])

    def _exact(self, priors: Sequence[Quadrature]) -> Quadrature:
        if self.reward is not None or len(priors[0].axes) > 1 or self.power == 1:
            raise UnsupportedError(
                "Interpolation: the optimum on a grid is known in one dimension, for W_2^2 and "
                "without a reward only."
            )
        return barycentre(priors, self.shares)

    def guided(self, reward: Potential) -> Interpolation:
        return Interpolation(
            *self.parts, weights=self.weights, reward=reward, power=self.power, metric=self.metric
        )

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.power == 2 else text.replace(self.symbol, "interpolation_w1", 1)


@final
class Contrast(Gate):
    """What the first part makes and the second does not, which no sum of divergences says::

        p*  ~  p_1 (w_1 p_1 / (w_1 p_1 + w_2 p_2)) exp(f / A)

    the first part, thinned by the probability that a sample at x is the first one's and not the
    second's. The factor is bounded by one, so that a bank of the first part carries the result,
    unlike the unbounded p_1 / p_2; where both agree it is w_1, a constant. It is the optimum of
    E[f + A log odds-probability] - A KL(p || p_1) (compare the contrast of Garipov et al.,
    NeurIPS 2023).
    """

    symbol = "-"

    def __init__(
        self,
        *parts: Circuit,
        weights: Sequence[float] | None = None,
        reward: Potential | None = None,
    ) -> None:
        super().__init__(*parts, weights=weights, reward=reward)
        if len(parts) != 2:
            raise ConfigError(f"Contrast takes two parts, a and not b; it got {len(parts)}.")

    def objective(
        self, priors: Sequence[Density], ratio: RatioEstimator | None = None
    ) -> Functional:
        odds = ExpectedReward(self.odds(priors[0].log, priors[1].log))
        utility = self.total * odds - self.total * KL(priors[0])
        return utility if self.reward is None else ExpectedReward(self.reward) + utility

    def _exact(self, priors: Sequence[Quadrature]) -> Quadrature:
        merged = priors[0].tilted(self.odds(priors[0].log, priors[1].log))
        return merged if self.reward is None else merged.tilted((1 / self.total) * self.reward)

    def odds(self, own: Potential, other: Potential) -> Odds:
        """log of the factor, from normalised log p_1 and log p_2."""
        return Odds(own, other, math.log(self.weights[1] / self.weights[0]))

"""What a line search remembers: earlier first variations, and the best step under all of them.

At a kink of the objective (a quantile between two values, mass that transport may send either way,
a repeated eigenvalue) no step along one first variation gains anything, although others do. A
bundle keeps the first variations of refused and of earlier steps, as planes above the objective,
and steps to the density that is best under the lowest of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from tiltflow.algorithms.steps import Array, Point, Trial
from tiltflow.potential import ZERO, Potential, combine

ROUNDING = 1e-14
"""Promises below this part of the objective, or of the spread of g, are rounding."""

STUCK = 0.9999
"""Of the last promise: a refused step that is remembered to so little effect is no kink's."""

SMALL = 1e-2
"""Below this, exponentials are 1 and something."""

STEEP = 1e8
"""Planes that are higher at p than this times the promise cannot be told from walls: left out."""

EXACT = 1e-3
"""How exactly the shares of planes are found, relative to what the step promises."""


@final
@dataclass(frozen=True, eq=False)
class Plane:
    """The linearisation q -> G[p] + error + E_q g - E_p g, seen from the current density p.

    Attributes:
        g: a first variation of G, at some density.
        values: of g on the bank, (N,).
        error: by how much the plane is above G at p; not negative where G is concave.
        share: of g in the last step.
    """

    g: Potential
    values: Array
    error: float = 0.0
    share: float = 0.0


@final
@dataclass(frozen=True, eq=False)
class Direction:
    """What a step goes along.

    Attributes:
        g: a mean of first variations.
        promise: what the step gains under the lowest plane, 0 where that is rounding; under one
            plane log E_p[exp(rate g)] / rate - E_p[g]. NaN where g has no values.
        stuck: whether the plane of the last refused step, of this rate, hardly changed it.
    """

    g: Potential
    promise: Callable[[], float]
    stuck: bool = False


@final
class Bundle:
    """Planes above G, at most ``size`` of them, seen from the density p that the loop is at.

    A step of a rate maximises the lowest plane less KL(q || p) / rate (Kiwiel, Math. Program. 85,
    1999). By duality it goes along sum_j a_j g_j with the shares a_j >= 0 of sum one that minimise
    what the step promises to gain::

        sum_j a_j error_j + log E_p exp(rate sum_j a_j (g_j - E_p g_j)) / rate

    Planes are kept as long as banks weigh the same points. They are those of the part of G that is
    not convex; the convex part enters by its linearisation at p, below which it cannot fall.

    Args:
        size: 1 for plain steps along the first variation, of which no value is needed then.
        concave: whether that part of G is concave. If not, a plane may cut into it: it is given
            up where that shows, and all are before a step is.
    """

    def __init__(self, size: int, concave: bool) -> None:
        self.size, self.concave = size, concave
        self.planes: list[Plane] = []
        self.current: Potential = ZERO
        self.stale = False
        """Whether there are planes from before p was reached."""
        self.last = (0.0, math.inf)
        """Rate and promise of the last step from p."""

    def start(self, point: Point[Any]) -> None:
        """Only the first variation at a point; nothing, where the bundle has been moved there."""
        if point.bent is self.current:
            return
        remembers = self.size > 1 and len(point.g_values) > 0
        self.planes = [Plane(point.bent, point.bent_values, share=1.0)] if remembers else []
        self.current, self.stale = point.bent, False

    def direction(self, point: Point[Any], rate: float) -> Direction:
        """The step of this rate from the point that the bundle has been started at or moved to."""
        if len(self.planes) > 1:
            highest = STEEP * _alone(point, rate)
            self.planes = [plane for plane in self.planes if plane.error <= highest]
        if len(self.planes) < 2:
            return Direction(point.g, functools.partial(_alone, point, rate))
        values = np.stack([plane.values for plane in self.planes])
        values = values + (point.g_values - point.bent_values)
        values = values - (values @ point.weights)[:, None]
        errors, start = np.array([(plane.error, plane.share) for plane in self.planes]).T
        floor = ROUNDING * abs(point.worth.value)
        shares, gain = best_shares(errors, values, point.weights, rate, start, floor)
        pairs = zip(self.planes, shares.tolist(), strict=True)
        self.planes = [replace(plane, share=share) for plane, share in pairs]
        g = combine(*((plane.share, plane.g) for plane in self.planes if plane.share > 0))
        promise = _resolved(gain, shares @ values, point)
        stuck = rate == self.last[0] and promise > STUCK * self.last[1]
        self.last = (rate, promise)
        return Direction(g + point.convex, lambda: promise, stuck)

    def add(self, trial: Trial[Any]) -> None:
        """The plane of a step that was refused."""
        if self.planes and not math.isnan(trial.error):
            new = trial.new
            self._append(Plane(new.bent, new.bent_values, max(trial.error, 0.0)))

    def move(self, trial: Trial[Any]) -> None:
        """To where an accepted step leads."""
        self.last = (0.0, math.inf)
        if not self.planes or math.isnan(trial.error):
            return  # ``start`` will begin anew
        old, new = trial.old, trial.new
        moved, gain = new.weights - old.weights, new.bent_worth - old.bent_worth
        rounding = 1e-12 * (abs(gain) + float(new.weights @ np.abs(new.bent_values)))
        kept = []
        for plane in self.planes:
            error = plane.error + float(moved @ plane.values) - gain
            if error >= -rounding:
                kept.append(replace(plane, error=max(error, 0.0)))
        self.planes, self.current, self.stale = kept, new.bent, bool(kept)
        self._append(Plane(new.bent, new.bent_values))

    def forget(self, point: Point[Any]) -> bool:
        """Give up planes that may be wrong and stand in the way; whether there were any."""
        if self.concave or not self.stale:
            return False
        self.current = ZERO
        self.start(point)
        return True

    def _append(self, plane: Plane) -> None:
        """Add a plane; in a full bundle, drop an unused one or merge the two least used."""
        if len(self.planes) >= self.size:
            order = sorted(range(len(self.planes)), key=lambda j: self.planes[j].share)
            least, other = (self.planes[j] for j in order[:2])
            if least.share > 0:
                a, b = least.share, other.share
                t = a / (a + b)
                self.planes[order[1]] = Plane(
                    t * least.g + (1 - t) * other.g, t * least.values + (1 - t) * other.values,
                    t * least.error + (1 - t) * other.error, a + b,
                )  # fmt: skip
            del self.planes[order[0]]
        self.planes.append(plane)


def _alone(point: Point[Any], rate: float) -> float:
    """The promise of one plane, without the cancellation of its two terms."""
    if not len(point.g_values):
        return math.nan
    values = point.g_values - point.weights @ point.g_values
    return _resolved(_log_mean_exp(rate * values, point.weights)[0] / rate, values, point)


def _resolved(promise: float, values: Array, point: Point[Any]) -> float:
    """The promise, or 0 where it is rounding."""
    spread = math.sqrt(float(point.weights @ values**2))
    return 0.0 if promise <= ROUNDING * (abs(point.worth.value) + spread) else promise


def _log_mean_exp(x: Array, weights: Array) -> tuple[float, Array]:
    """log E exp(x), and the weights of the tilt, (N,)."""
    x = np.where(weights > 0, x, -np.inf)
    top = float(x.max())
    tilted = weights * np.exp(x - top)
    total = float(tilted.sum())
    if top < SMALL:  # log E exp(x) is of second order in x, and its terms cancel
        return math.log1p(float(weights @ np.expm1(np.where(weights > 0, x, 0.0)))), tilted / total
    return math.log(total) + top, tilted / total


def best_shares(
    errors: Array, values: Array, weights: Array, rate: float, start: Array, floor: float
) -> tuple[Array, float]:
    """Shares a that minimise f(a) = a . errors + log E exp(rate a . values) / rate, and f there.

    Newton's method on the simplex: quadratic models, minimised exactly, and shortened steps.

    Args:
        errors: (M,).
        values: (M, N), of mean zero under ``weights`` (N,).
        weights: see above.
        rate: see above.
        start: (M,), not negative.
        floor: an error of f that does not matter.
    """

    def f(a: Array) -> tuple[float, Array]:
        log_mean, tilted = _log_mean_exp(rate * (a @ values), weights)
        return float(a @ errors) + log_mean / rate, tilted

    a = start / start.sum() if start.sum() > 0 else np.full(len(start), 1 / len(start))
    value, tilted = f(a)
    for _ in range(50):
        means = values @ tilted
        slope = errors + means
        if float(slope @ a - slope.min()) <= EXACT * value + floor:
            break
        curvature = rate * ((values * tilted) @ values.T - np.outer(means, means))
        towards = _on_simplex(slope - curvature @ a, curvature, a) - a
        descent, t = float(slope @ towards), 1.0
        new, tilted = f(a + towards)
        while new > value + 1e-4 * t * descent and t > 1e-8:
            t /= 2
            new, tilted = f(a + t * towards)
        if descent >= 0 or t <= 1e-8:
            break
        a, value = a + t * towards, new
    a = np.where(a > 1e-12, a, 0.0)
    return a / a.sum(), value


def _on_simplex(c: Array, matrix: Array, a: Array) -> Array:
    """argmin of c . a + a . matrix a / 2 over the simplex, by active sets from a feasible a."""
    # Planes that agree on the bank must not make it singular.
    matrix = matrix + 1e-12 * (matrix.trace() / len(c) + np.ptp(c) + 1e-300) * np.eye(len(c))
    free = a > 0
    for _ in range(10 * len(c)):
        target = _on_face(c, matrix, free)
        if (target < 0).any():
            falling = target < 0
            reach = np.where(falling, a / np.where(falling, a - target, 1.0), np.inf)
            first = int(reach.argmin())
            a = np.clip(a + reach[first] * (target - a), 0.0, None)
            a[first] = 0.0
            free[first] = False
            continue
        a = target
        slope = c + matrix @ a
        lowest = int(slope.argmin())
        if free[lowest] or slope[lowest] >= slope @ a - 1e-10 * np.abs(slope).max():
            break
        free[lowest] = True
    out: Array = a / a.sum()
    return out


def _on_face(c: Array, matrix: Array, free: Array) -> Array:
    """The minimum where only ``free`` shares differ from zero, of any sign."""
    n, scale = int(free.sum()), float(matrix[free, free].max())
    system = np.ones((n + 1, n + 1))
    system[:n, :n], system[n, n] = matrix[np.ix_(free, free)] / scale, 0.0
    out: Array = np.zeros(len(c))
    # Least squares, as the system may be singular to rounding.
    out[free] = np.linalg.lstsq(system, np.append(-c[free] / scale, 1.0), rcond=1e-15)[0][:n]
    return out

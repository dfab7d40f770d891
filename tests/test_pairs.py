"""Every utility with every divergence: mirror descent against a second route to the optimum."""

from __future__ import annotations

import pytest

from oracles.pairs import DIVERGENCES, MASS, UTILITIES, Pair

FAST = [(u, "KL") for u in UTILITIES] + [("ExpectedReward", d) for d in DIVERGENCES if d != "KL"]
SLOW = [(u, d) for u in UTILITIES for d in DIVERGENCES if (u, d) not in FAST]


def check(utility: str, divergence: str) -> None:
    """At most 1e-4 of the gain below the second route, and not far above it: both have converged
    (to local optima that may differ, where the objective is not concave)."""
    pair = Pair.of(utility, divergence)
    start = float(pair.value(MASS, 0.0))
    reached, best = pair.by_mirror_descent()[0], pair.by_second_route()
    gain = max(reached, best) - start
    assert reached >= best - 1e-4 * gain
    assert reached <= best + (1e-2 if pair.objective.curvature == "concave" else 3e-2) * gain


@pytest.mark.parametrize(("utility", "divergence"), FAST)
def test_pair(utility: str, divergence: str) -> None:
    """Every utility and every divergence once."""
    check(utility, divergence)


@pytest.mark.slow
@pytest.mark.parametrize(("utility", "divergence"), SLOW)
def test_other_pairs(utility: str, divergence: str) -> None:
    """The rest of the table."""
    check(utility, divergence)

"""The mean of a reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from tiltflow.density import Density
from tiltflow.functional import LINE, Certainty, Curvature, Functional
from tiltflow.potential import Potential
from tiltflow.types import Access, Estimate


@final
@dataclass(frozen=True, eq=False)
class ExpectedReward(Functional):
    """F[p] = E_p r, with first variation r: linear in p.

    ``ExpectedReward(r) - weight * KL(pretrained)`` is ordinary reward fine-tuning, and one step of
    rate 1 / weight solves it (methods, sections 3.3 and 2.1). Offers what the reward offers.

    Args:
        reward: r, (B, *event) -> (B,).
    """

    reward: Potential

    @property
    def curvature(self) -> Curvature:
        return "linear"

    def certainties(self) -> tuple[Certainty, ...]:
        return (Certainty(self.reward, LINE),)

    def offers(self, log: Access) -> Access:
        return self.reward.offers

    def value(self, p: Density) -> Estimate:
        self.reward.require(Access.VALUE, "ExpectedReward.value")
        return p.estimate(self.reward.value)

    def first_variation(self, p: Density) -> Potential:
        return self.reward

    def __str__(self) -> str:
        return f"ExpectedReward({self.reward})"

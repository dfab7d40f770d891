"""What a functional can do at a density, asked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from tiltflow.density import Bank, Density, FlowDensity
from tiltflow.errors import CapabilityError, ConfigError, UnsupportedError
from tiltflow.functional.base import Functional
from tiltflow.potential import Potential
from tiltflow.types import Access

_REMEDIES = {
    Access.VALUE: "Use a solver that needs gradients only, such as AdjointMatching, or a density "
    "whose log-probability is known.",
    Access.GRAD: "Use a solver that needs values only, such as WeightedMatching, or a "
    "differentiable reward.",
    Access.BOTH: "Use a differentiable reward, and a density with a known log-probability.",
}


_KNOWS = {
    Access.NONE: "neither its score nor its log-probability",
    Access.GRAD: "its score, not its log-probability",
    Access.VALUE: "its log-probability, not its score",
    Access.BOTH: "its score and its log-probability",
}


def check(objective: Functional, p: Density | Access, needs: Access, user: str) -> None:
    """Raise ``CapabilityError`` unless delta G at ``p`` offers ``needs``; draws no sample.

    Args:
        objective: the functional G.
        p: the density, or what its log offers.
        needs: what ``user`` cannot do without.
        user: who needs it, for the message.

    Raises:
        ConfigError: if a prior lives in another space.
        UnsupportedError: if scores of models on different schedules would be subtracted.
    """
    if isinstance(p, Density):
        check_priors(objective, p)

    def offered(functional: Functional) -> Access:
        return functional.offers(p) if isinstance(p, Access) else functional.offers_at(p)

    missing = needs & ~offered(objective)
    if not missing:
        return
    culprit = next((t for _, t in objective.terms if missing & ~offered(t)), objective)
    if isinstance(p, Access):
        reason = f"log p offers {p}"
    else:
        reason = f"{type(p).__name__} knows {_KNOWS[p.log.offers]}"
    raise CapabilityError(
        f"{culprit} offers {offered(culprit)} here ({reason}); {user} needs {needs}: {missing} is "
        f"missing. {_REMEDIES[missing]}"
    )


def check_priors(objective: Functional, p: Density) -> None:
    """Refuse priors that ``p`` cannot be compared with; draws no sample."""
    for prior in objective.priors:
        if None not in (p.event, prior.event) and p.event != prior.event:
            raise ConfigError(
                f"{objective}: the prior {type(prior).__name__} has samples of shape "
                f"{prior.event}, but the density that is tuned has {p.event}. Both must live in "
                "one space."
            )
        if not (isinstance(p, FlowDensity) and isinstance(prior, FlowDensity)):
            continue
        by_scores = Access.VALUE not in (p.log.offers | prior.log.offers)
        if by_scores and p.model.schedule != prior.model.schedule:
            raise UnsupportedError(
                f"{objective}: the prior's schedule is {prior.model.schedule}, that of the model "
                f"{p.model.schedule}; their scores shortly before t = 1 are of differently noised "
                "densities. Give both a likelihood, FlowDensity(model, log=Likelihood(model)), or "
                "use a divergence of samples, such as MMD."
            )


@final
@dataclass(frozen=True, eq=False)
class Promise(Potential):
    """A potential that does not exist yet, of which only the abilities are known."""

    access: Access

    @property
    def offers(self) -> Access:
        return self.access


@final
@dataclass(frozen=True, eq=False)
class FutureDensity(Density):
    """A density that does not exist yet; for asking functionals what they will offer at it."""

    promised: Potential

    @property
    def bank(self) -> Bank:
        raise UnsupportedError("A future density has no samples; abilities must not need any.")

    @property
    def log(self) -> Potential:
        return self.promised

"""The exact solver on a bank of samples: re-weighting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from tiltflow.context import Context
from tiltflow.density import Bank, Reweighted
from tiltflow.problem import ControlProblem, Solution
from tiltflow.types import Access


@final
@dataclass(frozen=True)
class BankSolver:
    """The exact tilt of a bank: weights proportional to (reference weights) * exp(terminal).

    ``stats``: ``path_kl`` = KL(new || reference) and ``step_kl`` = KL(new || init) between the
    weights, and the ``effective_size`` of the new ones, 1 / sum w^2.
    """

    needs: ClassVar[Access] = Access.VALUE

    def solve(
        self,
        problem: ControlProblem[Reweighted],
        context: Context,
        *,
        init: Reweighted | None = None,
    ) -> Solution[Reweighted]:
        """The re-weighted bank; ``init`` is only used to report how far the step went."""
        problem.terminal.require(self.needs, "BankSolver")
        old = problem.reference
        new = old.tilted(problem.terminal)
        stats = {
            "path_kl": weights_kl(new.bank, old.bank),
            "step_kl": weights_kl(new.bank, (old if init is None else init).bank),
            "effective_size": new.bank.effective_size,
        }
        return Solution(new, stats=stats)


def weights_kl(new: Bank, old: Bank) -> float:
    """KL between two weightings of the same points, in nats."""
    # A weight that has underflowed is not zero.
    p, q = new.weights.double(), old.weights.double().clamp(min=1e-300)
    ratio: Tensor = (p / q).log()[p > 0]
    return float((p[p > 0] * ratio).sum())

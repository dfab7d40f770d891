"""Weighted flow matching: fine-tuning from the values of a reward alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from tiltflow.context import Context
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel, device_of, freeze
from tiltflow.potential import Potential
from tiltflow.problem import ControlProblem, Result, Solution
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.solvers.common import (
    agreed,
    copied,
    endpoint_shift,
    evaluated,
    require_memoryless,
    to_train,
    with_known_moments,
)
from tiltflow.solvers.lean_adjoint import Steps
from tiltflow.solvers.weighted_bank import WeightedBank, draw, tempered
from tiltflow.training import Training, optimise
from tiltflow.types import Access, Conditions, expand_as, index_cond


@final
@dataclass(frozen=True, kw_only=True)
class WeightedMatching:
    """Fine-tune a flow model by flow matching on samples weighted with exp(terminal).

    Only values of the reward are used: it may be a black box. Samples X_1 of a proposal law get
    the weights u = dP_reference / dP_proposal and w = dP* / dP_proposal, proportional to
    u exp(phi), self-normalised in the log domain. They are noised, x_t = alpha X_1 + beta X_0,
    and the tuned end point is moved by delta = e_tuned(x_t) - e_reference(x_t). The loss is::

        sum over steps k of  weight_k E[w |delta|^2 - 2 (w - c(x_t) u) <delta, X_1 - e_reference>]

    with ``weight_k`` = on_endpoint^2 / (2 variance) of the sampler's step. For every function c,

    - its minimiser is e*(x_t) = E[w X_1 | x_t] / E[w | x_t], the end point of the tilted law.
      Proof: at the minimum delta E[w | x_t] = E[w r | x_t] - c E[u r | x_t] with
      r = X_1 - e_reference, and E[u r | x_t] = 0, because e_reference is the reference's
      conditional mean. c must not depend on X_1 beyond x_t: it is estimated from other samples;
    - its value is KL(P* || P_tuned) - KL(P* || P_reference) in nats, whose lowest value is minus
      the KL of the tilt. It starts at 0 when training starts from the reference.

    c = 0 is plain reward-weighted regression, of E[w |e_tuned - X_1|^2]. With c near E[w | x_t]
    (``WeightedBank.expected_excess``) the noise is that of w *given* x_t instead of X_1 given
    x_t: it vanishes near the data, and everywhere for a constant reward, which leaves the model
    as it was, bit for bit. And where a network's end points are not the conditional means of its
    own samples, which is always a little so, their error cancels instead of being "repaired" at
    the expense of KL. The regression is on forward KL: it covers all modes.

    Tilts that are too strong for samples of the reference need ``proposal="mixed"``: half of the
    samples of each round come from the model in training (in the first round from ``init``), and
    weights are those of the mixture. All rounds but the last are tempered to ``min_effective``,
    so that a strong tilt is approached in stages. Repeated weighting with a proposal that follows
    is the cross-entropy method for path laws (Kappen and Ruiz, J. Stat. Phys. 162, 2016).

    Where the last bank has fewer than ``min_effective_size`` effective samples, no regression on
    it can be trusted: the result is ``DEGENERATE`` and the model an untouched copy of ``init``
    (default: of the reference). With ``proposal="reference"`` that is known before any update.

    With conditions, weights are normalised per distinct condition, each of which has a normaliser
    of its own; conditions that repeat too rarely for that are refused. Every process draws and
    normalises a bank of its own and gradients are averaged; decisions are made in common.

    Args:
        sampler: kernel and steps of the samples; sample with as many steps as were trained.
        training: optimiser settings.
        num_samples: samples of a bank; ``rounds`` banks are drawn.
        batch_size: points per micro-batch, each at a random time, stratified over the steps.
        neighbours: samples that c is estimated from, drawn anew in each update; 0 sets c = 0.
            Worth it up to some hundred; the cost per update is batch_size * neighbours * dim.
        rounds: training is cut into so many parts, each with a fresh bank.
        proposal: where samples come from, ``"mixed"`` or ``"reference"``.
        min_effective_size: smallest effective sample size of the last bank.
        min_effective: effective sample fraction to which earlier banks are tempered (mixed only).
        num_evaluate: fresh trajectories for the final statistics.

    ``stats``: ``path_kl``, ``terminal``, ``gap`` and ``effective`` of the tuned model as in
    ``AdjointMatching``; ``effective_size`` and ``tilt_kl`` of the last bank. After a good fit
    ``path_kl`` is near ``tilt_kl``, an estimate of the optimum's (too low where the effective
    size is small).

    Cost: ``num_steps`` evaluations per sample (three times as many from a mixed proposal), one
    evaluation of the reward per sample, and two of the model per point of an update.
    """

    needs: ClassVar[Access] = Access.VALUE
    sampler: Sampler = field(default_factory=Sampler)
    training: Training = field(
        default_factory=lambda: Training(num_updates=4000, learning_rate=5e-3, ema=0.99)
    )
    num_samples: int = 4096
    batch_size: int = 256
    neighbours: int = 512
    rounds: int = 5
    proposal: Literal["mixed", "reference"] = "mixed"
    min_effective_size: float = 100.0
    min_effective: float = 0.1
    num_evaluate: int = 1024

    def __post_init__(self) -> None:
        checks = {
            "num_samples": self.num_samples >= 2,
            "batch_size": self.batch_size >= 1,
            "neighbours": self.neighbours >= 0,
            "rounds": self.rounds >= 1,
            "proposal": self.proposal in ("mixed", "reference"),
            "min_effective_size": 1 <= self.min_effective_size <= self.num_samples,
            "min_effective": 0 < self.min_effective < 1,
            "num_evaluate": self.num_evaluate >= 2,
        }
        for name, fine in checks.items():
            if not fine:
                raise ConfigError(
                    f"WeightedMatching: {name}={getattr(self, name)!r} out of range."
                )
        require_memoryless(self.sampler, "WeightedMatching")

    def solve(
        self,
        problem: ControlProblem[FlowModel],
        context: Context,
        *,
        init: FlowModel | None = None,
    ) -> Solution[FlowModel]:
        """The reference tilted by exp(terminal), as a flow model.

        Raises:
            CapabilityError: before any work, if the terminal potential has no values.
            UnsupportedError: before any work, if conditions repeat too rarely to be normalised.
            NonFiniteError: if a state, value or loss is not finite.
        """
        problem.terminal.require(self.needs, "WeightedMatching")
        reference = with_known_moments(
            freeze(problem.reference), init, self.sampler, problem.conditions, context
        )
        loss = _Regression(self, reference, init, problem.terminal, problem.conditions, context)
        done = optimise(loss.tuned.trainable, loss, self.training, context)
        tuned = copied(reference, init) if loss.degenerate else freeze(loss.tuned)
        stats = evaluated(
            tuned, reference, problem.terminal, sampler=self.sampler, count=self.num_evaluate,
            seed=context.seed.child("evaluate"), conditions=problem.conditions,
        )  # fmt: skip
        stats = loss.stats | stats | {"num_updates": float(done)}
        return Solution(tuned, Result.DEGENERATE if loss.degenerate else Result.DONE, stats)


@final
class _Regression:
    """The loss of weighted matching: draws a bank at the start of each round."""

    def __init__(
        self,
        solver: WeightedMatching,
        reference: FlowModel,
        init: FlowModel | None,
        terminal: Potential,
        conditions: Conditions | None,
        context: Context,
    ) -> None:
        self.solver, self.context = solver, context
        self.reference, self.tuned = reference, to_train(reference, init)
        self.init = None if init is None else copied(reference, init)
        self.terminal, self.conditions = terminal, conditions
        steps = Steps.of(solver.sampler, reference, torch.zeros((), device=device_of(reference)))
        noisy = steps.weight > 0
        self.t, self.weight = steps.t[noisy], steps.weight[noisy]
        self.per_round = max(1, math.ceil(solver.training.num_updates / solver.rounds))
        self.round, self.degenerate, self.stats = -1, False, dict[str, float]()
        self.bank: WeightedBank | None = None

    # --- the protocol of training.optimise -------------------------------------------------------

    def __call__(self, update: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        bank, size = self.bank, self.solver.batch_size
        assert bank is not None
        generator = self._seed("update", update, part).generator(self.t.device)
        own = torch.multinomial(bank.chance, size, replacement=True, generator=generator)
        k = self._stratified(size, generator)
        t, x1, cond = self.t[k], bank.points[own], index_cond(bank.cond, own)
        schedule, space = self.reference.schedule, self.reference.space
        alpha, beta = schedule.alpha(t), schedule.beta(t)
        noise = space.noise(size, generator, cond, x1.dtype)
        x = expand_as(alpha, x1) * x1 + expand_as(beta, x1) * noise
        with self.context.backend.autocast():
            base, shift = endpoint_shift(self.tuned, self.reference, x, t, cond)
        chance, weight = bank.chance[own], bank.weight[own]
        pull = weight
        if self.solver.neighbours:
            others = torch.randint(
                len(bank.points), (self.solver.neighbours,),
                generator=generator, device=generator.device,
            )  # fmt: skip
            c = bank.expected_excess(x, alpha, beta, own, others)
            pull = weight - bank.base[own] - c * bank.base[own]
        keep, pull = (weight / chance).to(x), (pull / chance).to(x)
        each = keep * space.inner(shift, shift) - 2 * pull * space.inner(shift, x1 - base)
        return len(self.t) * (self.weight[k] * each).mean(), self.stats

    def between_rounds(self, update: int) -> bool:
        # The bank of a mixed proposal depends on the parameters at its start.
        return self.solver.proposal == "reference" or update % self.per_round == 0

    def converged(self, update: int) -> bool:
        """Enter the round of an update; training ends where its bank is hopeless."""
        number = update // self.per_round
        if number != self.round:
            self.round = number
            self._enter(number)
        return self.degenerate

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to load: every bank and every batch is drawn from its address."""

    # --- one round -------------------------------------------------------------------------------

    def _enter(self, number: int) -> None:
        solver, other = self.solver, None
        if solver.proposal == "mixed":
            other = self.init if number == 0 else freeze(self.tuned.clone())
        samples = draw(
            self.reference, other, self.terminal, solver.num_samples, sampler=solver.sampler,
            seed=self._seed("bank", number), conditions=self.conditions,
            least=solver.min_effective_size,
        )  # fmt: skip
        if solver.proposal == "mixed" and number < solver.rounds - 1:
            least = max(solver.min_effective_size, solver.min_effective * solver.num_samples)
            self.bank = tempered(samples, least)
        else:
            self.bank = WeightedBank.of(samples)
            size = agreed(self.bank.effective_size, self.context.backend)
            self.degenerate = size < solver.min_effective_size
        self.stats = self.bank.stats

    def _seed(self, *labels: str | int) -> Seed:
        seed, backend = self.context.seed.child(*labels), self.context.backend
        if backend.num_processes == 1:
            return seed
        return seed.child("process", backend.process_index)

    def _stratified(self, size: int, generator: torch.Generator) -> Tensor:
        """Steps (B,), each equally often up to rounding, in no order that samples could share."""
        u = torch.rand(size, generator=generator, device=generator.device)
        spread = (torch.arange(size, device=u.device) + u) / size
        return (spread * len(self.t)).long().clamp(max=len(self.t) - 1)

"""Back-propagation through the sampler: the baseline that needs no theory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tiltflow.context import Context
from tiltflow.errors import ConfigError, NonFiniteError
from tiltflow.flow import FlowModel, device_of, freeze
from tiltflow.potential import Potential
from tiltflow.problem import ControlProblem, Result, Solution
from tiltflow.sample import Sampler
from tiltflow.solvers.common import (
    agreed,
    endpoint_shift,
    evaluated,
    require_memoryless,
    to_train,
    with_known_moments,
)
from tiltflow.solvers.lean_adjoint import Steps
from tiltflow.training import Training, optimise
from tiltflow.types import Access, Cond, Conditions, drawn_cond

STARVED = 10
"""So many updates in a row without a reward gradient, at the end, are ``Result.STARVED``."""


@final
@dataclass(frozen=True, kw_only=True)
class DirectBackprop:
    """Fine-tune a flow model by the gradient of a differentiable reward through its sampler.

    Samples are made with the noise z_k of a fresh seed and differentiated path by path::

        x_{k+1} = mean_tuned(x_k) + sqrt(v_k) z_k
        loss    = E[ -phi(x_K) + sum_k |mean_tuned(x_k) - mean_reference(x_k)|^2 / (2 v_k) ]

    With all steps differentiated (``depth=None``) that is minus the objective of the discretised
    problem, E[phi] - KL(P || P_reference) in nats, with its exact gradient: no approximation, but
    a graph of all steps (memory, or a second evaluation with ``checkpointing``) and gradients that
    grow along unstable paths.

    With ``depth=K`` only the last K steps are differentiated and only their KL counts (DRaFT-K;
    Clark et al., arXiv 2309.17400, section 4.2). That is cheaper and calmer, but biased: the
    optimum is that of a problem in which earlier steps are given. Their parameters move all the
    same where a network shares them between times, at no charge, so that ``path_kl`` can be far
    more than the loss says. A baseline; ``AdjointMatching`` has the whole problem at the price of
    vector-Jacobian products of the reference.

    Where the potential has no values, the gradient is the same and the reported loss lacks -phi.

    Args:
        sampler: kernel and steps; sample with as many steps as were trained.
        training: optimiser settings.
        num_trajectories: fresh trajectories of each micro-batch.
        depth: how many of the last steps are differentiated; ``None`` for all.
        checkpointing: keep the states of the differentiated steps only, and evaluate both models
            again on the way back: memory of one step instead of ``depth``, a third more time.
        num_evaluate: fresh trajectories for the final statistics.

    ``stats``: as ``AdjointMatching``.

    Cost of an update: ``num_steps`` evaluations of the tuned model, ``depth`` of the reference
    and as many vector-Jacobian products of both. Several processes draw different trajectories
    and average gradients.
    """

    needs: ClassVar[Access] = Access.GRAD
    sampler: Sampler = field(default_factory=Sampler)
    training: Training = field(
        default_factory=lambda: Training(num_updates=800, learning_rate=5e-3, ema=0.99)
    )
    num_trajectories: int = 64
    depth: int | None = None
    checkpointing: bool = False
    num_evaluate: int = 1024

    def __post_init__(self) -> None:
        steps = self.sampler.num_steps
        checks = {
            "num_trajectories": self.num_trajectories >= 1,
            "depth": self.depth is None or 1 <= self.depth <= steps,
            "num_evaluate": self.num_evaluate >= 2,
        }
        for name, fine in checks.items():
            if not fine:
                raise ConfigError(
                    f"DirectBackprop: {name}={getattr(self, name)!r} out of range"
                    f"{f' (the sampler has {steps} steps)' if name == 'depth' else ''}."
                )
        require_memoryless(self.sampler, "DirectBackprop")

    def solve(
        self,
        problem: ControlProblem[FlowModel],
        context: Context,
        *,
        init: FlowModel | None = None,
    ) -> Solution[FlowModel]:
        """The reference tilted by exp(terminal), as a flow model; biased where truncated.

        Raises:
            CapabilityError: before any work, if the terminal potential has no gradient.
            NonFiniteError: if a state, gradient or loss is not finite.
        """
        problem.terminal.require(self.needs, "DirectBackprop")
        reference = with_known_moments(
            freeze(problem.reference), init, self.sampler, problem.conditions, context
        )
        tuned = to_train(reference, init)
        loss = _Unrolled(self, tuned, reference, problem.terminal, problem.conditions, context)
        done = optimise(tuned.trainable, loss, self.training, context)
        freeze(tuned)
        stats = evaluated(
            tuned, reference, problem.terminal, sampler=self.sampler, count=self.num_evaluate,
            seed=context.seed.child("evaluate"), conditions=problem.conditions,
        )  # fmt: skip
        result = Result.STARVED if loss.starved >= STARVED else Result.DONE
        return Solution(tuned, result, stats | {"num_updates": float(done)})


@final
class _Unrolled:
    """Minus the objective on fresh trajectories, with a graph through their last steps."""

    def __init__(
        self,
        solver: DirectBackprop,
        tuned: FlowModel,
        reference: FlowModel,
        terminal: Potential,
        conditions: Conditions | None,
        context: Context,
    ) -> None:
        self.solver, self.tuned, self.reference = solver, tuned, reference
        self.terminal, self.conditions, self.context = terminal, conditions, context
        like = torch.zeros((), device=device_of(reference))
        self.steps = Steps.of(solver.sampler, reference, like)
        self.deterministic = (self.steps.weight == 0).tolist()
        self.starved = 0

    # --- the protocol of training.optimise -------------------------------------------------------

    def __call__(self, update: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        end, kl, cond = self._walk(update, part)
        value, slope = self._terminal(end.detach(), cond)
        active = agreed(float(slope.flatten(1).any(1).float().mean()), self.context.backend)
        self.starved = self.starved + 1 if active == 0 else 0
        inner = self.reference.space.inner(slope, end)  # has the gradient of phi(end)
        gain = inner - inner.detach()
        stats = {"path_kl": float(kl.detach().mean()), "active": active}
        if value is not None:
            gain = gain + value
            stats["terminal"] = float(value.mean())
        return (kl - gain).mean(), stats

    def between_rounds(self, update: int) -> bool:
        return True

    def converged(self, update: int) -> bool:
        return False

    def state(self) -> Mapping[str, Tensor]:
        return {"starved": torch.tensor(self.starved)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.starved = int(state["starved"])

    # --- one batch of trajectories ---------------------------------------------------------------

    def _walk(self, update: int, part: int) -> tuple[Tensor, Tensor, Cond | None]:
        """End points (B, *event) with their graph, the KL of the steps in it (B,), conditions."""
        count, seed = self.solver.num_trajectories, self.context.seed.child("update", update, part)
        if self.context.backend.num_processes > 1:
            seed = seed.child("process", self.context.backend.process_index)
        cond = drawn_cond(self.conditions, count, seed)
        generator = seed.child("paths").generator(self.steps.t.device)
        x = self.reference.space.noise(count, generator, cond)
        total, kl = len(self.steps.t), x.new_zeros(count)
        first = total - (self.solver.depth or total)
        for k in range(total):
            z = self.reference.space.noise(count, generator, cond)
            if k < first:
                with torch.no_grad():
                    x = self._blind(k, x, z, cond)
            elif self.solver.checkpointing:
                x, cost = checkpoint(
                    self._step, k, x, z, cond, use_reentrant=False, preserve_rng_state=False
                )
                kl = kl + cost
            else:
                x, cost = self._step(k, x, z, cond)
                kl = kl + cost
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                "direct back-propagation", update, "the state", "Lower the learning rate."
            )
        return x, kl, cond

    def _step(self, k: int, x: Tensor, z: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        """The next state (B, *event), and the KL of the step (B,)."""
        with self.context.backend.autocast():
            base, shift = endpoint_shift(
                self.tuned, self.reference, x, self.steps.t[k].expand(len(x)), cond, frozen=False
            )
        if self.deterministic[k]:
            # Its KL is 0 or infinite: untrained, or the reward would be raised here for nothing.
            return self._next(k, x, base + shift.detach(), z), x.new_zeros(len(x))
        kl = self.steps.weight[k] * self.reference.space.inner(shift, shift)
        return self._next(k, x, base + shift, z), kl

    def _blind(self, k: int, x: Tensor, z: Tensor, cond: Cond | None) -> Tensor:
        """The next state, without the reference."""
        with self.context.backend.autocast():
            end = self.tuned.endpoint(x, self.steps.t[k].expand(len(x)), cond)
        return self._next(k, x, end, z)

    def _next(self, k: int, x: Tensor, endpoint: Tensor, z: Tensor) -> Tensor:
        c = self.steps.coefficients
        return c.on_state[k] * x + c.on_endpoint[k] * endpoint + c.variance[k].sqrt() * z

    def _terminal(self, x: Tensor, cond: Cond | None) -> tuple[Tensor | None, Tensor]:
        """Values (B,), where the potential has them, and gradients (B, *event) in the space."""
        if self.terminal.offers is Access.BOTH:
            value, slope = self.terminal.value_and_grad(x, cond)
        else:
            value, slope = None, self.terminal.grad(x, cond)
        return value, self.reference.space.project(slope, cond)

"""What the trained solvers share: how they start, and what they report at the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltflow.context import Backend, Context
from tiltflow.delta import Correction
from tiltflow.errors import UnsupportedError
from tiltflow.flow import FlowModel, freeze, require_own_rollouts, unfreeze
from tiltflow.kernel import Auto
from tiltflow.potential import Potential
from tiltflow.sample import Sampler, calibrated, step_kl
from tiltflow.seed import Seed
from tiltflow.types import Access, Cond, Conditions, drawn_cond, expand_as


def require_memoryless(sampler: Sampler, user: str) -> None:
    """Raise ``UnsupportedError`` unless the sampler's kernel can be trained with."""
    if not sampler.kernel.memoryless:
        raise UnsupportedError(
            f"{user} cannot train with {type(sampler.kernel).__name__}: it is "
            "not memoryless, so the tilt would be biased. Train with EulerMaruyama or "
            "Ancestral, and sample with any kernel afterwards."
        )


def with_known_moments(
    reference: FlowModel,
    init: FlowModel | None,
    sampler: Sampler,
    conditions: Conditions | None,
    context: Context,
) -> FlowModel:
    """The reference with the posterior variance that ``Auto`` needs, measured if unknown."""
    if not isinstance(sampler.kernel, Auto) or reference.moments is not None:
        return reference
    if init is not None and init.moments is not None:
        return reference.with_moments(init.moments)
    return calibrated(
        reference, seed=context.seed.child("calibration"), conditions=conditions,
        num_steps=sampler.num_steps,
    )  # fmt: skip


def copied(reference: FlowModel, init: FlowModel | None) -> FlowModel:
    """A frozen copy of ``init`` (default: the reference) that has the reference's moments."""
    for model in (reference, init or reference):
        require_own_rollouts(model, "This solver")
    start = freeze((init or reference).clone())
    return start if reference.moments is None else start.with_moments(reference.moments)


def to_train(reference: FlowModel, init: FlowModel | None) -> FlowModel:
    """The same copy with its gradients switched on."""
    return unfreeze(copied(reference, init))


def agreed(number: float, backend: Backend) -> float:
    """The mean over processes: all of them must come to the same decisions."""
    if backend.num_processes == 1:
        return number
    mean = backend.reduce(torch.tensor(number, device=backend.device), reduction="mean")
    return float(mean)


def spread(log_weight: Tensor) -> float:
    """KL(P || P*) in nats: log mean exp minus mean of log dP* / dP up to a constant."""
    return float(log_weight.logsumexp(0) - math.log(len(log_weight)) - log_weight.mean())


def effective_size(log_weight: Tensor) -> float:
    """Kish's effective sample size (sum w)^2 / sum w^2 of w = exp(log_weight), (N,)."""
    return float((2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp())


@torch.no_grad()
def evaluated(
    tuned: FlowModel,
    reference: FlowModel,
    terminal: Potential | None,
    *,
    sampler: Sampler,
    count: int,
    seed: Seed,
    conditions: Conditions | None = None,
) -> dict[str, float]:
    """Statistics of a tuned model on ``count`` fresh trajectories.

    ``path_kl``: KL(P || P_reference) of the sampler's path laws. With the values of ``terminal``
    also ``terminal``, its mean; and without conditions ``gap``, an estimate of KL(P || P*) from
    the spread of phi - log dP / dP_reference, and ``effective``, the effective sample fraction of
    those path weights. ``*_error`` are standard errors.
    """
    cond = drawn_cond(conditions, count, seed)
    path = sampler.simulate(tuned, count, seed=seed.child("paths"), cond=cond)
    kl, ratio = step_kl(tuned, reference, sampler.kernel, path, own=True)
    stats = {"path_kl": float(kl.mean()), "path_kl_error": float(kl.std()) / count**0.5}
    if terminal is None or Access.VALUE not in terminal.offers:
        return stats
    value = terminal.value(path.end, cond)
    stats |= {
        "terminal": float(value.mean()),
        "terminal_error": float(value.std()) / count**0.5,
    }
    if cond is None:
        log_weight = (value - ratio).double()
        stats |= {"gap": spread(log_weight), "effective": effective_size(log_weight) / count}
    return stats


def endpoint_shift(
    tuned: FlowModel,
    reference: FlowModel,
    x: Tensor,
    t: Tensor,
    cond: Cond | None,
    *,
    frozen: bool = True,
) -> tuple[Tensor, Tensor]:
    """End points of the reference, and the tuned ones minus these, both (B, *event).

    The difference has the gradient of what is trained; unless ``frozen``, both also have that of
    x. A network that both models share is evaluated once, and a correction that is exactly zero
    not at all.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        end = base = reference.frozen_endpoint(x, t, cond)
        known = None if _is_null(reference) else reference.correction(x, t, cond, end)
    beta2 = expand_as(reference.schedule.beta(t), x) ** 2
    if known is not None:
        base = base + beta2 * known
    if tuned.net is not reference.net:
        return base, tuned.endpoint(x, t, cond) - base
    own = tuned.correction(x, t, cond, end)
    own = torch.zeros_like(x) if own is None else own
    return base, beta2 * (own if known is None else own - known)


def _is_null(model: FlowModel) -> bool:
    return isinstance(model.delta, Correction) and model.delta.is_null()

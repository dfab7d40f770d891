"""Learned guidance: a correction that knows where the reward goes up, and learns how far to go."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from tiltflow.delta import MLP, Correction
from tiltflow.errors import ConfigError
from tiltflow.features import Features
from tiltflow.flow import FlowModel
from tiltflow.potential import Potential
from tiltflow.types import Access, Cond, expand_as, index_cond


@final
class LearnedGuidance(nn.Module):
    """c(x, t) = gain(t, r(e)) grad r(e) at the predicted end point e = endpoint(x, t).

    The optimal correction is grad Phi_t / alpha_t with Phi_t = log E[exp phi(X_1) | X_t]; to first
    order Phi_t(x) is phi at the end point, so that its direction is known and only its length, a
    function of two numbers, is left to learn. A handful of roll-outs teach that; a network that
    has to find the direction too needs far more of them (docs/digits.md).
    A reward that is not known yet, as the later steps of a mirror descent, but is a function of
    features F (m,) has its gradient in the span of theirs: J_F(e)^T gain(t, F(e)), with m gains.
    The price: sampling evaluates these gradients at every step after ``since``.

    Args:
        model: the frozen model, shared.
        along: r, which offers value and gradient, or F, of values about one; taken at end points.
        hidden: widths of the layers of the gain.
        frequencies: Fourier pairs of t.
        since: nothing is added before this time. Long before the data an end point says little of
            a reward of details, such as the bonds of a molecule, and may be nothing that the
            reward can be asked about.
        init_seed: of the initial weights; the global generator is left alone, so that a run that
            is started again starts the same.
    """

    sees_endpoint = True

    def __init__(
        self,
        model: FlowModel,
        along: Potential | Features,
        hidden: Sequence[int] = (32, 32),
        frequencies: int = 4,
        since: float = 0.0,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= since < 1:
            raise ConfigError(f"LearnedGuidance: since={since!r} must be in [0, 1).")
        self.since = since
        if isinstance(along, Potential):
            along.require(Access.BOTH, "LearnedGuidance")
        # Behind a tuple, so that neither is registered: they are shared, not trained or saved.
        self._shared = (model, along)
        self.size = 1 if isinstance(along, Potential) else _count(along, model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            self.gain = MLP((self.size,), hidden, frequencies=frequencies, zero_init=True)

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond | None = None, *, endpoint: Tensor | None = None
    ) -> Tensor:
        """(B, *event), (B,) -> (B, *event); ``endpoint`` is that of the frozen model, if known."""
        values = x.new_zeros(len(t), self.size)
        directions = x.new_zeros(len(t), self.size, *x.shape[1:])
        late = (t >= self.since).nonzero()[:, 0]
        if len(late):
            seen = None if endpoint is None else endpoint[late]
            found = self._found(x[late], t[late], index_cond(cond, late), seen)
            values[late], directions[late] = (each.to(x) for each in found)
        # Of all rows, so that training may ask for a gradient where there are no late ones.
        gains: Tensor = self.gain(values, t)
        return (expand_as(gains, directions) * directions).sum(1)

    def _found(
        self, x: Tensor, t: Tensor, cond: Cond | None, endpoint: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, size) values at the end point of the frozen model, (B, size, *event) gradients."""
        model, along = self._shared
        if endpoint is None:
            with torch.no_grad():
                endpoint = model.frozen_endpoint(x.detach(), t, cond)
        if isinstance(along, Features):
            return along.value_and_jacobian(endpoint.detach(), cond)
        value, direction = along.value_and_grad(endpoint.detach(), cond)
        return value[:, None], direction[:, None]

    def __deepcopy__(self, memo: dict[int, Any]) -> LearnedGuidance:
        other = LearnedGuidance.__new__(LearnedGuidance)
        nn.Module.__init__(other)
        other._shared, other.gain = self._shared, copy.deepcopy(self.gain, memo)
        other.since, other.size = self.since, self.size
        return other


def _count(features: Features, model: FlowModel) -> int:
    """How many there are."""
    return features.value(model.space.noise(1, torch.Generator())).shape[1]


def guided(
    model: FlowModel,
    along: Potential | Features,
    hidden: Sequence[int] = (32, 32),
    *,
    since: float = 0.0,
) -> FlowModel:
    """The same model, to be trained through ``LearnedGuidance`` instead of its own weights."""
    guidance = LearnedGuidance(model, along, hidden, since=since)
    return model.with_delta(Correction(guidance, takes_cond=model.takes_cond))

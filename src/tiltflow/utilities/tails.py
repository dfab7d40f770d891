"""How many samples the mean of a tail needs."""

from __future__ import annotations

import math

from tiltflow.density import Bank
from tiltflow.errors import ConfigError

FEWEST_TAIL_SAMPLES = 10
"""Below this many effective samples in the tail, its threshold is noise."""

GOOD_TAIL_SAMPLES = 100
"""So many samples in the tail make a threshold good to a few percent (methods, section 3.7)."""


def samples_for_tail(mass: float) -> int:
    """Bank size with which the threshold of a tail of probability ``mass`` is good."""
    return math.ceil(GOOD_TAIL_SAMPLES / mass)


def require_tail(user: object, mass: float, bank: Bank) -> None:
    """Raise ``ConfigError`` if fewer than 10 effective samples of the bank lie in a tail.

    Args:
        user: who needs the tail, for the message.
        mass: probability of the tail.
        bank: the samples; quadrature nodes are always enough.
    """
    in_tail = mass * bank.effective_size
    if not bank.exact and in_tail < FEWEST_TAIL_SAMPLES * (1 - 1e-9):
        raise ConfigError(
            f"{user}: the bank has {bank.effective_size:.0f} effective samples, so that "
            f"{in_tail:.1f} are in the tail; at least {FEWEST_TAIL_SAMPLES} are needed. "
            f"Draw num_samples >= {GOOD_TAIL_SAMPLES / mass:.0f}, or choose a less extreme level."
        )

"""The exceptions of the library: a hierarchy one can catch by kind.

Every message is a sentence that says what was wrong, where, and what to do.
"""

from __future__ import annotations


class TiltflowError(Exception):
    """Base class of every error raised on purpose by this library."""


class CapabilityError(TiltflowError):
    """A part needs a value, a gradient or a log-density that another part cannot give."""


class UnsupportedError(TiltflowError):
    """The request is well formed, but mathematically or technically not available."""


class ShapeError(TiltflowError):
    """A tensor has another shape, dtype or device than its contract says."""


class ConfigError(TiltflowError):
    """A run file or a constructor argument is wrong; the message names the key."""


class CheckpointError(TiltflowError):
    """A checkpoint is missing, damaged, or belongs to something else."""


class NonFiniteError(TiltflowError):
    """A number became NaN or infinite, so that everything after it would be meaningless.

    Args:
        stage: what was being done, e.g. ``"adjoint matching"``.
        step: the update, iteration or time step at which it happened.
        quantity: the name of the number, e.g. ``"loss"``.
        remedy: what to try, as a sentence.
    """

    def __init__(
        self, stage: str, step: int | str, quantity: str, remedy: str = "Try a smaller rate."
    ) -> None:
        self.stage, self.step, self.quantity = stage, step, quantity
        super().__init__(f"{stage}, step {step}: {quantity} is not finite. {remedy}")

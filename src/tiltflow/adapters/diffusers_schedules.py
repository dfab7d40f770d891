"""Schedulers of diffusers as schedules, and their timesteps as grids of this library's times.

A scheduler is read, not run: its table of alphas or its sigmas become a ``Schedule``, its
timesteps a grid, and a step is then ``Deterministic`` (DDIM with eta = 0, Euler's method on
flows) or ``Ancestral`` (DDIM with eta = 1, DDPM). These are the scheduler's own steps, to
rounding; probing ``step`` with basis inputs would find the same three numbers, but only at its own
timesteps and in the precision of its tables.

Diffusion: timestep k = 0..T-1 is at t = (T - 1 - k) / T, and t = 1 is clean data, which the table
does not have. Flows: x = (1 - sigma) data + sigma noise, so that t = 1 - sigma.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.kernel import Ancestral, Coefficients, Deterministic, LinearKernel, Regridded
from tiltflow.sample import Sampler
from tiltflow.schedule import Linear, Schedule, Tabulated

TABLES = ("DDIMScheduler", "DDPMScheduler")
"""Read as they are: their steps are this library's."""
SOLVERS = (
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Read as the DDPM scheduler, or the flow-matching one, of the same config: only what a model was
trained with and how its timesteps are spaced is theirs, sampling is this library's."""


@final
@dataclass(frozen=True)
class DeterministicOn(LinearKernel):
    """``Deterministic`` on given times; it samples, and cannot train.

    Args:
        times: increasing times in [0, 1]; ``num_steps`` must be ``len(times) - 1``.
    """

    memoryless: ClassVar[bool] = False
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        Regridded(Ancestral(), self.times)  # the same demands on times

    def coefficients(self, schedule: Schedule, t: Tensor, s: Tensor) -> Coefficients:
        return Deterministic().coefficients(schedule, t, s)

    def grid(self, num_steps: int) -> Tensor:
        return Regridded(Ancestral(), self.times).grid(num_steps)


def schedule_of(scheduler: Any) -> Schedule:
    """The interpolant that a diffusers scheduler belongs to.

    Args:
        scheduler: of DDPM or DDIM, with or without ``rescale_betas_zero_snr``;
            ``FlowMatchEulerDiscreteScheduler``; or a solver of either kind (``SOLVERS``).

    Returns:
        ``Linear`` for flows, ``Tabulated`` for diffusion: T + 1 nodes, the scheduler's
        ``alphas_cumprod`` and clean data.

    Raises:
        UnsupportedError: for other schedulers, and for options whose steps are not Gaussian.
    """
    scheduler = _readable(scheduler)
    if _is_flow(scheduler):
        return Linear()
    return Tabulated((1.0, *scheduler.alphas_cumprod.double().tolist()))


def unclipped(scheduler: Any) -> tuple[Any, float | None]:
    """A DDPM scheduler that clips predicted images, as one that does not, and the largest pixel.

    DDPM's step with a clipped prediction is the step of a network that predicts clipped images
    (``PipelineNet(clip=...)``). DDIM keeps the noise of the prediction before the clip, which no
    network predicts: its scheduler, like all others, is returned as it is.
    """
    if type(scheduler).__name__ != "DDPMScheduler" or not scheduler.config.clip_sample:
        return scheduler, None
    plain = type(scheduler).from_config(scheduler.config, clip_sample=False)
    return plain, float(scheduler.config.clip_sample_range)


def prediction_of(scheduler: Any) -> str:
    """``"flow"``, ``"epsilon"``, ``"v_prediction"`` or ``"sample"``: what networks return."""
    scheduler = _readable(scheduler)
    return "flow" if _is_flow(scheduler) else str(scheduler.config.prediction_type)


def times_of(
    scheduler: Any,
    num_steps: int,
    *,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> tuple[float, ...]:
    """The scheduler's timesteps and the end of its last step, as increasing times in [0, 1].

    With ``set_alpha_to_one=False`` (Stable Diffusion) the end is not clean data but level 0, at
    t = (T - 1) / T; a last step that starts there changes nothing, and is left out.

    Args:
        scheduler: as for ``schedule_of``; it is not changed.
        num_steps: of ``scheduler.set_timesteps``.
        sigmas: of ``set_timesteps``, for flows (Flux: 1, 1 - 1/n, ..., 1/n).
        mu: of ``set_timesteps``, for flows whose shift depends on the size of the image.

    Raises:
        ConfigError: if ``num_steps`` does not fit the scheduler.
        UnsupportedError: as ``schedule_of``; where a shift by size is not given its ``mu``; and
            where DDIM steps do not end where the next one starts.
    """
    if num_steps < 1:
        raise ConfigError(f"times_of: num_steps={num_steps} must be at least 1.")
    original, scheduler = scheduler, copy.deepcopy(_readable(scheduler))
    if _is_flow(scheduler):
        return _flow_times(scheduler, num_steps, sigmas, mu)
    if sigmas is not None or mu is not None:
        raise ConfigError("times_of: sigmas and mu are for flow-matching schedulers.")
    total = int(scheduler.config.num_train_timesteps)
    if num_steps > total:
        raise ConfigError(f"times_of: num_steps={num_steps}, but the scheduler has {total}.")
    scheduler.set_timesteps(num_steps)
    levels = [int(level) for level in scheduler.timesteps]
    if levels[0] >= total:
        raise ConfigError(
            f"times_of: with {num_steps} steps and steps_offset="
            f"{scheduler.config.steps_offset} the first timestep is {levels[0]}, beyond the "
            f"table's {total - 1}; take fewer steps."
        )
    _check_joined(scheduler, levels, total // num_steps)
    end = _end(original, total)
    times = [(total - 1 - level) / total for level in levels]
    times = times if times[-1] == end else [*times, end]
    if scheduler.config.prediction_type == "epsilon" and scheduler.alphas_cumprod[levels[0]] == 0:
        raise UnsupportedError(
            "times_of: the first timestep is pure noise (rescale_betas_zero_snr), of which a "
            "prediction of the noise says nothing about the data. Use a v_prediction model, or "
            "timestep_spacing='leading'."
        )
    return tuple(times)


def sampler_of(
    scheduler: Any,
    num_steps: int,
    *,
    noise: bool = True,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Sampler:
    """A sampler that makes the scheduler's steps.

    Args:
        scheduler: as for ``schedule_of``.
        num_steps: of ``scheduler.set_timesteps``; the sampler may have one less (``times_of``).
        noise: ``True`` is DDPM's step, DDIM's with eta = 1, and the first-order SDE-DPM-Solver's
            on flows: memoryless, to train and to sample. ``False`` is DDIM's with eta = 0 and
            Euler's on flows: to sample.
        sigmas: as for ``times_of``.
        mu: as for ``times_of``.

    Raises:
        ConfigError, UnsupportedError: as ``times_of``.
    """
    times = times_of(scheduler, num_steps, sigmas=sigmas, mu=mu)
    kernel = Regridded(Ancestral(), times) if noise else DeterministicOn(times)
    return Sampler(kernel, len(times) - 1)


def _is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


def _readable(scheduler: Any) -> Any:
    """A DDIM, DDPM or FlowMatchEuler scheduler with the table and spacing of this one."""
    name, config = type(scheduler).__name__, scheduler.config
    if name in TABLES or _is_flow(scheduler):
        _check_plain(name, config)
        return scheduler
    if name not in SOLVERS:
        raise UnsupportedError(
            f"{name} is not a scheduler that this adapter knows; give the pipeline "
            "DDIMScheduler.from_config(...) or FlowMatchEulerDiscreteScheduler.from_config(...) "
            f"of what the model was trained with. Known: {', '.join((*TABLES, *SOLVERS))}."
        )
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return FlowMatchEulerDiscreteScheduler(
            config["num_train_timesteps"], shift=config.get("flow_shift") or 1.0
        )
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
             "prediction_type", "timestep_spacing", "steps_offset",
             "rescale_betas_zero_snr")  # fmt: skip
    return DDPMScheduler(**{k: config[k] for k in names if k in config}, clip_sample=False)


def _end(scheduler: Any, total: int) -> float:
    """The time at which the last step ends: clean data, or level 0."""
    name, config = type(scheduler).__name__, scheduler.config
    if name in ("DDIMScheduler", "PNDMScheduler"):
        return 1.0 if config.set_alpha_to_one else (total - 1) / total
    return 1.0 if config.get("final_sigmas_type", "zero") == "zero" else (total - 1) / total


_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "clip_sample": (
        (True,), "clips the predicted image and keeps the predicted noise; make it with "
        "clip_sample=False, as in DDIMScheduler.from_config(config, clip_sample=False)",
    ),
    "thresholding": (
        (True,), "rescales predicted images by their quantiles; make it with thresholding=False",
    ),
    "stochastic_sampling": (
        (True,), "renews the noise at every step; make it with stochastic_sampling=False, and "
        "sample with noise by sampler_of(..., noise=True)",
    ),
    "invert_sigmas": ((True,), "counts its sigmas from data to noise, which is not supported"),
    "variance_type": (
        ("fixed_large", "fixed_large_log", "learned", "learned_range"),
        "has another variance than the posterior's; make it with variance_type='fixed_small', or "
        "use DDIMScheduler",
    ),
}  # fmt: skip


def _check_plain(name: str, config: Mapping[str, Any]) -> None:
    for key, (values, why) in _REFUSED.items():
        of_ddpm = key != "variance_type" or name == "DDPMScheduler"  # DDIM ignores it
        if of_ddpm and config.get(key) in values:
            raise UnsupportedError(f"{name} with {key}={config[key]!r} {why}.")


def _check_joined(scheduler: Any, levels: Sequence[int], stride: int) -> None:
    """DDIM steps by T // n, whatever the next timestep is."""
    if type(scheduler).__name__ != "DDIMScheduler":
        return
    if any(a - stride != b for a, b in pairwise(levels)):
        raise UnsupportedError(
            f"DDIMScheduler with timestep_spacing={scheduler.config.timestep_spacing!r} and "
            f"{len(levels)} steps goes {stride} timesteps at a time, but its timesteps are not "
            f"{stride} apart: {levels[:3]}... A step would end where the next does not start. "
            f"Take a number of steps that divides {scheduler.config.num_train_timesteps}, "
            "timestep_spacing='leading', or DDPMScheduler."
        )


def _flow_times(
    scheduler: Any, num_steps: int, sigmas: Sequence[float] | None, mu: float | None
) -> tuple[float, ...]:
    if scheduler.config.use_dynamic_shifting and mu is None:
        raise UnsupportedError(
            "FlowMatchEulerDiscreteScheduler with use_dynamic_shifting=True shifts its timesteps "
            "by the size of the image: give mu, as the pipeline computes it "
            "(diffusers' calculate_shift), or use_dynamic_shifting=False and a shift."
        )
    given = {} if sigmas is None else {"sigmas": list(sigmas)}
    scheduler.set_timesteps(None if given else num_steps, mu=mu, **given)
    times = (1 - scheduler.sigmas.double()).clamp(0, 1).tolist()
    if len(times) != num_steps + 1:
        raise ConfigError(f"times_of: {len(times) - 1} sigmas for {num_steps} steps.")
    return tuple(times)


def timestep_of(t: Tensor, total: int) -> Tensor:
    """The timestep of a table of ``total`` at times t, float; whole where t is a node, up to
    rounding, and 0 from the least noise to clean data."""
    level = (total - 1 - total * t).clamp(min=0)
    whole = level.round()
    return torch.where((level - whole).abs() < 1e-3, whole, level)


__all__ = [
    "DeterministicOn",
    "prediction_of",
    "sampler_of",
    "schedule_of",
    "times_of",
    "timestep_of",
    "unclipped",
]

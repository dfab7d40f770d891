"""Schedulers of diffusers: our steps are theirs, and what is no such step is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiltflow.adapters.diffusers_schedules import (
    DeterministicOn,
    prediction_of,
    sampler_of,
    schedule_of,
    times_of,
    timestep_of,
)
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.sample import Sampler
from tiltflow.schedule import Linear, Tabulated
from tiltflow.space import Euclidean
from tiltflow.types import expand_as

diffusers = pytest.importorskip("diffusers")

# numpy on its arrays made of tensors
OLD = pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EVENT = (2, 3)


def output(x: Tensor, timestep: Tensor) -> Tensor:
    """What a network might say at (x, timestep): smooth, and far from linear in both."""
    k = expand_as(timestep, x) / 1000
    return torch.tanh(1.3 * x + 2 * k - 1) * (0.5 + k) - 0.2 * x.flip(-1)


class Said(nn.Module):
    """``output`` in this library's time and signs."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.kind, self.schedule = prediction_of(scheduler), schedule_of(scheduler)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.kind == "flow":
            return -output(x, 1000 * (1 - t))
        said = output(x, timestep_of(t, 1000))
        if self.kind == "v_prediction":
            return -expand_as(self.schedule.wronskian(t), x) * said
        return said


PREDICTS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "endpoint",
            "flow": "velocity"}  # fmt: skip


def flow(scheduler: Any) -> FlowModel:
    predicts = PREDICTS[prediction_of(scheduler)]
    return FlowModel(Said(scheduler), schedule_of(scheduler), Euclidean(EVENT), predicts=predicts)


def ours(sampler: Sampler, model: FlowModel, start: Tensor, noise: Tensor) -> list[Tensor]:
    """Our states on given noise, step by step."""
    times, x, states = sampler.times.to(start), start, []
    for k in range(sampler.num_steps):
        t, s = times[k].expand(len(x)), times[k + 1].expand(len(x))
        step = sampler.kernel.transition(model, x, t, s)
        x = step.mean + expand_as(step.variance.sqrt(), x) * noise[k]
        states.append(x)
    return states


def theirs(scheduler: Any, num: int, start: Tensor, noise: Tensor, eta: float) -> list[Tensor]:
    """States of the scheduler itself on the same noise."""
    scheduler.set_timesteps(num)
    x, states = start, []
    for k, level in enumerate(scheduler.timesteps):
        said = output(x, level.to(x).expand(len(x)))
        kwargs: dict[str, Any] = {}
        if type(scheduler).__name__ == "DDIMScheduler":
            kwargs = {"eta": eta, "variance_noise": noise[k] if eta else None}
        x = scheduler.step(said, level, x, **kwargs).prev_sample
        states.append(x)
    return states


def draws(num: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(num + 1, 4, *EVENT, generator=generator, dtype=torch.float64).to(dtype)
    return noise[0], noise[1:]


def largest(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference of two lists of states, relative to the size of the states."""
    return max(
        float((x - y).abs().max()) / max(1.0, float(y.abs().max()))
        for x, y in zip(a, b, strict=True)
    )


DDIM = [
    {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, **SD},
    {"timestep_spacing": "leading", "set_alpha_to_one": True, **SD},
    {"timestep_spacing": "trailing", **SD},
    {"timestep_spacing": "trailing", "prediction_type": "v_prediction",
     "rescale_betas_zero_snr": True, **SD},
    {"timestep_spacing": "trailing", "prediction_type": "sample", "beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"},
]  # fmt: skip


@pytest.mark.parametrize("config", DDIM, ids=str)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim(config: dict[str, Any], eta: float) -> None:
    """DDIM with eta = 0 and 1, to rounding where its table is in double precision."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **config)
    start, noise = draws(20, torch.float64)
    exact = diffusers.DDIMScheduler(clip_sample=False, **config)
    exact.alphas_cumprod = exact.alphas_cumprod.double()
    exact.final_alpha_cumprod = exact.final_alpha_cumprod.double()
    sampler = sampler_of(scheduler, 20, noise=eta == 1)
    assert sampler.num_steps == 20
    model = flow(scheduler)
    expected = theirs(exact, 20, start, noise, eta)
    # Theirs has sqrt(1 - alpha - variance), which at pure noise is the root of a rounding error.
    bound = 3e-8 if config.get("rescale_betas_zero_snr") and eta else 1e-11
    assert largest(ours(sampler, model, start, noise), expected) < bound
    single = ours(sampler, model, start.float(), noise.float())
    assert largest([x.double() for x in single], expected) < 1e-5
    if bound < 1e-8:
        own = theirs(scheduler, 20, start.float(), noise.float(), eta)
        assert largest(single, own) < 1e-5


def ddpm_steps(scheduler: Any, num: int, start: Tensor, monkeypatch: Any) -> list[Tensor]:
    """DDPM draws its noise itself, so that the draws are replaced; none at level 0."""
    _, noise = draws(num, start.dtype)
    waiting = list(noise)
    module = diffusers.schedulers.scheduling_ddpm
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: waiting.pop(0))
    return theirs(scheduler, num, start, noise, 1.0)


@pytest.mark.parametrize("num", [10, 30])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddpm(num: int, spacing: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of steps: DDPM's next timestep is where its step ends."""
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False, timestep_spacing=spacing, prediction_type=kind, **SD
    )
    start, noise = draws(num, torch.float64)
    states = ours(sampler_of(scheduler, num), flow(scheduler), start, noise)
    assert largest(states, ddpm_steps(scheduler, num, start, monkeypatch)) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_euler(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    start, noise = draws(12, torch.float32)
    states = ours(sampler_of(scheduler, 12, noise=False), flow(scheduler), start, noise)
    assert largest(states, theirs(scheduler, 12, start, noise, 0.0)) < 1e-5


def test_shift_by_size() -> None:
    """Flux: sigmas and mu of the pipeline are the scheduler's own arguments."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(UnsupportedError, match="mu"):
        times_of(scheduler, 5)
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2]
    times = times_of(scheduler, 5, sigmas=sigmas, mu=0.7)
    expected = [1 - math.exp(0.7) / (math.exp(0.7) + (1 / s - 1)) for s in sigmas]
    assert times == pytest.approx([*expected, 1.0], abs=1e-6)
    with pytest.raises(ConfigError, match="sigmas"):
        times_of(diffusers.DDPMScheduler(clip_sample=False), 5, mu=0.7)


@OLD
def test_noisy_steps_of_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ancestral steps on flows are those of the first-order SDE-DPM-Solver++."""
    settings: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    scheduler = diffusers.DPMSolverMultistepScheduler(
        flow_shift=3.0, algorithm_type="sde-dpmsolver++", solver_order=1,
        final_sigmas_type="zero", **settings,
    )  # fmt: skip
    num = 10
    start, noise = draws(num, torch.float32)
    waiting = list(noise)
    module = diffusers.schedulers.scheduling_dpmsolver_multistep
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: waiting.pop(0))
    expected = theirs(scheduler, num, start, noise, 1.0)
    times = tuple((1 - scheduler.sigmas.double()).tolist())
    model = flow(scheduler)
    assert isinstance(model.schedule, Linear)
    sampler = sampler_of(diffusers.FlowMatchEulerDiscreteScheduler(), num)
    sampler = Sampler(type(sampler.kernel)(sampler.kernel.kernel, times), num)
    # The solver's timesteps are whole numbers: it asks the network up to 1e-3 beside its sigma.
    asked = iter(scheduler.timesteps)
    model.net.forward = lambda x, t: -output(x, next(asked).to(x).expand(len(x)))
    assert largest(ours(sampler, model, start, noise), expected) < 1e-5


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"]
)
def test_solvers_are_read_as_what_the_model_was_trained_with(name: str) -> None:
    config = {"prediction_type": "v_prediction", "timestep_spacing": "leading",
              "steps_offset": 1, **SD}  # fmt: skip
    scheduler = getattr(diffusers, name)(**config)
    plain = diffusers.DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False)
    schedule = schedule_of(scheduler)
    assert schedule == schedule_of(plain)
    assert prediction_of(scheduler) == "v_prediction"
    ends = {"PNDMScheduler": 0.999}
    if name == "DPMSolverMultistepScheduler":
        ends[name] = 1.0
    expected = (*times_of(plain, 30)[:-1], ends.get(name, 1.0))
    assert times_of(scheduler, 30) == expected
    assert isinstance(schedule, Tabulated)


def test_a_flow_solver() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    assert isinstance(schedule_of(scheduler), Linear)
    plain = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert times_of(scheduler, 7) == times_of(plain, 7)


def test_grids_end_where_the_scheduler_ends() -> None:
    """Stable Diffusion ends at level 0; a step from there to there is left out."""
    ends = diffusers.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
    )
    times = times_of(ends, 50)
    assert (times[0], times[-2], times[-1]) == (0.018, 0.998, 0.999)
    still = diffusers.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading"
    )
    times = times_of(still, 50)
    assert (len(times), times[-1]) == (50, 0.999)
    assert sampler_of(still, 50).num_steps == 49


REFUSED = [
    (lambda: diffusers.DDIMScheduler(), "clip_sample=False"),
    (lambda: diffusers.DDPMScheduler(clip_sample=False, thresholding=True), "thresholding=False"),
    (
        lambda: diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_large"),
        "fixed_small",
    ),
    (lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "renews"),
    (lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "not supported"),
    (lambda: diffusers.EDMEulerScheduler(), "not a scheduler"),
    (
        lambda: diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
        "divides 1000",
    ),
    (
        lambda: diffusers.DDPMScheduler(
            clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        "v_prediction",
    ),
]


@pytest.mark.parametrize(("make", "match"), REFUSED)
def test_what_is_no_such_step_is_refused(make: Any, match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        times_of(make(), 30)


def test_bad_numbers_of_steps() -> None:
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    for number in (0, 1001):
        with pytest.raises(ConfigError, match="num_steps"):
            times_of(scheduler, number)
    offset = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    with pytest.raises(ConfigError, match="fewer steps"):
        times_of(offset, 1000)


def test_reading_changes_nothing() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    before = scheduler.timesteps.clone()
    sampler = sampler_of(scheduler, 10, noise=False)
    assert torch.equal(scheduler.timesteps, before)
    assert not DeterministicOn.memoryless
    assert isinstance(sampler.kernel, DeterministicOn)


def test_timesteps_are_whole_at_nodes() -> None:
    """Also in single precision, where 999 - 1000 t is not."""
    levels = torch.arange(1000)
    t = ((999 - levels.double()) / 1000).float()
    assert torch.equal(timestep_of(t, 1000), levels.float())
    assert float(timestep_of(torch.tensor(1.0), 1000)) == 0
    assert float(timestep_of(torch.tensor(0.0005), 1000)) == pytest.approx(998.5, abs=1e-3)

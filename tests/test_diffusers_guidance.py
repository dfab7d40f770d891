"""Modes of classifier-free guidance: each is what it says, and none is another in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from tiltflow.adapters.diffusers import Guidance, ImageModel, adapted
from tiltflow.algorithms.averaging import averaged
from tiltflow.context import Context, SingleProcess
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel, behaviour_of, freeze
from tiltflow.potential import Differentiable
from tiltflow.problem import ControlProblem
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching, WeightedMatching
from tiltflow.solvers.direct import DirectBackprop
from tiltflow.solvers.lean_adjoint import Rollout, Steps, rollout
from tiltflow.training import Training
from tiltflow.views import conditioned

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*__array.*:DeprecationWarning", "ignore:.*torchvision.*", "ignore::FutureWarning"
)
SCALE = 4.0
REWARD = Differentiable(lambda x: 0.3 * x.flatten(1).sum(1))
NOTHING = tiny.prompts("sd3", 1, 8)


def image(mode: str | None, lora: int | None = 4) -> ImageModel:
    guidance = None if mode is None else Guidance(SCALE, mode, NOTHING)  # type: ignore[arg-type]
    return adapted(
        tiny.stable_diffusion_3(), prompts=tiny.prompts("sd3"), guidance=guidance, lora=lora
    )


def moved(model: FlowModel) -> FlowModel:
    """A tuned model that differs from its reference."""
    clone = model.clone()
    generator = Seed(5).generator()
    with torch.no_grad():
        for p in clone.trainable.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return freeze(clone)


def by_hand(model: FlowModel, x: Tensor, t: float, prompt: int) -> Tensor:
    """Guided velocity from two separate evaluations without guidance."""
    assert model.net.scale == 1
    given = tiny.prompts("sd3").of(prompt, len(x))
    with torch.no_grad():
        nothing = model.velocity(x, t, NOTHING.of(0, len(x)))
        return nothing + SCALE * (model.velocity(x, t, given) - nothing)


def test_everywhere_guides_every_output() -> None:
    plain, guided = image(None).model, image("everywhere").model
    x = plain.space.noise(3, Seed(0).generator())
    with torch.no_grad():
        out = guided.velocity(x, 0.4, tiny.prompts("sd3").of(1, 3))
        without = plain.velocity(x, 0.4, tiny.prompts("sd3").of(1, 3))
    assert torch.allclose(out, by_hand(plain, x, 0.4, 1), atol=1e-6)
    assert float((out - without).abs().max()) > 1e-3
    assert behaviour_of(guided) is None
    assert behaviour_of(plain) is None


def test_rollouts_alone_are_guided() -> None:
    """The model itself has no guidance; what makes its roll-outs has it, with the same tensors."""
    model, plain = image("rollouts").model, image(None).model
    tuned = moved(model)
    behaviour = behaviour_of(tuned)
    assert behaviour is not None
    x, cond = plain.space.noise(3, Seed(0).generator()), tiny.prompts("sd3").of(1, 3)
    with torch.no_grad():
        assert torch.equal(model.velocity(x, 0.4, cond), plain.velocity(x, 0.4, cond))
        out = behaviour.velocity(x, 0.4, cond)
    assert torch.allclose(out, by_hand(tuned, x, 0.4, 1), atol=1e-5)
    own = {id(p) for p in tuned.net.parameters()}
    assert {id(p) for p in behaviour.net.parameters()} == own


def test_guidance_afterwards() -> None:
    """A model tuned without guidance, sampled with it: the guided field of the tuned network."""
    given = image("rollouts")
    tuned = moved(given.model)
    guided, behaviour = given.guided(tuned, SCALE), behaviour_of(tuned)
    assert behaviour is not None
    x, cond = tuned.space.noise(3, Seed(0).generator()), tiny.prompts("sd3").of(1, 3)
    with torch.no_grad():
        out = guided.velocity(x, 0.4, cond)
        assert torch.equal(out, behaviour.velocity(x, 0.4, cond))
    assert behaviour_of(guided) is None
    with pytest.raises(ConfigError, match="not known"):
        image(None).guided(image(None).model, SCALE)


def rolled(mode: str) -> tuple[Rollout, FlowModel, FlowModel, Sampler]:
    given = image(mode)
    reference, sampler = given.model, given.sampler(4)
    tuned = moved(reference)
    steps = Steps.of(sampler, reference, torch.zeros(()))
    path = rollout(
        tuned, reference, steps, REWARD, 3, seed=Seed(1), backend=SingleProcess(),
        cond=tiny.prompts("sd3").of(1, 3), behaviour=behaviour_of(tuned),
    )  # fmt: skip
    return path, tuned, reference, sampler


def test_states_are_guided_and_adjoints_are_not() -> None:
    """Every step of a roll-out goes where the guided tuned model goes; the rest is unguided."""
    path, tuned, reference, sampler = rolled("rollouts")
    guided, cond = behaviour_of(tuned), path.cond
    assert guided is not None
    c = sampler.kernel.coefficients(reference.schedule, sampler.times[:-1], sampler.times[1:])
    last = len(sampler.times) - 2
    assert float(c.variance[last]) == 0
    x = path.states[last]
    t, s = (sampler.times[last + i].float().expand(3) for i in (0, 1))
    leaf = x.clone().requires_grad_()
    end = reference.endpoint(leaf, t, cond)
    (pulled,) = torch.autograd.grad(end, leaf, path.adjoints[last + 1])
    with torch.no_grad():
        mean = sampler.kernel.transition(guided, x, t, s, cond).mean
        unguided = tuned.endpoint(x, t, cond)
    a, b = float(c.on_state[last]), float(c.on_endpoint[last])
    assert torch.allclose(path.states[last + 1], mean.float(), atol=1e-4)
    assert torch.allclose(path.tuned[last], unguided, atol=1e-5)
    assert torch.allclose(path.reference[last], end, atol=1e-5)
    assert torch.allclose(path.adjoints[last], a * path.adjoints[last + 1] + b * pulled, atol=1e-5)
    assert float((a * x + b * unguided - path.states[last + 1]).abs().max()) > 1e-3


def solver(given: ImageModel) -> AdjointMatching:
    return AdjointMatching(
        sampler=given.sampler(4), training=Training(num_updates=4, learning_rate=0.1),
        num_trajectories=4, updates_per_rollout=2, num_evaluate=4,
    )  # fmt: skip


def test_modes_train_differently() -> None:
    """One problem, three modes, three results; none is another by accident."""
    results = []
    for mode in (None, "rollouts", "everywhere"):
        given = image(mode)
        problem = ControlProblem(given.model, REWARD, given.prompts)
        tuned = solver(given).solve(problem, Context(seed=Seed(3))).model
        results.append(torch.cat([p.flatten() for p in tuned.trainable.parameters()]))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert float((results[i] - results[j]).abs().max()) > 1e-3


def test_rollouts_mode_is_refused_by_all_others() -> None:
    given = image("rollouts")
    problem = ControlProblem(given.model, REWARD, given.prompts)
    for other in (
        DirectBackprop(sampler=given.sampler(4)),
        WeightedMatching(sampler=given.sampler(4)),
    ):
        with pytest.raises(UnsupportedError, match="only AdjointMatching"):
            other.solve(problem, Context())
    with pytest.raises(UnsupportedError, match="only AdjointMatching"):
        conditioned(given.model, tiny.prompts("sd3").of(0))
    with pytest.raises(UnsupportedError, match="only AdjointMatching"):
        averaged([given.model, given.model], [0.5, 0.5])
    with pytest.raises(UnsupportedError, match="no optimum"):
        AdjointMatching(sampler=given.sampler(4), tolerance=0.1).solve(
            ControlProblem(given.model, REWARD), Context()
        )


def test_round_trip_with_guidance(tmp_path: Path) -> None:
    """Weights tuned under guidance, loaded in plain diffusers at that scale: the same images."""
    given = image("everywhere")
    problem = ControlProblem(given.model, REWARD, given.prompts)
    tuned = solver(given).solve(problem, Context(seed=Seed(3))).model
    given.save_lora(tuned, tmp_path)
    pipeline = tiny.stable_diffusion_3()
    pipeline.load_lora_weights(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    start = tuned.space.noise(2, Seed(8).generator())
    theirs = pipeline(
        **tiny.embeddings("sd3", tiny.prompts("sd3"), NOTHING), height=16, width=16,
        guidance_scale=SCALE, num_inference_steps=4, latents=start.clone(), output_type="pt",
    ).images  # fmt: skip
    cond, x, ode = given.prompts.at(torch.arange(2)), start, given.sampler(4, noise=False)
    with torch.no_grad():
        for k in range(4):
            t, s = (ode.times[k + i].float().expand(2) for i in (0, 1))
            x = ode.kernel.transition(tuned, x, t, s, cond).mean
        own = given.decode(x)
    assert float((own - torch.as_tensor(theirs)).abs().max()) < 1e-5

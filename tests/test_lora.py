"""Low-rank adapters: nothing changes at the start, only they are trained, plain diffusers reads
them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("diffusers")

import tiny_pipelines as tiny
from tiltflow.adapters.diffusers import ImageModel, adapted
from tiltflow.context import Context, SingleProcess
from tiltflow.delta import MLP
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel, freeze, unfreeze
from tiltflow.lora import LoRA, lora_tensors, merged, sharing_copy, with_lora
from tiltflow.potential import Decoded, Differentiable
from tiltflow.problem import ControlProblem
from tiltflow.schedule import Linear
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.solvers.lean_adjoint import Steps, rollout
from tiltflow.space import Euclidean
from tiltflow.training import Training

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*__array.*:DeprecationWarning", "ignore:.*torchvision.*", "ignore::FutureWarning"
)
TARGETS = ("layers.0", "layers.2")


def plain() -> FlowModel:
    torch.manual_seed(0)
    return FlowModel(
        MLP((2,), (16, 16)), Linear(), Euclidean((2,)), predicts="velocity"
    )  # fmt: skip


def filled(model: FlowModel, seed: int = 1) -> FlowModel:
    """Adapters that do something."""
    generator = Seed(seed).generator()
    with torch.no_grad():
        for name, p in model.trainable.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def said(model: FlowModel) -> Tensor:
    x = torch.randn(5, 2, generator=Seed(2).generator())
    with torch.no_grad():
        return model.velocity(x, 0.4)


def test_adapters_change_nothing_at_first_and_share_the_network() -> None:
    model = plain()
    before, lora = said(model), with_lora(model, 3, targets=TARGETS)
    assert torch.equal(said(lora), before)
    own = {id(p) for p in model.net.parameters()}
    extra = [p for p in lora.net.parameters() if id(p) not in own]
    assert sum(id(p) in own for p in lora.net.parameters()) == len(own)
    assert {id(p) for p in extra} == {id(p) for p in lora.trainable.parameters()}
    assert all(3 in p.shape for p in extra)
    assert len(extra) == 4
    filled(lora)
    assert torch.equal(said(model), before)
    assert not torch.allclose(said(lora), before)


def test_clones_share_all_but_the_adapters() -> None:
    lora = filled(with_lora(plain(), 3, targets=TARGETS))
    clone = lora.clone()
    assert torch.equal(said(clone), said(lora))
    shared = {id(p) for p in lora.net.parameters()} & {id(p) for p in clone.net.parameters()}
    trained = {id(p) for p in clone.trainable.parameters()}
    assert not shared & trained
    assert len(shared) + len(trained) == len(list(clone.net.parameters()))
    reference = said(lora)
    filled(clone, seed=5)
    assert torch.equal(said(lora), reference)
    assert not torch.allclose(said(clone), reference)


def test_only_adapters_are_trained() -> None:
    """Every adapter gets a gradient, nothing else does; freezing the reference leaves it so."""
    reference = freeze(filled(with_lora(plain(), 3, targets=TARGETS)))
    tuned = unfreeze(reference.clone())
    freeze(reference)
    x = torch.randn(5, 2, generator=Seed(2).generator())
    tuned.velocity(x, 0.4).square().sum().backward()  # type: ignore[no-untyped-call]
    grads = {id(p) for p in tuned.net.parameters() if p.grad is not None}
    assert grads == {id(p) for p in tuned.trainable.parameters()}
    assert all(bool(p.grad.any()) for p in tuned.trainable.parameters() if p.grad is not None)
    assert not any(p.requires_grad for p in reference.net.parameters())


def test_merging_is_the_same_function() -> None:
    lora = filled(with_lora(plain(), 3, targets=TARGETS))
    before = {k: v.clone() for k, v in lora.net.state_dict().items()}
    whole = FlowModel(merged(lora.net), Linear(), Euclidean((2,)), predicts="velocity")
    assert torch.allclose(said(whole), said(lora), atol=1e-6)
    assert set(whole.net.state_dict()) == set(plain().net.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in lora.net.state_dict().items())


def test_draws_are_addressed() -> None:
    model = plain()
    state = torch.random.get_rng_state()
    a, b, c = (with_lora(model, 3, targets=TARGETS, seed=Seed(n)) for n in (1, 1, 2))
    first, second, third = (lora_tensors(m.net)["layers.0.lora_A.weight"] for m in (a, b, c))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        with_lora(plain(), targets=["nowhere"])
    with pytest.raises(ConfigError, match="rank"):
        with_lora(plain(), 0)
    with pytest.raises(ConfigError, match="no adapters"):
        _ = plain().with_delta(LoRA()).trainable


def test_sharing_copies_are_independent_in_structure() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    copy = sharing_copy(net, own=lambda name: name == "1.running_mean")
    copy[1] = nn.Identity()
    assert isinstance(net[1], nn.BatchNorm1d)
    assert copy[0].weight is net[0].weight
    again = sharing_copy(net, own=lambda name: name == "1.running_mean")
    assert again[1].running_var is net[1].running_var
    assert again[1].running_mean is not net[1].running_mean


# --- with pipelines ------------------------------------------------------------------------------


def warmth(y: Tensor) -> Tensor:
    """How much redder than blue an image is, (B,)."""
    return (y[:, 0] - y[:, 2]).mean((1, 2))


def tuned_by(image: ImageModel, updates: int = 6) -> FlowModel:
    """A few updates of Adjoint Matching towards warm images."""
    solver = AdjointMatching(
        sampler=image.sampler(4), training=Training(num_updates=updates, learning_rate=0.1),
        num_trajectories=4, updates_per_rollout=2, num_evaluate=4,
    )  # fmt: skip
    reward = Decoded(400 * Differentiable(warmth), image.decode)
    problem = ControlProblem(image.model, reward, image.prompts)
    return solver.solve(problem, Context(seed=Seed(3))).model


def drawn(image: ImageModel, model: FlowModel, start: Tensor) -> Tensor:
    cond = None if image.prompts is None else image.prompts.at(torch.arange(2))
    sampler, x = image.sampler(4, noise=False), start
    times = sampler.times.to(x)
    with torch.no_grad():
        for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            a, b = torch.full((2,), t), torch.full((2,), s)
            x = sampler.kernel.transition(model, x, a, b, cond).mean
        return image.decode(x)


def plainly(pipeline: Any, kind: str, start: Tensor) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    side, latents, options = 16, start.clone(), {}
    if kind in ("sana", "pixart"):
        options = {"use_resolution_binning": False, "negative_prompt": None}
        side = 32 if kind == "sana" else 16
    if kind == "flux":
        latents = pipeline._pack_latents(start, 2, 4, 8, 8)
    out = pipeline(
        **tiny.embeddings(kind, tiny.prompts(kind), None), height=side, width=side,
        guidance_scale=1.0, num_inference_steps=4, latents=latents, output_type="pt", **options,
    )  # fmt: skip
    return torch.as_tensor(out.images)


def test_half_precision() -> None:
    """Networks in bfloat16: adapters and states are in single precision, and adapters move."""
    pipeline = tiny.stable_diffusion()
    pipeline.unet.to(torch.bfloat16)
    image = adapted(pipeline, prompts=tiny.prompts("sd"), lora=4)
    x = image.model.space.noise(2, Seed(0).generator())
    cond = tiny.prompts("sd").of(0, 2)
    assert {p.dtype for p in image.model.trainable.parameters()} == {torch.float32}
    tuned = tuned_by(image, updates=2)
    with torch.no_grad():
        before, after = image.model.noise(x, 0.5, cond), tuned.noise(x, 0.5, cond)
    assert after.dtype == torch.float32
    assert float((after - before).abs().max()) > 0
    assert {p.dtype for p in tuned.net.parameters()} == {torch.float32, torch.bfloat16}


def adjoints(checkpointed: bool) -> tuple[Tensor, Tensor]:
    """Of a roll-out whose reference and tuned adapters differ, and the gradient of the tuned."""
    pipeline = tiny.stable_diffusion_3()
    if checkpointed:
        pipeline.transformer.enable_gradient_checkpointing()
    image = adapted(pipeline, prompts=tiny.prompts("sd3"), lora=4)
    reference, tuned = filled(image.model.clone(), 1), filled(image.model.clone(), 2)
    sampler, cond = image.sampler(4), tiny.prompts("sd3").of(1, 3)
    steps = Steps.of(sampler, reference, torch.zeros(()))
    path = rollout(
        freeze(reference), freeze(tuned), steps, Differentiable(lambda x: x.flatten(1).sum(1)), 3,
        seed=Seed(1), backend=SingleProcess(), cond=cond,
    )  # fmt: skip
    out = unfreeze(tuned).endpoint(path.states[1], sampler.times[1].float(), cond)
    reference.endpoint(path.states[1], 0.5, cond)
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    grads = [p.grad for p in tuned.trainable.parameters() if p.grad is not None]
    return path.adjoints, torch.cat([g.flatten() for g in grads])


def test_recomputed_activations_have_the_right_adapters() -> None:
    """diffusers' gradient checkpointing, with other adapters asked in between."""
    plain, again = adjoints(False), adjoints(True)
    assert float(plain[1].abs().max()) > 1e-4
    for a, b in zip(plain, again, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * float(a.abs().max()))


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("sdxl", "sana")]


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", *SLOW])
def test_round_trip(kind: str, tmp_path: Path) -> None:
    """Tune, save, load in plain diffusers: the same images, and others than before."""
    make, side = {**tiny.KINDS, "flux": tiny.flux}[kind], 32 if kind == "sana" else 16
    image = adapted(make(), prompts=tiny.prompts(kind), size=(side, side), lora=4)
    start = image.model.space.noise(2, Seed(8).generator())
    before = drawn(image, image.model, start)
    tuned = tuned_by(image)
    own = drawn(image, tuned, start)
    assert float((own - before).abs().max()) > 1e-3
    assert torch.equal(drawn(image, image.model, start), before)
    image.save_lora(tuned, tmp_path)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    other = make()
    assert float((plainly(other, kind, start) - before).abs().max()) < 1e-5
    other.load_lora_weights(tmp_path)
    assert float((plainly(other, kind, start) - own).abs().max()) < 1e-5
    whole = image.tuned_pipeline(tuned)
    assert float((plainly(whole, kind, start) - own).abs().max()) < 1e-5
    assert float((plainly(image.pipeline, kind, start) - before).abs().max()) < 1e-5


def test_pipelines_without_lora_files(tmp_path: Path) -> None:
    """PixArt's reads none; a pipeline with merged weights is the same."""
    image = adapted(tiny.pixart(), prompts=tiny.prompts("pixart"), lora=4)
    tuned = filled(image.model.clone())
    with pytest.raises(UnsupportedError, match="tuned_pipeline"):
        image.save_lora(tuned, tmp_path)
    start = image.model.space.noise(2, Seed(8).generator())
    own = drawn(image, tuned, start)
    assert float((own - drawn(image, image.model, start)).abs().max()) > 1e-3
    assert float((plainly(image.tuned_pipeline(tuned), "pixart", start) - own).abs().max()) < 1e-5


def test_full_training_and_unconditional_models(tmp_path: Path) -> None:
    """All weights, saved as a pipeline; unconditional pipelines read no LoRA file."""
    image = adapted(tiny.unconditional(), lora=4)
    tuned = tuned_by(image)
    with pytest.raises(UnsupportedError, match="tuned_pipeline"):
        image.save_lora(tuned, tmp_path)
    whole = adapted(tiny.unconditional(), lora=None)
    full = tuned_by(whole)
    with pytest.raises(ConfigError, match="tuned_pipeline"):
        whole.save_lora(full, tmp_path)
    x = whole.model.space.noise(2, Seed(8).generator())
    for model in (tuned, full):
        whole.tuned_pipeline(model).save_pretrained(tmp_path / "whole")
        from diffusers import DDPMPipeline

        back = adapted(DDPMPipeline.from_pretrained(tmp_path / "whole"), lora=None).model
        with torch.no_grad():
            expected, out = model.endpoint(x, 0.5), back.endpoint(x, 0.5)
        assert float((expected - out).abs().max()) < 1e-5 * float(expected.abs().max())
        assert not torch.equal(whole.model.endpoint(x, 0.5), out)


def test_training_moves_the_right_way() -> None:
    """End to end: images of the same noise become warmer, by adapters of one convolution."""
    plain = adapted(tiny.unconditional(prediction_type="v_prediction"), lora=None)
    image = replace(plain, model=with_lora(plain.model, 3, targets=("conv_out",)))
    solver = AdjointMatching(
        sampler=image.sampler(4), num_trajectories=16, updates_per_rollout=4, num_evaluate=4,
        training=Training(num_updates=40, learning_rate=3e-3, decay="constant"),
    )  # fmt: skip
    reward = Decoded(200 * Differentiable(warmth), image.decode)
    tuned = solver.solve(ControlProblem(image.model, reward), Context(seed=Seed(3))).model
    values = [
        warmth(image.decode(image.sampler(4).sample(m, 64, seed=Seed(9))))
        for m in (image.model, tuned)
    ]
    rise = values[1] - values[0]
    assert float(rise.mean()) > 4.5 * float(rise.std()) / 8

"""Pipelines of diffusers as flow models: the same images, and what training may rely on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from tiltflow.adapters.diffusers import Guidance, ImageModel, Prompts, adapted, load_pipeline
from tiltflow.adapters.diffusers_decode import Decoder
from tiltflow.errors import ConfigError, ShapeError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.potential import Decoded, Differentiable
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.types import Cond

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*__array.*:DeprecationWarning", "ignore:.*torchvision.*", "ignore::FutureWarning"
)
STEPS = 4
SIDE = {"sana": 32}
"""Its pipeline wants multiples of 32 pixels; the others are asked for 16."""


def noise(model: FlowModel, count: int = 2, seed: int = 0) -> Tensor:
    return model.space.noise(count, Seed(seed).generator())


@torch.no_grad()
def sampled(sampler: Sampler, model: FlowModel, start: Tensor, cond: Cond | None) -> Tensor:
    """Our ODE steps from given noise."""
    x, times = start, sampler.times.to(start)
    for k in range(sampler.num_steps):
        t, s = times[k].expand(len(x)), times[k + 1].expand(len(x))
        x = sampler.kernel.transition(model, x, t, s, cond).mean
    return x


def images_of(
    pipeline: Any, kind: str, start: Tensor, given: Prompts, nothing: Prompts | None, scale: float
) -> Tensor:
    """What the pipeline itself makes of the same noise, in [0, 1]."""
    side = SIDE.get(kind, 16)
    kwargs: dict[str, Any] = {"height": side, "width": side, "guidance_scale": scale}
    if kind in ("sana", "pixart"):
        kwargs |= {"use_resolution_binning": False, "negative_prompt": None}
    pipeline.set_progress_bar_config(disable=True)
    return torch.as_tensor(
        pipeline(
            **tiny.embeddings(kind, given, nothing), **kwargs, num_inference_steps=STEPS,
            latents=start.clone(), output_type="pt",
        ).images
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_images_are_those_of_the_pipeline(kind: str, scale: float) -> None:
    """Network, schedule, grid, guidance and decoder together, each family with its own."""
    pipeline, given, nothing = tiny.KINDS[kind](), tiny.prompts(kind), tiny.prompts(kind, 1, 8)
    guidance = None if scale == 1 else Guidance(scale, negative=nothing)
    side = SIDE.get(kind, 16)
    image = adapted(pipeline, prompts=given, guidance=guidance, size=(side, side), lora=None)
    start, cond = noise(image.model), given.at(torch.arange(2))
    own = image.decode(sampled(image.sampler(STEPS, noise=False), image.model, start, cond))
    theirs = images_of(pipeline, kind, start, given, nothing if scale > 1 else None, scale)
    assert float((own - theirs).abs().max()) < 1e-5
    assert float(own.std()) > 0.01
    assert float((own[0] - own[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_other_predictions(kind: str) -> None:
    """v and data predictions, with zero terminal SNR."""
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps_offset": 0}
    pipeline = tiny.stable_diffusion(tiny.ddim(prediction_type=kind, **zero))
    given = tiny.prompts("sd")
    image = adapted(pipeline, prompts=given, lora=None)
    start, cond = noise(image.model), given.at(torch.arange(2))
    sampler = image.sampler(STEPS, noise=False)
    assert float(sampler.times[0]) == 0
    own = image.decode(sampled(sampler, image.model, start, cond))
    assert float((own - images_of(pipeline, "sd", start, given, None, 1.0)).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
def test_unconditional_images(kind: str, clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDPM's noisy steps on its own draws, through sampler and pipeline; clipped too."""
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm

    pipeline = tiny.unconditional(prediction_type=kind, clip_sample=clip, clip_sample_range=0.8)
    image = adapted(pipeline, lora=None)
    path = image.sampler(STEPS).simulate(image.model, 2, seed=Seed(0))
    generator = Seed(0).generator()
    draws = [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(STEPS + 1)]
    assert torch.equal(draws[0], path.states[0])
    for module in (pipeline_ddpm, scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: draws.pop(0))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, num_inference_steps=STEPS, output_type="np").images
    own = image.decode(path.end).permute(0, 2, 3, 1)
    assert float((own - torch.as_tensor(theirs)).abs().max()) < 1e-5
    assert image.model.takes_cond is False
    with torch.no_grad():
        largest = float(image.model.endpoint(path.states[0], 0.0).abs().max())
    assert largest == pytest.approx(0.8) if clip else largest > 1
    assert image.size == (8, 8)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_velocity_score_and_end_point_are_one_thing(kind: str) -> None:
    """The identities of a flow model hold with a network of diffusers inside."""
    given = tiny.prompts(kind)
    model = adapted(tiny.KINDS[kind](), prompts=given, lora=None).model
    model.net.double()
    start, cond = noise(model).double(), given.at(torch.arange(2))
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    s = model.schedule
    with torch.no_grad():
        end, eps, velocity, score = (
            f(start, t, cond) for f in (model.endpoint, model.noise, model.velocity, model.score)
        )
    alpha, beta, da, db = (
        f(t)[:, None, None, None] for f in (s.alpha, s.beta, s.d_alpha, s.d_beta)
    )
    size = float(end.abs().max())
    assert float((alpha * end + beta * eps - start).abs().max()) < 1e-9 * size
    assert float((da * end + db * eps - velocity).abs().max()) < 1e-9 * size
    assert float((score + eps / beta).abs().max()) < 1e-9 * size


def test_flows_run_from_noise_to_data() -> None:
    """SD3's network returns noise - data at sigma = 1 - t; ours data - noise."""
    pipeline, given = tiny.stable_diffusion_3(), tiny.prompts("sd3")
    image = adapted(pipeline, prompts=given, lora=None)
    x, cond = noise(image.model), given.at(torch.arange(2))
    with torch.no_grad():
        (raw,) = pipeline.transformer(
            x, encoder_hidden_states=given.tensors["text"],
            pooled_projections=given.tensors["pooled"], timestep=torch.full((2,), 750.0),
            return_dict=False,
        )  # fmt: skip
        assert torch.equal(image.model.velocity(x, 0.25, cond), -raw)


def test_shift_by_the_size_of_the_image() -> None:
    """SD3's newer configs: the same images where timesteps depend on the size."""
    pipeline = tiny.stable_diffusion_3(use_dynamic_shifting=True, base_image_seq_len=4)
    given = tiny.prompts("sd3")
    image = adapted(pipeline, prompts=given, lora=None)
    start, cond = noise(image.model), given.at(torch.arange(2))
    sampler = image.sampler(STEPS, noise=False)
    assert sampler.times.tolist() != adapted(
        tiny.stable_diffusion_3(), prompts=given, lora=None
    ).sampler(STEPS, noise=False).times.tolist()  # fmt: skip
    own = image.decode(sampled(sampler, image.model, start, cond))
    assert float((own - images_of(pipeline, "sd3", start, given, None, 1.0)).abs().max()) < 1e-5


@pytest.mark.parametrize("told", [None, 2.5])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_flux(told: float | None, scale: float) -> None:
    """Packed latents, a shift by size, guidance as an input and as two evaluations."""
    pipeline, given, nothing = tiny.flux(told is not None), tiny.prompts("flux"), None
    if scale > 1:
        nothing = tiny.prompts("flux", 1, 8)
    guidance = None if nothing is None else Guidance(scale, negative=nothing)
    image = adapted(
        pipeline, prompts=given, guidance=guidance, size=(16, 24), lora=None, told=told or 3.5
    )
    start, cond = noise(image.model), given.at(torch.arange(2))
    own = image.decode(sampled(image.sampler(STEPS, noise=False), image.model, start, cond))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        **tiny.embeddings("flux", given, nothing), height=16, width=24, true_cfg_scale=scale,
        guidance_scale=told, num_inference_steps=STEPS, output_type="pt",
        latents=pipeline._pack_latents(start, 2, 4, 8, 12),
    ).images  # fmt: skip
    assert float((own - torch.as_tensor(theirs)).abs().max()) < 1e-5
    assert own.shape == (2, 3, 16, 24)
    with pytest.raises(ConfigError, match="multiples of 4"):
        adapted(pipeline, prompts=given, size=(16, 18))


# --- prompts -------------------------------------------------------------------------------------


def test_prompts_are_conditions() -> None:
    given = tiny.prompts("sdxl", 3)
    cond = given.draw(50, Seed(1))
    number = torch.as_tensor(cond["prompt"])
    assert set(number.tolist()) == {0, 1, 2}
    assert torch.equal(torch.as_tensor(cond["text"]), given.tensors["text"][number])
    assert torch.equal(torch.as_tensor(given.draw(50, Seed(1))["prompt"]), number)
    one = given.of(2, 4)
    assert torch.as_tensor(one["pooled"]).shape == (4, tiny.POOLED)
    with pytest.raises(ConfigError, match="no number 3"):
        given.of(3)
    with pytest.raises(ConfigError, match="leading length"):
        Prompts({"text": torch.zeros(2, 5, 8), "pooled": torch.zeros(3, 4)})


def inpainting() -> Any:
    pipeline = tiny.stable_diffusion()
    pipeline.register_modules(unet=tiny.unet(in_channels=9))
    return pipeline


def clipped_ddim() -> Any:
    pipeline = tiny.unconditional()
    pipeline.register_modules(scheduler=tiny.ddim(clip_sample=True))
    return pipeline


def of_classes() -> Any:
    pipeline = tiny.unconditional()
    pipeline.unet.register_to_config(num_class_embeds=3)
    return pipeline


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: adapted(tiny.stable_diffusion()), ConfigError, "give the prompts"),
    (lambda: adapted(tiny.stable_diffusion(), prompts="a cat"), ConfigError, "list of texts"),
    (lambda: adapted(tiny.stable_diffusion(), prompts=["a cat"]), UnsupportedError, "encode"),
    (lambda: adapted(tiny.unconditional(), prompts=["a cat"]), ConfigError, "no prompts"),
    (lambda: adapted(tiny.unconditional(), guidance=Guidance(2)), ConfigError, "no prompts"),
    (lambda: adapted(inpainting(), prompts=tiny.prompts("sd")), UnsupportedError, "inpainting"),
    (lambda: adapted(of_classes()), UnsupportedError, "does not know how to ask"),
    (lambda: Guidance(1.0), ConfigError, "above 1"),
    (lambda: Guidance(2.0, mode="none"), ConfigError, "leave it out"),  # type: ignore[arg-type]
    (
        lambda: adapted(
            tiny.stable_diffusion(), prompts=tiny.prompts("sd"), guidance=Guidance(2.0)
        ),
        ConfigError,
        "encoded negative",
    ),
    (
        lambda: adapted(tiny.stable_diffusion(), prompts=tiny.prompts("sd"), size=(17, 16)),
        ConfigError,
        "multiples",
    ),
    (lambda: adapted(clipped_ddim()), UnsupportedError, "clip_sample=False"),
]


@pytest.mark.parametrize(("make", "error", "match"), REFUSED)
def test_what_does_not_fit_is_refused(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_missing_conditions_are_named() -> None:
    image = adapted(tiny.stable_diffusion(), prompts=tiny.prompts("sd"), lora=None)
    with pytest.raises(ShapeError, match="'text'"):
        image.model.endpoint(noise(image.model), 0.5)


@pytest.mark.parametrize("negative", [None, "ugly"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_texts_are_encoded_as_the_pipeline_does(
    kind: str, negative: str | None, tmp_path: Path
) -> None:
    """The same images as from a call with texts, with and without a negative prompt."""
    pipeline, texts = tiny.with_text_encoders(kind, tmp_path), ["a cat", "dog"]
    image = adapted(pipeline, prompts=texts, guidance=Guidance(3.0, negative=negative), lora=None)
    assert image.prompts is not None
    assert image.prompts.texts == ("a cat", "dog")
    start, cond = noise(image.model), image.prompts.at(torch.arange(2))
    own = image.decode(sampled(image.sampler(STEPS, noise=False), image.model, start, cond))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        texts, negative_prompt=None if negative is None else [negative] * 2, height=16, width=16,
        guidance_scale=3.0, num_inference_steps=STEPS, latents=start.clone(), output_type="pt",
    ).images  # fmt: skip
    assert float((own - torch.as_tensor(theirs)).abs().max()) < 1e-5
    swapped = sampled(
        image.sampler(STEPS, noise=False),
        image.model,
        start,
        image.prompts.at(torch.tensor([1, 0])),
    )
    assert float((image.decode(swapped) - own).abs().max()) > 1e-4


@pytest.mark.parametrize("kind", ["sana", "pixart", "flux"])
def test_long_texts_are_encoded_as_the_pipeline_does(kind: str, tmp_path: Path) -> None:
    """Encodings and masks of the text encoders that read hundreds of tokens."""
    pipeline, texts = tiny.with_text_encoders(kind, tmp_path), ["a cat", "dog"]
    image = adapted(pipeline, prompts=texts, guidance=Guidance(3.0), size=(32, 32), lora=None)
    assert image.prompts is not None
    start, cond = noise(image.model), image.prompts.at(torch.arange(2))
    own = image.decode(sampled(image.sampler(STEPS, noise=False), image.model, start, cond))
    pipeline.set_progress_bar_config(disable=True)
    latents, scale = start.clone(), {"guidance_scale": 3.0, "use_resolution_binning": False}
    if kind == "flux":
        latents = pipeline._pack_latents(start, 2, 4, 16, 16)
        scale = {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]}
    theirs = pipeline(
        texts, height=32, width=32, num_inference_steps=STEPS, latents=latents, output_type="pt",
        **scale,
    ).images  # fmt: skip
    assert float((own - torch.as_tensor(theirs)).abs().max()) < 1e-5
    assert float((own[0] - own[1]).abs().max()) > 1e-4


# --- decoding ------------------------------------------------------------------------------------


def with_latents() -> tuple[ImageModel, Tensor]:
    image = adapted(tiny.stable_diffusion_3(), prompts=tiny.prompts("sd3"), lora=None)
    return image, noise(image.model)


def slope(decode: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of a reward of images."""
    weights = torch.linspace(-1, 1, 16)
    reward = Differentiable(lambda y: (y * weights).flatten(1).sum(1))
    return Decoded(reward, decode).value_and_grad(x)


def test_checkpointed_decoding_has_the_same_gradient() -> None:
    image, x = with_latents()
    plain = slope(image.decode, x)
    again = slope(image.with_decoder(checkpointed=True).decode, x)
    assert float(plain[1].abs().max()) > 1e-3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


def test_gradient_of_decoding() -> None:
    """Against a finite difference, in double precision."""
    pipeline = tiny.stable_diffusion_3()
    pipeline.vae.double()
    decode, x = Decoder(pipeline.vae), torch.randn(1, 4, 8, 8, generator=Seed(2).generator())
    x = 0.1 * x.double()
    leaf = x.clone().requires_grad_()
    decode(leaf)[:, :, :4].sum().backward()  # type: ignore[no-untyped-call]
    direction = torch.randn(x.shape, generator=Seed(3).generator(), dtype=x.dtype)
    h = 1e-5
    ends = [float(decode(x + s * h * direction)[:, :, :4].sum()) for s in (1, -1)]
    assert leaf.grad is not None
    exact = float((leaf.grad * direction).sum())
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(exact, rel=1e-6)
    assert abs(exact) > 1e-3


def test_decoding_in_tiles_and_in_low_precision() -> None:
    """Close to the whole, and the pipeline's VAE is left as it was."""
    image, _ = with_latents()
    large = 0.3 * torch.randn(1, 4, 24, 24, generator=Seed(4).generator())
    whole = image.decode(large)
    tiled = image.with_decoder(tiled=True).decode(large)
    low = image.with_decoder(dtype=torch.bfloat16).decode(large)
    vae = image.pipeline.vae
    assert not vae.use_tiling
    assert vae.dtype == torch.float32
    assert low.dtype == torch.float32
    assert 0 < float((low - whole).abs().mean()) < 0.01
    assert 0 < float((tiled - whole).abs().mean()) < 0.1
    pipeline = tiny.stable_diffusion_3()
    pipeline.vae.to(torch.float16)
    assert Decoder(pipeline.vae).vae.dtype == torch.float32
    assert Decoder(pipeline.vae, dtype=torch.float16).vae.dtype == torch.float16
    with pytest.raises(ConfigError, match="no VAE"):
        adapted(tiny.unconditional(), lora=None).with_decoder(tiled=True)


# --- files ---------------------------------------------------------------------------------------


def test_loading_is_that_of_diffusers(tmp_path: Path) -> None:
    """A folder with safetensors is read; one with pickles only by an explicit wish."""
    pipeline = tiny.unconditional()
    pipeline.save_pretrained(tmp_path / "safe")
    image = load_pipeline(tmp_path / "safe", lora=None)
    same = adapted(pipeline, lora=None)
    x = noise(same.model)
    with torch.no_grad():
        assert torch.equal(image.model.endpoint(x, 0.5), same.model.endpoint(x, 0.5))
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        load_pipeline(tmp_path / "pickled")


@pytest.mark.parametrize("page", ["docs/images.md", "README.md"])
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of both pages, of at most 15 lines, with a tiny pipeline and fewer steps."""
    import diffusers

    text = (Path(__file__).resolve().parent.parent / page).read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (block,) = [each for each in blocks if "load_pipeline" in each]
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    asked: dict[str, Any] = {}

    def stand_in(name: str, **kwargs: Any) -> Any:
        asked.update(kwargs, name=name)
        return tiny.with_text_encoders("sd", tmp_path / "words")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", stand_in)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(
        block.replace("sampler(50)", "sampler(5)").replace("=200", "=2").replace("=10,", "=2,"),
        scope,
    )
    assert asked["use_safetensors"] is True
    assert (tmp_path / "tuned" / "pytorch_lora_weights.safetensors").is_file()
    assert scope["image"].prompts.texts == ("a bird", "a lake")

"""Rewards of images: CLIP's scores, the aesthetic head, and sizes of JPEGs."""

from __future__ import annotations

import builtins
import importlib
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tiltflow.errors import (
    CapabilityError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    ShapeError,
)
from tiltflow.potential import Decoded, Potential
from tiltflow.rewards import Aesthetic, ClipScore, JpegSize
from tiltflow.rewards.clip import ClipFeatures, clip_score, linear_head
from tiltflow.rewards.pixels import ClipPixels
from tiny_clip import SIZE, WIDTH, clip, images, in_steps, processor, tokenizer

PROMPTS = ("a cat", "two dogs", "sea")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def model() -> Any:
    return clip()


@pytest.fixture(scope="module")
def score(model: Any, words: Any) -> ClipScore:
    return ClipScore(model, words, PROMPTS)


def check_gradient(reward: Potential, x: torch.Tensor, cond: Any = None) -> None:
    """Central differences along random directions, in float64."""
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    value, grad = reward.value_and_grad(x, cond)
    assert torch.equal(value, reward.value(x, cond))
    h = 1e-5
    up, down = reward.value(x + h * direction, cond), reward.value(x - h * direction, cond)
    slope = (grad * direction).flatten(1).sum(1)
    scale = grad.flatten(1).norm(dim=1) * direction.flatten(1).norm(dim=1)
    assert bool((scale > 0).all())
    assert float((((up - down) / (2 * h) - slope) / scale).abs().max()) < 1e-7


def test_score_is_that_of_the_model_itself(model: Any, words: Any, score: ClipScore) -> None:
    """transformers' logits_per_image of the same pixels, with its own padding of the texts."""
    x = images(4)
    pixels = ClipPixels(SIZE)(x)
    with torch.no_grad():
        tokens = words(list(PROMPTS), padding="max_length", return_tensors="pt")
        logits = model(**tokens, pixel_values=pixels).logits_per_image
    number = torch.tensor([2, 0, 1, 2])
    expected = logits[torch.arange(4), number]
    scaled = ClipScore(model, words, PROMPTS, scaled=True)
    assert torch.allclose(scaled.value(x, {"prompt": number}), expected, rtol=0, atol=1e-9)
    cosines = score.value(x, {"prompt": number})
    assert torch.allclose(cosines * model.logit_scale.exp(), expected, rtol=0, atol=1e-9)
    assert bool((cosines.abs() <= 1).all())
    assert float(cosines.std()) > 1e-3, "all prompts alike would prove nothing"


def test_whole_path_is_transformers(model: Any, words: Any) -> None:
    """From 8-bit images: their processor and model, up to the rounding of pixels."""
    x = in_steps(images(3, 64, 48))
    one = ClipScore(model, words, ["cat"])
    given = processor(SIZE)(list((255 * x).round().to(torch.uint8)), return_tensors="pt")
    with torch.no_grad():
        tokens = words(["cat"], return_tensors="pt")
        out = model(**tokens, pixel_values=given["pixel_values"].double())
    expected = (out.logits_per_image / model.logit_scale.exp())[:, 0]
    spread = float(expected.std())
    assert float((one.value(x) - expected).abs().max()) < 0.02 * spread


def test_gradient_is_the_finite_difference(model: Any, score: ClipScore) -> None:
    cond = {"prompt": torch.tensor([1, 1, 0])}
    check_gradient(score, images(3), cond)
    check_gradient(Aesthetic(model, nn.Linear(WIDTH, 1).double()), images(3))


def test_latents_by_way_of_a_decoder(score: ClipScore) -> None:
    """``Decoded`` hands the prompts on; the gradient is the latents'."""
    z = torch.logit(images(2)[:, :, ::4, ::4])

    def decode(z: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(nn.functional.interpolate(z, scale_factor=4, mode="bilinear"))

    check_gradient(Decoded(score, decode), z, {"prompt": torch.tensor([0, 2])})


def test_prompts_by_number(model: Any, words: Any, score: ClipScore) -> None:
    """Each sample is compared with its own prompt only."""
    x = images(1).expand(3, -1, -1, -1)
    together = score.value(x, {"prompt": torch.arange(3)})
    alone = [float(ClipScore(model, words, [p]).value(x[:1])) for p in PROMPTS]
    assert together.tolist() == pytest.approx(alone, abs=1e-12)
    assert len(set(alone)) == 3
    many = {"prompt": torch.zeros(3, dtype=torch.long), "text": torch.zeros(3, 2, 2)}
    one = ClipScore(model, words, PROMPTS[:1])
    assert torch.equal(one.value(x, many), one.value(x))


def test_prompts_that_are_missing(score: ClipScore, model: Any, words: Any) -> None:
    x = images(2)
    for wrong in (None, {}, {"prompt": torch.tensor([0])}, {"prompt": torch.tensor([0.0, 1.0])},
                  {"prompt": ["sea", "sea"]}):  # fmt: skip
        with pytest.raises(ShapeError, match=r"cond\['prompt'\]"):
            score.value(x, wrong)
    for outside in ([0, 3], [-1, 0]):
        with pytest.raises(ShapeError, match="3 prompts"):
            score.value(x, {"prompt": torch.tensor(outside)})
    for wrong_prompts in ([], "a cat"):
        with pytest.raises(ConfigError, match="prompts"):
            ClipScore(model, words, wrong_prompts)


def test_long_prompts_are_cut_with_a_warning(model: Any, words: Any) -> None:
    long = "abcdefghijklmnop"
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than the 12 tokens") as seen:
        cut = ClipScore(model, words, [long, "sea"])
    assert seen[0].filename == __file__
    assert float(cut.value(images(1), {"prompt": torch.tensor([0])})) != 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClipScore(model, words, [long[:10]])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: 255 * x,
        lambda x: 2 * x - 1,
        lambda x: x + 0.01,
        lambda x: x[:, :1],
        lambda x: x[0],
        lambda x: (255 * x).to(torch.uint8),
    ],
)
def test_images_out_of_range_are_refused(wrong: Any, model: Any, words: Any) -> None:
    """Times 255, centred, brightened, grey, single, of integers."""
    x = images(2)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 1
    for reward in (ClipScore(model, words, ["sea"]), JpegSize()):
        reward.value(x)
        with pytest.raises(ShapeError, match=r"\[0, 1\]"):
            reward.value(wrong(x))


def test_overshoot_of_a_step_is_clamped(model: Any, words: Any) -> None:
    x = images(2, SIZE, SIZE)
    x[:, :, :4] = 1
    over, reward = x.clone(), ClipScore(model, words, ["sea"])
    over[:, :, :4] += 0.9 / 255
    assert torch.allclose(reward.value(over), reward.value(x), atol=1e-3 / 255)
    assert torch.equal(JpegSize().value(over), JpegSize().value(x))
    x[1, 0, 5, 5] = torch.nan
    with pytest.raises(NonFiniteError, match="pixel"):
        reward.value(x)


def test_model_is_frozen_and_keeps_its_dtype(words: Any) -> None:
    """Gradients go to the images alone, in their dtype, whatever the model's is."""
    net = clip().to(torch.float32).train()
    reward = ClipScore(net, words, ["sea"], scaled=True)
    assert not net.training
    value, grad = reward.value_and_grad(images(2))
    assert value.dtype == grad.dtype == torch.float64
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    assert all(p.dtype == torch.float32 for p in net.parameters())
    exact = ClipScore(clip(), words, ["sea"], scaled=True).value(images(2))
    assert torch.allclose(value, exact, rtol=1e-4)


def test_half_precision(words: Any) -> None:
    """Model and images in bfloat16: values in single precision, near those in double; what is left
    is the rounding of weights, activations and pixels."""
    x = images(8)
    exact, slope = ClipScore(clip(), words, ["sea"]).value_and_grad(x)
    reward = ClipScore(clip().to(torch.bfloat16), words, ["sea"])
    value, grad = reward.value_and_grad(x.to(torch.bfloat16))
    assert (value.dtype, grad.dtype) == (torch.float32, torch.bfloat16)
    assert float((value - exact).abs().max()) < 0.01
    pair = grad.double().flatten(1), slope.flatten(1)
    assert float(nn.functional.cosine_similarity(*pair).min()) > 0.998
    assert JpegSize().value(x.to(torch.bfloat16)).dtype == torch.float32


def test_features_are_unit_vectors_for_kernels(model: Any) -> None:
    from tiltflow.similarity import CosineSimilarity

    features = ClipFeatures(model)
    x = images(3)
    phi = features.value(x)
    assert phi.shape == (3, WIDTH)
    assert torch.allclose(phi.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(CosineSimilarity(features).matrix(x, x), phi @ phi.T)
    with pytest.raises(ConfigError, match="Linear has no vision_model"):
        ClipFeatures(nn.Linear(2, 2))


def written_head(folder: Path, widths: tuple[int, ...]) -> tuple[Path, nn.Sequential]:
    """As LAION's: linear layers with dropout between some of them, hence gaps in the numbers."""
    from safetensors.torch import save_file

    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b).double(), nn.Dropout(0.2)]
    whole = nn.Sequential(*layers[:-1])
    tensors = {f"layers.{key}": t for key, t in whole.state_dict().items()}
    save_file(tensors, folder / "head.safetensors")
    return folder / "head.safetensors", whole.eval()


def test_aesthetic_head(model: Any, tmp_path: Path) -> None:
    """Twelve numbers, so that 10 comes after 2; the score is the head of the unit embedding."""
    path, whole = written_head(tmp_path, (WIDTH, 12, 9, 8, 7, 5, 4, 1))
    assert len(whole) == 13
    x = images(4)
    expected = whole(ClipFeatures(model).value(x))[:, 0]
    assert torch.allclose(Aesthetic(model, linear_head(path)).value(x), expected, atol=1e-12)
    assert torch.equal(Aesthetic(model, whole).value(x), expected.detach())
    other, _ = written_head(tmp_path, (WIDTH + 1, 1))
    with pytest.raises(ConfigError, match="width 17"):
        Aesthetic(model, linear_head(other))


def test_heads_that_are_none(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "head.safetensors"
    one = {"weight": torch.ones(1, 3), "bias": torch.zeros(1)}
    save_file(one, path)
    assert linear_head(path)(torch.ones(1, 3)).tolist() == [[3]]
    for wrong in (
        {"weight": torch.ones(1, 3)},
        {"weight": torch.ones(2, 3), "bias": torch.zeros(2)},
        {**one, "more": torch.ones(1)},
        {f"l.{i}.{key}": t.clone() for i in (0, 1) for key, t in one.items()},
        {"first.weight": torch.ones(1, 3), "first.bias": torch.zeros(1)},
        {"more": torch.ones(1)},
    ):
        save_file(wrong, path)
        with pytest.raises(CheckpointError, match="not a row of linear layers"):
            linear_head(path)
    with pytest.raises(CheckpointError, match="save_file"):
        linear_head(tmp_path / "absent.safetensors")


def test_loading_by_name(model: Any, words: Any, score: ClipScore, tmp_path: Path) -> None:
    """From a folder that transformers wrote; nothing is downloaded."""
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded = clip_score(str(tmp_path), PROMPTS, local_files_only=True, dtype=torch.float64)
    x, cond = images(2), {"prompt": torch.tensor([2, 1])}
    assert torch.equal(loaded.value(x, cond), score.value(x, cond))
    with pytest.raises(OSError, match="nowhere"):
        clip_score(str(tmp_path / "nowhere"), PROMPTS, local_files_only=True)


def test_wrong_numbers_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for quality in (0, 96):
        with pytest.raises(ConfigError, match="quality"):
            JpegSize(quality)
    with pytest.raises(ConfigError, match="size=0"):
        ClipPixels(0)

    def missing(name: str) -> Any:
        raise builtins.ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(CapabilityError, match=r"pip install 'tiltflow\[diffusers\]'"):
        clip_score("anything", PROMPTS)
    with pytest.raises(CapabilityError, match="pip install pillow"):
        JpegSize()

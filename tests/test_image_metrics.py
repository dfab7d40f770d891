"""Metrics of images: Vendi score, Frechet distance, rewards per prompt."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiltflow.rewards.clip
from tiltflow.density import Empirical
from tiltflow.errors import ConfigError, NonFiniteError, ShapeError
from tiltflow.metrics import frechet, image_features, image_report, left_cvar, per_prompt, vendi
from tiltflow.metrics.tails import right_cvar
from tiltflow.potential import BlackBox, Differentiable
from tiny_clip import WIDTH, clip, images, tokenizer


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def given(mean: Tensor, cov: Tensor, count: int, seed: int) -> Tensor:
    """Samples whose mean and unbiased covariance are exactly these."""
    x = normal(count, len(mean), seed=seed)
    x = x - x.mean(0)
    own = torch.linalg.cholesky(torch.cov(x.T))
    white = torch.linalg.solve_triangular(own, x.T, upper=False)
    return mean + (torch.linalg.cholesky(cov) @ white).T


def test_frechet_of_two_gaussians() -> None:
    """Commuting covariances: |dm|^2 + sum (sd_a - sd_b)^2, in any rotation; 0 of the same."""
    turn = torch.linalg.qr(normal(3, 3, seed=0)).Q
    sd_a, sd_b = (torch.tensor(s, dtype=torch.float64) for s in ([1, 2, 0.5], [3, 2, 0.1]))
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    a = given(mean, turn @ torch.diag(sd_a**2) @ turn.T, 50, 1)
    b = given(0 * mean, turn @ torch.diag(sd_b**2) @ turn.T, 70, 2)
    expected = float(mean.square().sum() + (sd_a - sd_b).square().sum())
    assert frechet(a, b).value == pytest.approx(expected, rel=1e-10)
    assert frechet(b, a).value == pytest.approx(expected, rel=1e-10)
    assert frechet(a, a + 2).value == pytest.approx(12, rel=1e-10)
    assert frechet(a, a).value == pytest.approx(0, abs=1e-10)


def test_frechet_is_the_textbooks() -> None:
    """With scipy's matrix square root, for covariances that do not commute."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = normal(40, 6, seed=3) @ normal(6, 6, seed=4), normal(30, 6, seed=5) + 1
    ca, cb = (torch.cov(x.T).numpy() for x in (a, b))
    root = linalg.sqrtm(ca @ cb).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + (ca + cb - 2 * root).trace()
    assert frechet(a, b).value == pytest.approx(expected, rel=1e-8)


def test_frechet_with_fewer_samples_than_features() -> None:
    """Padding by features that are zero changes nothing, the error included."""
    a, b = normal(9, 4, seed=6), 2 * normal(8, 4, seed=7)
    turn = torch.linalg.qr(normal(30, 30, seed=8)).Q
    wide = [torch.nn.functional.pad(x, (0, 26)) @ turn for x in (a, b)]
    narrow, padded = frechet(a, b), frechet(*wide)
    assert padded.value == pytest.approx(narrow.value, rel=1e-9)
    assert padded.standard_error == pytest.approx(narrow.standard_error, rel=1e-6)
    assert narrow.count == 8


@pytest.mark.parametrize("swapped", [False, True])
def test_error_of_the_frechet_distance(swapped: bool) -> None:
    """The scatter over 300 pairs of samples, within a sixth (four errors of it). One law is
    skewed, so that means and covariances err together."""
    mix, shift = normal(3, 3, seed=9), torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    pairs = []
    for i in range(300):
        a = normal(1200, 3, seed=2 * i) @ mix
        b = normal(300, 3, seed=2 * i + 1).square() + shift
        pairs.append(frechet(b, a) if swapped else frechet(a, b))
    scatter = float(torch.tensor([p.value for p in pairs]).std())
    told = sum(p.standard_error for p in pairs) / len(pairs)
    assert told == pytest.approx(scatter, rel=1 / 6)


def test_frechet_from_constant_features() -> None:
    """A point: its distance is that of the means plus the trace; no number is divided by zero."""
    b = normal(50, 3, seed=11)
    out = frechet(torch.full((4, 3), 2.0), b)
    expected = float((b.mean(0) - 2).square().sum() + torch.cov(b.T).trace())
    assert out.value == pytest.approx(expected, rel=1e-12)
    assert math.isfinite(out.standard_error)
    flat = torch.nn.functional.pad(b, (0, 1))
    assert frechet(flat, flat + 1).value == pytest.approx(4, rel=1e-12)
    assert frechet(flat, flat + 1).standard_error == pytest.approx(
        frechet(b, b + 1).standard_error, abs=1e-9
    )


def test_bias_of_the_frechet_distance() -> None:
    """(m^2 + 5 m) / 2N for N samples each of N(0, 1), to first order."""
    n, m = 2000, 4
    found = torch.tensor(
        [frechet(normal(n, m, seed=2 * i), normal(n, m, seed=2 * i + 1)).value for i in range(200)]
    )
    expected = (m**2 + 5 * m) / (2 * n)
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - expected) < 4.5 * error
    assert error < 0.05 * expected


def test_vendi_counts_kinds() -> None:
    """k orthogonal kinds, equally many of each: k; all alike: 1; lengths do not count."""
    kinds = torch.eye(5, dtype=torch.float64)
    assert vendi(kinds.repeat(7, 1)).value == pytest.approx(5, rel=1e-4)
    assert vendi(3 * kinds[:1].repeat(7, 1)).value == pytest.approx(1, rel=1e-4)
    assert vendi(kinds * torch.arange(1.0, 6.0)[:, None]).value == pytest.approx(5, rel=1e-4)
    assert vendi(kinds.repeat(7, 1), at_most=3).value == pytest.approx(3, rel=1e-4)


def test_vendi_is_the_entropy_of_the_kernel() -> None:
    """exp of the entropy of the eigenvalues of K / n, K the matrix of cosines."""
    phi = normal(60, 8, seed=10) + 1
    unit = phi / phi.norm(dim=1, keepdim=True)
    spectrum = torch.linalg.eigvalsh(unit @ unit.T / len(phi)).clamp(min=1e-300)
    expected = math.exp(-float((spectrum * spectrum.log()).sum()))
    out = vendi(phi)
    assert out.value == pytest.approx(expected, rel=1e-4)
    assert 0 < out.standard_error < out.value
    assert out.count == 60


def test_tails_per_prompt_and_pooled() -> None:
    """Ten samples of 0, ..., 9 for one prompt, five of 100 to 104 for another."""
    values = torch.cat([torch.arange(10.0), 100 + torch.arange(5.0)])
    prompt = torch.tensor([4] * 10 + [2] * 5)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    out = per_prompt(values[order], prompt[order], left=0.2, right=0.8)
    numbers = {key: e.value for key, e in out.items()}
    assert numbers == pytest.approx(
        {
            "mean": 37.0, "left_cvar": 1.0, "right_cvar": 103.0,
            "mean[each]": (4.5 + 102) / 2, "left_cvar[each]": (0.5 + 100) / 2,
            "right_cvar[each]": (8.5 + 104) / 2,
            "mean[2]": 102.0, "left_cvar[2]": 100.0, "right_cvar[2]": 104.0,
            "mean[4]": 4.5, "left_cvar[4]": 0.5, "right_cvar[4]": 8.5,
        }
    )  # fmt: skip
    assert out["left_cvar"] == left_cvar(values, 0.2)
    assert out["right_cvar[4]"] == right_cvar(values[:10], 0.8)
    errors = [out[f"left_cvar[{k}]"].standard_error for k in (2, 4)]
    assert out["left_cvar[each]"].standard_error == pytest.approx(math.hypot(*errors) / 2)
    assert (out["mean[4]"].count, out["mean[2]"].count, out["mean[each]"].count) == (10, 5, 15)


def test_features_are_made_in_parts() -> None:
    """The same in any parts, without a graph; CLIP's are of its embedding's width."""
    from tiltflow.rewards.clip import ClipFeatures

    features, x = ClipFeatures(clip()), images(5)
    whole = features.value(x)
    for at_once in (1, 2, 5):
        parts = image_features(x, features.value, at_once=at_once)
        assert torch.allclose(parts, whole, atol=1e-12)
    assert parts.shape == (5, WIDTH)
    assert not image_features(x.requires_grad_(), features.value).requires_grad


def test_report() -> None:
    """Every number is that of the function it is named after."""
    x, prompt = images(6, 8, 8), torch.tensor([0, 0, 0, 1, 1, 3])
    light = Differentiable(lambda x: x.mean((1, 2, 3)))

    def colours(x: Tensor) -> Tensor:
        return x.mean((2, 3)).float()

    phi, reference = image_features(x, colours), image_features(images(4, seed=1), colours)
    out = image_report(
        x, {"prompt": prompt}, rewards={"light": light}, features=colours, reference=reference
    )
    told = {f"light.{k}": e for k, e in per_prompt(light.value(x), prompt).items()}
    made = {"vendi": vendi(phi), "vendi[0]": vendi(phi[:3]), "vendi[1]": vendi(phi[3:5])}
    assert out == told | made | {"frechet": frechet(phi, reference)}
    assert list(image_report(x, rewards={"light": light})) == [
        "light.mean", "light.left_cvar", "light.right_cvar"
    ]  # fmt: skip
    assert list(image_report(x, rewards={}, features=colours)) == ["vendi"]


def test_refusals() -> None:
    x = images(3, 8, 8)
    for wrong in (255 * x, x[:, 0], x[:0]):
        with pytest.raises(ShapeError, match="image"):
            image_features(wrong, lambda x: x.flatten(1))
    with pytest.raises(ShapeError, match="samples, features"):
        image_features(x, lambda x: x)
    with pytest.raises(NonFiniteError, match="feature"):
        image_features(x, lambda x: x.flatten(1) / 0)
    with pytest.raises(ShapeError, match="same features"):
        frechet(normal(5, 3, seed=0), normal(5, 4, seed=0))
    with pytest.raises(ShapeError, match="two samples"):
        frechet(normal(5, 3, seed=0), normal(1, 3, seed=0))
    with pytest.raises(ConfigError, match="at_most"):
        vendi(normal(5, 3, seed=0), at_most=5000)
    with pytest.raises(ConfigError, match="zero"):
        vendi(torch.zeros(4, 3))
    with pytest.raises(ConfigError, match="reference"):
        image_report(x, rewards={}, reference=normal(5, 3, seed=0))
    for prompt in (torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0])):
        with pytest.raises(ShapeError, match="numbers"):
            per_prompt(torch.arange(3.0), prompt)


def test_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every block of Python on docs/image-rewards.md, with a tiny CLIP for each name."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    made = clip(), tokenizer(tmp_path / "words")
    monkeypatch.setattr(tiltflow.rewards.clip, "load_clip", lambda name, **kwargs: made)
    head = {"layers.0.weight": torch.ones(1, WIDTH), "layers.0.bias": torch.zeros(1)}
    torch.save(head, "sac+logos+ava1-l14-linearMSE.pth")
    prompt = torch.arange(6) % 2
    scope = {
        "torch": torch, "tiltflow": tiltflow, "BlackBox": BlackBox, "model": made[0],
        "decode": torch.sigmoid, "latents": torch.logit(images(6)), "numbers": prompt,
        "images": images(6), "photographs": images(8, seed=1), "cond": {"prompt": prompt},
        "score": lambda text, image: len(text) * float(image.mean()),
    }  # fmt: skip
    page = Path(__file__).resolve().parent.parent / "docs" / "image-rewards.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    with pytest.warns(UserWarning, match="longer than the 12 tokens"):
        exec(blocks[0], scope)
    for block in blocks[1:]:
        exec(block, scope)
        reward = scope["reward"]
        assert reward.value(images(6), {"prompt": prompt}).shape == (6,)
    assert {"clip.mean[1]", "clip.left_cvar[each]", "vendi", "frechet"} <= set(scope["report"])
    value = scope["diversity"].value(Empirical(scope["latents"]))
    assert 0 < value.value < math.log(6)

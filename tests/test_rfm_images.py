"""The union of image models: its judges, what runs without the models, and a smoke run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from published import published
from tiltflow.analytic import GaussianMixture
from tiltflow.context import Context
from tiltflow.schedule import Linear
from tiltflow.seed import Seed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import rfm_images  # noqa: E402
import rfm_images_lab  # noqa: E402
from rfm_images_judges import COMPARED, discriminator, distance, frechet  # noqa: E402
from rfm_images_taught import TaughtLoss  # noqa: E402
from toys import Store  # noqa: E402


def features(count: int, seed: int) -> torch.Tensor:
    x = torch.randn(count, 6, dtype=torch.float64, generator=Seed(seed).generator())
    return x * torch.linspace(0.5, 2, 6, dtype=torch.float64)


def test_frechet_distance_of_an_affine_map() -> None:
    """b = s a + m has distance |mean_b - mean_a|^2 + (s - 1)^2 tr C exactly; of a to a it is 0."""
    a = features(50, 0)
    b = 1.7 * a + torch.arange(6)
    shift = (b.mean(0) - a.mean(0)).square().sum()
    expected = float(shift + 0.7**2 * torch.cov(a.T).trace())
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_error_of_the_frechet_distance() -> None:
    """The error is the scatter of the distance over independent samples, to a factor of two."""
    other = features(2000, 99) + 0.5
    found = [distance(features(COMPARED, seed), other) for seed in range(30)]
    scatter = float(torch.tensor([value for value, _ in found]).std())
    claimed = float(torch.tensor([error for _, error in found]).mean())
    assert 0.5 < claimed / scatter < 2


def test_the_discriminator_tells_parts_apart() -> None:
    """Bars from left to right against bars from top to bottom; no global randomness."""
    generator = Seed(1).generator()
    bars = torch.rand(200, 1, 28, 1, generator=generator).expand(200, 1, 28, 28)
    state = torch.get_rng_state()
    net = discriminator(bars[:100], bars[:100].mT, Seed(0), 30)
    assert torch.equal(torch.get_rng_state(), state)
    right = torch.cat([net(bars[100:])[:, 0] < 0, net(bars[100:].mT)[:, 0] > 0])
    assert float(right.double().mean()) > 0.95


def test_what_is_taught_is_the_mixture() -> None:
    """The exact model of .25 N(-1, .5^2) + .75 N(1, .3^2) is the minimiser of its parts' teaching:
    its errors are orthogonal to functions of (x, t); those of a model of other shares are not."""
    parts = [GaussianMixture([[-1.0]], 0.5), GaussianMixture([[1.0]], 0.3)]
    stds = torch.tensor([0.5, 0.3], dtype=torch.float64)
    banks = [part.sample(20_000, Seed(k)).float() for k, part in enumerate(parts)]

    def worst(share: float) -> float:
        model = GaussianMixture([[-1.0], [1.0]], stds, [share, 1 - share]).flow(Linear())
        flows = [part.flow(Linear()) for part in parts]
        loss = TaughtLoss(model, flows, banks, [5000, 15_000], Context(Seed(3)))
        pairs = [
            loss._pair(flow, bank, count, Seed(4).child(k).generator())
            for k, (flow, bank, count) in enumerate(zip(flows, banks, loss.counts, strict=True))
        ]
        x, t, target = (torch.cat(each) for each in zip(*pairs, strict=True))
        inside = t < 0.95  # the noise of these flows is (x - t end) / (1 - t)
        error = (model.noise(x, t) - target)[inside, 0].detach()
        zs = []
        for test in (torch.ones_like(t), x[:, 0], t, (3 * x[:, 0]).sin()):
            product = error * test[inside]
            zs.append(float(product.mean() / product.std()) * len(product) ** 0.5)
        return max(abs(z) for z in zs)

    assert worst(0.25) < 4.5
    assert worst(0.75) > 20


def test_without_models_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rfm_images, "MODELS", tmp_path / "nowhere")
    store = Store(tmp_path / "images.json")
    rfm_images.run(store, [0], quick=True)
    assert store.known == {}
    assert rfm_images.section(store) == ""
    assert "no models in" in capsys.readouterr().out


@published("ddpm_unet_28", "mnist_classifier")
@pytest.mark.skipif(not rfm_images_lab.DATA.is_dir(), reason="no MNIST test set beside the models")
@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    """A run goes on where it was; every number of the page is one."""
    store = Store(tmp_path / "images.json")
    rfm_images.run(store, [0, 1], quick=True)
    assert not any(key.endswith("/1") for key in store.known), "one seed is enough"
    before = store.path.read_text(encoding="utf-8")
    rfm_images.run(Store(store.path), [0, 1], quick=True)
    assert store.path.read_text(encoding="utf-8") == before
    assert all(finite(value) for value in json.loads(before).values())
    page = rfm_images.section(store)
    assert all(title in page for title in ("one network, 1 : 1", "**Guided**", "CPU-seconds"))
    rfm_images.pictures(store, tmp_path / "docs")
    assert (tmp_path / "docs" / "images" / "rfm_images.png").stat().st_size < 200_000


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(finite(v) for v in value.values())
    if isinstance(value, list):
        return all(finite(v) for v in value)
    return not isinstance(value, float) or abs(value) < float("inf")

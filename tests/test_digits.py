"""The shipped digit models: they load, they are what their card says, and damage is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tiltflow.adapters import digits
from tiltflow.adapters.digits import (
    CLASSES,
    EVENT,
    DigitClassifier,
    DigitNet,
    digits_card,
    load_digit_classifier,
    load_digit_judge,
    load_digits_flow,
)
from tiltflow.adapters.digits_data import no_digits, warped
from tiltflow.errors import CheckpointError
from tiltflow.metrics import left_cvar
from tiltflow.rewards import Readability
from tiltflow.sample import Sampler
from tiltflow.seed import Seed


def test_package_data_is_small() -> None:
    """Network files together stay under 2 MB."""
    assert sum(p.stat().st_size for p in digits.DATA.iterdir()) < 2e6


def test_samples_are_as_good_as_the_card_says() -> None:
    """Mean and worst tenth of readability on 2000 fresh samples, |z| < 4.5 against the card."""
    quality = digits_card()["flow"]["quality"]["euler_maruyama_40"]
    x = Sampler().sample(load_digits_flow(), 2000, seed=Seed(11))
    r = Readability().value(x)
    worst = left_cvar(r, 0.1)
    assert abs(worst.value - quality["worst_tenth"]["value"]) < 4.5 * worst.standard_error
    mean_error = float(r.std()) / 2000**0.5
    assert abs(float(r.mean()) - quality["readability"]["mean"]["value"]) < 4.5 * mean_error
    shares = torch.bincount(Readability().class_of(x), minlength=CLASSES) / 2000
    assert float(shares.min()) > 0.05
    agree = (load_digit_judge()(x).argmax(1) == Readability().class_of(x)).double().mean()
    assert float(agree) > 0.9


def test_card_is_honest_about_the_classifiers() -> None:
    """Accuracy above 0.97 on the held-out digits; the judge is another network."""
    card = digits_card()
    assert card["classifier"]["quality"]["accuracy"] > 0.97
    assert card["judge"]["quality"]["accuracy"] > 0.97
    assert card["classifier"]["architecture"] != card["judge"]["architecture"]


def test_held_out_accuracy_is_reproduced() -> None:
    """The number of the card, to the last digit of 360."""
    pytest.importorskip("sklearn")
    from tiltflow.adapters.digits_data import load_data

    _, (x, y) = load_data()
    accuracy = float((load_digit_classifier()(x).argmax(1) == y).double().mean())
    assert accuracy == pytest.approx(digits_card()["classifier"]["quality"]["accuracy"], abs=3e-3)


def test_readability_falls_gradually_from_digits_to_blots() -> None:
    """Blends of two samples lie between samples and images that are no digits."""
    reward = Readability()
    x = Sampler().sample(load_digits_flow(), 1000, seed=Seed(12))
    clear = x[reward.value(x) > -0.05][:300]
    other = clear[torch.randperm(len(clear), generator=Seed(13).generator())]
    differs = reward.class_of(clear) != reward.class_of(other)
    blend = (0.5 * (clear + other))[differs]
    blots = no_digits(clear, Seed(14).generator())
    means = [float(reward.value(images).mean()) for images in (clear, blend, blots)]
    assert means[0] > -0.05 > -0.4 > means[1] > -1.3 > means[2]


def test_warps_keep_shape_range_and_paper() -> None:
    x = -torch.ones(5, *EVENT)
    assert torch.allclose(warped(x, Seed(0).generator()), x)
    ink = warped(torch.ones(5, *EVENT), Seed(0).generator())
    assert float(ink.min()) >= -1 - 1e-6
    assert float(ink.max()) <= 1 + 1e-6


def test_networks_are_smooth_enough_for_gradients() -> None:
    """DigitNet and the classifier have finite second derivatives at random points (no ReLU)."""
    x = torch.randn(2, *EVENT, dtype=torch.float64, requires_grad=True)
    net, classifier = DigitNet(16, 1, 2).double(), DigitClassifier(2, (2, 3)).double()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for out in (net(x, t).square().sum(), classifier(x).square().sum()):
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert bool(torch.isfinite(second).all())
        assert float(second.abs().max()) > 0


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "data"
    shutil.copytree(digits.DATA, copy)
    monkeypatch.setattr(digits, "DATA", copy)
    return copy


def test_damaged_weights_are_refused(data: Path) -> None:
    path = data / "digits_flow.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"not the file that digits\.json describes"):
        load_digits_flow()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read.*make digits-train"):
        load_digits_flow()


def test_damaged_card_is_refused(data: Path) -> None:
    card = json.loads((data / "digits.json").read_text())
    (data / "digits.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"digits\.json.*missing or damaged"):
        load_digit_classifier()
    del card["judge"]["sha256"]
    (data / "digits.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="sha256"):
        load_digits_flow()


def test_card_of_another_architecture_is_refused(data: Path) -> None:
    card = json.loads((data / "digits.json").read_text())
    card["flow"]["architecture"]["width"] = 32
    (data / "digits.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="of another size"):
        load_digits_flow()


@pytest.mark.slow
def test_training_is_deterministic(tmp_path: Path) -> None:
    """A short training twice: the same files."""
    pytest.importorskip("sklearn")
    from tiltflow.adapters.train_digits import Recipe, train

    recipe = Recipe(flow_updates=30, classifier_updates=10, samples=200)
    cards = [train(tmp_path / name, recipe, lambda line: None) for name in ("a", "b")]
    assert cards[0] == cards[1]

"""The digits of Reward-Guided Flow Merging: a smoke run, the measures, and one small training."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiltflow.adapters.digits import load_digits_flow
from tiltflow.errors import UnsupportedError
from tiltflow.rewards import Readability
from tiltflow.sample import Sampler
from tiltflow.seed import Seed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import rfm_digits  # noqa: E402
import rfm_digits_models as models  # noqa: E402
import rfm_digits_tables as tables  # noqa: E402
from toys import Store  # noqa: E402


def use(monkeypatch: pytest.MonkeyPatch, x: Tensor, labels: Tensor) -> None:
    """Instead of the digits, which need scikit-learn."""
    for module in (rfm_digits, models):
        monkeypatch.setattr(module, "data", lambda: (x, labels))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on where it was, and says what it made."""
    x = torch.rand(60, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    use(monkeypatch, x, torch.arange(60) % 10)
    store = Store(tmp_path / "digits.json")
    assert rfm_digits.section(store) == ""
    rfm_digits.run(store, [0], True)
    before = store.path.read_text(encoding="utf-8")
    weights = (tmp_path / "digits_a.safetensors").read_bytes()
    rfm_digits.run(Store(store.path), [0], True)
    assert store.path.read_text(encoding="utf-8") == before
    assert (tmp_path / "digits_a.safetensors").read_bytes() == weights
    text = rfm_digits.section(store)
    for row in ("`one_shot`, ODE", "`FeynmanKac`, SDE", "0.3\\*a \\| 0.7\\*b, `distilled`, ODE"):
        assert f"| {row} |" in text


def test_without_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    models.data.cache_clear()
    with pytest.raises(UnsupportedError, match=r"tiltflow\[train\]"):
        rfm_digits.run(Store(tmp_path / "digits.json"), [0], True)


def test_weights_count_as_copies() -> None:
    """Of an image with weight 2/3, and of the same image twice."""
    x = Sampler().sample(load_digits_flow(), 40, seed=Seed(0))
    copies = models.looked(torch.cat([x, x[:20]]))
    weights = torch.cat([torch.full((20,), 2.0), torch.ones(20)]) / 60
    found = models.looked(x, weights)
    for key in ("shares", "clear", "confident", "spread"):
        assert found[key] == pytest.approx(copies[key], abs=1e-6)
    assert found["effective"] == pytest.approx(60**2 / (20 * 4 + 20), rel=1e-5)
    assert sum(found["shares"]) == pytest.approx(1)


def test_deviations_from_a_mixture() -> None:
    def look(share: float, count: float) -> dict[str, object]:
        return {"shares": [share, 1 - share, *[0.0] * 8], "effective": count}

    parts = {"a": look(1.0, 1e4), "b": look(0.0, 1e4)}
    differences, errors = tables.deviations(look(0.34, 1e4), parts, 0.3)
    assert differences[0] == pytest.approx(0.04)
    assert errors[0] == pytest.approx(math.sqrt(0.34 * 0.66 / 1e4), rel=1e-3)
    assert min(errors) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_both_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models of samples of the shipped one: their intersection draws 4s and 5s, by weights
    more purely than the average of velocities does."""
    x = Sampler().sample(load_digits_flow(), 3000, seed=Seed(1))
    readable = Readability().value(x) > math.log(0.9)
    use(monkeypatch, x[readable], Readability().class_of(x[readable]))
    sizes = models.Sizes(
        width=96, depth=2, updates=1500, bank=1200, likelihood_steps=10, fit=1000, fresh=1000
    )
    methods = rfm_digits.methods(models.Work(Store(tmp_path / "digits.json"), sizes))
    weighted, averaged = (methods[f"{name}/and"](0)["sde"] for name in ("weighted", "averaging"))
    assert tables.common(weighted) > 0.9
    assert tables.common(averaged) < tables.common(weighted)
    assert weighted["confident"] > averaged["confident"]

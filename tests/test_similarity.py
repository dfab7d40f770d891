"""Kernels: their formulas, their gradients, and that pieces give what the whole gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tiltflow.similarity
from oracles import axis
from tiltflow.analytic import gaussian
from tiltflow.density import Quadrature
from tiltflow.distances import median_distance, squared_distances
from tiltflow.errors import ConfigError
from tiltflow.features import FeatureMap
from tiltflow.seed import Seed
from tiltflow.similarity import (
    CosineSimilarity,
    GaussianSimilarity,
    InverseMultiquadric,
    LaplaceSimilarity,
    MeanEmbedding,
    NegativeDistance,
    Similarity,
)

KERNELS: dict[str, Similarity] = {
    "cosine": CosineSimilarity(),
    "gaussian": GaussianSimilarity(1.3),
    "laplace": LaplaceSimilarity(0.7),
    "multiquadric": InverseMultiquadric(0.9),
    "negative distance": NegativeDistance(),
}
FORMULAS: dict[str, Callable[[float, float], float]] = {
    "gaussian": lambda d, _: math.exp(-(d**2) / (2 * 1.3**2)),
    "laplace": lambda d, _: math.exp(-d / 0.7),
    "multiquadric": lambda d, _: 1 / math.sqrt(1 + d**2 / 0.9**2),
    "negative distance": lambda d, _: -d,
    "cosine": lambda _, cosine: cosine,
}
kernels = pytest.mark.parametrize("name", sorted(KERNELS))


def points(count: int, dimension: int, label: str = "x") -> Tensor:
    generator = Seed(0).child(label).generator()
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64)


class Plain(Similarity):
    """A third party's kernel, of which only the matrix is written: 1 / (1 + |x - y|^2)."""

    features = None

    def _matrix(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 / (1 + squared_distances(x, y))


@kernels
@pytest.mark.parametrize("dimension", [1, 2, 7])
def test_formula(name: str, dimension: int) -> None:
    """Every entry of the matrix and of the diagonal is the formula of the docstring."""
    x, y = points(5, dimension), points(6, dimension, "y")
    matrix = KERNELS[name].matrix(x, y)
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            cosine = float(a @ b / (a.norm() * b.norm()))
            expected = FORMULAS[name](float((a - b).norm()), cosine)
            assert float(matrix[i, j]) == pytest.approx(expected, rel=1e-12)
    diagonal = KERNELS[name].matrix(x, x).diagonal()
    torch.testing.assert_close(KERNELS[name].diagonal(x), diagonal, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kernel", [*KERNELS.values(), Plain()], ids=str)
@pytest.mark.parametrize("dimension", [2, 20])
def test_gradient_of_the_mean_embedding(kernel: Similarity, dimension: int) -> None:
    """The closed form is what autograd says of the matrix, for weights of any sign."""
    x, y = points(9, dimension), points(33, dimension, "y")
    w = points(33, 1, "w")[:, 0]
    leaf = x.clone().requires_grad_()
    value = kernel.matrix(leaf, y) @ w
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    found = MeanEmbedding(kernel, y, w).value_and_grad(x)
    torch.testing.assert_close(found[0], value.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], grad, rtol=1e-9, atol=1e-9)
    single = MeanEmbedding(kernel, y.float(), w.float()).grad(x.float())
    assert single.dtype is torch.float32
    torch.testing.assert_close(single.double(), grad, rtol=1e-3, atol=1e-3)


@kernels
def test_gradient_through_features(name: str) -> None:
    """Kernels of features are pulled back to the state, whatever its shape."""
    kernel = type(
        KERNELS[name]
    )(  # type: ignore[call-arg]
        **({"bandwidth": 1.3} if hasattr(KERNELS[name], "bandwidth") else {}),
        features=FeatureMap(lambda x: torch.cat([x.flatten(1).sin(), x.flatten(1)[:, :2]], 1)),
    )
    x, y = points(7, 4).view(7, 2, 2), points(11, 4, "y").view(11, 2, 2)
    w = points(11, 1, "w")[:, 0]
    embedding, h = MeanEmbedding(kernel, y, w), 1e-6
    grad = embedding.grad(x)
    for i, j in ((0, 0), (1, 1)):
        e = torch.zeros(2, 2, dtype=torch.float64)
        e[i, j] = h
        numeric = (embedding.value(x + e) - embedding.value(x - e)) / (2 * h)
        torch.testing.assert_close(grad[:, i, j], numeric, rtol=1e-6, atol=1e-7)


@kernels
def test_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of any size give the product with the whole matrix."""
    kernel, x, y = KERNELS[name], points(75, 3), points(40, 3, "y")
    columns = points(75, 2, "w")
    mean = kernel.mean(y, x, columns[:, 0])
    grad = kernel.mean_and_grad(y, x, columns[:, 0])[1]
    whole = kernel.matrix(x, x) @ columns
    torch.testing.assert_close(kernel.products(x, columns), whole, rtol=1e-12, atol=1e-11)
    monkeypatch.setattr(tiltflow.similarity, "TILE", 32)
    monkeypatch.setattr(tiltflow.similarity, "CHUNK", 200)
    torch.testing.assert_close(kernel.products(x, columns), whole, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(kernel.mean(y, x, columns[:, 0]), mean, rtol=1e-12, atol=1e-12)
    pieces = kernel.mean_and_grad(y, x, columns[:, 0])[1]
    torch.testing.assert_close(pieces, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [NegativeDistance(), LaplaceSimilarity(0.5)], ids=str)
def test_gradient_of_a_distance_at_zero(kernel: Similarity) -> None:
    """A sample does not pull itself; the gradient there is finite, and that of the others."""
    x = points(6, 2)
    w = torch.ones(6, dtype=torch.float64)
    with_itself = MeanEmbedding(kernel, x, w).grad(x[:1])
    others = MeanEmbedding(kernel, x[1:], w[1:]).grad(x[:1])
    torch.testing.assert_close(with_itself, others)


def test_distances_far_from_the_origin() -> None:
    """In few dimensions nothing cancels: |x - y| = 1e-3 at 1e6 is right to nine digits."""
    x = torch.full((1, 3), 1e6, dtype=torch.float64)
    y = x + torch.tensor([1e-3, 0, 0], dtype=torch.float64)
    exact = float(y[0, 0] - x[0, 0]) ** 2
    assert float(squared_distances(x, y)) == pytest.approx(exact, rel=1e-12)
    many = torch.full((2, 40), 1e3, dtype=torch.float64)
    many[1, 0] += 0.5
    torch.testing.assert_close(squared_distances(many, many)[0, 1].item(), 0.25)


# ---------------------------------------------------------------- the median heuristic


def test_median_of_a_gaussian() -> None:
    """|X - Y| with X, Y ~ N(0, s^2) has median 0.67449 sqrt(2) s: samples and a grid agree."""
    exact = 0.6744897501960817 * math.sqrt(2) * 1.3
    density = gaussian([0.4], 1.3)
    sampled = GaussianSimilarity().fitted(density.sample(8000, Seed(3)))
    assert sampled.bandwidth == pytest.approx(exact, rel=0.06)  # 1000 samples: 1.3 %
    bank = Quadrature.of([axis(-8, 8, 3001)], density.log).bank
    on_grid = GaussianSimilarity().fitted(bank.points, bank.weights)
    assert on_grid.bandwidth == pytest.approx(exact, rel=0.01)


def test_weights_are_repetitions() -> None:
    """The weighted median of pairs of different points: brute force over repeated pairs."""
    x = points(12, 2)
    w = (torch.arange(12) % 3 + 1).double()
    pairs = [(float((x[i] - x[j]).norm()), int(w[i] * w[j])) for i in range(12) for j in range(i)]
    repeated = sorted(d for d, times in pairs for _ in range(times))
    assert median_distance(x, w) == pytest.approx(repeated[(len(repeated) - 1) // 2], rel=1e-12)


def test_a_given_bandwidth_stays() -> None:
    """Only an open bandwidth is fitted; features are what is compared."""
    x = points(50, 2)
    assert GaussianSimilarity(0.3).fitted(x).bandwidth == 0.3
    doubled = LaplaceSimilarity(features=FeatureMap(lambda x: 2 * x)).fitted(x).bandwidth
    assert doubled == pytest.approx(2 * (LaplaceSimilarity().fitted(x).bandwidth or 0))


@pytest.mark.parametrize("h", [0.0, -1.0, math.nan, math.inf])
def test_bad_bandwidth(h: float) -> None:
    with pytest.raises(ConfigError, match=r"bandwidth=.* must be a positive length"):
        GaussianSimilarity(h)


@pytest.mark.parametrize("count", [1, 30])
def test_degenerate_samples(count: int) -> None:
    """No bandwidth can be guessed from points that are all alike."""
    with pytest.raises(ConfigError, match="all alike"):
        InverseMultiquadric().fitted(torch.ones(count, 2))


def test_open_bandwidth_is_refused() -> None:
    with pytest.raises(ConfigError, match="no bandwidth yet"):
        GaussianSimilarity().matrix(points(2, 1), points(2, 1))

from __future__ import annotations

import math

import pytest
import torch

from tiltflow.errors import ConfigError, ShapeError
from tiltflow.seed import Seed
from tiltflow.space import Euclidean, Masked, Space, ZeroMean
from tiltflow.types import Cond

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).float()
COND: Cond = {"mask": MASK}
CASES: dict[str, tuple[Space, Cond | None]] = {
    "euclidean": (Euclidean((4, 3)), None),
    "masked": (Masked((4, 3)), COND),
    "zero_mean_atoms": (ZeroMean((4, 3)), None),
    "zero_mean_all": (ZeroMean((4, 3), over=(0, 1)), None),
    "zero_mean_masked": (ZeroMean((4, 3), key="mask"), COND),
    "zero_mean_columns": (ZeroMean((4, 3), columns=2, key="mask"), COND),
}
every = pytest.mark.parametrize(("space", "cond"), CASES.values(), ids=CASES.keys())


def matrix(space: Space, cond: Cond | None, sample: int) -> torch.Tensor:
    """The projector on the states of one sample, (12, 12), column by column."""
    basis = torch.eye(12, dtype=torch.float64)
    columns = []
    for e in basis:
        x = torch.zeros(3, 12, dtype=torch.float64)
        x[sample] = e
        columns.append(space.project(x.reshape(3, 4, 3), cond)[sample].flatten())
    return torch.stack(columns, 1)


@every
def test_orthogonal_projection(space: Space, cond: Cond | None) -> None:
    """P P = P and P^T = P, exactly an orthogonal projector; dimension = trace P."""
    dimension = space.dimension(3, cond)
    for sample in range(3):
        p = matrix(space, cond, sample)
        torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-14)
        torch.testing.assert_close(p.T, p, rtol=0, atol=1e-14)
        assert float(p.trace()) == pytest.approx(int(dimension[sample]), abs=1e-12)


@every
def test_noise_lives_on_the_space(space: Space, cond: Cond | None) -> None:
    """P z = z, and E|z|^2 = dimension: |z statistic| < 4.5 with 4000 draws per sample."""
    draws = torch.stack(
        [space.noise(3, Seed(1).child(i).generator(), cond, torch.float64) for i in range(4000)]
    )
    first = draws[0]
    torch.testing.assert_close(space.project(first, cond), first, rtol=0, atol=1e-14)
    mean = draws.pow(2).flatten(2).sum(2).mean(0)
    d = space.dimension(3, cond).double()
    error = (2 * d / 4000).sqrt()
    assert bool(((mean - d).abs() < 4.5 * error).all())


@every
def test_inner_product(space: Space, cond: Cond | None) -> None:
    """<P a, b> = <a, P b>, per sample."""
    a, b = torch.randn(2, 3, 4, 3, generator=Seed(2).generator(), dtype=torch.float64)
    left = space.inner(space.project(a, cond), b)
    assert left.shape == (3,)
    torch.testing.assert_close(
        left, space.inner(a, space.project(b, cond)), rtol=1e-12, atol=1e-12
    )


def test_zero_mean_is_zero_mean() -> None:
    """The centre of mass vanishes over the atoms that exist, in the centred columns alone."""
    x = torch.randn(3, 4, 3, generator=Seed(3).generator(), dtype=torch.float64)
    y = ZeroMean((4, 3), columns=2, key="mask").project(x, COND)
    assert float(y[..., :2].sum(1).abs().max()) < 1e-14
    torch.testing.assert_close(y[..., 2], x[..., 2] * MASK)
    assert float((y * (1 - MASK)[..., None]).abs().max()) == 0


def test_padding_does_not_matter() -> None:
    """A batch padded to 6 rows projects like the same batch padded to 4."""
    space = ZeroMean((4, 3), key="mask")
    x = torch.randn(3, 4, 3, generator=Seed(4).generator())
    wide = torch.cat([x, torch.randn(3, 2, 3, generator=Seed(5).generator())], 1)
    mask = torch.cat([MASK, torch.zeros(3, 2)], 1)
    out = space.project(wide, {"mask": mask})
    torch.testing.assert_close(out[:, :4], space.project(x, COND))
    assert space.shape(3, {"mask": mask}) == (3, 6, 3)


def test_noise_is_addressed() -> None:
    """Equal seeds give equal bits, other addresses other noise."""
    space = Euclidean((5,))
    first = space.noise(7, Seed(0).child("a").generator())
    assert torch.equal(first, space.noise(7, Seed(0).child("a").generator()))
    assert not torch.equal(first, space.noise(7, Seed(0).child("b").generator()))
    assert first.dtype == torch.float32


def test_euclidean() -> None:
    """All of R^event: P is the identity and the dimension the number of entries."""
    space = Euclidean((2, 3))
    x = torch.randn(4, 2, 3)
    assert space.project(x) is x
    assert space.dimension(4).tolist() == [math.prod((2, 3))] * 4


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Euclidean(()), "positive integers"),
        (lambda: Euclidean((0,)), "positive integers"),
        (lambda: ZeroMean((4, 3), over=(2,)), "must name axes"),
        (lambda: ZeroMean((4, 3), over=()), "must name axes"),
        (lambda: ZeroMean((4, 3), over=(0, 1), columns=2), "columns"),
    ],
)
def test_bad_spaces(make: object, match: str) -> None:
    """Impossible spaces are refused at construction."""
    with pytest.raises(ConfigError, match=match):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("cond", [None, {}, {"mask": MASK[:2]}, {"mask": ["a"]}])
def test_missing_mask(cond: Cond | None) -> None:
    """A masked space without a mask of the batch's length says what it needs."""
    with pytest.raises(ShapeError, match="0/1 tensor 'mask'"):
        Masked((4, 3)).project(torch.zeros(3, 4, 3), cond)


def test_wrong_states_are_refused() -> None:
    """`check` compares a batch with the event shape; padded spaces may vary in length."""
    with pytest.raises(ShapeError, match="state space"):
        Euclidean((2,)).check(torch.zeros(5, 3))
    with pytest.raises(ShapeError, match="state space"):
        Masked((4, 3)).check(torch.zeros(5, 3))
    Masked((4, 3)).check(torch.zeros(5, 9, 3))

"""Gates and circuits: closed forms on grids, and the language they are written in."""

from __future__ import annotations

import math

import pytest
import torch

from oracles import axis
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.density import Quadrature
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.operators import (
    Circuit,
    Contrast,
    Gate,
    Interpolation,
    Intersection,
    Prior,
    Union,
    circuit,
    drawn,
    union_weights,
)
from tiltflow.potential import Differentiable
from tiltflow.rewards.points import Linear

A, B, C, D = map(Prior, "abcd")
LINE = axis(-8, 8, 3201)
F = Differentiable(lambda x: (1.3 * x[:, 0]).sin())


def normal(mean: float, std: float) -> Quadrature:
    return Quadrature.of([LINE], gaussian([mean], std).log)


LEFT, RIGHT = normal(-1.0, 0.8), normal(1.5, 0.5)


def moments(p: Quadrature) -> tuple[float, float]:
    x, w = p.nodes[:, 0], p.probabilities
    mean = float((w * x).sum())
    return mean, math.sqrt(float((w * (x - mean) ** 2).sum()))


def evaluated(node: Circuit, priors: dict[str, Quadrature]) -> Quadrature:
    """Gate by gate, from the bottom."""
    if isinstance(node, Prior):
        return priors[node.name]
    assert isinstance(node, Gate)
    return node.exact([evaluated(part, priors) for part in node.parts])


# --- closed forms --------------------------------------------------------------------------------


def test_intersection_of_normals() -> None:
    """Methods, section 5.2: precisions add by shares."""
    found = Intersection(A, B, weights=(0.3, 0.7)).exact([LEFT, RIGHT])
    assert moments(found) == pytest.approx((1.1414914, 0.5531070), abs=1e-6)
    same = Intersection(A, B, weights=(0.6, 1.4)).exact([LEFT, RIGHT])
    assert found.total_variation(same) < 1e-12


def test_intersection_with_a_reward() -> None:
    """N(0, 1) and N(0, 1/4) in equal parts: variance 0.4; f / A = -x^2 / 2 adds precision 1."""
    pair, square = [normal(0.0, 1.0), normal(0.0, 0.5)], Differentiable(lambda x: -(x[:, 0] ** 2))
    assert moments(Intersection(A, B).exact(pair))[1] ** 2 == pytest.approx(0.4, abs=1e-6)
    guided = Intersection(A, B, reward=square).exact(pair)
    assert moments(guided)[1] ** 2 == pytest.approx(0.285714, abs=1e-6)


def test_union_is_the_mixture() -> None:
    exact = Quadrature.of([LINE], GaussianMixture([[-1.0], [1.5]], [0.8, 0.5], [0.25, 0.75]).log)
    assert Union(A, B, weights=(1, 3)).exact([LEFT, RIGHT]).total_variation(exact) < 1e-10


@pytest.mark.parametrize("total", [0.4, 2.0, 20.0])
def test_guided_union(total: float) -> None:
    """A pbar / (nu - f): normalised, and E f = nu - A."""
    gate = Union(A, B, weights=(total / 4, 3 * total / 4), reward=F)
    found, f = gate.exact([LEFT, RIGHT]), F.value(LEFT.nodes).double()
    mixture = Union(A, B, weights=(1, 3)).exact([LEFT, RIGHT]).probabilities
    weights = union_weights(f, mixture, total)
    nu = float((total / weights + f)[0])
    assert torch.allclose(total / weights + f, torch.full_like(f, nu))
    assert float((mixture * weights).sum()) == pytest.approx(1, abs=1e-9)
    assert float((found.probabilities * f).sum()) == pytest.approx(nu - total, abs=1e-8)


def test_a_union_that_no_density_solves() -> None:
    """A reward with a sharp peak, where the mixture is thin: an atom."""
    peak = Differentiable(lambda x: -(x[:, 0] - 6.0).abs().sqrt())
    with pytest.raises(UnsupportedError, match="atom"):
        Union(A, B, weights=(1e-3, 1e-3), reward=peak).exact([LEFT, RIGHT])


def test_interpolation_of_normals() -> None:
    """Mean and standard deviation are interpolated (methods, section 5.2)."""
    found = Interpolation(A, B, weights=(0.3, 0.7)).exact([LEFT, RIGHT])
    assert moments(found) == pytest.approx((0.75, 0.59), abs=1e-3)
    assert found.total_variation(normal(0.75, 0.59)) < 2e-3
    with pytest.raises(UnsupportedError, match="one dimension"):
        Interpolation(A, B, reward=F).exact([LEFT, RIGHT])


def test_contrast() -> None:
    """p_1^2 / (p_1 + p_2), normalised; nothing happens where both are the same."""
    found = Contrast(A, B).exact([LEFT, RIGHT])
    p, q = LEFT.probabilities, RIGHT.probabilities
    exact = p * p / (p + q)
    assert torch.allclose(found.probabilities, exact / exact.sum(), atol=1e-12)
    assert Contrast(A, B).exact([LEFT, LEFT]).total_variation(LEFT) < 1e-12
    with pytest.raises(ConfigError, match="two parts"):
        Contrast(A, B, C)
    with pytest.raises(ConfigError, match="two parts"):
        circuit("contrast(a, b, c)")


def test_parts_on_different_grids() -> None:
    other = Quadrature.of([axis(-6, 6, 3201)], gaussian([0.0]).log)
    for gate in (A & B, A | B, A - B, Interpolation(A, B)):
        with pytest.raises(ConfigError, match="one grid"):
            gate.exact([LEFT, other])
        with pytest.raises(ConfigError, match="2 parts, but 3"):
            gate.exact([LEFT, RIGHT, LEFT])


GATES = [
    Intersection(A, B, weights=(0.5, 1.0), reward=F),
    Union(A, B, weights=(0.5, 1.0), reward=F),
    Contrast(A, B, weights=(0.5, 1.0), reward=F),
    Interpolation(A, B, weights=(0.5, 1.0)),
]


@pytest.mark.parametrize("gate", GATES, ids=lambda g: type(g).__name__)
def test_the_closed_form_is_the_maximum(gate: Gate) -> None:
    """No tilt of it is better, and every part is worse."""
    grid = [axis(-5, 5, 501)]
    priors = [Quadrature.of(grid, gaussian([m], s).log) for m, s in ((-1.0, 0.8), (1.0, 0.6))]
    objective, best = gate.objective(priors), gate.exact(priors)
    value = objective.value(best).value
    for k in range(1, 5):
        wave = Differentiable(lambda x, k=k: (k * x[:, 0] + 0.3 * k).cos())
        for size in (-0.1, 0.1):
            other = objective.value(best.tilted(size * wave)).value
            assert other < value + 1e-6 * abs(value)
    away = [p for p in priors if p.total_variation(best) > 1e-6]
    for p in away:
        assert objective.value(p.tilted(0.0 * Linear(1.0))).value < value


# --- circuits ------------------------------------------------------------------------------------


def test_a_circuit_gate_by_gate() -> None:
    """(a & b) | c is the mixture of the geometric mean and c."""
    priors = {"a": LEFT, "b": RIGHT, "c": normal(4.0, 0.3)}
    found = evaluated(circuit("(a & b) | c"), priors)
    mean = Intersection(A, B).exact([LEFT, RIGHT])
    exact = 0.5 * mean.probabilities + 0.5 * priors["c"].probabilities
    assert torch.allclose(found.probabilities, exact, atol=1e-12)


@pytest.mark.parametrize("sign", ["&", "|", "interpolation"])
def test_order_and_equal_parts(sign: str) -> None:
    """The order of parts does not matter, and merging a model with itself changes nothing."""
    priors = {"a": LEFT, "b": RIGHT, "c": normal(0.5, 1.0)}
    signs = {
        "&": "{} & {} & {}",
        "|": "{} | {} | {}",
        "interpolation": "interpolation({}, {}, {})",
    }
    one, two = (evaluated(circuit(signs[sign].format(*t)), priors) for t in ("abc", "cab"))
    assert one.total_variation(two) < 1e-9
    # Quantiles are interpolated between nodes.
    assert evaluated(circuit(signs[sign].format(*"aaa")), priors).total_variation(LEFT) < 1e-6


def test_nesting_multiplies_exponents() -> None:
    priors = {"a": LEFT, "b": RIGHT, "c": normal(0.5, 1.0)}
    nested, flat = (evaluated(circuit(t), priors) for t in ("(a & b) & c", "a & b & 2*c"))
    chain = evaluated(circuit("a & b & c"), priors)
    assert nested.total_variation(flat) < 1e-12
    assert nested.total_variation(chain) > 0.01


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a&b&c", "a & b & c"),
        ("(a & b) & c", "(a & b) & c"),
        ("a | b & c", "a | (b & c)"),
        ("(a & b) | (c & d)", "(a & b) | (c & d)"),
        ("0.3*a & .7*b", "0.3*a & 0.7*b"),
        ("a - 2*b | c", "(a - 2*b) | c"),
        ("interpolation(a, 2*(b|c))", "interpolation(a, 2*(b | c))"),
        ("a \u2227 b \u2228 c", "(a & b) | c"),
        ("union(a, intersection(b, c))", "a | (b & c)"),
        ("((a))", "a"),
    ],
)
def test_parsed_and_printed(text: str, printed: str) -> None:
    found = circuit(text, "abcd")
    assert str(found) == printed
    assert str(circuit(str(found))) == printed


def test_chains_in_python() -> None:
    """One sign makes one gate of a chain from the left; what is grouped stays grouped."""
    assert str(A & B & C) == "a & b & c"
    assert str(A & (B & C)) == "a & (b & c)"
    assert str(Intersection(A & B, C)) == "(a & b) & c"
    assert str(A & B | C) == "(a & b) | c"
    assert str((A - B) | C) == "(a - b) | c"
    assert ((A & B) | (C & A)).names == ("a", "b", "c")
    assert [str(n) for n in (A & B | C).walk()] == ["a", "b", "a & b", "c", "(a & b) | c"]


@pytest.mark.parametrize(
    ("text", "position", "why"),
    [
        ("a &", 4, "expected a model"),
        ("(a | b", 7, r"expected \)"),
        ("a b", 3, "found 'b'"),
        ("a & e", 5, "no model 'e'"),
        ("a & 0*b", 5, "positive"),
        ("2*a", 1, "no gate"),
        ("a & (2*b)", 1, "no gate"),
        ("a @ b", 3, "no meaning"),
        ("", 1, "found the end"),
        ("union(a)", 1, "two parts"),
        ("a & -b", 5, "expected a model"),
        ("2 a & b", 3, r"expected \*"),
        ("interpolation(a, b", 19, "expected , or"),
    ],
)
def test_syntax_errors_say_where(text: str, position: int, why: str) -> None:
    with pytest.raises(ConfigError, match=f"position {position}, .*{why}"):
        circuit(text, "abc")


def test_bad_gates() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        Intersection(A)
    with pytest.raises(ConfigError, match="Prior"):
        Union(A, "b")  # type: ignore[arg-type]
    for weights in ((1.0, 0.0), (1.0, -2.0), (math.nan, 1.0), (math.inf, 1.0)):
        with pytest.raises(ConfigError, match="positive"):
            Union(A, B, weights=weights)
    with pytest.raises(ConfigError, match="as many weights"):
        Union(A, B, weights=(1.0,))
    with pytest.raises(ConfigError, match="letters"):
        Prior("two words")


def test_drawn() -> None:
    assert drawn(circuit("(a & 2*b) | interpolation(c, d)")) == (
        "Union\n├─ 0.5 Intersection\n│  ├─ 0.333 a\n│  └─ 0.667 b\n"
        "└─ 0.5 Interpolation\n   ├─ 0.5 c\n   └─ 0.5 d"
    )
    assert "reward" in drawn((A & B).guided(F))

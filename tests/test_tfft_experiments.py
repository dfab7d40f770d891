"""The experiments of Tail-aware Flow Fine-Tuning: what is exact in them, and smoke runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from oracles import TFFT_LEFT, TFFT_RIGHT
from tiltflow.errors import UnsupportedError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import tfft  # noqa: E402
import tfft_hard  # noqa: E402
import tfft_tables  # noqa: E402
import tfft_toys  # noqa: E402
from toys import Store, of_seeds  # noqa: E402

ROW = {"objective_error": 0.01, "tail": 0.0, "kl": 0.0}


@pytest.mark.parametrize(
    ("case", "row"),
    [(tfft_toys.CASES[0], TFFT_LEFT[3]), (tfft_hard.FAR, TFFT_RIGHT[-1])],
    ids=["left", "right"],
)
def test_the_optimum_on_the_grid(case: tfft_toys.Case, row: tuple[float, ...]) -> None:
    """Methods, table 4.5."""
    weight, threshold, value = row[:3]
    assert case.weight == weight
    best = case.best(quick=False)
    assert best.threshold == pytest.approx(threshold, abs=5e-3)
    assert best.objective == pytest.approx(value, abs=1e-4)


@pytest.mark.slow
def test_every_weight_of_the_densities_is_supported() -> None:
    """Stage 1 refuses none of them, and does refuse what is meant to starve."""
    for case in tfft_toys.CASES:
        with pytest.raises(_Reached):
            tfft_toys.run(case, _Stop(), seed=0, quick=False)
    with pytest.raises(UnsupportedError, match="at weight 1"):
        tfft_toys.run(tfft_hard.FAR, _Stop(), seed=0, quick=False)


class _Reached(Exception):
    pass


class _Stop:
    """A solver that only says that it was reached."""

    needs = tfft_toys.adjoint_matching(quick=True).needs

    def solve(self, problem: object, context: object, *, init: object = None) -> object:
        raise _Reached


def test_the_winner_is_the_largest_objective() -> None:
    runs = {
        method: [ROW | {"objective": value}, ROW | {"objective": value + 0.002}]
        for method, value in (("tail", 1.0), ("mean", 0.5), ("steps-2", 0.99))
    }
    said = tfft_tables.winner(runs, tfft_tables.METHODS)
    assert "**tail-aware**, 0.010" in said
    assert "FDC, K = 2, within the errors" in said


def test_the_gap_is_the_part_that_was_not_made() -> None:
    best = {"before": 1.0, "objective": 3.0}
    (run,) = tfft_tables.with_gap([ROW | {"objective": 2.5}], best)
    assert run["gap"] == pytest.approx(25.0)
    assert run["gap_error"] == pytest.approx(0.5)


def test_results_of_seeds_are_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.json")
    for key in ("tail/left/10", "tail/left/2", "tail/left/x", "tail/2"):
        store.get(key, lambda k=key: k)
    assert of_seeds(store, "tail/left") == ["tail/left/2", "tail/left/10"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", tfft.NAMES)
def test_smoke(name: str, tmp_path: Path) -> None:
    """Every command runs, goes on where it was, and writes its section."""
    arguments = [name, "--quick", "--seeds", "1", "--out", str(tmp_path)]
    tfft.main(arguments)
    before = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
    tfft.main(arguments)
    assert (tmp_path / f"{name}.json").read_text(encoding="utf-8") == before
    page = (tmp_path / "docs" / "tfft.md").read_text(encoding="utf-8")
    assert f"tfft.py {name}" in page

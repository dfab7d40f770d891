"""Constructors are the config: reading, resolving, writing, and every way to get it wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltflow.config import interpret
from tiltflow.errors import ConfigError, ShapeError, UnsupportedError
from tiltflow.experiment import load, prepare, resolve
from tiltflow.functional import Functional, Hinges
from tiltflow.registry import kinds, summary
from tiltflow.run import check
from tiltflow.runfile import first_differences, override, parse_toml, read_toml, write_toml
from tiltflow.sample import Sampler
from tiltflow.training import Training
from tiltflow.workflow import workflow_of

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
MINIMAL = """
[models]
pretrained = { kind = "Gaussian", mean = [0.0, 0.0] }
[objective]
utility = { kind = "ExpectedReward", reward = { kind = "Linear", slope = [1.0, 0.0] } }
divergences = [{ kind = "KL", prior = "pretrained", weight = 1.0 }]
[solver]
kind = "AdjointMatching"
"""


def minimal(*assignments: str) -> dict[str, Any]:
    return override(parse_toml(MINIMAL), assignments)


scalars = (
    st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("ab.é \"'", max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text("abc_-.é ", min_size=1, max_size=5), values, max_size=4))
def test_toml_round_trip(data: dict[str, Any]) -> None:
    """parse(write(data)) == data, for everything TOML can hold."""
    assert parse_toml(write_toml(data)) == data


def test_a_resolved_file_resolves_to_itself() -> None:
    """Defaults are expanded, and the result is itself a valid run file: a fixed point."""
    once = resolve(minimal()).plain
    assert once["solver"]["sampler"]["kernel"]["kind"] == "Auto"
    assert once["solver"]["training"]["num_updates"] > 0
    assert once["evaluate"]["levels"] == [0.1]
    assert parse_toml(write_toml(once)) == once
    assert resolve(parse_toml(write_toml(once))).plain == once


def test_none_can_be_said_and_survives() -> None:
    """``None`` where it is not the default is spelled "none"."""
    tree = resolve(minimal("solver.clip=none"))
    assert tree.plain["solver"]["clip"] == "none"
    assert tree.fields["solver"].build({}).clip is None
    again = resolve(parse_toml(write_toml(tree.plain)))
    assert again.fields["solver"].build({}).clip is None


def test_objects_are_built() -> None:
    plan = prepare(resolve(minimal("solver.sampler.num_steps=7", "seed=3")))
    assert plan.experiment.solver.sampler.num_steps == 7  # type: ignore[attr-defined]
    assert plan.seed.root == 3
    (term,) = plan.experiment.objective.divergences
    assert term.functional.prior is plan.prior  # type: ignore[attr-defined]
    assert check(plan)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_experiments_prepare(path: Path) -> None:
    tree = load(path)
    flow = workflow_of(tree)
    plan = flow.prepare(tree, None)
    flow.check(plan)
    assert plan.experiment.name == path.stem


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("solver.num_step=3", r"solver\.num_step: unknown\. .*Valid keys: chunk, clip"),
        ("solver.sampler.num_step=3", r"solver\.sampler\.num_step: .* Did you mean num_steps\?"),
        ("solver.training.lerning_rate=3", r"Did you mean learning_rate\?"),
        ("sover.kind=x", r"sover: unknown\. Did you mean solver\?"),
        ("solver.kind=AdjointMaching", r"solver\.kind: .* Did you mean AdjointMatching\?"),
        ("objective.utility.kind=LeftCVar", r"Did you mean LeftCVaR\?"),
        ("objective.utility.reward.kind=Lineal", r"Did you mean Linear\?"),
        ("objective.divergences.0.prior=pretraned", r"no model 'pretraned'\. Did you mean pre"),
        ("objective.divergences.0.weight=-1", r"weight must be positive"),
        ("objective.divergences.1.weight=1", r"is a list of 1"),
        ("solver.sampler.num_steps=forty", r"solver\.sampler\.num_steps: expected an integer"),
        ("solver.sampler.num_steps=40.5", r"expected an integer, got 40\.5"),
        ("solver.sampler.num_steps=0", r"solver\.sampler: num_steps must be at least 1"),
        ("solver.sampler=40", r"solver\.sampler: expected a table, got 40"),
        ("solver.use_values=1", r"expected true or false, got 1"),
        ("solver.training.decay=linear", r"must be one of 'cosine', 'constant'"),
        ("solver.training.learning_rate=-1", r"solver\.training: .*learning_rate=-1.0"),
        ("solver.training.betas=[0.9]", r"expected a list of 2"),
        ("evaluate.levels=[1.5]", r"evaluate: levels must lie in"),
        ("evaluate.levels=0.1", r"evaluate\.levels: expected a list of a number, got 0\.1"),
        ("algorithm.num_iterations=3", r"algorithm: 3 iterations need rates"),
        ("algorithm.rates=[0.1, 0.2]", r"rates has 2 entries"),
        ("algorithm.kind=mirror", r"algorithm\.kind: must be one of 'mirror_descent'"),
        ("models.pretrained.mean=[]", r"std must be positive"),
        ("models.pretrained.std=[1.0]", r"one number or one per dimension"),
        ("baseline.match=path_kl", r"baseline\.utility: missing"),
        ("name=a/b", r"file name without slashes"),
        ("seed", r"write it as a\.b\.c=value"),
        ("seed.deeper=1", r"expected an integer"),
    ],
)
def test_errors_name_the_key_and_the_remedy(assignment: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        prepare(resolve(minimal(assignment)))


@pytest.mark.parametrize("missing", ["models", "objective", "solver"])
def test_missing_tables_are_named(missing: str) -> None:
    data = minimal()
    del data[missing]
    with pytest.raises(ConfigError, match=f"{missing}: missing"):
        resolve(data)


def test_the_pretrained_model_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"models\.pretrained: missing"):
        resolve({**minimal(), "models": {"other": {"kind": "Ring"}}})


def test_a_kernel_that_cannot_train_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"solver: .* not memoryless"):
        resolve(minimal("solver.sampler.kernel.kind=Deterministic")).fields["solver"].build({})


def test_missing_abilities_are_found_before_work() -> None:
    """Entropy of a flow offers its gradient only; the evaluation needs a reward with values."""
    data = minimal()
    data["objective"]["utility"] = {"kind": "Entropy"}
    with pytest.raises(ConfigError, match=r"evaluate\.reward: missing"):
        prepare(resolve(data))
    data = minimal()
    data["objective"]["utility"]["reward"] = {"kind": "Linear", "slope": [1.0, 2.0, 3.0]}
    with pytest.raises(ShapeError, match="one per coordinate"):
        check(prepare(resolve(data)))


def test_files_that_are_not_toml(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"not valid TOML: .*line 1"):
        read_toml(bad)
    with pytest.raises(ConfigError, match="Cannot read the run file"):
        read_toml(tmp_path / "absent.toml")


def test_set_parses_toml_and_falls_back_to_text() -> None:
    data = override({}, ["a.b=3e-2", "a.c=[1, 2]", "d=Left CVaR", "e=true", 'f={ x = "y" }'])
    assert data == {
        "a": {"b": 0.03, "c": [1, 2]}, "d": "Left CVaR", "e": True, "f": {"x": "y"},
    }  # fmt: skip


def test_overrides_do_not_touch_their_input() -> None:
    data = minimal()
    override(data, ["solver.kind=other"])
    assert data["solver"]["kind"] == "AdjointMatching"


def test_first_differences() -> None:
    ours = {"a": 1, "b": {"c": [1, 2], "d": 0}}
    theirs = {"a": 1, "b": {"c": [1, 3]}, "e": 5}
    found = first_differences(ours, theirs)
    assert found == [("b.c.1", 2, 3), ("b.d", 0, None), ("e", None, 5)]


def test_shapes_of_certainty_equivalents() -> None:
    """A utility with a shape, from a table and back."""
    table = {
        "kind": "CertaintyEquivalent",
        "reward": {"kind": "Linear", "slope": [1.0]},
        "shape": {"kind": "Hinges", "knots": [0.0], "slopes": [0.5, 3.0]},
    }
    node = interpret(Functional, table, "utility")
    assert node.plain["shape"] == table["shape"]
    utility = node.build({})
    assert utility.shape == Hinges((0.0,), (0.5, 3.0))
    wrong = {**table, "shape": {**table["shape"], "slopes": [2.0, 3.0]}}
    node = interpret(Functional, wrong, "utility")
    with pytest.raises(ConfigError, match=r"utility.shape: Hinges"):
        node.build({})


def test_every_kind_has_a_summary_and_known_arguments() -> None:
    """Whatever a run file can name can be listed, and says in a line what it is."""
    for group in ("utilities", "divergences", "solvers", "models", "rewards", "kernels"):
        assert kinds(group), group
        for name, constructor in kinds(group).items():
            assert summary(constructor), name


def test_third_party_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point of group tiltflow.rewards adds a kind, but cannot replace an own one."""
    import importlib.metadata

    class Point:
        def __init__(self, name: str) -> None:
            self.name = name

        def load(self) -> Any:
            return dict

    def entry_points(group: str) -> list[Point]:
        return [Point("Foreign"), Point("Linear")] if group == "tiltflow.rewards" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert kinds("rewards")["Foreign"] is dict
    assert kinds("rewards")["Linear"] is not dict


@dataclass(frozen=True)
class Nested:
    """A dataclass like those of plugins."""

    sampler: Sampler
    training: Training | None = None
    pair: tuple[int, float] = (1, 2.0)
    number: float | list[float] = 1.0


def test_interpretation_follows_hints() -> None:
    node = interpret(Nested, {"sampler": {"num_steps": 3}, "number": [1, 2]}, "x")
    built = node.build({})
    assert built == Nested(Sampler(num_steps=3), None, (1, 2.0), (1.0, 2.0))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"x\.number: expected a number or a list"):
        interpret(Nested, {"sampler": {}, "number": "many"}, "x")
    with pytest.raises(ConfigError, match=r"x\.training\.rate: unknown"):
        interpret(Nested, {"sampler": {}, "training": {"rate": 1}}, "x")

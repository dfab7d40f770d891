"""Runs that plan on a bank: which way is taken, what is recorded, and that a kill is nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from test_run import TINY, Kill, essence, execute, plan_of
from tiltflow.errors import CapabilityError, ConfigError

PLANNED = (
    TINY.replace("num_iterations = 2\nrates = [0.5, 0.5]\n", "planning = { bank_size = 2000 }\n")
    # A steep tilt and a picky bank, so that there are rounds.
    .replace("weight = 2.0", "weight = 0.2")
    .replace("bank_size = 2000", "bank_size = 2000, min_effective = 0.4, max_rounds = 2")
)


def lines(path: Path, kind: str) -> list[dict[str, object]]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == kind]


def test_which_way() -> None:
    """No rates and a bank that is enough: plan. Rates, or one exact step: steps."""
    assert plan_of(PLANNED).planned
    assert not plan_of().planned
    linear = PLANNED.replace('kind = "LeftCVaR", level = 0.2,', 'kind = "ExpectedReward",')
    assert not plan_of(linear).planned
    forced = plan_of(PLANNED, way="steps")
    assert not forced.planned
    with pytest.raises(ConfigError, match="finds its own steps"):
        plan_of(TINY, way="plan")


def test_a_planned_run(tmp_path: Path) -> None:
    """The record says the way, the plan's objective and how thin its bank was."""
    report = execute(plan_of(PLANNED), tmp_path)
    rounds = lines(tmp_path, "iteration")
    assert [r["way"] for r in rounds] == ["plan", "plan"]
    stats = report["iterations"][0]["stats"]
    assert stats["plan_exhausted"]
    assert stats["plan_effective_size"] >= 800
    assert report["iterations"][1]["stats"]["plan_kl"] > 0
    assert report["numbers"]["tuned"]["gain.left_cvar"]["value"] > 0


def test_killed_and_continued(tmp_path: Path) -> None:
    """In the first round, between the rounds, in the second, in the baseline: the same bytes."""
    execute(plan_of(PLANNED), tmp_path / "straight")
    for moment in (7, 20, 21, 30, 45):
        path = tmp_path / str(moment)
        with pytest.raises(Kill):
            execute(plan_of(PLANNED), path, die_at=moment)
        execute(plan_of(PLANNED), path)
        assert essence(path) == essence(tmp_path / "straight")


ENTROPY = PLANNED.replace(
    'utility = { kind = "LeftCVaR", level = 0.2, reward = { kind = "Linear", slope = [1.0] } }',
    'utility = { kind = "Entropy" }',
).replace("levels = [0.2]", 'levels = [0.2]\nreward = { kind = "Linear", slope = [1.0] }')


def test_the_entropy_of_a_model(tmp_path: Path) -> None:
    """It cannot be planned from scores; with a likelihood it can, and the plan knows its value.

    The objective is H - 0.2 KL; the pre-trained N(0, 1) has an entropy of 1.419.
    """
    assert not plan_of(ENTROPY).planned
    plan = plan_of(ENTROPY, likelihood_steps=10)
    assert plan.planned
    report = execute(plan, tmp_path)
    assert report["iterations"][-1]["stats"]["plan_objective"] > 1.42
    with pytest.raises(CapabilityError, match="Planning on a bank"):
        execute(plan_of(ENTROPY, way="plan"), tmp_path / "scores")


def test_several_utilities() -> None:
    """`utilities` adds to the objective, each with its weight."""
    barrier = (
        'utilities = [{ kind = "LogBarrier", weight = 0.1, lower = -5.0, '
        'constraint = { kind = "Linear", slope = [1.0] } }]\ndivergences'
    )
    plan = plan_of(PLANNED.replace("divergences", barrier))
    assert [c for c, _ in plan.objective.terms] == [1.0, 0.1, -0.2]

"""Tail-aware fine-tuning in run files: what is refused, what is recorded, a kill is nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from test_planned_run import lines
from test_report import facts
from test_run import TINY, Kill, essence, execute, plan_of
from tiltflow import plots
from tiltflow.cli import FAILED, FINE, USAGE, main
from tiltflow.config import Table
from tiltflow.diagnosis import diagnose
from tiltflow.errors import ConfigError
from tiltflow.experiment import prepare, resolve
from tiltflow.inspection import describe
from tiltflow.report import write_report
from tiltflow.rundir import RunDirectory
from tiltflow.runfile import override, parse_toml
from tiltflow.tables import MirrorDescent, TailAware

pytestmark = pytest.mark.filterwarnings("ignore:tail_aware. E u")  # trainings are short here

TAIL = TINY[: TINY.index("[baseline]")].replace(
    "num_iterations = 2\nrates = [0.5, 0.5]\n",
    'kind = "tail_aware"\nbank_size = 2000\n',
)
ROUNDS = ("objective.divergences.0.weight=0.4", "algorithm.max_rounds=3")
"""A weight at which 2000 samples would starve a training."""

LOOP = sys.modules["tiltflow.algorithms.tail_aware"]  # the function has the same name


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)  # they take seconds


def tree_of(*assignments: str, text: str = TAIL) -> Table:
    return resolve(override(parse_toml(text), assignments))


def run(path: Path, *assignments: str, die_at: int | None = None) -> dict[str, Any]:
    return execute(prepare(tree_of(*assignments)), path, die_at)


# Reading


def test_kind_chooses_the_table() -> None:
    """Files without a kind are as before; a resolved file resolves to itself."""
    assert isinstance(plan_of().experiment.algorithm, MirrorDescent)
    tree = tree_of()
    algorithm = prepare(tree).experiment.algorithm
    assert algorithm == TailAware(bank_size=2000, num_samples=256)
    assert tree.plain["algorithm"]["kind"] == "tail_aware"
    assert resolve(tree.plain).plain == tree.plain
    assert not prepare(tree).planned


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["algorithm.kind=tail"], r"algorithm\.kind: must be one of 'mirror_descent', 'tail_aw"),
        (["algorithm.bank_siz=9"], r"algorithm\.bank_siz: unknown\. Did you mean bank_size\?"),
        (
            ["algorithm.rates=[1.0]"],
            r"rates: belongs to kind 'mirror_descent', but .* 'tail_aware",
        ),
        (["algorithm.kind=mirror_descent"], r"bank_size: belongs to kind 'tail_aware'"),
        (["algorithm.max_rounds=many"], r"algorithm\.max_rounds: expected an integer"),
        (["algorithm.ease=all"], r"algorithm\.ease: must be one of 'weight', 'level', 'width'"),
        (["algorithm.max_rounds=0"], r"algorithm: .*max_rounds at least 1"),
        (["algorithm=3"], r"algorithm: expected a table, got 3"),
    ],
)
def test_wrong_keys(assignments: Sequence[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        prepare(tree_of(*assignments))


def test_the_default_kind_is_said() -> None:
    with pytest.raises(
        ConfigError, match=r"max_rounds: belongs to kind 'tail_aware', but kind is"
    ):
        plan_of(max_rounds=2)


KL = '{ kind = "KL", prior = "pretrained", weight = 1.0 }'


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ('objective.utility={ kind = "Entropy" }', r"objective\.utility: Entropy"),
        (
            'objective.utility={ kind = "SpectralRisk", levels = [0.2, 0.8], '
            "slopes = [2.0, 1.0, 2.0], reward = { kind = 'Linear', slope = [1.0] } }",
            r"objective\.utility: SpectralRisk.* favours the best and guards",
        ),
        ('objective.utilities=[{ kind = "Entropy", weight = 1.0 }]', r"objective\.utilities: "),
        ("objective.divergences=[]", r"objective\.divergences: there are 0"),
        (f"objective.divergences=[{KL}, {KL}]", r"objective\.divergences: there are 2"),
        (
            'objective.divergences=[{ kind = "ForwardKL", prior = "pretrained", weight = 1.0 }]',
            r"objective\.divergences\.0: .* is not a KL from pretrained",
        ),
        ("objective.divergences.0.prior=other", r"divergences\.0: .* is not a KL from pretrained"),
    ],
)
def test_objectives_that_it_does_not_solve(assignment: str, says: str) -> None:
    """Refused while the file is read, with the way out."""
    text = TAIL.replace(
        "[objective]", 'other = { kind = "Gaussian", mean = [0.0] }\n[objective]'
    ).replace("levels", 'reward = { kind = "Linear", slope = [1.0] }\nlevels')
    with pytest.raises(ConfigError, match=says + r'.*"mirror_descent", which takes any objective'):
        prepare(tree_of(assignment, text=text))


def test_abilities_are_checked_first() -> None:
    """Adjoint Matching asks the utility for gradients; solvers that need values do not."""
    values = "solver={ kind = 'WeightedMatching', sampler = { num_steps = 8 } }"
    assert "fine" in describe(tree_of(values), prepare(tree_of(values)))
    assert "LeftCVaR" in describe(tree_of(), prepare(tree_of()))


# Running


def test_a_run_says_what_was_planned_and_what_became_of_it(tmp_path: Path) -> None:
    report = run(tmp_path)
    (line,) = lines(tmp_path, "round")
    assert line["way"] == "tail_aware"
    found, numbers = report["tail_aware"], report["numbers"]["tuned"]
    assert found["thresholds"] == [numbers["tail_aware.threshold"]["value"]]
    assert found["level"] == 0.2
    assert found["tail_mass"]["value"] == pytest.approx(0.2 * found["drive"]["value"])
    assert found["tail_mass"]["standard_error"] > 0
    assert found["bank"] == 2000
    assert found["active"] == pytest.approx(found["beyond"] / 2000)
    planned, measured = found["planned"], found["measured"]
    assert planned["objective"] == pytest.approx(planned["utility"] - 2 * planned["kl"])
    assert measured["kl"] == numbers["path_kl"]
    told = measured["utility"]["value"] - 2 * measured["kl"]["value"]
    assert measured["objective"]["value"] == pytest.approx(told)
    assert any("not that of the plan" in f["title"] for f in report["findings"])
    low, high = report["intervals"]["tuned"]["tails.left_cvar"]
    assert low < numbers["tails.left_cvar"]["value"] < high
    text = write_report(RunDirectory(tmp_path)).read_text()
    for words in ("Threshold and tail", "part of the samples beyond", "95 % interval", "1 of at"):
        assert words in text


def test_other_reports_have_no_such_section(tmp_path: Path) -> None:
    report = execute(plan_of(), tmp_path)
    assert "tail_aware" not in report
    assert not any(name.startswith("tail_aware") for name in report["numbers"]["tuned"])
    text = write_report(RunDirectory(tmp_path)).read_text()
    assert "Threshold and tail" not in text
    assert "95 % interval" in text


def test_reports_of_earlier_versions_can_be_rewritten(tmp_path: Path) -> None:
    report = execute(plan_of(), tmp_path)
    del report["intervals"]
    RunDirectory(tmp_path).write_json(tmp_path / "report.json", report)
    assert "95 % interval" not in write_report(RunDirectory(tmp_path)).read_text()


@pytest.mark.parametrize(
    ("utility", "thresholds"),
    [
        ('kind = "SpectralRisk", levels = [0.2, 0.5], slopes = [2.0, 1.5, 0.5]', 2),
        ('kind = "EntropicRisk", sensitivity = -0.5', 1),
        ('kind = "ExpectedReward"', 0),
    ],
)
def test_several_thresholds_or_no_tail(utility: str, thresholds: int, tmp_path: Path) -> None:
    reward = 'reward = { kind = "Linear", slope = [1.0] }'
    report = run(tmp_path, f"objective.utility={{ {utility}, {reward} }}")
    found = report["tail_aware"]
    assert len(found["thresholds"]) == thresholds
    assert found["level"] is None
    assert found["tail_mass"] is None
    assert "Threshold and tail" in write_report(RunDirectory(tmp_path)).read_text()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in rounds that nobody disturbed."""
    path = tmp_path_factory.mktemp("tails") / "straight"
    run(path, *ROUNDS)
    return path


def test_rounds_are_recorded(straight: Path) -> None:
    weights = [line["stats"]["weight"] for line in lines(straight, "round")]  # type: ignore[index]
    assert len(weights) == 3
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] == 0.4
    updates = [json.loads(x) for x in (straight / "metrics.jsonl").read_text().splitlines()]
    assert {u["at"] for u in updates if u["kind"] == "update"} == {f"round/{r}" for r in range(3)}
    write_report(RunDirectory(straight))
    assert "3 of at most 3" in (straight / "report.html").read_text()


@pytest.mark.parametrize("moment", [7, 20, 21, 33, 60])
def test_killed_in_a_training(moment: int, straight: Path, tmp_path: Path) -> None:
    """The same bytes, wherever in one of the three trainings the kill fell."""
    with pytest.raises(Kill):
        run(tmp_path, *ROUNDS, die_at=moment)
    run(tmp_path, *ROUNDS)
    assert essence(tmp_path) == essence(straight)


def test_killed_between_rounds(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a round was saved, while the samples for the next threshold are drawn; no training is
    done twice."""

    def die(*arguments: object) -> None:
        raise Kill

    with monkeypatch.context() as patched:
        patched.setattr(LOOP, "corrected", die)
        with pytest.raises(Kill):
            run(tmp_path, *ROUNDS)
    assert len(lines(tmp_path, "round")) == 1
    run(tmp_path, *ROUNDS)
    assert essence(tmp_path) == essence(straight)
    with pytest.raises(Kill):  # 40 updates, then the evaluation
        run(tmp_path / "again", *ROUNDS, die_at=61)
    with monkeypatch.context() as patched:
        patched.setattr(LOOP, "corrected", die)
        run(tmp_path / "again", *ROUNDS)
    assert essence(tmp_path / "again") == essence(straight)


def command(tmp_path: Path, name: str, *assignments: str) -> int:
    (tmp_path / "tail.toml").write_text(TAIL)
    sets = [word for each in assignments for word in ("--set", each)]
    file, out = str(tmp_path / "tail.toml"), str(tmp_path / name)
    return main(["run", file, "--out", out, "--snapshot-seconds", "0", *sets])


def test_a_starving_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any training, with the smallest weight that would do; which then does."""
    starving = "objective.divergences.0.weight=0.3"
    for _ in range(2):
        assert command(tmp_path, "a", starving) == FAILED
        told = capsys.readouterr().err
        assert "supports weights of" in told
        assert "raise the weight" in told
    assert not (tmp_path / "a" / "checkpoints").exists()
    enough = float(told.partition("supports weights of ")[2].partition(" ")[0])
    assert 0.3 < enough < 1
    larger = f"objective.divergences.0.weight={1.01 * enough}"
    assert command(tmp_path, "a", larger) == USAGE
    assert "objective.divergences.0.weight is 0.3 there" in capsys.readouterr().err
    assert command(tmp_path, "b", larger) == FINE
    assert "beyond the threshold" in capsys.readouterr().out


def test_anyway_trains_with_a_warning(tmp_path: Path) -> None:
    """And says afterwards that it did starve."""
    starving = "objective.divergences.0.weight=0.3"
    may, has = (pytest.warns(RuntimeWarning, match=m) for m in ("may starve", "has starved"))
    with may, has:
        report = run(tmp_path, starving, "algorithm.anyway=true")
    assert report["tail_aware"]["reached_weight"] == 0.3
    assert report["solves"]["tuned"]["result"] == "STARVED"


def test_refused_after_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rounds before stay, and can be evaluated; the report names their weight."""
    far = ("objective.divergences.0.weight=0.1", "algorithm.max_rounds=2")
    for _ in range(2):
        assert command(tmp_path, "a", *far) == FAILED
        assert "at weight 0.1" in capsys.readouterr().err
    (line,) = lines(tmp_path / "a", "round")
    assert line["stats"]["weight"] > 0.3  # type: ignore[index]
    assert main(["evaluate", str(tmp_path / "a")]) == FINE
    assert "The weight that was trained for" in (tmp_path / "a" / "report.html").read_text()


# Findings


@pytest.mark.parametrize(
    ("stats", "says"),
    [
        ({"drive": 1.2, "drive_error": 0.05, "level_mass": 0.2}, r"24\.0% ± 1\.0% .* be 20\.0%"),
        ({"drive": 0.8, "drive_error": 0.05}, r"E u'\(r - y\*\) is 0\.8 .* should be 1"),
        ({"drive": 1.2, "drive_error": 0.07}, None),
        ({"drive": 1.09, "drive_error": 0.001}, None),
    ],
)
def test_the_finding_about_the_tail(stats: dict[str, float], says: str | None) -> None:
    """Over 10 % and over three standard errors off."""
    found = diagnose(facts(stats={**stats, "rounds": 2.0}))
    assert bool(found) == (says is not None)
    if says is not None:
        assert found[0].title == "The tuned model's tail is not that of the plan"
        assert "max_rounds = 3" in found[0].text
        assert re.search(says, found[0].text)

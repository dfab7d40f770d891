"""Merging from run files: what is refused, what is recorded, a kill is nothing, the report."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from test_report import Outline
from test_run import Kill, essence
from test_run import execute as execute_any
from test_run import lines as updates_in
from tiltflow import plots
from tiltflow.adapters.checkpoint import load_tensors
from tiltflow.algorithms.lowerings import Job, Lowered, Merging
from tiltflow.analytic import gaussian
from tiltflow.cli import FINE, USAGE, main
from tiltflow.context import Context
from tiltflow.errors import CheckpointError, ConfigError, UnsupportedError
from tiltflow.experiment import resolve
from tiltflow.flow import FlowModel
from tiltflow.merges import results, run
from tiltflow.merges.exact import distances
from tiltflow.merges.findings import findings
from tiltflow.merges.plan import MergePlan, check, prepare, signature
from tiltflow.operators import circuit
from tiltflow.plots import available
from tiltflow.recorder import Drive
from tiltflow.report import write_report
from tiltflow.rundir import RunDirectory
from tiltflow.runfile import override, parse_toml
from tiltflow.types import Estimate
from tiltflow.workflow import workflow_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
TINY = """
name = "tiny"
circuit = "(a & b)[lean] | interpolation(a, c)"
[models]
a = { kind = "GaussianMixture", means = [[-1.0], [1.0]], stds = 0.6, hidden = [8] }
b = { kind = "Gaussian", mean = [0.5], std = 1.0, hidden = [8] }
c = { kind = "Gaussian", mean = [2.0], std = 0.6, hidden = [8] }
[rewards]
lean = { kind = "Linear", slope = [0.5] }
[merging]
sampler = { num_steps = 5 }
training = { num_updates = 12, learning_rate = 1e-2, ema = 0.5 }
bank_size = 200
batch_size = 32
chunk = 100
likelihood_steps = 5
[merging.solver]
sampler = { num_steps = 5 }
training = { num_updates = 12, learning_rate = 1e-2 }
num_trajectories = 16
updates_per_rollout = 4
num_evaluate = 32
[evaluate]
num_samples = 128
sampler = { num_steps = 5 }
likelihood_steps = 4
"""
GATES = ["(a & b)[lean]", "interpolation(a, c)", "(a & b)[lean] | interpolation(a, c)"]


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)  # they take seconds


def plan_of(*assignments: str, text: str = TINY) -> MergePlan:
    return prepare(resolve(override(parse_toml(text), assignments)))


execute = functools.partial(execute_any, train=run.train, evaluate=results.evaluate)


# Reading


def test_the_plan_and_the_resolved_file() -> None:
    """A resolved file resolves to itself; gates are in the order in which they are made."""
    tree = resolve(parse_toml(TINY))
    assert resolve(tree.plain).plain == tree.plain
    plan = prepare(tree)
    assert [plan.written(gate) for gate, _ in check(plan)] == GATES
    assert [name for _, name in plan.gates] == ["one_shot", "transported", "distilled"]
    assert plan.start is None
    assert plan.judge is plan.pretrained["a"]


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("circuit=a & d", r"at position 5, there is no model 'd' \(models: a, b, c\)"),
        ("circuit=(a & b", r"at position 7, expected \), found the end"),
        ("circuit=(a & b)[left]", r"there is no reward 'left' \(rewards: lean\)"),
        ("circuit=a", r"circuit: a is a model"),
        ("circuit=3", r"circuit: expected a text, got 3"),
        ("objective=3", r"objective: unknown"),
        ("lowerings.intersecton=one_shot", r"lowerings\.intersecton: .*mean intersection\?"),
        ("lowerings.intersection=weigthed", r"lowerings\.intersection: .*mean weighted\?"),
        ("start=d", r"start: there is no model 'd'"),
        ("evaluate.classes=d", r"evaluate\.classes: there is no model 'd'"),
        ("merging.bank_siz=3", r"merging\.bank_siz: unknown\. Did you mean bank_size\?"),
        ("merging.solver.kind=WeightedBank", r"merging\.solver\.kind: must be 'AdjointMatching'"),
        ("merging.solver.num_trajectories=1", r"merging\.solver: .*num_trajectories=1"),
        ("models.c.mean=[0.0, 0.0]", r"models\.c: its states are in .*merging needs one space"),
        ("models.merged={ kind = 'Gaussian', mean = [0.0] }", r"models\.merged: must be a word"),
        ("evaluate.sampler.kernel=Heun", r"evaluate: sampler\.kernel: Heun has no memoryless"),
        ("evaluate.num_samples=1", r"evaluate: num_samples must be at least 16"),
        ("name=a/b", r"name: must be a file name"),
    ],
)
def test_refusals(assignment: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan_of(assignment)


def test_a_gate_that_cannot_be_made() -> None:
    """A known lowering that does not fit the gate, before any work."""
    plan = plan_of("circuit=interpolation_w1(a, b)", "lowerings.interpolation=transported")
    with pytest.raises(UnsupportedError, match="W_2"):
        check(plan)


@pytest.mark.parametrize(
    "text",
    [
        "(a & b)[lean] & c",
        "(a | (b & c)[lean]) & c",
        "interpolation(a | b, 0.5*(b & c), 2*c)[lean]",
        "interpolation_w1(a, b) - (a & a & b)",
        "0.3*a & 0.7*(b & (c | a))",
    ],
)
def test_written_gates_are_read_back(text: str) -> None:
    """The text of a gate with its rewards is the text of the very same circuit."""
    plan = plan_of(f"circuit={text}")
    again = circuit(plan.written(plan.root), plan.models, plan.experiment.rewards)
    assert signature(again) == signature(plan.root)
    assert plan.written(again) == plan.written(plan.root)


# Running


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    path = tmp_path_factory.mktemp("merges") / "straight"
    execute(plan_of(), path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "tiny.toml"
    path.write_text(TINY)
    return path


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == kind]


def test_a_run_leaves_what_it_promises(straight: Path) -> None:
    assert [line["gate"] for line in lines(straight, "gate")] == GATES
    assert [line["lowering"] for line in lines(straight, "gate")] == [
        "one_shot", "transported", "distilled"
    ]  # fmt: skip
    assert [line["gate"] for line in lines(straight, "solve")] == GATES[:1]
    assert len(lines(straight, "update")) == 36
    assert [line["model"] for line in lines(straight, "evaluation")] == ["a", "b", "c", *GATES]
    kept = {p.name for p in (straight / "samples").iterdir()}
    assert kept == {f"{n}.safetensors" for n in (
        "model_a", "model_b", "model_c", "gate_0000", "gate_0001", "gate_0002")}  # fmt: skip


def test_the_report_says_how_gates_were_made(straight: Path) -> None:
    report = json.loads((straight / "report.json").read_text())
    first, second, root = report["gates"]
    assert (first["lowering"], first["chosen"], first["reward_name"]) == (
        "one_shot",
        False,
        "lean",
    )
    assert first["own_reward"]["standard_error"] > 0
    assert first["solves"] == ["DONE"]
    assert [part["name"] for part in root["parts"]] == GATES[:2]
    assert second["stats"]["updates"] == 12
    numbers = report["numbers"]
    assert numbers[GATES[0]]["kl_to.a"] == first["parts"][0]["kl_to"]
    assert set(report["shares"]["b"]) == {"1", "2"}
    stages = set(report["cost"])
    assert stages == {*GATES, "evaluation"}
    assert sum(each["evaluations"] for each in report["cost"].values()) > 1000


@pytest.mark.parametrize(
    "moment", [5, 30, *(pytest.param(m, marks=pytest.mark.slow) for m in (1, 12, 13, 24, 36, 39))]
)
def test_killed_and_continued_equals_straight(moment: int, straight: Path, tmp_path: Path) -> None:
    """Same bytes in metrics.jsonl and same numbers, wherever the kill fell; no work done twice."""
    with pytest.raises(Kill):
        execute(plan_of(), tmp_path / "run", die_at=moment)
    execute(plan_of(), tmp_path / "run")
    assert essence(tmp_path / "run") == essence(straight)


def test_killed_between_a_solve_and_its_gate(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The solved problem is kept and not solved again."""

    def die(*arguments: object) -> None:
        raise Kill

    with monkeypatch.context() as patched:
        patched.setattr(run._Recorder, "made", die)
        with pytest.raises(Kill):
            execute(plan_of(), tmp_path)
    assert len(lines(tmp_path, "solve")) == 1
    updates = len(lines(tmp_path, "update"))
    execute(plan_of(), tmp_path)
    assert updates == 12
    assert essence(tmp_path) == essence(straight)


def test_restore_gives_the_very_models(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    plan, directory = plan_of(), RunDirectory(tmp_path / "run")
    outcome = run.restore(plan, directory)
    again = results.evaluate(plan, outcome, directory, Drive())
    assert again["numbers"] == essence(straight)[1]["numbers"]
    for k, lowered in enumerate(outcome.gates.values()):
        state = directory.checkpoints / f"gate_{k:04d}" / "solution.json"
        kept = json.loads(state.read_text())["notes"]["moments"]
        assert json.loads(json.dumps(lowered.model.moments)) == kept
        assert kept is not None


def test_unfinished_and_damaged_runs(tmp_path: Path) -> None:
    with pytest.raises(Kill):
        execute(plan_of(), tmp_path, die_at=20)
    with pytest.raises(ConfigError, match=r"has not made interpolation\(a, c\) yet"):
        run.restore(plan_of(), RunDirectory(tmp_path))
    state = tmp_path / "checkpoints" / "gate_0000" / "solution.json"
    state.write_bytes(state.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"solution\.json is damaged"):
        execute(plan_of(), tmp_path)


OTHERS = {
    "descent": (
        "circuit=a & b", "lowerings.intersection=trajectory", "merging.descent.num_iterations=2",
        "start=b",
    ),
    "schedules": ("circuit=a & b & c", 'models.b.schedule={ kind = "Cosine" }', "start=b",
                  "merging.refit=true"),
    "networks": (
        "circuit=a & b", 'models={ a = { kind = "Digits" }, b = { kind = "Digits" } }',
        "merging.bank_size=40", "merging.solver.num_trajectories=4",
        "merging.solver.num_evaluate=4", "evaluate.num_samples=16",
    ),
}  # fmt: skip
"""Runs of several trainings: two problems and a refit; other schedules; whole networks."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:merge. the parts of")
@pytest.mark.parametrize("name", list(OTHERS))
def test_other_runs_killed_and_continued(name: str, tmp_path: Path) -> None:
    """A kill inside each of their trainings."""
    report = execute(plan_of(*OTHERS[name]), tmp_path / "straight")
    (gate,) = report["gates"]
    assert gate["chosen"] == (name == "descent")
    assert gate["solves"] == ["DONE"] * (2 if name == "descent" else 1)
    assert gate["stats"]["refitted"] == 1
    for moment in (7, 19, 30) if name == "descent" else (7, 19):
        path = tmp_path / str(moment)
        with pytest.raises(Kill):
            execute(plan_of(*OTHERS[name]), path, die_at=moment)
        execute(plan_of(*OTHERS[name]), path)
        assert essence(path) == essence(tmp_path / "straight")


@pytest.mark.slow
def test_sigkill_of_the_command_line(straight: Path, file: Path, tmp_path: Path) -> None:
    """`tiltflow run` killed by SIGKILL in two trainings, then run again: the same bits."""
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "tiltflow", "run", str(file), "--out", str(out),
        "--snapshot-seconds", "0",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for goal in (7, 29):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and updates_in(out) < goal:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert main(command[3:]) == FINE
    assert essence(out) == essence(straight)


def test_a_gate_that_occurs_twice_is_made_once(tmp_path: Path) -> None:
    plan, directory = plan_of("circuit=(a & b) | ((a & b) | c)"), RunDirectory(tmp_path)
    directory.claim(plan.resolved)
    outcome = run.train(plan, directory, Drive())
    assert list(outcome.gates) == ["a & b", "(a & b) | c", "(a & b) | ((a & b) | c)"]
    assert outcome.model is list(outcome.gates.values())[-1].model


# Evaluating


def outcome_of(plan: MergePlan, model: FlowModel) -> run.MergeOutcome:
    """As if a merge had made the one gate of the plan so."""
    parts = tuple(plan.models.values())
    job = Job(plan.root, parts, parts[0], "one_shot", Merging(), Context())
    key = plan.written(plan.root)
    return run.MergeOutcome({key: Lowered(model, "one_shot", {})}, {key: job})


NORMALS = (
    "circuit=a & b", 'models.a={ kind = "Gaussian", mean = [0.0] }',
    'models.b={ kind = "Gaussian", mean = [0.0], std = 0.5 }', "evaluate.likelihood_steps=60",
)  # fmt: skip


def test_the_distance_to_the_closed_form() -> None:
    """Zero for a model that is the optimum, N(0, 2/5); the known value for another one."""
    plan = plan_of(*NORMALS)
    x = torch.linspace(-9, 9, 4001).double()
    p, q = ((-(x**2) / (2 * v)).exp() / math.sqrt(2 * math.pi * v) for v in (0.4, 1.0))
    apart = float((p - q).abs().sum()) * float(x[1] - x[0]) / 2
    for std, expected in ((math.sqrt(0.4), 0.0), (1.0, apart)):
        found = distances(plan, outcome_of(plan, gaussian([0.0], std).flow()))["a & b"]
        assert isinstance(found, Estimate)
        assert abs(found.value - expected) < 3e-3
    assert apart > 0.2


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["evaluate.likelihood_steps=0"], "likelihood_steps is 0"),
        (["circuit=interpolation_w1(a, b)"], "W_2"),
        (["circuit=interpolation_w1(a, b) & b"], r"part interpolation_w1\(a, b\) is not: .*W_2"),
        (["circuit=(a & b)[lean]", "rewards.lean.slope=[50.0]"], "reaches beyond the grid"),
    ],
)
def test_why_there_is_no_closed_form(assignments: list[str], says: str) -> None:
    plan = plan_of(*NORMALS, *assignments)
    (found,) = distances(plan, outcome_of(plan, plan.models["a"])).values()
    assert isinstance(found, str)
    assert re.search(says, found)


def test_models_whose_density_is_not_known() -> None:
    plan = plan_of(*NORMALS)
    unknown = replace(plan.pretrained["b"], exact=None)
    plan = replace(plan, pretrained={**plan.pretrained, "b": unknown})
    found = distances(plan, outcome_of(plan, plan.models["a"]))
    assert found == {"a & b": "the density of b is not known"}


def test_expectations_and_reported_numbers(tmp_path: Path) -> None:
    """Metrics of the result bare, of models and gates by name; a reward and judges for all."""
    plan = plan_of(
        "circuit=(a & b)[lean]", 'evaluate.reward={ kind = "Linear", slope = [2.0] }',
        'evaluate.classes="a"',
        'expect={ "b.reward" = { value = 1.0, within = 1.0 }, own_reward = { value = 9.0, '
        'within = 0.1, from = "nowhere" }, '
        '"(a & b)[lean].kl_to.a" = { value = 0.0, within = 9.0 } }',
    )  # fmt: skip
    report = execute(plan, tmp_path / "a")
    assert [v["met"] for v in report["expectations"]] == [True, False, True]
    numbers = report["numbers"]
    for name in ("a", "b", "(a & b)[lean]"):
        assert numbers[name]["reward"]["value"] == pytest.approx(
            2 * numbers[name]["mean.0"]["value"], rel=1e-4
        )
    reward, mean = numbers["(a & b)[lean]"]["own_reward"], numbers["(a & b)[lean]"]["mean.0"]
    assert reward["value"] == pytest.approx(0.5 * mean["value"], rel=1e-4)
    sampled = load_tensors(tmp_path / "a" / "samples" / "model_b.safetensors")["points"]
    assert float(sampled.double().mean()) == pytest.approx(numbers["b"]["mean.0"]["value"])
    assert numbers["b"]["variance.0"]["value"] == pytest.approx(float(sampled.double().var()))
    wrong = plan_of("expect={ kl_to_a = { value = 0.0, within = 1.0 } }", "circuit=a & b")
    with pytest.raises(ConfigError, match=r"expect\.kl_to_a: .*Did you mean kl_to\.a"):
        execute(wrong, tmp_path / "b")


def estimate(value: float, error: float = 0.0) -> dict[str, float]:
    return {"value": value, "standard_error": error}


def made_up(**changes: Any) -> dict[str, Any]:
    """A report of one gate about which there is nothing to say."""
    parts = [
        {"name": n, "share": 0.5, "kl_to": estimate(0.5, 0.1), "kl_from": estimate(0.5, 0.1)}
        for n in "ab"
    ]
    gate = {
        "text": "a & b", "gate": "Intersection", "guided": False, "solves": ["DONE"],
        "stats": {"apart": 1.0}, "total_variation": estimate(0.05), "parts": parts,
    } | changes  # fmt: skip
    shares = {
        "a": {"x": estimate(0.2, 0.01)}, "b": {"x": estimate(0.4, 0.01)},
        "a & b": {"x": estimate(0.3, 0.01)},
    }  # fmt: skip
    return {"gates": [gate], "shares": shares}


def parts_with(**kls: tuple[float, float]) -> list[dict[str, Any]]:
    known = {name: estimate(*kl) for name, kl in kls.items()}
    return [{"name": "a", "share": 0.5, "kl_to": estimate(0.5), "kl_from": estimate(0.5)} | known]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"stats": {"apart": 5.1}}, "hardly meet.*exp\\(-5.1\\)"),
        ({"solves": ["DONE", "STARVED"]}, "gave up.*problem 2 of 2"),
        ({"parts": parts_with(kl_to=(8.5, 0.1))}, "far from a.*8.5 nats"),
        ({"parts": parts_with(kl_to=(8.5, 0.1)), "gate": "Union"}, None),
        ({"parts": parts_with(kl_from=(1.6, 0.1)), "gate": "Union"}, "does not cover a"),
        ({"parts": parts_with(kl_from=(1.4, 0.1)), "gate": "Union"}, None),
        ({"parts": parts_with(kl_from=(9.0, 0.1)), "gate": "Union", "guided": True}, None),
        ({"total_variation": estimate(0.11)}, "not its closed form.*0.11"),
        ({"total_variation": None}, None),
    ],
)
def test_findings(changes: dict[str, Any], says: str | None) -> None:
    found = findings(made_up(**changes) | {"shares": {}})
    assert bool(found) == (says is not None), found
    if says is not None:
        assert re.search(says, f"{found[0].title}. {found[0].text}")


def test_a_union_with_other_shares() -> None:
    """Over three standard errors from the mean of the parts' shares: 0.3, here to 0.012."""
    for own, expected in ((0.33, 0), (0.35, 1)):
        report = made_up(gate="Union")
        report["shares"]["a & b"]["x"] = estimate(own, 0.01)
        found = findings(report)
        assert len(found) == expected
    assert "x: 35.0% instead of 30.0%" in found[0].text
    assert not findings({**report, "gates": [{**report["gates"][0], "guided": True}]})


# The report and the command line


def test_the_page(straight: Path) -> None:
    """Closed tags, no links, the drawing, each gate; findings, cost and the configuration."""
    text = write_report(RunDirectory(straight)).read_text()
    page = Outline()
    page.feed(text)
    assert page.open == []
    assert not [link for link in page.links if not link.startswith("data:")]
    for words in (
        "<svg", "one_shot, reward lean", "chosen automatically", "KL from it", "The circuit",
        "Classes of the parts", "Every model", "Cost", "interpolation(a, c)", "total variation",
        "└─ 0.5 c", "How to do it again",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.slow
@pytest.mark.skipif(not available(), reason="matplotlib is not installed")
@pytest.mark.parametrize("space", ["line", "plane", "pictures"])
def test_the_page_with_figures(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Histograms, scatters, pictures; class masses and training curves."""
    monkeypatch.setattr(plots, "available", available)
    changes = {
        "line": [],
        "plane": [
            "circuit=(a & b) - c", 'models={ a = { kind = "Ring", count = 3, hidden = [8] }, '
            'b = { kind = "Gaussian", mean = [0.5, 0.0] }, c = { kind = "Ring", count = 5 } }',
        ],
        "pictures": [
            "circuit=a | b", "evaluate.num_samples=16", "merging.bank_size=40",
            'models={ a = { kind = "Digits" }, b = { kind = "Digits" } }',
        ],
    }[space]  # fmt: skip
    execute(plan_of(*changes), tmp_path)
    picture = tmp_path / "picture.png"
    assert main(["report", str(tmp_path), "--picture", str(picture)]) == FINE
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text().count("<img") >= 3


def test_the_commands(
    file: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """run (a second time too), inspect, sample, evaluate, report."""
    out = tmp_path / "run"
    arguments = ["run", str(file), "--out", str(out), "--snapshot-seconds", "0"]
    assert main(arguments) == FINE
    assert essence(out) == essence(straight)
    shown = capsys.readouterr().out
    assert "interpolation(a, c): transported" in shown
    assert "└─" in shown
    assert main(arguments) == FINE
    assert "finished already" in capsys.readouterr().err
    before = json.loads((out / "report.json").read_text())["numbers"]
    assert main(["evaluate", str(out)]) == FINE
    assert json.loads((out / "report.json").read_text())["numbers"] == before
    for model, code in ((None, FINE), ("b", FINE), ("gate_0001", FINE), ("tuned", USAGE)):
        choice = [] if model is None else ["--model", model]
        assert main(["sample", str(out), "-n", "8", *choice]) == code
    assert "it has merged, a, b, c, gate_0000" in capsys.readouterr().err
    assert load_tensors(out / "samples" / "merged_8_0.safetensors")["points"].shape == (8, 1)
    assert "rewards" not in load_tensors(out / "samples" / "b_8_0.safetensors")
    assert main(["inspect", str(file)]) == FINE
    shown = capsys.readouterr().out
    assert "(a & b)[lean]                  one_shot (chosen automatically)" in shown
    assert "time        about" in shown


def test_nothing_is_left_where_a_file_is_refused(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    for assignment, code in (
        ("circuit=a & x", USAGE), ("lowerings.union=best", USAGE),
        ("circuit=interpolation(a, b)[box]", USAGE), ("models.c.mean=[0.0, 0.0]", USAGE),
        ("lowerings.interpolation=terminal", None),
    ):  # fmt: skip
        found = (
            main(["inspect", str(file), "--set", assignment])
            if code is None
            else main(["run", str(file), "--out", str(out), "--set", assignment])
        )
        assert found == (code or FINE)
        assert "Traceback" not in capsys.readouterr().err
        assert not out.exists()


def test_gates_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "gates"]) == FINE
    shown = capsys.readouterr().out
    for words in ("intersection", "one_shot", "weighted", "distilled", "contrast"):
        assert words in shown


def test_the_file_on_the_page() -> None:
    """The run file in docs/merging.md can be read, and its expectations name metrics."""
    text = (DOCS / "merging.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    tree = resolve(parse_toml(block))
    plan = workflow_of(tree).prepare(tree, None)
    assert [plan.written(gate) for gate, _ in check(plan)] == [
        "(a & b)[lean]",
        plan.written(plan.root),
    ]
    for metric in plan.experiment.expect:
        assert metric.split(".")[-2:] in (["kl_to", "c"], ["(a & b)[lean]", "own_reward"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merge_gaussians", "merge_circuit"])
def test_shipped_runs_meet_their_expectations(name: str, tmp_path: Path) -> None:
    path = DOCS.parent / "experiments" / f"{name}.toml"
    assert main(["run", str(path), "--out", str(tmp_path)]) == FINE

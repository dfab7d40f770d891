"""Runs: whole, killed at any moment, on a full disk, on damaged files, on bad rewards."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltflow import experiment, plots, results, run
from tiltflow.adapters import checkpoint
from tiltflow.algorithms import Attempt, PathKLBound
from tiltflow.cli import main
from tiltflow.context import Snapshot
from tiltflow.errors import (
    CapabilityError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    ShapeError,
)
from tiltflow.potential import BlackBox, Differentiable, Potential
from tiltflow.recorder import Drive, Progress
from tiltflow.rundir import RunDirectory
from tiltflow.runfile import parse_toml

TINY = """
name = "tiny"
[models]
pretrained = { kind = "Gaussian", mean = [0.0], std = 1.0, hidden = [8] }
[objective]
utility = { kind = "LeftCVaR", level = 0.2, reward = { kind = "Linear", slope = [1.0] } }
divergences = [{ kind = "KL", prior = "pretrained", weight = 2.0 }]
[algorithm]
num_iterations = 2
rates = [0.5, 0.5]
num_samples = 256
[solver]
kind = "AdjointMatching"
sampler = { num_steps = 8 }
training = { num_updates = 20, learning_rate = 1e-2 }
num_trajectories = 32
updates_per_rollout = 5
num_evaluate = 64
[evaluate]
num_samples = 256
sampler = { num_steps = 8 }
levels = [0.2]
[baseline]
utility = { kind = "ExpectedReward", reward = { kind = "Linear", slope = [1.0] } }
num_samples = 512
"""
RETRYING = TINY.replace(
    "rates = [0.5, 0.5]",
    'rate = { kind = "PathKLBound", bound = 0.004, initial = 0.5, max_rate = 0.5 }',
)


class Kill(BaseException):
    """Stands for a kill inside a process: nothing in the library may catch it."""


def plan_of(text: str = TINY, **changes: Any) -> experiment.Plan:
    data = parse_toml(text)
    data["algorithm"] |= changes
    return experiment.prepare(experiment.resolve(data))


def execute(
    plan: Any,
    path: Path,
    die_at: int | None = None,
    train: Callable[..., Any] = run.train,
    evaluate: Callable[..., dict[str, Any]] = results.evaluate,
) -> dict[str, Any]:
    """A whole run in this process; ``die_at`` kills it at that call of ``on_progress``."""
    count = 0

    def on_progress(progress: Progress) -> None:
        nonlocal count
        count += 1
        if count == die_at:
            raise Kill

    directory = RunDirectory(path)
    directory.claim(plan.resolved)
    drive = Drive(snapshot_seconds=0.0, on_progress=on_progress)
    return evaluate(plan, train(plan, directory, drive), directory, drive)


def essence(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Everything of a run that must not depend on whether it was interrupted."""
    report = json.loads((path / "report.json").read_text())
    del report["cost"]
    return (path / "metrics.jsonl").read_bytes(), report


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    path = tmp_path_factory.mktemp("runs") / "straight"
    execute(plan_of(), path)
    return path


def test_a_run_leaves_what_it_promises(straight: Path) -> None:
    names = {p.name for p in straight.iterdir()}
    assert names >= {
        "config.toml", "environment.json", "metrics.jsonl", "timing.jsonl", "checkpoints",
        "samples", "report.json",
    }  # fmt: skip
    kinds = [
        json.loads(line)["kind"] for line in (straight / "metrics.jsonl").read_text().splitlines()
    ]
    assert kinds.count("iteration") == 2
    assert kinds.count("baseline") == 1
    assert kinds.count("evaluation") == 3
    environment = json.loads((straight / "environment.json").read_text())
    assert not set(environment) & set(os.environ)


def test_the_tuned_model_moves_uphill(straight: Path) -> None:
    """End to end, the sign: LeftCVaR of the tuned law is above the pre-trained one's."""
    numbers = json.loads((straight / "report.json").read_text())["numbers"]
    gain = numbers["tuned"]["gain.left_cvar"]
    assert gain["value"] > 4.5 * gain["standard_error"] > 0
    assert numbers["baseline"]["gain.mean"]["value"] > 0
    assert numbers["pretrained"]["path_kl"]["value"] == 0


@pytest.mark.parametrize("moment", [1, 5, 6, 20, 21, 26, 47, 60, 61, 62])
def test_killed_and_continued_equals_straight(moment: int, straight: Path, tmp_path: Path) -> None:
    """Same bytes in metrics.jsonl and same numbers in report.json, wherever the kill fell."""
    with pytest.raises(Kill):
        execute(plan_of(), tmp_path / "run", die_at=moment)
    execute(plan_of(), tmp_path / "run")
    assert essence(tmp_path / "run") == essence(straight)


def test_killed_inside_a_second_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts that a rate rule refused are recomputed on resume, but not recorded twice."""

    def refuse_once(self: PathKLBound, attempt: Attempt) -> float | None:
        return attempt.rate / 2 if attempt.number == 0 else None

    monkeypatch.setattr(PathKLBound, "retry", refuse_once)
    execute(plan_of(RETRYING), tmp_path / "straight")
    metrics, _ = essence(tmp_path / "straight")
    assert b"attempt" in metrics
    for moment in (26, 33, 57):
        path = tmp_path / str(moment)
        with pytest.raises(Kill):
            execute(plan_of(RETRYING), path, die_at=moment)
        execute(plan_of(RETRYING), path)
        assert essence(path) == essence(tmp_path / "straight")


def test_sigkill_of_the_command_line(
    straight: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`tiltflow run` killed by SIGKILL at random moments, then run again: the same bits."""
    (tmp_path / "tiny.toml").write_text(TINY)
    out, rng = tmp_path / "run", random.Random(0)
    command = [
        sys.executable, "-m", "tiltflow", "run", str(tmp_path / "tiny.toml"), "--out", str(out),
        "--snapshot-seconds", "0",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for goal in (rng.randrange(5, 20), rng.randrange(23, 60)):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and lines(out) < goal:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    monkeypatch.setattr(plots, "available", lambda: False)  # figures take seconds
    assert main(command[3:]) == 0
    assert essence(out) == essence(straight)
    capsys.readouterr()
    assert main(command[3:]) == 0
    assert "finished already" in capsys.readouterr().err
    assert essence(out) == essence(straight)


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_another_config_is_refused(straight: Path) -> None:
    plan = plan_of(rates=[0.5, 0.25])
    with pytest.raises(ConfigError, match=r"algorithm\.rates\.1 is 0\.5 there and 0\.25 here"):
        RunDirectory(straight).claim(plan.resolved)


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="not a run directory"):
        RunDirectory(tmp_path).claim(plan_of().resolved)


def test_two_processes_cannot_share_a_directory(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    held = RunDirectory(tmp_path).lock()
    with pytest.raises(ConfigError, match="Another process"):
        RunDirectory(tmp_path).lock()
    assert held is not None
    held.close()


@pytest.mark.parametrize(
    ("damage", "remedy"),
    [
        ("latest/snapshot.safetensors", "snapshot.safetensors is not a readable"),
        ("iteration_0000/delta.safetensors", "delta.safetensors is not a readable"),
        ("iteration_0000/solution.json", "solution.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named(damage: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(Kill):
        execute(plan_of(), tmp_path, die_at=33)
    file = tmp_path / "checkpoints" / damage
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=remedy):
        execute(plan_of(), tmp_path)


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    """A delta of another architecture, and a snapshot of another training."""
    with pytest.raises(Kill):
        execute(plan_of(), tmp_path, die_at=33)
    delta = tmp_path / "checkpoints" / "iteration_0000" / "delta.safetensors"
    original = delta.read_bytes()
    checkpoint.save_tensors(delta, {"layers.0.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="belongs to another model"):
        execute(plan_of(), tmp_path)
    delta.write_bytes(original)
    directory = RunDirectory(tmp_path)
    loaded = directory.load_snapshot()
    assert loaded is not None
    snapshot = Snapshot(loaded[0].address, loaded[0].update, {"parameter/other": torch.zeros(2)})
    directory.save_snapshot(snapshot)
    with pytest.raises(CheckpointError, match="another model"):
        execute(plan_of(), tmp_path)


def test_a_full_disk_loses_nothing(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC while a snapshot is written: an error that says so; the last one still serves."""
    real, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises((CheckpointError, OSError), match="No space left"):
        execute(plan_of(), tmp_path / "run")
    monkeypatch.undo()
    kept = RunDirectory(tmp_path / "run").load_snapshot()
    assert kept is not None
    assert kept[0].update > 0
    execute(plan_of(), tmp_path / "run")
    assert essence(tmp_path / "run") == essence(straight)


def replaced(plan: experiment.Plan, reward: Potential) -> experiment.Plan:
    """The plan with another reward in objective and evaluation."""
    from dataclasses import replace

    from tiltflow.utilities import LeftCVaR

    utility = LeftCVaR(reward, 0.2)
    objective = replace(plan.experiment.objective, utility=utility)
    changed = replace(plan.experiment, objective=objective)
    return replace(plan, experiment=changed, objective=objective.functional, reward=reward)


def nan_far_out(x: Tensor) -> Tensor:
    return torch.where(x[:, 0] > 1.5, torch.nan, x[:, 0])


@pytest.mark.parametrize(
    ("reward", "error", "says"),
    [
        (Differentiable(lambda x: x), ShapeError, "one number per sample"),
        (Differentiable(lambda x: x[:, 0] * torch.nan), NonFiniteError, "value is not finite"),
        (Differentiable(lambda x: x[:, 0].detach()), CapabilityError, "no gradient"),
        (BlackBox(lambda x: x[:, 0]), CapabilityError, "AdjointMatching needs gradient"),
        (Differentiable(nan_far_out), NonFiniteError, "value is not finite"),
    ],
)
def test_bad_rewards(reward: Potential, error: type[Exception], says: str, tmp_path: Path) -> None:
    """A wrong shape, NaN at once or later, a missing gradient: a sentence that names it."""
    says = says.replace("needs gradient", "needs GRAD")
    with pytest.raises(error, match=says):
        execute(replaced(plan_of(), reward), tmp_path)


def test_restore_gives_the_trained_models(straight: Path) -> None:
    plan = plan_of()
    outcome = run.restore(plan, RunDirectory(straight))
    again = results.evaluate(plan, outcome, RunDirectory(straight), Drive())
    assert again["numbers"] == essence(straight)[1]["numbers"]


def test_expectations_are_compared(tmp_path: Path) -> None:
    """A miss is recorded as such; an unknown metric names the nearest."""
    expected = '[expect]\n"path_kl" = { value = 99.0, within = 0.1, from = "nowhere" }\n'
    report = execute(plan_of(TINY + expected), tmp_path / "a")
    assert [v["met"] for v in report["expectations"]] == [False]
    with pytest.raises(ConfigError, match="Did you mean path_kl"):
        execute(plan_of(TINY + expected.replace("path_kl", "pathkl")), tmp_path / "b")

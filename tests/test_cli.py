"""The command line: every command, exit codes, errors of one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiltflow import plots
from tiltflow.adapters.checkpoint import load_tensors
from tiltflow.cli import FAILED, FINE, GROUPS, MISSED, USAGE, main
from tiltflow.recorder import Progress
from tiltflow.terminal import Bar

TINY = """
[models]
pretrained = { kind = "Ring", count = 3, hidden = [8] }
[objective]
utility = { kind = "ExpectedReward", reward = { kind = "Linear", slope = [0.5, 0.0] } }
divergences = [{ kind = "KL", prior = "pretrained", weight = 1.0 }]
[algorithm]
num_samples = 64
[solver]
kind = "AdjointMatching"
sampler = { num_steps = 5 }
training = { num_updates = 4 }
num_trajectories = 16
updates_per_rollout = 2
num_evaluate = 16
[evaluate]
num_samples = 64
sampler = { num_steps = 5 }
[expect]
"path_kl" = { value = 0.0, within = 5.0, from = "a test" }
"""


@pytest.fixture(scope="module", autouse=True)
def _without_figures() -> Iterator[None]:
    """Figures take seconds; `test_report.py` has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "available", lambda: False)
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny_ring.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def done(file: Path) -> Path:
    """The directory of a finished run."""
    out = file.parent / "run"
    assert main(["run", str(file), "--out", str(out)]) == FINE
    return out


def test_run_prints_the_table_and_the_report(
    done: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(file), "--out", str(done)]) == FINE
    shown = capsys.readouterr()
    assert "mean reward" in shown.out
    assert "report.html" in shown.out
    assert "finished already" in shown.err


def test_the_name_of_the_file_is_the_default_name(done: Path) -> None:
    assert 'name = "tiny_ring"' in (done / "config.toml").read_text()


def test_the_resolved_config_is_a_run_file_of_the_same_run(done: Path) -> None:
    assert main(["run", str(done / "config.toml"), "--out", str(done)]) == FINE


def test_evaluate_repeats_the_numbers(done: Path) -> None:
    before = json.loads((done / "report.json").read_text())["numbers"]
    (done / "report.html").unlink()
    assert main(["evaluate", str(done)]) == FINE
    assert json.loads((done / "report.json").read_text())["numbers"] == before
    assert (done / "report.html").exists()


def test_a_missed_expectation_is_exit_code_3(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(file), "--out", str(tmp_path / "a")]
    arguments += ["--set", "expect.path_kl.value=9.0", "--set", "expect.path_kl.within=0.1"]
    assert main(arguments) == MISSED
    assert "expectation missed: path_kl" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "a")]) == MISSED


def test_sample(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "bank.safetensors"
    assert main(["sample", str(done), "-n", "32", "--out", str(out)]) == FINE
    bank = load_tensors(out)
    assert bank["points"].shape == (32, 2)
    assert float(bank["weights"].sum()) == pytest.approx(1)
    again = tmp_path / "again.safetensors"
    assert main(["sample", str(done), "-n", "32", "--out", str(again)]) == FINE
    assert bool((load_tensors(again)["points"] == bank["points"]).all())
    assert main(["sample", str(done), "--model", "baseline"]) == USAGE
    assert main(["sample", str(done), "-n", "0"]) == USAGE


def test_inspect_does_no_work(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(file)]) == FINE
    shown = capsys.readouterr().out
    assert "AdjointMatching needs GRAD: fine" in shown
    assert "num_steps = 5" in shown
    assert "time        about" in shown
    assert list(tmp_path.iterdir()) == []


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == FINE
    shown = capsys.readouterr().out
    assert all(f"{group}:" in shown for group in GROUPS)
    assert main(["list", "utilities"]) == FINE
    assert "LeftCVaR" in capsys.readouterr().out
    assert main(["list", "kernels"]) == FINE
    shown = capsys.readouterr().out
    assert "EulerMaruyama" in shown
    assert "Transition" not in shown, "a class of the module, but not a kernel"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--set", "solver.num_step=3"], USAGE, "unknown"),
        (["--set", "solver.sampler.num_step=3"], USAGE, "Did you mean num_steps?"),
        (["--device", "abacus"], USAGE, "--device abacus: not available"),
        (["--set", "algorithm.num_samples=1"], USAGE, "num_samples at least 2"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str],
    code: int,
    says: str,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    assert main(["run", str(file), "--out", str(out), *arguments]) == code
    shown = capsys.readouterr().err
    assert says in shown
    assert "Traceback" not in shown
    assert len(shown.strip().splitlines()) == 1
    assert not out.exists()


def test_another_config_is_refused_before_any_work(
    done: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*")}
    assert main(["run", str(file), "--out", str(done), "--set", "seed=1"]) == USAGE
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in done.rglob("*")}


def test_directories_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("evaluate", "report", "sample"):
        assert main([command, str(tmp_path)]) == USAGE
        assert "not a run directory" in capsys.readouterr().err


def test_a_damaged_delta_is_a_failure(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(done, tmp_path / "copy")
    delta = tmp_path / "copy" / "checkpoints" / "iteration_0000" / "delta.safetensors"
    delta.write_bytes(b"rubbish")
    assert main(["evaluate", str(tmp_path / "copy")]) == FAILED
    assert "delta.safetensors is not a readable" in capsys.readouterr().err


def test_debug_shows_the_traceback(file: Path) -> None:
    from tiltflow.errors import ConfigError

    for arguments in (["--debug", "inspect", str(file)], ["inspect", str(file), "--debug"]):
        with pytest.raises(ConfigError):
            main([*arguments, "--set", "solver.num_step=3"])


def test_usage_errors_are_exit_code_2() -> None:
    with pytest.raises(SystemExit) as error:
        main(["rum"])
    assert error.value.code == USAGE


def test_an_interrupt_says_how_to_continue(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiltflow import run

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupt)
    assert main(["run", str(file), "--out", str(tmp_path / "run")]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_help_is_instant() -> None:
    """`--help` imports neither torch nor numpy."""
    code = (
        "import sys\nfrom tiltflow.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'tqdm') if m in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip().endswith("[]")
    assert time.monotonic() - start < 5


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Bar()
    for done in range(1, 50):
        bar(Progress("training", done, 100, {"loss": 0.5}))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Bar, "EVERY", 0.0)
    bar(Progress("training", 50, 100, {"loss": 0.5}))
    shown = capsys.readouterr().err
    assert shown.startswith("training: 50/100")
    assert "s left" in shown


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = Bar()
    bar(Progress("training", 1, 100, {"loss": 0.5}))
    bar(Progress("evaluation", 1, 10))
    bar.close()

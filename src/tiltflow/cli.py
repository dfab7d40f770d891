"""The command line. Only the standard library is imported before a command runs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tiltflow.cli_parser import GROUPS, parser
from tiltflow.terminal import Bar, say, summary_text

if TYPE_CHECKING:
    import torch

    from tiltflow.recorder import Drive
    from tiltflow.rundir import RunDirectory
    from tiltflow.workflow import Workflow

__all__ = ["FAILED", "FINE", "GROUPS", "MISSED", "USAGE", "main"]

FINE, FAILED, USAGE, MISSED = 0, 1, 2, 3
"""Exit codes: fine; failed; wrong usage; an expectation of the run file was missed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors are one sentence on stderr."""
    options = parser().parse_args(arguments)
    if options.debug:
        return _dispatch(options)
    try:
        with _terminations_as_interrupts():
            return _dispatch(options)
    except KeyboardInterrupt:
        print(_interrupted(options), file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # e.g. `tiltflow list | head`
        sys.stderr.close()
        return FINE
    except Exception as error:
        return _complain(error)


def _complain(error: Exception) -> int:
    from tiltflow.errors import ConfigError, TiltflowError

    if isinstance(error, TiltflowError):
        print(f"tiltflow: {error}", file=sys.stderr)
        return USAGE if isinstance(error, ConfigError) else FAILED
    kind = type(error).__name__
    print(f"tiltflow: {kind}: {error}. --debug shows where.", file=sys.stderr)
    return FAILED


def _interrupted(options: argparse.Namespace) -> str:
    if options.command != "run":
        return "\ntiltflow: interrupted."
    return (
        "\ntiltflow: interrupted. Nothing is lost but the last seconds: the same command "
        "continues from the last snapshot."
    )


def _dispatch(options: argparse.Namespace) -> int:
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "run": _run, "sample": _sample, "evaluate": _evaluate, "report": _report,
        "inspect": _inspect, "list": _list,
    }  # fmt: skip
    return commands[options.command](options)


def _run(options: argparse.Namespace) -> int:
    from tiltflow.experiment import load
    from tiltflow.rundir import RunDirectory
    from tiltflow.workflow import workflow_of

    tree = load(options.file, options.assign)
    directory = RunDirectory(options.out or Path("runs") / str(tree.plain["name"]))
    device, flow = _device(options), workflow_of(tree)
    if directory.config.exists():  # before any work, and before a lock file is made
        directory.check_same(tree.plain)
        done = directory.read_json(directory.report)
        if done is not None:
            say(f"{directory.path} is finished already; rewriting its report.")
            return _finish(directory, done)
    plan = flow.prepare(tree, device)
    flow.check(plan)
    existed = directory.claim(tree.plain)
    lock = directory.lock()
    try:
        say(f"{'Continuing' if existed else 'Starting'} {directory.path}")
        bar = Bar()
        outcome = flow.train(plan, directory, _drive(device, options.snapshot_seconds, bar))
        report = _measure(flow, plan, outcome, directory, device, bar)
    finally:
        if lock is not None:
            lock.close()
    return _finish(directory, report)


def _measure(
    flow: Workflow, plan: Any, outcome: Any, directory: RunDirectory, device: Any, bar: Bar
) -> dict[str, Any]:
    report = flow.evaluate(plan, outcome, directory, _drive(device, 10.0, bar))
    bar.close()
    return report


def _finish(directory: RunDirectory, report: dict[str, Any]) -> int:
    from tiltflow.report import write_report

    path = write_report(directory)
    print(summary_text(report))
    print(f"\nReport: {path}")
    missed = [v for v in report["expectations"] if not v["met"]]
    for v in missed:
        say(f"expectation missed: {v['metric']} is {v['measured']['value']:.5g}, "
             f"expected {v['value']:.5g} ± {v['within']:.2g}")  # fmt: skip
    return MISSED if missed else FINE


def _sample(options: argparse.Namespace) -> int:
    from tiltflow.errors import ConfigError
    from tiltflow.sample_files import write_samples
    from tiltflow.seed import Seed
    from tiltflow.types import drawn_cond

    if options.n < 1:
        raise ConfigError(f"-n {options.n}: at least one sample.")
    flow, plan, outcome, directory = _restored(options)
    models, wanted = flow.models(plan, outcome), options.model or flow.result
    if wanted not in models:
        raise ConfigError(f"{directory.path} has no {wanted}; it has {', '.join(models)}.")
    seed = Seed(options.seed).child("sample")
    states, sampler = flow.states(plan), plan.experiment.evaluate.sampler
    cond = drawn_cond(states.conditions, options.n, seed)
    points = sampler.sample(models[wanted], options.n, seed=seed, cond=cond)
    name = f"{wanted}_{options.n}_{options.seed}.safetensors"
    path = options.out or directory.samples / name
    reward = flow.reward(plan)
    rewards = None if reward is None else reward.value(points, cond)
    print("\n".join(write_samples(path, points, rewards, cond, states.layout)))
    return FINE


def _evaluate(options: argparse.Namespace) -> int:
    flow, plan, outcome, directory = _restored(options)
    lock = directory.lock()
    try:
        report = _measure(flow, plan, outcome, directory, _device(options), Bar())
    finally:
        if lock is not None:
            lock.close()
    return _finish(directory, report)


def _restored(options: argparse.Namespace) -> tuple[Workflow, Any, Any, RunDirectory]:
    from tiltflow.experiment import resolve
    from tiltflow.rundir import RunDirectory
    from tiltflow.workflow import workflow_of

    directory = RunDirectory.existing(options.directory)
    tree = resolve(directory.read_config())
    flow = workflow_of(tree)
    plan = flow.prepare(tree, _device(options))
    return flow, plan, flow.restore(plan, directory), directory


def _report(options: argparse.Namespace) -> int:
    from tiltflow.report import write_picture, write_report
    from tiltflow.rundir import RunDirectory

    directory = RunDirectory.existing(options.directory)
    print(write_report(directory))
    if options.picture is not None:
        write_picture(directory, options.picture)
        print(options.picture)
    return FINE


def _inspect(options: argparse.Namespace) -> int:
    from tiltflow.experiment import load
    from tiltflow.workflow import workflow_of

    tree = load(options.file, options.assign)
    flow = workflow_of(tree)
    print(flow.describe(tree, flow.prepare(tree, _device(options))))
    return FINE


def _list(options: argparse.Namespace) -> int:
    from tiltflow.merges.inspection import gate_lines
    from tiltflow.registry import summary
    from tiltflow.signatures import choices

    for group in [options.group] if options.group else GROUPS:
        if not options.group:
            print(f"{group}:")
        lines = (
            gate_lines()
            if group == "gates"
            else (
                f"  {name:20} {summary(constructor)}"
                for name, constructor in sorted(choices(group).items())
            )
        )
        print("\n".join(lines))
    return FINE


def _device(options: argparse.Namespace) -> torch.device:
    import torch

    from tiltflow.errors import ConfigError

    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {options.device}: not available here ({str(error).splitlines()[0]})."
        ) from None
    return device


def _drive(device: torch.device, snapshot_seconds: float, bar: Bar) -> Drive:
    from tiltflow.recorder import Drive

    return Drive(device=device, snapshot_seconds=snapshot_seconds, on_progress=bar)


@contextmanager
def _terminations_as_interrupts() -> Iterator[None]:
    """A polite kill (a time limit, a closed terminal) ends like Ctrl-C: with a sentence."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    names = [n for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
    before = {n: signal.signal(getattr(signal, n), interrupt) for n in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)

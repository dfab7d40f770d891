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

from tiltflow.terminal import Bar, say, summary_text

if TYPE_CHECKING:
    import torch

    from tiltflow.recorder import Drive
    from tiltflow.rundir import RunDirectory

FINE, FAILED, USAGE, MISSED = 0, 1, 2, 3
"""Exit codes: fine; failed; wrong usage; an expectation of the run file was missed."""

GROUPS = (
    "utilities", "divergences", "algorithms", "solvers", "models", "rewards", "kernels",
    "schedules",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors are one sentence on stderr."""
    options = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tiltflow",
        description="Adapt pre-trained flow and diffusion models at the level of their density.",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_directory_commands(commands)
    inspect = commands.add_parser("inspect", help="check a run file and estimate its cost")
    inspect.add_argument("file", type=Path, metavar="FILE.toml")
    _add_set(inspect)
    listing = commands.add_parser("list", help="what a run file can name")
    listing.add_argument("group", nargs="?", choices=GROUPS, metavar="GROUP",
                         help=f"one of {', '.join(GROUPS)}; default: all")  # fmt: skip
    for name, command in commands.choices.items():
        command.set_defaults(command=name)
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="assign",
                         help="override a key: --set solver.sampler.num_steps=80")  # fmt: skip
    _add_device(command)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="do what a run file says, or continue it")
    run.add_argument("file", type=Path, metavar="FILE.toml")
    run.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<name>")
    run.add_argument("--snapshot-seconds", type=float, default=10.0, metavar="S",
                     help="least time between two snapshots (default: 10)")  # fmt: skip
    _add_set(run)


def _add_directory_commands(commands: Any) -> None:
    sample = commands.add_parser("sample", help="draw samples of a finished run")
    sample.add_argument("directory", type=Path, metavar="DIR")
    sample.add_argument("-n", type=int, default=1000, metavar="N", help="how many (default: 1000)")
    sample.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    sample.add_argument("--model", choices=("tuned", "baseline", "pretrained"), default="tuned")
    sample.add_argument("--out", type=Path, metavar="FILE.safetensors",
                        help="default: DIR/samples/<model>_<N>_<seed>.safetensors")  # fmt: skip
    _add_device(sample)
    evaluate = commands.add_parser("evaluate", help="measure a finished run again")
    evaluate.add_argument("directory", type=Path, metavar="DIR")
    _add_device(evaluate)
    report = commands.add_parser("report", help="rewrite the report of a finished run")
    report.add_argument("directory", type=Path, metavar="DIR")
    report.add_argument("--picture", type=Path, metavar="FILE.png",
                        help="also save the worst samples before and after")  # fmt: skip


def _dispatch(options: argparse.Namespace) -> int:
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "run": _run, "sample": _sample, "evaluate": _evaluate, "report": _report,
        "inspect": _inspect, "list": _list,
    }  # fmt: skip
    return commands[options.command](options)


def _run(options: argparse.Namespace) -> int:
    from tiltflow.experiment import load, prepare
    from tiltflow.run import check, train
    from tiltflow.rundir import RunDirectory

    tree = load(options.file, options.assign)
    directory = RunDirectory(options.out or Path("runs") / str(tree.plain["name"]))
    device = _device(options)
    if directory.config.exists():  # before any work, and before a lock file is made
        directory.check_same(tree.plain)
        done = directory.read_json(directory.report)
        if done is not None:
            say(f"{directory.path} is finished already; rewriting its report.")
            return _finish(directory, done)
    plan = prepare(tree, device)
    check(plan)
    existed = directory.claim(tree.plain)
    lock = directory.lock()
    try:
        say(f"{'Continuing' if existed else 'Starting'} {directory.path}")
        bar = Bar()
        outcome = train(plan, directory, _drive(device, options.snapshot_seconds, bar))
        report = _measure(plan, outcome, directory, device, bar)
    finally:
        if lock is not None:
            lock.close()
    return _finish(directory, report)


def _measure(plan: Any, outcome: Any, directory: Any, device: Any, bar: Bar) -> dict[str, Any]:
    from tiltflow.results import evaluate

    report = evaluate(plan, outcome, directory, _drive(device, 10.0, bar))
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
    from tiltflow.adapters.checkpoint import save_tensors
    from tiltflow.errors import ConfigError
    from tiltflow.seed import Seed

    if options.n < 1:
        raise ConfigError(f"-n {options.n}: at least one sample.")
    plan, outcome, directory = _restored(options)
    models = {"pretrained": plan.pretrained.model, "tuned": outcome.tuned.model}
    if outcome.baseline is not None:
        models["baseline"] = outcome.baseline.model
    if options.model not in models:
        raise ConfigError(f"{directory.path} has no baseline.")
    seed = Seed(options.seed).child("sample")
    points = plan.experiment.evaluate.sampler.sample(models[options.model], options.n, seed=seed)
    name = f"{options.model}_{options.n}_{options.seed}.safetensors"
    path = options.out or directory.samples / name
    weights = points.new_full((options.n,), 1 / options.n)
    save_tensors(
        path, {"points": points, "weights": weights, "rewards": plan.reward.value(points)}
    )
    print(path)
    return FINE


def _evaluate(options: argparse.Namespace) -> int:
    plan, outcome, directory = _restored(options)
    lock = directory.lock()
    try:
        report = _measure(plan, outcome, directory, _device(options), Bar())
    finally:
        if lock is not None:
            lock.close()
    return _finish(directory, report)


def _restored(options: argparse.Namespace) -> tuple[Any, Any, RunDirectory]:
    from tiltflow.experiment import prepare, resolve
    from tiltflow.run import restore
    from tiltflow.rundir import RunDirectory

    directory = RunDirectory.existing(options.directory)
    plan = prepare(resolve(directory.read_config()), _device(options))
    return plan, restore(plan, directory), directory


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
    from tiltflow.experiment import load, prepare
    from tiltflow.inspection import describe

    tree = load(options.file, options.assign)
    print(describe(tree, prepare(tree, _device(options))))
    return FINE


def _list(options: argparse.Namespace) -> int:
    from tiltflow.registry import summary
    from tiltflow.signatures import choices

    for group in [options.group] if options.group else GROUPS:
        if not options.group:
            print(f"{group}:")
        for name, constructor in sorted(choices(group).items()):
            print(f"  {name:20} {summary(constructor)}")
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

"""The arguments of the command line. Only the standard library is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

GROUPS = (
    "utilities", "divergences", "algorithms", "solvers", "models", "rewards", "kernels",
    "schedules", "gates",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """All commands."""
    top = argparse.ArgumentParser(
        prog="tiltflow",
        description="Adapt pre-trained flow and diffusion models at the level of their density.",
    )
    top.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    return top


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
    sample.add_argument("--model", metavar="NAME",
                        help="tuned (default), baseline or pretrained; of a merge merged "
                        "(default), a model's name, or gate_0000, ...")  # fmt: skip
    sample.add_argument("--out", type=Path, metavar="FILE.safetensors",
                        help="default: DIR/samples/<model>_<N>_<seed>.safetensors; molecules are "
                        "also written as .xyz, .sdf and a gallery .html beside it")  # fmt: skip
    _add_device(sample)
    evaluate = commands.add_parser("evaluate", help="measure a finished run again")
    evaluate.add_argument("directory", type=Path, metavar="DIR")
    _add_device(evaluate)
    report = commands.add_parser("report", help="rewrite the report of a finished run")
    report.add_argument("directory", type=Path, metavar="DIR")
    report.add_argument("--picture", type=Path, metavar="FILE.png",
                        help="also save the worst samples before and after")  # fmt: skip

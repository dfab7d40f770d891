"""The command line of a paper's experiments: one name, seeds, and a page from all results."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from toys import ROOT, Store

Run = Callable[[Store, Sequence[int], bool], None]
"""(results, seeds, whether this is a smoke run): does what is not in the results yet."""


@dataclass(frozen=True)
class Commands:
    """``python experiments/PAPER.py NAME [--seeds N] [--quick]``.

    Args:
        paper: results are kept in runs/PAPER, seed by seed and method by method.
        description: first line of the help.
        runs: by name.
        write: the page, from the results by name, in a folder.
        seeds: of every training, by default.
    """

    paper: str
    description: str
    runs: Mapping[str, Run]
    write: Callable[[Mapping[str, Store], Path], None]
    seeds: int

    def __call__(self, arguments: Sequence[str]) -> None:
        """Run one experiment and write the page; a smoke run writes it beside its results."""
        parser = argparse.ArgumentParser(description=self.description)
        parser.add_argument("name", choices=[*self.runs, "page"])
        parser.add_argument(
            "--seeds", type=int, default=self.seeds, help="seeds 0, 1, ... of every training"
        )
        parser.add_argument(
            "--quick", action="store_true", help="a smoke run: meaningless numbers"
        )
        parser.add_argument("--out", type=Path, help=f"default: runs/{self.paper}")
        given = parser.parse_args(arguments)
        out = given.out or ROOT / "runs" / (self.paper + ("-quick" if given.quick else ""))
        torch.set_num_threads(1)
        if given.name != "page":
            run = self.runs[given.name]
            run(Store(out / f"{given.name}.json"), range(given.seeds), given.quick)
        stores = {name: Store(out / f"{name}.json") for name in self.runs}
        self.write(stores, out / "docs" if given.quick else ROOT / "docs")

"""The experiments of Tail-aware Flow Fine-Tuning, each with one command.

    python experiments/tfft.py NAME [--seeds 3] [--quick]

with NAME one of cost, densities, frontier, starvation, digits, solvers; or page.

Every experiment has exact optima beside it where there are any (on a grid), trains all methods for
all seeds, and writes docs/tfft.md anew from all results there are. Results are kept in
runs/tfft/*.json, seed by seed and method by method: a killed command goes on where it was, and
``page`` only writes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import tfft_digits
import tfft_hard
import tfft_page
import tfft_plane
import tfft_solvers
import torch
from toys import ROOT, Store

RUNS = {
    "densities": tfft_plane.densities,
    "frontier": tfft_plane.frontier,
    "cost": tfft_plane.cost,
    "starvation": tfft_hard.starvation,
    "digits": tfft_digits.digits,
    "solvers": tfft_solvers.solvers,
}
NAMES = tuple(RUNS)


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    name: str
    seeds: tuple[int, ...]
    quick: bool
    out: Path

    def store(self, name: str) -> Store:
        """The results of an experiment."""
        return Store(self.out / f"{name}.json")


def parsed(arguments: list[str] | None = None) -> Arguments:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=[*NAMES, "page"])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of every training")
    parser.add_argument("--quick", action="store_true", help="a smoke run: meaningless numbers")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/tfft")
    given = parser.parse_args(arguments)
    out = given.out or ROOT / "runs" / ("tfft-quick" if given.quick else "tfft")
    return Arguments(given.name, tuple(range(given.seeds)), given.quick, out)


def main(arguments: list[str] | None = None) -> None:
    """Run one experiment and write the page, except after a smoke run."""
    given = parsed(arguments)
    torch.set_num_threads(1)
    if given.name != "page":
        RUNS[given.name](given.store(given.name), given.seeds, given.quick)
    stores = {name: given.store(name) for name in NAMES}
    tfft_page.write(stores, given.out / "docs" if given.quick else ROOT / "docs")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The five experiments in the plane of Flow Density Control, each with one command.

    python experiments/fdc.py NAME [--seeds 5] [--quick]

with NAME one of risk, novelty, wasserstein, exploration, ablation; or page.

Every experiment reads its run file here (fdc_*.toml), solves its problem exactly on a grid, trains
all methods for all seeds, and writes docs/fdc.md anew from all results there are. Results are kept
in runs/fdc/*.json, seed by seed and method by method: a killed command goes on where it was, and
``page`` only writes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import fdc_others
import fdc_page
import fdc_runs
import torch
from toys import ROOT, Store

RUNS = {
    "risk": fdc_runs.RISK.run,
    "novelty": fdc_runs.NOVELTY.run,
    "wasserstein": fdc_others.wasserstein,
    "exploration": fdc_others.exploration,
    "ablation": fdc_others.ablation,
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
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... of every training")
    parser.add_argument("--quick", action="store_true", help="a smoke run: meaningless numbers")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/fdc")
    given = parser.parse_args(arguments)
    out = given.out or ROOT / "runs" / ("fdc-quick" if given.quick else "fdc")
    return Arguments(given.name, tuple(range(given.seeds)), given.quick, out)


def main(arguments: list[str] | None = None) -> None:
    """Run one experiment and write the page, except after a smoke run."""
    given = parsed(arguments)
    torch.set_num_threads(1)
    if given.name != "page":
        RUNS[given.name](given.store(given.name), given.seeds, given.quick)
    stores = {name: given.store(name) for name in NAMES}
    home = given.out / "docs" if given.quick else ROOT / "docs"
    fdc_page.write(stores, home)


if __name__ == "__main__":
    main(sys.argv[1:])

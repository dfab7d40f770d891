"""All benchmarks: ``python benchmarks/run.py [--quick] [--only ring hard ...]``.

One thread; process CPU-seconds; each page of docs/benchmarks is printed and written. The page
"utilities" takes most of an hour and "planning" ten minutes; both keep what they have measured in
benchmarks/.cache and go on from there (results of other settings are not used; remove the file of
a page to measure anew, after a change of the library).
"""

from __future__ import annotations

import argparse
import importlib

import torch
from common import Settings

PAGES = (
    "ring", "hard", "discretisation", "ratios", "transport", "solvers", "pairs", "modes",
    "planning", "utilities", "xtb",
)  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PAGES, default=PAGES, help="which pages")
    parser.add_argument("--quick", action="store_true", help="a smoke run that writes nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        settings = Settings(seeds=(0,), samples=500, quick=True)
    else:
        settings = Settings(seeds=tuple(arguments.seeds))
    for name in arguments.only:
        importlib.import_module(name).main(settings)


if __name__ == "__main__":
    main()

"""The report's part about molecules: how good they are, and what they look like."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tiltflow.gallery import cards, grid, legend, metrics_table
from tiltflow.html_page import section
from tiltflow.molecules import Layout, Molecules
from tiltflow.rundir import RunDirectory
from tiltflow.sample_files import read_molecules

PAIRS, TAIL = 8, 6
"""How many samples are shown of the same noise, and of the worst and the best of each model."""


def read_all(
    directory: RunDirectory, data: Mapping[str, Any], files: Mapping[str, str]
) -> dict[str, Molecules]:
    """The kept molecules of each model; none where samples are something else.

    Args:
        directory: of the run.
        data: the report, which has their layout as a table.
        files: of each model, the name of its samples.
    """
    table = data.get("layout")
    if not table:
        return {}
    layout = Layout(**{**table, "elements": tuple(table["elements"])})
    return {
        name: read_molecules(directory.samples / f"{file}.safetensors", layout)
        for name, file in files.items()
    }


def molecules_sections(
    data: Mapping[str, Any],
    molecules: Mapping[str, Molecules],
    rewards: Mapping[str, Tensor],
    titles: Mapping[str, str],
) -> str:
    """Metrics of all models together, samples from the same noise, the worst and the best.

    Args:
        data: the report.
        molecules: kept, of each model.
        rewards: of each model, of all samples.
        titles: what the models are called.
    """
    names = {m: titles[m] for m in molecules}
    told = metrics_table(data["numbers"], names, data.get("molecule_note"))
    failed = [f"{html.escape(why)}: {n}" for why, n in data.get("xtb_failures", {}).items()]
    told += f'<p class="soft">xTB failed, in all: {", ".join(failed)}.</p>' if failed else ""
    tails = "".join(
        f"<h3>{names[m]}</h3>{_tails(each, rewards[m])}" for m, each in molecules.items()
    )
    return (
        section("Molecules", told)
        + section("Molecules from the same noise", legend(),
                  _pairs(molecules, rewards, names))
        + section("The worst and the best molecules", tails)
    )  # fmt: skip


def _pairs(
    molecules: Mapping[str, Molecules], rewards: Mapping[str, Tensor], names: Mapping[str, str]
) -> str:
    """A column for each model, a row for each noise: the first samples, not picked."""
    count = min(PAIRS, *(len(each) for each in molecules.values()))
    columns = [cards(each.chosen(range(count)), rewards[m]) for m, each in molecules.items()]
    head = "".join(f"<th>{names[m]}</th>" for m in molecules)
    rows = "".join(
        f"<tr>{''.join(f'<td>{column[i]}</td>' for column in columns)}</tr>" for i in range(count)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>{rows}</table></div>'


def _tails(molecules: Molecules, rewards: Tensor) -> str:
    order = rewards[: len(molecules)].argsort()
    count = min(TAIL, max(1, len(order) // 2))
    worst, best = order[:count], order.flip(0)[:count]
    return "".join(
        f'<p class="soft">{told}</p>{grid(cards(molecules.chosen(i), rewards[i]))}'
        for told, i in (("Lowest rewards", worst), ("Highest rewards", best))
    )

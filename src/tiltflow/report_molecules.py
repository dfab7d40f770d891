"""The report's part about molecules: how good they are, and what they look like."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tiltflow.gallery import cards, chosen, grid, legend, metrics_table
from tiltflow.html_page import section
from tiltflow.molecules import Layout, Molecules
from tiltflow.rundir import RunDirectory
from tiltflow.sample_files import read_molecules

PAIRS, TAIL = 8, 6
"""How many samples are shown of the same noise, and of the worst and the best of each model."""


def read_all(directory: RunDirectory, data: Mapping[str, Any]) -> dict[str, Molecules]:
    """The kept molecules of each model; none where samples are something else."""
    if not data.get("layout"):
        return {}
    layout = layout_of(data["layout"])
    names = data["numbers"]
    return {n: read_molecules(directory.samples / f"{n}.safetensors", layout) for n in names}


def layout_of(table: Mapping[str, Any]) -> Layout:
    """The layout that ``report.json`` has as a table."""
    return Layout(**{**table, "elements": tuple(table["elements"])})


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
    if not molecules:
        return ""
    names = {m: titles[m] for m in molecules}
    told = metrics_table(data["numbers"], names, data.get("molecule_note"))
    failed = [f"{html.escape(why)}: {n}" for why, n in data.get("xtb_failures", {}).items()]
    told += f'<p class="soft">xTB failed, in all: {", ".join(failed)}.</p>' if failed else ""
    tails = "".join(
        f"<h3>{names[m]}</h3>{_tails(each, rewards[m])}" for m, each in molecules.items()
    )
    return (
        section("Molecules", told)
        + section("Molecules from the same noise", legend(molecules["pretrained"]),
                  _pairs(molecules, rewards, names))
        + section("The worst and the best molecules", tails)
    )  # fmt: skip


def _pairs(
    molecules: Mapping[str, Molecules], rewards: Mapping[str, Tensor], names: Mapping[str, str]
) -> str:
    """A column for each model, a row for each noise: the first samples, not picked."""
    count = min(PAIRS, *(len(each) for each in molecules.values()))
    columns = [cards(chosen(each, range(count)), rewards[m]) for m, each in molecules.items()]
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
        f'<p class="soft">{told}</p>{grid(cards(chosen(molecules, i), rewards[i]))}'
        for told, i in (("Lowest rewards", worst), ("Highest rewards", best))
    )

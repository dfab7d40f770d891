"""Molecules in an HTML page: cards with pictures, and a table of how good they are together."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tiltflow.bonds import (
    RDKIT,
    connected,
    has_rdkit,
    perceived_where_known,
    smiles,
    stable_atoms,
)
from tiltflow.html_page import number, page, section, table
from tiltflow.molecule_pictures import balls_and_sticks, drawing
from tiltflow.molecules import Molecules, formula
from tiltflow.recorder import plain_json
from tiltflow.types import Estimate

ROWS = (
    ("stable atoms", "atom_stability", "bonds add up to the valency; share of all atoms"),
    ("stable molecules", "molecule_stability", "all of whose atoms are; share of all"),
    ("valid", "valid", "RDKit accepts the bonds, missing hydrogens implied; share of all"),
    ("valid and in one piece", "valid_connected", "share of all"),
    ("unique", "unique", "distinct SMILES, share of the valid; falls with their number"),
    ("different ones, Vendi", "vendi", "effective number among the valid, at most 1000 compared"),
    ("atoms", "atoms", "mean number"),
    ("xTB fails", "xtb_failed", "share of all"),
    ("formation energy, Hartree per atom", "formation_energy_per_atom",
     "from free atoms, of those that do not fail; lower is more stable"),
)  # fmt: skip
"""Name, metric of ``metrics.molecule_report``, what it means."""

SHOWN = 48
"""Molecules of a gallery, at most."""

LEGEND = (
    "Left: the sample as it is, with the bonds that its distances say (EDM's rule); a dashed ring "
    "marks an atom whose bonds do not add up to its valency. Right: RDKit's drawing of these "
    "bonds, which implies missing hydrogens; none where the molecule is invalid. "
)


def metrics_table(
    numbers: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], note: str | None
) -> str:
    """Everything about the molecules of several models together.

    Args:
        numbers: of each model, estimates as plain data, ``molecules.*`` among them.
        names: of the models, for people.
        note: why there are no numbers, or nothing.
    """
    rows = [
        ("", [f"{label}<br><small style='white-space:normal'>{meaning}</small>",
              *(number(numbers[m].get(f"molecules.{key}")) for m in names)])
        for label, key, meaning in ROWS
        if any(f"molecules.{key}" in numbers[m] for m in names)
    ]  # fmt: skip
    told = f'<div class="box">No metrics: {html.escape(note)}</div>' if note else ""
    if not rows:
        return told
    caption = "Read them together: each of them is easily raised at the cost of the others."
    head = ["", *(html.escape(t) for t in names.values())]
    return told + table(head, rows, caption) + _by_size(numbers, names, head)


def _by_size(
    numbers: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], head: Sequence[str]
) -> str:
    """Formation energies of each number of atoms, folded; nothing where there are none."""
    key = "molecules.formation_energy_per_atom["
    sizes = {int(k[len(key) : -1]) for m in names for k in numbers[m] if k.startswith(key)}
    rows = [
        ("", [f"{n} atoms", *(number(numbers[m].get(f"{key}{n}]")) for m in names)])
        for n in sorted(sizes)
    ]
    told = "Formation energies by number of atoms, Hartree per atom"
    return f"<details><summary>{told}</summary>{table(head, rows)}</details>" if rows else ""


def cards(molecules: Molecules, rewards: Tensor | None = None) -> list[str]:
    """A card for each molecule: picture, drawing, formula, reward, and what is wrong with it."""
    found = perceived_where_known(molecules)
    out = []
    for i, (picture, (molecule, why)) in enumerate(
        zip(balls_and_sticks(molecules), found, strict=True)
    ):
        drawn = drawing(molecule) or ""
        poor, state = _state(molecules, i, molecule, why)
        name = re.sub(r"(\d+)", r"<sub>\1</sub>", formula(molecules[i][0].tolist()))
        words = [f"<b>{name or 'empty'}</b>", state]
        if rewards is not None:
            words.insert(1, f"reward {float(rewards[i]):.4g}")
        hint = html.escape(smiles(molecule) or "", quote=True)
        out.append(
            f'<figure class="molecule{" poor" if poor else ""}" title="{hint}">{picture}{drawn}'
            f"<figcaption>{' · '.join(words)}</figcaption></figure>"
        )
    return out


def _state(molecules: Molecules, i: int, molecule: Any | None, why: str) -> tuple[bool, str]:
    """Whether something is wrong with a molecule, and what."""
    if molecule is None:
        return why == "invalid", why
    if not connected(molecule):
        from rdkit import Chem

        return True, f"{len(Chem.GetMolFrags(molecule))} pieces"
    alone = molecules.chosen([i])
    off = int((~stable_atoms(alone) & alone.mask).sum())
    return False, "stable" if off == 0 else f"valid, {off} atom{'s' if off > 1 else ''} off"


def legend() -> str:
    """What cards show."""
    missing = f"<b>{RDKIT}</b> Without it there are no drawings."
    return f'<p class="soft">{LEGEND}{"" if has_rdkit() else missing}</p>'


def grid(every: Sequence[str]) -> str:
    """Cards side by side."""
    return f'<div class="cards">{"".join(every)}</div>'


def gallery_page(
    title: str,
    molecules: Molecules,
    rewards: Tensor | None,
    numbers: Mapping[str, Estimate],
    note: str = "",
) -> str:
    """A page about one batch: its metrics, and its first molecules.

    Args:
        title: of the page.
        molecules: B of them.
        rewards: (B,), or ``None``.
        numbers: ``molecules.*`` of them.
        note: why there are no numbers.
    """
    first = molecules.chosen(range(min(SHOWN, len(molecules))))
    told = metrics_table({"all": plain_json(numbers)}, {"all": f"{len(molecules)} samples"}, note)
    shown = f"The first {len(first)} of {len(molecules)}"
    if rewards is not None:
        mean = Estimate.of(rewards)
        told = f"<p>Mean reward {number(plain_json(mean))}.</p>{told}"
    body = section(shown, legend(), grid(cards(first, rewards)))
    return page(title, [f"<h1>{html.escape(title)}</h1>", section("Together", told), body])

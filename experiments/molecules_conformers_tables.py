"""The section on conformers of the page of ``molecules.py``, from results only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from molecules_conformers_judge import Property, errors
from tfft_tables import said
from toys import Record, Store, of_seeds, table

ROWS = {
    "part/a": "a, of MMFF94", "part/b": "b, of UFF", "merged/balanced": "B: a & b",
    "merged/unbalanced": "UB: 0.75\\*a & 0.25\\*b", "merged/guided": "RG: (a & b)[reward]",
    "merged/union": "UNION: a \\| b", "particles/balanced": "B by `FeynmanKac`, nothing trained",
    "particles/guided": "RG by `FeynmanKac`, nothing trained",
    "exact/a": "exact a", "exact/b": "exact b", "exact/balanced": "exact B",
    "exact/unbalanced": "exact UB", "exact/guided": "exact RG", "exact/union": "exact UNION",
}  # fmt: skip

ERRORS = {"energy": "energy", "dipole": "dipole", "gap": "gap", "lowest": "lowest energy"}

PUBLISHED = 0.3193
"""Energy error of RFM on the first molecule, in kcal/mol; the only number that was found."""

SETUP = """\
Two flows of conformers of the same three molecules, {smiles},
as two groups might have trained them: a on the Boltzmann law of the force field MMFF94 at 600 K, b
on that of UFF, {data} conformers of each molecule by Monte Carlo. Neither field is the reference,
GFN2-xTB. One network (`adapters.conformers`, harmonic prior, width {hidden}, {blocks} blocks,
{updates} updates of {batch} conformers) serves all three molecules; merging is done molecule by
molecule.

Merging two such models means something: exp(-E_a / kT)^w exp(-E_b / kT)^(1 - w) is the Boltzmann
law of the averaged force field w E_a + (1 - w) E_b. So an intersection keeps what both fields
find likely, and *what it should give is known*, by the same Monte Carlo: the rows "exact". The
union is either's conformers. The reward of RG is -E / kT at 600 K by GFN2-xTB, after MMFF94 has
relaxed the sample (strain would decide everything otherwise), with A = 1.

Intersections are lowered by `particles` ({bank} of them, {fit} updates), unions are distilled
({bank} samples); all start from a. All sampling is by {steps} `Ancestral` steps of the SDE: the
default kernel puts as much noise into bonds as into torsions, which strains molecules. {fresh}
samples of each model."""

PROTOCOL = """\
**Ensembles.** {relax} generated conformers of each molecule are relaxed by GFN2-xTB (L-BFGS to
0.0003 Hartree per Angstrom); those that keep their bonds are told apart by energy and dipole (0.1
kcal/mol, 0.1 Debye), each counts once, and energy, dipole moment and HOMO-LUMO gap are averaged
with exp(-E / kT), kT = 0.592 kcal/mol. References are the distinct minima that are reached from
{embed} ETKDG conformers. Errors are |generated - reference|, the median over the molecules, in
kcal/mol and Debye; *found* is the share of the references within 3 kcal/mol of the lowest, and
*mean* the plain mean energy of the relaxed conformers above the lowest reference. The rows
"exact" are perfect models with as many conformers: what is not larger is noise. (The published
protocol takes twice as many conformers as references, at most 32, counts repeated ones
repeatedly, and has 1000 molecules.) {spread}"""

SPREAD = (
    "± is the standard error over {seeds} seeds of merging and sampling, with the same a and b."
)

LAWS = """\
**Laws.** Of samples as they are: bonds kept (distances below 1.3 times the sum of covalent radii,
and no others); strain, the median GFN2-xTB energy above that of exact samples, in kcal/mol; and
the total variation between the shares of rotamers (each torsion in three classes, 9 or 27 of
them) and those of the exact gate: of the merged model, of the better of its parts, and of as
many exact samples, which is noise. Means over the molecules. The networks are small: they learn
shapes better than shares of rotamers (rows a and b). Where a row is not below that of the better
part, merging has not brought the rotamers closer to the exact gate; fitting a network to the
particles takes back part of what these have (rows `FeynmanKac`)."""


def section(store: Store) -> str:
    """The section in Markdown; empty where nothing was run."""
    seeds = len(of_seeds(store, "merged/balanced"))
    if not seeds or not of_seeds(store, "exact/balanced"):
        return ""
    names = ", ".join(f"`{s}`" for s in _smiles(store))
    spread = SPREAD.format(seeds=seeds) if seeds > 1 else "One seed."
    numbers = store.known["sizes"]["result"] | {"spread": spread, "smiles": names}
    return "\n".join([
        "## Conformers: what two flows agree on", "", SETUP.format(**numbers), "",
        PROTOCOL.format(**numbers), "", *_ensembles(store), *_molecules(store),
        LAWS, "", *_laws(store), *_costs(store), "",
    ])  # fmt: skip


def _smiles(store: Store) -> list[str]:
    return list(of_seeds(store, "exact/balanced")[0])


def _ensembles(store: Store) -> list[str]:
    rows = []
    for key, label in ROWS.items():
        found = [over_molecules(r) for r in records(store, key)]
        if found:
            told = [said(found, error, 2) for error in ERRORS]
            share = said(found, "coverage", 0, 100) + " %"
            rows.append([label, *told, share, said(found, "mean", 2)])
    return table(["", *ERRORS.values(), "found", "mean"], rows)


def records(store: Store, key: str) -> list[Record]:
    """Of all seeds, with errors against the references; not finite, where nothing was found."""
    known = {
        s: [Property(**p) for p in store.known[f"references/{s}"]["result"]]
        for s in _smiles(store)
    }
    nothing = dict.fromkeys([*ERRORS, "mean"], math.inf)
    return [
        {
            s: each | nothing | errors([Property(*p) for p in each["found"]], known[s])
            for s, each in record.items()
        }
        for record in of_seeds(store, key)
    ]


def over_molecules(record: Record) -> Record:
    """Medians of errors, and means of the rest, over the molecules."""
    each = list(record.values())
    medians = {e: statistics.median(r[e] for r in each) for e in ERRORS}
    return medians | {k: statistics.fmean(r[k] for r in each) for k in ("coverage", "mean")}


def _molecules(store: Store) -> list[str]:
    rows, smiles = [], _smiles(store)
    for key, label in ROWS.items():
        found = records(store, key)
        if found:
            rows.append([label, *(said([r[s] for r in found], "energy", 2) for s in smiles)])
    said_of = (
        f"Energy errors by molecule, in kcal/mol. For `{smiles[0]}` {PUBLISHED} was reported of "
        "merged ETFlow models, which know all of QM9; ours are small models of these molecules."
    )
    return [said_of, "", *table(["", *(f"`{s}`" for s in smiles)], rows)]


def _laws(store: Store) -> list[str]:
    rows = []
    for gate in ("a", "b", "balanced", "unbalanced", "guided", "union"):
        key = f"part/{gate}" if gate in "ab" else f"merged/{gate}"
        (exact,) = of_seeds(store, f"exact/{gate}")
        for each in (key, f"particles/{gate}"):
            found = [_compared(r, exact) for r in of_seeds(store, each)]
            if found:
                rows.append([
                    ROWS[each], said(found, "kept", 1, 100) + " %", said(found, "strain", 1),
                    said(found, "rotamers", 3), "" if gate in "ab" else _nearest(store, exact),
                    f"{statistics.fmean(r['rotamers'] for r in exact.values()):.3f}",
                ])  # fmt: skip
    return table(
        ["", "bonds kept", "strain", "TV to exact", "of the better part", "of exact samples"], rows
    )


def _compared(record: Record, exact: Record) -> Record:
    """Means over the molecules."""
    strain = statistics.fmean(r["middle"] - exact[s]["middle"] for s, r in record.items())
    means = {k: statistics.fmean(r[k] for r in record.values()) for k in ("kept", "rotamers")}
    return means | {"strain": strain}


def _nearest(store: Store, exact: Record) -> str:
    """Total variation of the part that is closer to a gate's law."""
    far = {}
    for name in ("a", "b"):
        parts = of_seeds(store, f"part/{name}")
        each = [variation(p[s]["shares"], exact[s]["law"]) for p in parts for s in exact]
        far[name] = statistics.fmean(each)
    best = min(far, key=lambda name: far[name])
    return f"{far[best]:.3f} ({best})"


def variation(p: Sequence[float], q: Sequence[float]) -> float:
    """Total variation of two laws on the same classes."""
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def _costs(store: Store) -> list[str]:
    merged = of_seeds(store, "merged/balanced")
    stats = [r[s]["stats"] for r in merged for s in r]
    guided = [r[s]["stats"] for r in of_seeds(store, "merged/guided") for s in r]
    cpu = statistics.fmean(sum(each["cpu"] for each in r.values()) for r in merged)
    sizes = store.known["sizes"]["result"]
    parts = [store.known[f"trained/{n}/0"]["result"]["cpu"] for n in "ab"]
    return [
        f"-log of the overlap of a and b, by particles: "
        f"{statistics.fmean(s['apart'] for s in stats):.1f} nats on average; of {sizes['bank']} "
        f"particles, {statistics.fmean(s['ancestors'] for s in stats):.0f} effective ancestors "
        f"are left, with the reward {statistics.fmean(s['ancestors'] for s in guided):.0f}. "
        f"CPU-seconds: {parts[0]:.0f} and {parts[1]:.0f} for a and b with their data, {cpu:.0f} "
        "for merging all molecules once. This is the "
        + (
            "full setting."
            if sizes["device"] == "cuda"
            else "small setting; the full one, "
            "`molecules_conformers_models.FULL`, runs where there is a GPU and has not been run."
        )
    ]


__all__ = ["section", "variation"]

"""Bonds of a molecule, read from distances by the rule of EDM; valency, SMILES and RDKit."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tiltflow.errors import CapabilityError, UnsupportedError
from tiltflow.molecules import SYMBOLS, Molecules

VALENCIES = {1: 1, 6: 4, 7: 3, 8: 2, 9: 1}
"""Allowed sum of bond orders of an element, by atomic number."""

LENGTHS: tuple[dict[tuple[int, int], int], ...] = (
    {
        (1, 1): 74, (1, 6): 109, (1, 7): 101, (1, 8): 96, (1, 9): 92, (6, 6): 154, (6, 7): 147,
        (6, 8): 143, (6, 9): 135, (7, 7): 145, (7, 8): 140, (7, 9): 136, (8, 8): 148,
        (8, 9): 142, (9, 9): 142,
    },
    {(6, 6): 134, (6, 7): 129, (6, 8): 120, (7, 7): 125, (7, 8): 121, (8, 8): 121},
    {(6, 6): 120, (6, 7): 116, (6, 8): 113, (7, 7): 110},
)  # fmt: skip
"""Typical lengths of single, double and triple bonds in pm, by atomic numbers in order: the
tables of the stability metric of EDM (Hoogeboom et al., 2022, appendix E)."""

MARGINS = (10, 5, 3)
"""In pm: a bond may be so much longer than its typical length."""

NEVER = -1e3
"""Angstrom: the reach of a bond that there is not; finite, so that one can calculate with it."""

NEARLY_ZERO = 1e-6
"""Angstrom: two atoms in one place have no direction, and no NaN either."""

RDKIT = "RDKit is needed for this: pip install 'tiltflow[molecules]'."


def reach(elements: Sequence[int]) -> Tensor:
    """Below which distance a bond of order 1, 2 and 3 is seen, (3, E, E), in Angstrom.

    Args:
        elements: atomic numbers, E of them.

    Raises:
        UnsupportedError: for an element without a table: all but H, C, N, O and F.
    """
    require_tables(elements)
    out = torch.full((3, len(elements), len(elements)), NEVER, dtype=torch.float64)
    for order, (table, margin) in enumerate(zip(LENGTHS, MARGINS, strict=True)):
        for i, a in enumerate(elements):
            for j, b in enumerate(elements):
                length = table.get((min(a, b), max(a, b)))
                if length is not None:
                    out[order, i, j] = (length + margin) / 100
    return out


def require_tables(elements: Sequence[int]) -> None:
    """Raise ``UnsupportedError`` for elements whose bond lengths and valency are not known."""
    unknown = [z for z in elements if z not in VALENCIES]
    if unknown:
        raise UnsupportedError(
            f"Bond lengths and valencies are known of {', '.join(SYMBOLS[z] for z in VALENCIES)}, "
            f"not of element {unknown[0]}. Leave molecules with other elements out."
        )


def distances(positions: Tensor) -> Tensor:
    """Of all atoms, (B, N, 3) -> (B, N, N), with a gradient even where two are in one place."""
    offset = positions[:, :, None] - positions[:, None]
    return (offset.square().sum(-1) + NEARLY_ZERO**2).sqrt()


def bond_orders(molecules: Molecules) -> Tensor:
    """Orders of the bonds, (B, N, N) of int64, 0 for none, by EDM's rule::

        order = [d < single + 10 pm] + [d < double + 5 pm] + [d < triple + 3 pm]

    with the lengths of the pair of elements where there is such a bond. Padding has no bonds.

    Raises:
        UnsupportedError: for elements other than H, C, N, O and F.
    """
    elements, index = _columns(molecules)
    positions = molecules.positions.double()
    d = (positions[:, :, None] - positions[:, None]).norm(dim=-1)
    limits = reach(elements).to(d.device)[:, index[:, :, None], index[:, None]]
    orders: Tensor = (d < limits).sum(0) * molecules.pairs
    return orders


def _columns(molecules: Molecules) -> tuple[list[int], Tensor]:
    """The elements that occur, and which of them each atom is, (B, N); padding is the first."""
    elements = sorted({z for z in molecules.numbers.flatten().tolist() if z > 0})
    require_tables(elements)
    table = torch.zeros(max(elements, default=0) + 1, dtype=torch.long)
    table[elements] = torch.arange(len(elements))
    return elements or [1], table.to(molecules.numbers.device)[molecules.numbers.long()]


def stable_atoms(molecules: Molecules) -> Tensor:
    """Which atoms have the right sum of bond orders, (B, N) of bool; padding has not.

    Raises:
        UnsupportedError: for elements other than H, C, N, O and F.
    """
    valencies = torch.zeros(max(VALENCIES) + 1, dtype=torch.long)
    valencies[list(VALENCIES)] = torch.tensor(list(VALENCIES.values()))
    found = bond_orders(molecules).sum(-1)
    due = valencies.to(found.device)[molecules.numbers.long()]
    return (found == due) & molecules.mask


def has_rdkit() -> bool:
    """Whether RDKit is installed."""
    return importlib.util.find_spec("rdkit") is not None


def require_rdkit() -> None:
    """Raise ``CapabilityError`` where RDKit is not installed."""
    if not has_rdkit():
        raise CapabilityError(RDKIT)


def perceived(molecules: Molecules) -> list[Any | None]:
    """RDKit's molecule of each, with the bonds of ``bond_orders``; ``None`` where invalid.

    Valid means that RDKit sanitises it: no atom has more bonds than it can have. Hydrogens that
    are missing are implied, and there may be several fragments, as in EDM's metric. A molecule
    without atoms or with positions that are not finite is invalid.

    Raises:
        CapabilityError: if RDKit is not installed.
        UnsupportedError: for elements other than H, C, N, O and F.
    """
    require_rdkit()
    from rdkit import rdBase

    orders = bond_orders(molecules).cpu()
    finite = molecules.positions.isfinite().all(-1) | ~molecules.mask
    usable = (finite.all(1) & molecules.mask.any(1)).tolist()
    with rdBase.BlockLogs():
        return [
            _sanitised(*molecules[i], _among(orders[i], molecules.mask[i].cpu()))
            if usable[i]
            else None
            for i in range(len(molecules))
        ]


def perceived_where_known(molecules: Molecules) -> list[tuple[Any | None, str]]:
    """``perceived``, but for batches of which some molecules, or all, cannot be looked at.

    Returns:
        RDKit's molecule of each and "", or ``None`` and why: "invalid", "element without known
        bond lengths", "RDKit is not installed".
    """
    if not has_rdkit():
        return [(None, "RDKit is not installed")] * len(molecules)
    strange = ~torch.isin(molecules.numbers, torch.tensor([0, *VALENCIES]).to(molecules.numbers))
    known = ~strange.any(1)
    why = ["invalid" if fine else "element without known bond lengths" for fine in known.tolist()]
    found = iter(perceived(molecules.chosen(known.nonzero()[:, 0])))
    each = [next(found) if fine else None for fine in known.tolist()]
    return [(m, reason if m is None else "") for m, reason in zip(each, why, strict=True)]


def _among(orders: Tensor, atoms: Tensor) -> Tensor:
    return orders[atoms][:, atoms]


def _sanitised(numbers: Tensor, positions: Tensor, orders: Tensor) -> Any | None:
    """From atoms (n,), (n, 3) and the orders of their bonds, (n, n)."""
    from rdkit import Chem

    kinds = Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE
    editable, places = Chem.RWMol(), Chem.Conformer(len(numbers))
    for i, (z, x) in enumerate(zip(numbers.tolist(), positions.tolist(), strict=True)):
        editable.AddAtom(Chem.Atom(z))
        places.SetAtomPosition(i, x)
    for i, j in orders.triu(1).nonzero().tolist():
        editable.AddBond(i, j, kinds[int(orders[i, j]) - 1])
    molecule = editable.GetMol()
    molecule.AddConformer(places)
    try:
        Chem.SanitizeMol(molecule)
    except ValueError:  # what RDKit's exceptions of this kind are
        return None
    return molecule


def connected(molecule: Any | None) -> bool:
    """Whether an RDKit molecule is one piece; not, where it is invalid."""
    if molecule is None:
        return False
    from rdkit import Chem

    return len(Chem.GetMolFrags(molecule)) == 1


def smiles(molecule: Any | None) -> str | None:
    """Canonical SMILES of an RDKit molecule without explicit hydrogens, of all fragments.

    ``None`` for an invalid molecule, and where RDKit cannot read back what it has written.
    """
    if molecule is None:
        return None
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        read = Chem.MolFromSmiles(Chem.MolToSmiles(molecule))
        return None if read is None else str(Chem.MolToSmiles(read))


__all__ = [
    "LENGTHS",
    "MARGINS",
    "RDKIT",
    "VALENCIES",
    "bond_orders",
    "connected",
    "distances",
    "has_rdkit",
    "perceived",
    "perceived_where_known",
    "reach",
    "require_rdkit",
    "require_tables",
    "smiles",
    "stable_atoms",
]

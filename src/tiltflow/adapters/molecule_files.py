"""Molecules as files that other programs read: XYZ and SDF (V2000), in Angstrom.

What cannot be written is left out and counted: a batch never dies for one molecule. Every record
says which molecule of the batch it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tiltflow.adapters.checkpoint import write_atomic
from tiltflow.bonds import perceived_where_known
from tiltflow.errors import ConfigError
from tiltflow.molecules import SYMBOLS, Molecules

Properties = Mapping[str, Sequence[Any] | Tensor]
"""By name, one value per molecule; put units into the names."""

FARTHEST = 9999.0
"""Angstrom: what the columns of an SDF have room for."""

MOST_ATOMS = 999
"""In a record of SDF V2000."""

END = "$$$$"
"""Of a record of SDF, on a line of its own."""

NUMBERS = {symbol: z for z, symbol in enumerate(SYMBOLS) if z > 0}
"""Atomic numbers by symbol."""


@final
@dataclass(frozen=True)
class Written:
    """What became of a batch.

    Attributes:
        path: the file.
        count: records in it.
        left_out: molecules that are not in it, by reason.
        without_bonds: records without bonds, by reason (SDF only).
    """

    path: Path
    count: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    without_bonds: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [f"{n} left out ({why})" for why, n in self.left_out.items()]
        told += [f"{n} without bonds ({why})" for why, n in self.without_bonds.items()]
        return f"{self.path}: {'; '.join([f'{self.count} molecules', *told])}"


def write_xyz(
    molecules: Molecules, path: str | Path, properties: Properties | None = None
) -> Written:
    """One XYZ file with all molecules, positions in Angstrom.

    The comment line of each has ``index=`` and the properties as ``name=value``. Molecules without
    atoms or with positions that are not finite are left out.

    Args:
        molecules: B of them.
        path: of the file, which is replaced.
        properties: one value per molecule each, e.g. ``{"energy_hartree": energies}``.

    Raises:
        ConfigError: for properties of another length.
        CheckpointError: if the file cannot be written.
    """
    rows, left_out, records = _rows(molecules, properties), Counter[str](), []
    for i in range(len(molecules)):
        reason = _unwritable(*molecules[i])
        if reason:
            left_out[reason] += 1
            continue
        words = [f"{name.replace(' ', '_')}={_quoted(text)}" for name, text in rows[i].items()]
        records.append(molecules.xyz(i, " ".join([f"index={i}", *words])))
    write_atomic(Path(path), "".join(records).encode())
    return Written(Path(path), len(records), dict(left_out))


def write_sdf(
    molecules: Molecules, path: str | Path, properties: Properties | None = None
) -> Written:
    """One SDF file (V2000) with all molecules, positions in Angstrom.

    Bonds are those of ``bonds.perceived``. Where there are none to be had (RDKit is missing, the
    molecule is invalid, or the lengths of its bonds are not known) a record has atoms only, and
    its property ``bonds`` says why. Left out are molecules without atoms, with positions that are
    not finite or beyond 9999 Angstrom, and with more than 999 atoms.

    Args:
        molecules: B of them.
        path: of the file, which is replaced.
        properties: one value per molecule each, written as data items.

    Raises:
        ConfigError: for properties of another length.
        CheckpointError: if the file cannot be written.
    """
    rows, left_out, bondless = _rows(molecules, properties), Counter[str](), Counter[str]()
    records = []
    for i, (found, why) in enumerate(perceived_where_known(molecules)):
        reason = _unwritable(*molecules[i], limited=True)
        if reason:
            left_out[reason] += 1
            continue
        known = found is not None
        block = _block_with_bonds(found, i) if known else _block_of_atoms(*molecules[i], i)
        bondless.update([] if known else [why])
        items = {"index": str(i), "bonds": "perceived" if known else why, **rows[i]}
        data = "".join(f">  <{name}>\n{value}\n\n" for name, value in items.items())
        records.append(f"{block}{data}{END}\n")
    write_atomic(Path(path), "".join(records).encode())
    return Written(Path(path), len(records), dict(left_out), dict(bondless))


def _rows(molecules: Molecules, properties: Properties | None) -> list[dict[str, str]]:
    """The properties of each molecule, as text without line breaks."""
    rows: list[dict[str, str]] = [{} for _ in range(len(molecules))]
    for name, column in (properties or {}).items():
        values = column.tolist() if isinstance(column, Tensor) else list(column)
        if len(values) != len(rows):
            raise ConfigError(
                f"properties[{name!r}] has {len(values)} values for {len(rows)} molecules."
            )
        for row, value in zip(rows, values, strict=True):
            text = f"{value:.8g}" if isinstance(value, float) else str(value)
            row[name] = " ".join(text.split())
            if row[name].startswith(END):
                raise ConfigError(
                    f"properties[{name!r}]: {row[name]!r} would end the record in an SDF file; "
                    "leave it out or write it otherwise."
                )
    return rows


def _quoted(text: str) -> str:
    """In quotes where it is not one plain word, as in the extended XYZ format."""
    if not any(mark in text for mark in ' "\\='):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _unwritable(numbers: Tensor, positions: Tensor, limited: bool = False) -> str:
    """Why a molecule cannot be written, or nothing; ``limited``: in columns of fixed width."""
    if len(numbers) == 0:
        return "no atoms"
    if not bool(positions.isfinite().all()):
        return "positions not finite"
    if limited and len(numbers) > MOST_ATOMS:
        return f"more than {MOST_ATOMS} atoms"
    if limited and float(positions.abs().max()) > FARTHEST:
        return f"an atom farther than {FARTHEST:.0f} Angstrom"
    return ""


def _block_with_bonds(molecule: Any, i: int) -> str:
    from rdkit import Chem

    molecule.SetProp("_Name", f"molecule {i}")
    return str(Chem.MolToMolBlock(molecule, forceV3000=False))


def _block_of_atoms(numbers: Tensor, positions: Tensor, i: int) -> str:
    rows = [
        f"{x:10.4f}{y:10.4f}{w:10.4f} {SYMBOLS[z]:<3} 0  0  0  0  0  0  0  0  0  0  0  0\n"
        for z, (x, y, w) in zip(numbers.tolist(), positions.tolist(), strict=True)
    ]
    counts = f"{len(rows):3d}  0  0  0  0  0  0  0  0  0999 V2000\n"
    head = f"molecule {i}\n  tiltflow          3D\n\n{counts}"
    return f"{head}{''.join(rows)}M  END\n"


Record = list[tuple[int, tuple[float, float, float]]]
"""Atomic numbers and positions of one molecule."""


def read_xyz(path: str | Path) -> Molecules:
    """The molecules of an XYZ file, padded to the largest; columns after the position are ignored.

    Raises:
        ConfigError: names file and line, where the file is missing, empty or cut short, or has an
            unknown element or a position that is not finite.
    """
    lines = _Lines.of(Path(path))
    records = []
    while lines.more():
        count = lines.count(str.strip, "the number of atoms")
        lines.next()  # the comment
        records.append([lines.atom(_xyz_atom) for _ in range(count)])
    return _padded(records, lines)


def read_sdf(path: str | Path) -> Molecules:
    """The atoms of the molecules of an SDF file (V2000), padded to the largest.

    Bonds, charges and properties are not read: tiltflow sees bonds in distances (``bonds``).

    Raises:
        ConfigError: as ``read_xyz``; also for V3000.
    """
    lines = _Lines.of(Path(path))
    records = []
    while lines.more():
        for _ in range(3):  # name, program, comment
            lines.next()
        if "V3000" in lines.peek():
            raise lines.wrong("the record is V3000; write it as V2000, or as XYZ")
        count = lines.count(lambda text: text[:3], "the number of atoms in its first 3 columns")
        records.append([lines.atom(_sdf_atom) for _ in range(count)])
        while lines.left() and lines.next().strip() != END:
            pass
    return _padded(records, lines)


def _xyz_atom(text: str) -> tuple[str, list[str]]:
    words = text.split()
    return words[0], words[1:4]


def _sdf_atom(text: str) -> tuple[str, list[str]]:
    return text[31:34].strip(), [text[0:10], text[10:20], text[20:30]]


def _padded(records: Sequence[Record], lines: _Lines) -> Molecules:
    if not records:
        raise ConfigError(f"{lines.path}: there are no molecules in it.")
    shape = len(records), max(1, *(len(record) for record in records))
    numbers, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(*shape, 3)
    for i, record in enumerate(records):
        for j, (z, place) in enumerate(record):
            numbers[i, j], positions[i, j] = z, torch.tensor(place)
    return Molecules(positions, numbers)


@final
class _Lines:
    """A file that is read line by line, and complains with the number of the line."""

    def __init__(self, path: Path, lines: Sequence[str]) -> None:
        self.path, self._lines, self._at = path, lines, 0

    @staticmethod
    def of(path: Path) -> _Lines:
        try:
            return _Lines(path, path.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as text ({error}).") from None

    def left(self) -> bool:
        return self._at < len(self._lines)

    def more(self) -> bool:
        """Whether anything but empty lines is left."""
        return any(self._lines[k].strip() for k in range(self._at, len(self._lines)))

    def peek(self) -> str:
        if not self.left():
            raise self.wrong("the file ends inside a molecule")
        return self._lines[self._at]

    def next(self) -> str:
        text = self.peek()
        self._at += 1
        return text

    def wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path}, line {self._at + 1}: {what}.")

    def count(self, where: Callable[[str], str], what: str) -> int:
        text = self.peek()
        try:
            count = int(where(text))
        except (ValueError, IndexError):
            raise self.wrong(f"expected {what}, found {text!r}") from None
        if count < 0:
            raise self.wrong(f"{count} atoms")
        self._at += 1
        return count

    def atom(self, parts: Callable[[str], tuple[str, list[str]]]) -> Any:
        """Atomic number and position on this line."""
        text = self.peek()
        try:
            symbol, words = parts(text)
            x, y, z = (float(word) for word in words)
        except (ValueError, IndexError):
            raise self.wrong(f"expected an element and a position, found {text!r}") from None
        number = int(symbol) if symbol.isdecimal() else NUMBERS.get(symbol.capitalize(), 0)
        if not 0 < number < len(SYMBOLS):
            raise self.wrong(f"{symbol!r} is no element from H to {SYMBOLS[-1]}")
        if not all(abs(value) < float("inf") for value in (x, y, z)):
            raise self.wrong(f"the position {x}, {y}, {z} is not finite")
        self._at += 1
        return number, (x, y, z)


__all__ = ["Written", "read_sdf", "read_xyz", "write_sdf", "write_xyz"]

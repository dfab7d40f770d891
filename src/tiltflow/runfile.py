"""Run files as text: TOML in, TOML out, and ``--set`` overrides. Knows no schema."""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tiltflow.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Plain: TypeAlias = Any
"""What TOML can hold: bool, int, float, str, lists and tables of them."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def read_toml(path: Path) -> dict[str, Plain]:
    """The content of a TOML file.

    Raises:
        ConfigError: if the file cannot be read, or is not TOML; names the line.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the run file {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8.") from None
    except ConfigError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def parse_toml(text: str) -> dict[str, Plain]:
    """The content of a TOML text; raises ``ConfigError`` with the parser's line and column."""
    try:
        data: dict[str, Plain] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{error}.") from None
    return data


def write_toml(data: Mapping[str, Plain]) -> str:
    """TOML text of a table; ``parse_toml(write_toml(data)) == data``.

    ``None`` is left out, because TOML has no such value: an absent key means its default.
    """
    lines: list[str] = []
    _section(lines, (), data)
    return "\n".join(lines).strip() + "\n"


def _section(lines: list[str], path: tuple[str, ...], table: Mapping[str, Plain]) -> None:
    """Scalars first; tables that fit on a line inline, the others as sections of their own."""
    sections = {k: v for k, v in table.items() if isinstance(v, Mapping) and not _fits(k, v, path)}
    if path and (not sections or len(sections) < len(table)):
        lines += ["", f"[{'.'.join(_key(part) for part in path)}]"]
    for key, value in table.items():
        if key not in sections and value is not None:
            lines += _assignment(key, value)
    for key, value in sections.items():
        _section(lines, (*path, key), value)


def _fits(key: str, value: Mapping[str, Plain], path: tuple[str, ...]) -> bool:
    return bool(path) and len(key) + len(_value(value)) < 88


def _assignment(key: str, value: Plain) -> list[str]:
    text = f"{_key(key)} = {_value(value)}"
    tables = isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value)
    if tables and len(text) > 88:
        return [f"{_key(key)} = [", *(f"    {_value(v)}," for v in value), "]"]
    return [text]


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Plain) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, Sequence):
        return f"[{', '.join(_value(v) for v in value)}]"
    raise ConfigError(f"A run file cannot hold a {type(value).__name__}.")


def nearest(key: str, valid: Iterable[str]) -> str:
    """``Did you mean num_steps? Valid keys: ...``: the end of a message about a wrong name."""
    names = sorted(valid)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"{hint}Valid keys: {', '.join(names) or 'none'}."


def override(data: dict[str, Plain], assignments: Sequence[str]) -> dict[str, Plain]:
    """Apply ``a.b.c=value`` in order; a value that is not TOML is taken as a string.

    Only the syntax is checked here: an unknown path fails when the result is interpreted, like an
    unknown key in a file. Numbers in a path index lists (``objective.divergences.0.weight=2``).

    Raises:
        ConfigError: if an assignment has no ``=``, or leads through something that is no table.
    """
    out: dict[str, Plain] = _copy(data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        parts = [part.strip() for part in path.split(".")]
        if not equals or not all(parts):
            raise ConfigError(f"--set {assignment}: write it as a.b.c=value.")
        try:
            value = parse_toml(f"value = {text.strip()}")["value"]
        except ConfigError:
            value = text.strip()
        _put(out, parts, value, assignment)
    return out


def _put(table: Plain, parts: list[str], value: Plain, assignment: str) -> None:
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(table, list):
            if not part.isdigit() or int(part) >= len(table):
                raise ConfigError(
                    f"--set {assignment}: {'.'.join(parts[:depth])} is a list of {len(table)}; "
                    f"'{part}' is not an index of it."
                )
            key: Plain = int(part)
        elif isinstance(table, dict):
            key = part
            if not last:
                table.setdefault(key, {})
        else:
            raise ConfigError(
                f"--set {assignment}: {'.'.join(parts[:depth])} is a value, not a table."
            )
        if last:
            table[key] = value
        else:
            table = table[key]


def _copy(data: Plain) -> Plain:
    if isinstance(data, Mapping):
        return {key: _copy(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_copy(value) for value in data]
    return data


def first_differences(
    ours: Plain, theirs: Plain, path: str = "", limit: int = 4
) -> list[tuple[str, Plain, Plain]]:
    """The first keys at which two plain values differ, with both values."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys = [*ours, *(k for k in theirs if k not in ours)]
        pairs = [(f"{path}.{k}" if path else k, ours.get(k), theirs.get(k)) for k in keys]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(f"{path}.{i}", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    else:
        return [] if ours == theirs else [(path, ours, theirs)]
    found = [d for name, a, b in pairs for d in first_differences(a, b, name, limit)]
    return found[:limit]

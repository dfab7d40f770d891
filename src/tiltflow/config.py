"""Constructors are the config: tables of a run file <-> keyword arguments of classes.

``interpret`` reads a plain value against a type hint and returns a ``Node``, which knows its fully
explicit plain form (defaults expanded; itself valid input) and how to build the object. There is
no second schema that could drift: the keys *are* the arguments.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, final, get_args, get_origin

import torch
from torch import Tensor

from tiltflow.density import Density
from tiltflow.errors import ConfigError, NonFiniteError, TiltflowError
from tiltflow.functional import Functional
from tiltflow.registry import Constructor, kinds
from tiltflow.runfile import Plain, nearest
from tiltflow.signatures import (
    ABSENT,
    GROUPS_OF,
    NONE,
    Weighted,
    arguments_of,
    described,
    expected,
    is_a,
    kinds_of_table,
    settable,
)

Scope = Mapping[str, Density]
"""The densities that a run file can refer to by name, e.g. ``prior = "pretrained"``."""


class Node(abc.ABC):
    """One interpreted value of a run file."""

    plain: Plain

    @abc.abstractmethod
    def build(self, scope: Scope) -> Any:
        """The object; raises ``ConfigError`` with the path of the key."""

    def children(self) -> Mapping[str, Node]:
        """Named parts, for printing the object tree."""
        return {}


@final
@dataclass(frozen=True)
class Leaf(Node):
    """A value that needs nothing else."""

    plain: Plain
    value: Any

    def build(self, scope: Scope) -> Any:
        return self.value


@final
@dataclass(frozen=True)
class Name(Node):
    """The name of a model whose density is meant."""

    plain: Plain
    path: str

    def build(self, scope: Scope) -> Any:
        if self.plain not in scope:
            valid = nearest(self.plain, scope).replace("Valid keys", "Models")
            raise ConfigError(f"{self.path}: there is no model {self.plain!r}. {valid}")
        return scope[self.plain]


@final
@dataclass(frozen=True)
class Items(Node):
    """A list or a table of values."""

    items: Mapping[str, Node]
    is_table: bool

    @property
    def plain(self) -> Plain:
        if self.is_table:
            return {key: node.plain for key, node in self.items.items()}
        return [node.plain for node in self.items.values()]

    def build(self, scope: Scope) -> Any:
        built = {key: node.build(scope) for key, node in self.items.items()}
        return built if self.is_table else tuple(built.values())

    def children(self) -> Mapping[str, Node]:
        return self.items


@final
@dataclass(frozen=True)
class Table(Node):
    """A constructor and its keyword arguments."""

    constructor: Constructor
    kind: str | None
    fields: Mapping[str, Node]
    path: str
    flat: str | None = None

    @property
    def plain(self) -> Plain:
        head = {} if self.kind is None else {"kind": self.kind}
        body = {key.rstrip("_"): node.plain for key, node in self.fields.items()}
        if self.flat is not None:  # the keys of this part are written beside the others
            head |= body.pop(self.flat)
        return head | {key: value for key, value in body.items() if value is not None}

    def build(self, scope: Scope) -> Any:
        arguments = {key: node.build(scope) for key, node in self.fields.items()}
        try:
            return self.constructor(**arguments)
        except NonFiniteError:
            raise
        except TiltflowError as error:
            raise type(error)(f"{self.path or 'run file'}: {error}") from None
        except (TypeError, ValueError, RuntimeError) as error:
            name = getattr(self.constructor, "__name__", "the constructor")
            raise ConfigError(f"{self.path or 'run file'}: {name} refused it: {error}.") from error

    def children(self) -> Mapping[str, Node]:
        return self.fields


def interpret(hint: Any, value: Plain, path: str) -> Node:
    """Read ``value`` as ``hint``; every error is a ``ConfigError`` that begins with ``path``."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _union(get_args(hint), value, path)
    if origin is Literal:
        return _choice(get_args(hint), value, path)
    if origin in (tuple, list, Sequence):
        return _items(hint, value, path)
    if origin in (Mapping, dict):
        if not isinstance(value, dict):
            raise _mismatch(path, "a table", value)
        inner = get_args(hint)[1]
        parts = {k: interpret(inner, v, _join(path, k)) for k, v in value.items()}
        return Items(parts, is_table=True)
    base = hint if origin is None else origin
    if base in GROUPS_OF:
        return _kind(base, value, path)
    if base is Density:
        if not isinstance(value, str):
            raise _mismatch(path, "the name of a model", value)
        return Name(value, path)
    if inspect.isclass(base) and issubclass(base, enum.Enum):
        names = tuple(member.value for member in base)
        return Leaf(value, base(_choice(names, value, path).plain))
    if base is Weighted:
        return _weighted(value, path)
    if dataclasses.is_dataclass(base):
        return _table(typing.cast(Constructor, base), None, _unnamed(base, value, path), path)
    return _scalar(base, value, path)


def _scalar(hint: Any, value: Plain, path: str) -> Leaf:
    if hint is Any:
        return Leaf(value, value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return Leaf(float(value), float(value))
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return Leaf(value, value)
    if hint is bool and isinstance(value, bool):
        return Leaf(value, value)
    if hint in (str, Path) and isinstance(value, str):
        return Leaf(value, hint(value))
    if hint is Tensor and isinstance(value, int | float | list):
        try:
            return Leaf(value, torch.tensor(value, dtype=torch.get_default_dtype()))
        except (TypeError, ValueError):
            raise _mismatch(path, "numbers in a regular list", value) from None
    raise _mismatch(path, expected(hint), value)


def _union(hints: Sequence[Any], value: Plain, path: str) -> Node:
    """The first alternative that fits; for a table, the complaint of the one that takes tables."""
    rest = [h for h in hints if h is not type(None) and settable(h)]
    kinds = {name: h for h in rest for name in kinds_of_table(h)}
    if isinstance(value, dict) and len(kinds) > 1:
        return _alternative(kinds, value, path)
    if type(None) in hints and value == NONE and str not in rest:
        return Leaf(NONE, None)
    complaint: ConfigError | None = None
    for hint in rest:
        try:
            return interpret(hint, value, path)
        except ConfigError as error:
            takes_tables = (
                hint in GROUPS_OF
                or get_origin(hint) in GROUPS_OF
                or (dataclasses.is_dataclass(hint))
            )
            if isinstance(value, dict) and takes_tables:
                complaint = complaint or error
    if len(rest) == 1:
        return interpret(rest[0], value, path)
    words = dict.fromkeys(expected(h) for h in rest)
    raise complaint or _mismatch(path, " or ".join(words), value)


def _alternative(tables: Mapping[str, Constructor], value: Plain, path: str) -> Node:
    """The table that ``kind`` names; without one, the first."""
    kind = str(_choice(tuple(tables), value.get("kind", next(iter(tables))), f"{path}.kind").plain)
    mine = arguments_of(tables[kind])
    for key in value:
        owners = [repr(name) for name, other in tables.items() if key in arguments_of(other)]
        if key not in mine and owners:
            raise ConfigError(
                f"{path}.{key}: belongs to kind {' or '.join(owners)}, but kind is {kind!r} here."
            )
    return interpret(tables[kind], value, path)


def _choice(names: Sequence[Any], value: Plain, path: str) -> Leaf:
    if value in names and type(value) in {type(n) for n in names}:
        return Leaf(value, value)
    raise ConfigError(f"{path}: must be one of {', '.join(map(repr, names))}, got {value!r}.")


def _items(hint: Any, value: Plain, path: str) -> Node:
    if not isinstance(value, list | tuple):
        raise _mismatch(path, expected(hint), value)
    inner = get_args(hint) or (Any, ...)
    fixed = get_origin(hint) is tuple and Ellipsis not in inner
    if fixed and len(inner) != len(value):
        raise _mismatch(path, f"a list of {len(inner)}", value)
    hints = inner if fixed else [inner[0]] * len(value)
    parts = {
        str(i): interpret(h, v, f"{path}.{i}")
        for i, (h, v) in enumerate(zip(hints, value, strict=True))
    }
    return Items(parts, is_table=False)


def _kind(base: Any, value: Plain, path: str) -> Node:
    """A table whose ``kind`` names a class; a string is short for a table with nothing else."""
    value = {"kind": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise _mismatch(path, "a table with a kind", value)
    known: dict[str, Constructor] = {}
    for group in GROUPS_OF[base]:
        known |= kinds(group)
    known = {name: c for name, c in known.items() if is_a(c, base)}
    if "kind" not in value:
        raise ConfigError(f"{path}.kind: missing. Choose one of: {', '.join(sorted(known))}.")
    kind = value["kind"]
    if kind not in known:
        hint = nearest(str(kind), known).replace("Valid keys", "Known kinds")
        raise ConfigError(f"{path}.kind: there is no {kind!r} here. {hint}")
    return _table(known[kind], kind, {k: v for k, v in value.items() if k != "kind"}, path)


def _unnamed(base: Any, value: Plain, path: str) -> Plain:
    """Without a ``kind`` that names the very class that the key stands for."""
    named = isinstance(value, dict) and "kind" in value
    if not named or "kind" in arguments_of(base):
        return value
    if value["kind"] != base.__name__:
        raise ConfigError(f"{path}.kind: must be {base.__name__!r} here, got {value['kind']!r}.")
    return {k: v for k, v in value.items() if k != "kind"}


def _weighted(value: Plain, path: str) -> Table:
    """``weight`` beside the arguments of the functional itself, all in one table."""
    if not isinstance(value, dict) or "weight" not in value:
        raise ConfigError(f"{path}.weight: missing; every divergence needs a positive weight.")
    weight = interpret(float, value["weight"], f"{path}.weight")
    inner = {k: v for k, v in value.items() if k != "weight"}
    fields = {"functional": _kind(Functional, inner, path), "weight": weight}
    return Table(Weighted, None, fields, path, flat="functional")


def _table(constructor: Constructor, kind: str | None, value: Plain, path: str) -> Table:
    if not isinstance(value, dict):
        raise _mismatch(path, "a table", value)
    known = arguments_of(constructor)
    spelled = {name.rstrip("_"): name for name in known}  # ``from_`` is spelled ``from``
    unknown = [key for key in value if key not in spelled]
    if unknown:
        raise ConfigError(f"{_join(path, unknown[0])}: unknown. {nearest(unknown[0], spelled)}")
    fields = {}
    for key, name in spelled.items():
        argument = known[name]
        if key in value:
            fields[name] = interpret(argument.hint, value[key], _join(path, key))
        elif argument.default is ABSENT:
            label = kind or getattr(constructor, "__name__", "this table")
            raise ConfigError(f"{_join(path, key)}: missing; {label} needs it.")
        elif argument.default is not None:
            default = described(argument.default)
            if default is not ABSENT:
                fields[name] = interpret(argument.hint, default, _join(path, key))
    return Table(constructor, kind, fields, path)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _mismatch(path: str, expected: str, value: Plain) -> ConfigError:
    return ConfigError(f"{path}: expected {expected}, got {value!r}.")

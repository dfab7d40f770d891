"""What constructors take: the arguments that a run file can set, their hints and defaults."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, final, get_args, get_origin

from torch import Tensor

from tiltflow.algorithms.mirror_descent import mirror_descent
from tiltflow.algorithms.rates import RateRule
from tiltflow.algorithms.tail_aware import tail_aware
from tiltflow.density import Density
from tiltflow.errors import ConfigError
from tiltflow.features import Features
from tiltflow.functional import Functional, Shape
from tiltflow.kernel import Kernel, LinearKernel
from tiltflow.models import Model
from tiltflow.potential import Potential, Reward
from tiltflow.problem import Solver
from tiltflow.ratio import RatioEstimator
from tiltflow.registry import Constructor, kinds
from tiltflow.runfile import Plain
from tiltflow.schedule import Schedule
from tiltflow.similarity import Similarity

GROUPS_OF: dict[Any, tuple[str, ...]] = {
    Kernel: ("kernels",),
    LinearKernel: ("kernels",),
    Schedule: ("schedules",),
    Potential: ("rewards",),
    Reward: ("rewards",),
    Functional: ("utilities", "divergences"),
    Solver: ("solvers",),
    RateRule: ("algorithms",),
    Model: ("models",),
    Features: ("features",),
    Similarity: ("similarities",),
    RatioEstimator: ("ratios",),
    Shape: ("shapes",),
}
"""A hint of this class is a choice: the table's ``kind`` names a member of these groups."""

ABSENT: Any = object()

NONE = "none"
"""How a run file spells ``None``, where it is not the default: ``clip = "none"``."""


@final
@dataclass(frozen=True)
class Weighted:
    """A divergence and its weight: ``{ kind = "KL", prior = "pretrained", weight = 0.5 }``."""

    functional: Functional
    weight: float

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError("weight must be positive; leave the divergence out instead.")


@final
@dataclass(frozen=True)
class Argument:
    """A keyword argument of a constructor that a run file can set."""

    hint: Any
    default: Any = ABSENT


def arguments_of(constructor: Constructor) -> dict[str, Argument]:
    """The arguments that a run file can set; callables, modules and seeds are not among them."""
    hints = _hints(constructor)
    out = {}
    factories = {
        f.name: f.default_factory
        for f in (dataclasses.fields(constructor) if dataclasses.is_dataclass(constructor) else ())
        if f.default_factory is not dataclasses.MISSING
    }
    for name, parameter in inspect.signature(constructor).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = hints.get(name, Any)
        default = parameter.default
        if default is parameter.empty:
            default = ABSENT
        elif name in factories:
            default = factories[name]()
        if settable(hint):
            out[name] = Argument(hint, default)
        elif default is ABSENT:
            label = getattr(constructor, "__name__", constructor)
            raise ConfigError(f"{label} needs {name}, which a run file cannot hold; use Python.")
    return out


def _hints(constructor: Constructor) -> dict[str, Any]:
    owner = constructor
    if inspect.isclass(constructor) and not dataclasses.is_dataclass(constructor):
        owner = constructor.__init__
    try:
        return typing.get_type_hints(owner)
    except NameError:  # a name that is imported for type checkers only
        return {}


def settable(hint: Any) -> bool:
    """Whether a run file can hold a value of this hint."""
    if hint is Any or hint in GROUPS_OF or hint in (Density, Tensor, Path, type(None)):
        return True
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(settable(h) for h in get_args(hint) if h is not type(None))
    if origin is Literal:
        return True
    if origin in (tuple, list, Sequence, Mapping, dict):
        inner = [h for h in get_args(hint) if h is not Ellipsis]
        return all(settable(h) for h in (inner[1:] if origin in (Mapping, dict) else inner))
    base = hint if origin is None else origin
    if base in GROUPS_OF or base in (bool, int, float, str):
        return True
    return inspect.isclass(base) and (
        issubclass(base, enum.Enum)
        or (dataclasses.is_dataclass(base) and getattr(base, "__name__", "") not in ("Seed",))
    )


def is_a(constructor: Constructor, base: Any) -> bool:
    """Whether what it constructs is a ``base``, a class or a protocol."""
    if getattr(base, "_is_protocol", False):  # protocols are recognised by their methods
        names = [n for n in vars(base) if not n.startswith("_")]
        return all(hasattr(constructor, n) for n in names)
    return inspect.isclass(constructor) and issubclass(constructor, base)


def kinds_of_table(hint: Any) -> tuple[str, ...]:
    """The values of ``kind`` with which a union's table means this alternative, if it has one."""
    if not (inspect.isclass(hint) and dataclasses.is_dataclass(hint)):
        return ()
    kind = _hints(hint).get("kind")
    return get_args(kind) if get_origin(kind) is Literal else ()


def choices(group: str) -> dict[str, Constructor]:
    """What a run file can name in a group, for listing; algorithms are functions."""
    bases = [base for base, groups in GROUPS_OF.items() if group in groups]
    found = {n: c for n, c in kinds(group).items() if any(is_a(c, base) for base in bases)}
    loops: dict[str, Constructor] = {"mirror_descent": mirror_descent, "tail_aware": tail_aware}
    return found | (loops if group == "algorithms" else {})


def described(value: Any) -> Plain:
    """The plain form of a default value, or ``ABSENT`` where it has none."""
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping | list | tuple):
        parts = [described(v) for v in (value.values() if isinstance(value, Mapping) else value)]
        if any(part is ABSENT for part in parts):
            return ABSENT
        return dict(zip(value, parts, strict=True)) if isinstance(value, Mapping) else parts
    if not dataclasses.is_dataclass(value):
        return ABSENT
    known = arguments_of(type(value))
    parts_of = {name.rstrip("_"): described(getattr(value, name)) for name in known}
    defaults = {name.rstrip("_"): argument.default for name, argument in known.items()}
    table = {
        k: NONE if v is None else v
        for k, v in parts_of.items()
        if v is not ABSENT and not (v is None and defaults[k] is None)
    }
    polymorphic = any(is_a(type(value), base) for base in GROUPS_OF)
    return {"kind": type(value).__name__} | table if polymorphic else table


def expected(hint: Any) -> str:
    """A hint in words, for messages."""
    names = {
        float: "a number", int: "an integer", bool: "true or false", str: "a text",
        Path: "a path", Tensor: "numbers", Density: "the name of a model",
    }  # fmt: skip
    origin = get_origin(hint)
    if origin in (tuple, list, Sequence):
        inner = [h for h in get_args(hint) if h is not Ellipsis]
        return f"a list of {expected(inner[0])}" if inner else "a list"
    if origin in (Mapping, dict):
        return "a table"
    if origin in (Union, types.UnionType):
        words = [expected(h) for h in get_args(hint) if h is not type(None)]
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    return names.get(hint, "a table")

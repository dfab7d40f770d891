"""Which classes a run file can name: the ``__all__`` of the subpackages, and entry points."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from tiltflow.errors import ConfigError

Constructor: TypeAlias = Callable[..., Any]

GROUPS: dict[str, str] = {
    "utilities": "tiltflow.utilities",
    "divergences": "tiltflow.divergences",
    "solvers": "tiltflow.solvers",
    "algorithms": "tiltflow.algorithms",
    "rewards": "tiltflow.rewards",
    "models": "tiltflow.models",
    "kernels": "tiltflow.kernel",
    "schedules": "tiltflow.schedule",
    "features": "tiltflow.features",
    "similarities": "tiltflow.similarity",
    "ratios": "tiltflow.ratio",
    "shapes": "tiltflow.functional.shapes",
}
"""Name of a group -> the module whose public classes it holds."""


def kinds(group: str) -> dict[str, Constructor]:
    """Every concrete class of a group by its name; the name is the ``kind`` of a run file.

    Third-party packages add to it by an entry point of group ``tiltflow.<group>``. An own name
    wins over a foreign one, so that installing a package cannot change a run.
    """
    if group not in GROUPS:
        raise ConfigError(f"There is no group {group!r}; there are: {', '.join(GROUPS)}.")
    found: dict[str, Constructor] = {}
    for point in importlib.metadata.entry_points(group=f"tiltflow.{group}"):
        found[point.name] = point.load()
    module = importlib.import_module(GROUPS[group])
    names = getattr(module, "__all__", None)
    if names is None:
        own = vars(module).items()
        names = [n for n, v in own if getattr(v, "__module__", None) == module.__name__]
    for name in names:
        value = getattr(module, name)
        public = inspect.isclass(value) and not inspect.isabstract(value)
        if public and not name.startswith("_") and not getattr(value, "_is_protocol", False):
            found[name] = value
    return found


def summary(constructor: Constructor) -> str:
    """First line of the docstring, without mark-up and final punctuation."""
    text = inspect.getdoc(constructor) or ""
    return text.split("\n", 1)[0].replace("``", "").rstrip(".:")

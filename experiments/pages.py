"""The page of a paper's experiments, from the results of its command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from toys import Store


@dataclass(frozen=True)
class Page:
    """docs/NAME.md and its pictures, with a section for every experiment that has begun.

    Args:
        command: the experiments' script, without ``.py``.
        name: of the page.
        head: what it begins with.
        modules: of each experiment; ``section(store)`` is its part of the page, nothing where
            nothing was run, and ``pictures(store, home)``, where there is one, makes its pictures.
    """

    command: str
    name: str
    head: str
    modules: Mapping[str, ModuleType]

    def __call__(self, stores: Mapping[str, Store], home: Path) -> None:
        """Write it into a folder, from the results by experiment."""
        (home / "images").mkdir(parents=True, exist_ok=True)
        parts = [self.head.strip()]
        for name, module in self.modules.items():
            text = module.section(stores[name])
            if not text:
                continue
            if hasattr(module, "pictures"):
                module.pictures(stores[name], home)
            minutes = stores[name].seconds() / 60
            spent = f"`python experiments/{self.command}.py {name}`: {minutes:.1f} CPU-minutes"
            head = "" if text.startswith("## ") else f"## {name.capitalize()}\n\n"
            parts += [head + text.strip(), spent + " so far."]
        (home / f"{self.name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")

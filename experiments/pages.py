"""docs/rfm.md and its pictures, from the results of ``rfm.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import rfm_texts as texts
from toys import Store


def write(modules: Mapping[str, ModuleType], stores: Mapping[str, Store], home: Path) -> None:
    """The page, with a section for every experiment that has begun.

    Args:
        modules: of each experiment; ``section(store)`` is its part of the page, nothing where
            nothing was run, and ``pictures(store, home)``, where there is one, makes its pictures.
        stores: results by experiment.
        home: where the page and ``images`` are.
    """
    (home / "images").mkdir(parents=True, exist_ok=True)
    parts = [texts.HEAD.strip()]
    for name, module in modules.items():
        text = module.section(stores[name])
        if not text:
            continue
        if hasattr(module, "pictures"):
            module.pictures(stores[name], home)
        minutes = stores[name].seconds() / 60
        spent = f"`python experiments/rfm.py {name}`: {minutes:.1f} CPU-minutes so far."
        head = "" if text.startswith("## ") else f"## {name.capitalize()}\n\n"
        parts += [head + text.strip(), spent]
    (home / "rfm.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")

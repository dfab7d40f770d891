"""Randomness with an address: every draw is a function of (root, path)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import final

import torch


@final
@dataclass(frozen=True)
class Seed:
    """An address in a tree of random streams.

    ``generator = f(sha256(root, path))``: there is nothing to save and nothing to replay, so that
    resuming a run needs only the number of the update at which it stopped.

    Example:
        >>> Seed(0).child("update", 3).generator().initial_seed() == (
        ...     Seed(0).child("update").child(3).generator().initial_seed())
        True
    """

    root: int
    path: tuple[str, ...] = ()

    def child(self, *labels: str | int) -> Seed:
        """The stream at a deeper address."""
        return Seed(self.root, self.path + tuple(str(label) for label in labels))

    @property
    def number(self) -> int:
        """The address as an integer of 63 bits."""
        digest = hashlib.sha256(repr((self.root, self.path)).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator positioned at this address."""
        return torch.Generator(device).manual_seed(self.number)

"""Networks in files that say of which kind and size they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from tiltflow.adapters.checkpoint import compare, load_metadata, load_tensors, save_tensors
from tiltflow.errors import CheckpointError, ConfigError

M = TypeVar("M")


def save_described(path: str | Path, net: nn.Module, kind: str, card: Mapping[str, Any]) -> None:
    """Write the weights of a network and its card, what JSON can hold, as one safetensors file.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    text = json.dumps({"kind": kind, **card}, sort_keys=True)
    save_tensors(path, net.state_dict(), {"model": text})


def load_described(
    path: str | Path, kind: str, made: Callable[[dict[str, Any]], tuple[M, nn.Module]]
) -> M:
    """What ``save_described`` wrote, frozen.

    Args:
        path: the file.
        kind: what it must be of.
        made: an empty model and its network, of a card.

    Raises:
        CheckpointError: if the file is missing, damaged or of something else.
    """
    path = Path(path)
    tensors, text = load_tensors(path), load_metadata(path).get("model", "null")
    try:
        card = json.loads(text)
        found = card.pop("kind")
        if found != kind:
            raise ConfigError(f"it is of kind {found!r}")
        model, net = made(card)
    except (AttributeError, KeyError, ValueError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{path} is not a file of kind {kind!r}, or does not say of which network its weights "
            f"are ({error}); it belongs to another model."
        ) from error
    compare(path, tensors, net.state_dict())
    net.load_state_dict(tensors)
    net.requires_grad_(False).eval()
    return model


__all__ = ["load_described", "save_described"]

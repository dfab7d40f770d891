"""Reward-Guided Flow Merging: circuits of pre-trained models as one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from tiltflow.algorithms.averaging import require_alike
from tiltflow.algorithms.lowerings import LOWERINGS, Lowered, Merging
from tiltflow.context import Context
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel
from tiltflow.operators import Circuit, Gate, Prior, circuit


@final
@dataclass(frozen=True)
class Merged:
    """A merged model, and how each gate became one.

    Attributes:
        model: of the whole circuit.
        gates: by the text of the gate, from the bottom to the top.
    """

    model: FlowModel
    gates: Mapping[str, Lowered]


def ignore(gate: Gate, lowered: Lowered) -> None:
    """Default of ``on_gate``."""


def merge(
    expression: Circuit | str,
    models: Mapping[str, FlowModel],
    *,
    context: Context,
    settings: Merging | None = None,
    start: FlowModel | None = None,
    lowerings: Mapping[type[Gate], str] | None = None,
    on_gate: Callable[[Gate, Lowered], None] = ignore,
) -> Merged:
    """One model for a circuit of pre-trained ones (RFM, arXiv 2602.08012), gate by gate.

    From the bottom up, each gate becomes a flow model (``lowerings``), which is then a part of
    the gates above it. A gate that occurs twice is made once.

    Args:
        expression: a ``Circuit``, or its text (``operators.circuit``).
        models: the pre-trained models by name; of one space and one schedule.
        context: seed, backend, callbacks; gate k runs at the address ``gate/k``.
        settings: of trainings and banks.
        start: where trainings start from; default: the first model that the gate is over.
        lowerings: how each kind of gate is made, where not by default: ``{Intersection:
            "weighted"}``.
        on_gate: called with each gate and its model.

    Raises:
        ConfigError: before any work, for a name without a model or an unknown lowering.
        UnsupportedError: before any work, for models that cannot be merged.
    """
    root = circuit(expression, models) if isinstance(expression, str) else expression
    missing = [name for name in root.names if name not in models]
    if missing:
        raise ConfigError(
            f"merge: there is no model {missing[0]!r}, which {root} needs; models: "
            f"{', '.join(models) or 'none'}."
        )
    chosen = {kind: _chosen(kind, lowerings or {}) for kind in LOWERINGS}
    require_alike([models[name] for name in root.names])
    settings = settings or Merging()
    made: dict[str, Lowered] = {}
    for node in root.walk():
        if not isinstance(node, Gate) or _key(node) in made:
            continue
        parts = [_model(part, models, made) for part in node.parts]
        at = context.child("gate", len(made))
        lower = LOWERINGS[type(node)][chosen[type(node)]]
        lowered = lower(node, parts, start or parts[0], settings, at)
        made[_key(node)] = lowered
        on_gate(node, lowered)
    return Merged(_model(root, models, made), made)


def _key(gate: Gate) -> str:
    """Equal for gates that are the same: text, and the very rewards inside."""
    rewards = [f"@{id(g.reward):x}" for g in gate.walk() if isinstance(g, Gate) and g.reward]
    return f"{gate}{''.join(rewards)}"


def _model(
    part: Circuit, models: Mapping[str, FlowModel], made: Mapping[str, Lowered]
) -> FlowModel:
    if isinstance(part, Prior):
        return models[part.name]
    assert isinstance(part, Gate)
    return made[_key(part)].model


def _chosen(kind: type[Gate], given: Mapping[type[Gate], str]) -> str:
    known = LOWERINGS[kind]
    name = given.get(kind, next(iter(known)))
    if name not in known:
        raise ConfigError(
            f"merge: {kind.__name__} has no lowering {name!r}; there are: {', '.join(known)}."
        )
    return name

"""Reward-Guided Flow Merging: circuits of pre-trained models as one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from tiltflow.algorithms.averaging import require_alike
from tiltflow.algorithms.lowerings import LOWERINGS, REWARDED, Lowered, Merging
from tiltflow.context import Context
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.operators import Circuit, Gate, Prior, circuit
from tiltflow.potential import Potential
from tiltflow.types import Access


@final
@dataclass(frozen=True)
class Merged:
    """A merged model, and how each gate became one.

    Attributes:
        model: of the whole circuit.
        gates: by the text of the gate, from the bottom to the top; with ``#0``, ``#1``, ... behind
            it for each reward inside, in the order in which they first appear.
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
    if not isinstance(models, Mapping):
        raise ConfigError('merge: models must be a mapping of names, {"a": first, "b": second}.')
    root = circuit(expression, models) if isinstance(expression, str) else expression
    missing = [name for name in root.names if name not in models]
    if missing:
        raise ConfigError(
            f"merge: there is no model {missing[0]!r}, which {root} needs; models: "
            f"{', '.join(models) or 'none'}."
        )
    chosen = _chosen(lowerings or {})
    _check(root, [models[name] for name in root.names], start, chosen)
    settings = settings or Merging()
    made, keys = dict[str, Lowered](), _Keys([])
    for node in root.walk():
        if not isinstance(node, Gate) or keys.of(node) in made:
            continue
        parts = [_model(part, models, made, keys) for part in node.parts]
        at = context.child("gate", len(made))
        lower = LOWERINGS[type(node)][chosen[type(node)]]
        lowered = lower(node, parts, start or parts[0], settings, at)
        made[keys.of(node)] = lowered
        on_gate(node, lowered)
    return Merged(_model(root, models, made, keys), made)


@dataclass(frozen=True)
class _Keys:
    """Names for gates: equal texts with the very same rewards inside are the same gate."""

    rewards: list[Potential]

    def of(self, gate: Gate) -> str:
        marks = []
        for node in gate.walk():
            if isinstance(node, Gate) and node.reward is not None:
                known = [i for i, r in enumerate(self.rewards) if r is node.reward]
                if not known:
                    self.rewards.append(node.reward)
                marks.append(f"#{known[0] if known else len(self.rewards) - 1}")
            elif isinstance(node, Gate):
                marks.append("")
        return f"{gate}{''.join(marks)}"


def _model(
    part: Circuit, models: Mapping[str, FlowModel], made: Mapping[str, Lowered], keys: _Keys
) -> FlowModel:
    if isinstance(part, Prior):
        return models[part.name]
    assert isinstance(part, Gate)
    return made[keys.of(part)].model


def _check(
    root: Circuit,
    models: list[FlowModel],
    start: FlowModel | None,
    chosen: Mapping[type[Gate], str],
) -> None:
    """Refuse what would fail after some gates have been trained."""
    alike = models if start is None else [*models, start]
    require_alike(alike)
    if any(model.takes_cond for model in alike):
        raise UnsupportedError(
            "merge: models with conditions cannot be merged yet; fix the condition in a network "
            "of your own, FlowModel(net_at(cond), ...)."
        )
    for node in root.walk():
        if isinstance(node, Gate) and node.reward is not None:
            name = chosen[type(node)]
            node.reward.require(REWARDED.get(name, Access.NONE), f"{type(node).__name__} ({name})")


def _chosen(given: Mapping[type[Gate], str]) -> dict[type[Gate], str]:
    """The lowering of each kind of gate."""
    for kind, name in given.items():
        if kind not in LOWERINGS:
            kinds = ", ".join(known.__name__ for known in LOWERINGS)
            raise ConfigError(f"merge: lowerings are by class ({kinds}), not {kind!r}.")
        if name not in LOWERINGS[kind]:
            raise ConfigError(
                f"merge: {kind.__name__} has no lowering {name!r}; there are: "
                f"{', '.join(LOWERINGS[kind])}."
            )
    return {kind: given.get(kind, next(iter(known))) for kind, known in LOWERINGS.items()}

"""Reward-Guided Flow Merging: circuits of pre-trained models as one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from tiltflow.algorithms.averaging import aligned
from tiltflow.algorithms.lowerings import LOWERINGS, Job, Keeper, Lowered, Merging
from tiltflow.context import Context
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.kernel import Auto
from tiltflow.operators import Circuit, Gate, Prior, circuit
from tiltflow.potential import Potential
from tiltflow.sample import Sampler, calibrated
from tiltflow.types import Conditions


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


def merge(
    expression: Circuit | str,
    models: Mapping[str, FlowModel],
    *,
    context: Context,
    settings: Merging | None = None,
    start: FlowModel | None = None,
    lowerings: Mapping[type[Gate], str] | None = None,
    rewards: Mapping[str, Potential] | None = None,
    conditions: Conditions | None = None,
    keeper: Keeper | None = None,
) -> Merged:
    """One model for a circuit of pre-trained ones (RFM, arXiv 2602.08012), gate by gate.

    From the bottom up, each gate becomes a flow model (``lowerings``), which is then a part of
    the gates above it. A gate that occurs twice is made once. Schedules may differ: all models
    are seen on that of the start (``views.rescheduled``).

    Args:
        expression: a ``Circuit``, or its text (``operators.circuit``).
        models: the pre-trained models by name; of one space.
        context: seed, backend, callbacks; gate k runs at the address ``gate/k``.
        settings: of trainings and banks.
        start: where trainings start from; default: the first model that the gate is over.
        lowerings: how each kind of gate is made, where not by default: ``{Intersection:
            "weighted"}``. By default the first of ``LOWERINGS`` that can make it.
        rewards: of gates in a text, by name.
        conditions: law of the conditions, for conditional models; each condition is merged by
            itself. ``views.conditioned`` merges different conditions.
        keeper: is told what has been made, and knows what an earlier call made.

    Raises:
        ConfigError: before any work, for a name without a model, an unknown lowering, models of
            different spaces.
        UnsupportedError: before any work, for a gate that its lowering cannot make.
    """
    if not isinstance(models, Mapping):
        raise ConfigError('merge: models must be a mapping of names, {"a": first, "b": second}.')
    root = expression
    if isinstance(root, str):
        root = circuit(root, models, rewards)
    missing = [name for name in root.names if name not in models]
    if missing:
        raise ConfigError(
            f"merge: there is no model {missing[0]!r}, which {root} needs; models: "
            f"{', '.join(models) or 'none'}."
        )
    models = _prepared({name: models[name] for name in root.names}, start, conditions)
    chosen = chosen_lowerings(root, lowerings or {}, conditional=conditions is not None)
    settings = settings or Merging()
    if isinstance(settings.sampler.kernel, Auto):
        models = _calibrated(models, settings.sampler, conditions, context)
    keeper = keeper or Keeper()
    made, keys = dict[str, Lowered](), _Keys([])
    for node, name in chosen:
        key = keys.of(node)
        if key in made:
            continue
        parts = tuple(_model(part, models, made, keys) for part in node.parts)
        at = context.child("gate", len(made))
        job = Job(node, parts, start or parts[0], name, settings, at, conditions, keeper)
        earlier = keeper.gate(key, job)
        made[key] = earlier or LOWERINGS[type(node)][name].make(job)
        if earlier is None:
            keeper.made(key, job, made[key])
    return Merged(_model(root, models, made, keys), made)


def chosen_lowerings(
    root: Circuit, given: Mapping[type[Gate], str], *, conditional: bool = False
) -> list[tuple[Gate, str]]:
    """All gates from the bottom to the top, with their lowerings.

    Raises:
        ConfigError: for an unknown lowering.
        UnsupportedError: for a gate that cannot be made.
    """
    for kind, name in given.items():
        if kind not in LOWERINGS:
            kinds = ", ".join(known.__name__ for known in LOWERINGS)
            raise ConfigError(f"merge: lowerings are by class ({kinds}), not {kind!r}.")
        if name not in LOWERINGS[kind]:
            raise ConfigError(
                f"merge: {kind.__name__} has no lowering {name!r}; there are: "
                f"{', '.join(LOWERINGS[kind])}."
            )
    gates = [node for node in root.walk() if isinstance(node, Gate)]
    return [(gate, _lowering(gate, given.get(type(gate)), conditional)) for gate in gates]


def _lowering(gate: Gate, given: str | None, conditional: bool) -> str:
    known = LOWERINGS[type(gate)]
    objections = {
        name: known[name].objection(gate, conditional) for name in ([given] if given else known)
    }
    for name, objection in objections.items():
        if not objection:
            return name
    told = "; ".join(f"{name}: {objection}" for name, objection in objections.items())
    raise UnsupportedError(f"merge: {gate} cannot be made. {told}.")


def _prepared(
    models: Mapping[str, FlowModel], start: FlowModel | None, conditions: Conditions | None
) -> dict[str, FlowModel]:
    """The models on the schedule of the start, or of the first one."""
    every = [*([] if start is None else [start]), *models.values()]
    seen = aligned(every)[len(every) - len(models) :]
    conditional = any(model.takes_cond for model in every)
    if conditional and conditions is None:
        raise ConfigError(
            "merge: a model takes conditions; pass conditions=..., their law, or fix one: "
            "views.conditioned(model, cond)."
        )
    if conditional and not every[0].takes_cond:
        raise ConfigError(
            "merge: trainings start from a model that takes no conditions, but another one does; "
            "pass start=... one that does."
        )
    return dict(zip(models, seen, strict=True))


def _calibrated(
    models: Mapping[str, FlowModel],
    sampler: Sampler,
    conditions: Conditions | None,
    context: Context,
) -> dict[str, FlowModel]:
    """The models with what the kernel ``Auto`` needs; without it, it is Euler-Maruyama."""
    return {
        name: model
        if model.moments is not None
        else calibrated(
            model, seed=context.seed.child("calibration", name), num_steps=sampler.num_steps,
            conditions=conditions,
        )
        for name, model in models.items()
    }  # fmt: skip


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

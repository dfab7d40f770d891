"""A run file that merges models, with its circuit read and its models loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import torch

from tiltflow.algorithms.lowerings import LOWERINGS
from tiltflow.algorithms.merging import chosen_lowerings
from tiltflow.config import Table
from tiltflow.errors import CapabilityError, ConfigError
from tiltflow.experiment import load_models, measured
from tiltflow.flow import FlowModel
from tiltflow.merge_tables import MergeExperiment
from tiltflow.models import Model, Pretrained
from tiltflow.operators import Circuit, Gate, circuit
from tiltflow.runfile import Plain
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.types import Access, Conditions, drawn_cond

Signature: TypeAlias = tuple[str, tuple[int, ...]]


def signature(node: Circuit) -> Signature:
    """What is equal for nodes that become one model: the text and the very rewards inside."""
    gates = (each for each in node.walk() if isinstance(each, Gate))
    return str(node), tuple(id(gate.reward) for gate in gates)


@final
@dataclass(frozen=True)
class MergePlan:
    """Everything that a merge needs, nothing done yet.

    Attributes:
        experiment, resolved: the run file.
        root: its circuit.
        pretrained: the models of the circuit, in the order in which they first appear, and the
            start if it is another one.
    """

    experiment: MergeExperiment
    resolved: Plain
    root: Gate
    pretrained: Mapping[str, Pretrained]

    @property
    def seed(self) -> Seed:
        """Root of all random streams."""
        return Seed(self.experiment.seed)

    @property
    def models(self) -> dict[str, FlowModel]:
        """The models of the circuit, by name."""
        return {name: self.pretrained[name].model for name in self.root.names}

    @property
    def start(self) -> FlowModel | None:
        """The model that trainings start from, where it is named."""
        name = self.experiment.start
        return None if name is None else self.pretrained[name].model

    @property
    def conditions(self) -> Conditions | None:
        """Law of the conditions of all models, if they take some."""
        laws = [each.conditions for each in self.pretrained.values()]
        return next((law for law in laws if law is not None), None)

    @property
    def judge(self) -> Pretrained:
        """The model that says of which class samples are, and what else a report shows of them."""
        named, known = self.experiment.evaluate.classes, self.pretrained
        able = [name for name in self.root.names if known[name].classify is not None]
        return known[named or (able or self.root.names)[0]]

    @property
    def gates(self) -> list[tuple[Gate, str]]:
        """All gates from the bottom to the top, each once, with their lowerings."""
        once: dict[Signature, tuple[Gate, str]] = {}
        conditional, given = self.conditions is not None, self.experiment.chosen
        for gate, name in chosen_lowerings(self.root, given, conditional=conditional):
            once.setdefault(signature(gate), (gate, name))
        return list(once.values())

    def written(self, node: Circuit) -> str:
        """The text of a node, with the names of its rewards: ``(a & b)[lean] | c``."""
        if not isinstance(node, Gate):
            return str(node)
        word, texts = node.symbol.isalpha(), []
        for part, weight in zip(node.parts, node.weights, strict=True):
            text, alone = self.written(part), word and weight == 1
            if isinstance(part, Gate) and not (alone or _closed(part)):
                text = f"({text})"
            texts.append(text if weight == 1 else f"{weight:.12g}*{text}")
        head = str(node).partition("(")[0] if word else ""
        whole = f"{head}({', '.join(texts)})" if word else f" {node.symbol} ".join(texts)
        name = self.reward_name(node)
        if name is None:
            return whole
        return f"{whole}[{name}]" if word else f"({whole})[{name}]"

    def reward_name(self, gate: Gate) -> str | None:
        """What the run file calls the gate's reward."""
        if gate.reward is None:
            return None
        for name, reward in self.experiment.rewards.items():
            if reward is gate.reward:
                return name
        return None


def _closed(gate: Gate) -> bool:
    """Whether its text needs no parentheses inside another gate."""
    return gate.symbol.isalpha() or gate.reward is not None


def prepare(tree: Table, device: torch.device | None = None) -> MergePlan:
    """Read the circuit, then load the models and measure their moments.

    Raises:
        ConfigError: for values that a constructor refuses; for a circuit that cannot be read, with
            the position; for models of different spaces.
        CheckpointError: for model files that are wrong.
    """
    experiment: MergeExperiment = tree.build({})
    root = _read(experiment)
    names = dict.fromkeys([*root.names, *([experiment.start] if experiment.start else [])])
    classes = experiment.evaluate.classes
    names |= dict.fromkeys([classes] if classes else [])
    loaded = load_models({name: experiment.models[name] for name in names}, device)
    plan = MergePlan(experiment, tree.plain, root, loaded)
    _check_models(plan)
    merging, seed = experiment.merging, Seed(experiment.seed).child("models")
    samplers = merging.sampler, merging.solver.sampler, experiment.evaluate.sampler
    known = measured(loaded, samplers, Sampler().num_steps, seed)
    return replace(plan, pretrained=known)


def _read(experiment: MergeExperiment) -> Gate:
    recipes: Mapping[str, Model] = experiment.models
    root: Circuit = circuit(experiment.circuit, recipes, experiment.rewards)
    if not isinstance(root, Gate):
        raise ConfigError(
            f"circuit: {root} is a model, and there is nothing to merge. Write for example "
            f'"{root} & other".'
        )
    return root


def _check_models(plan: MergePlan) -> None:
    for name, each in plan.pretrained.items():
        if each.conditions is not None and each.conditions != plan.conditions:
            raise ConfigError(
                f"models.{name}: its conditions have another law than those of the other models, "
                "but a merge has one law of conditions; use algorithms.merge in Python."
            )
        if plan.conditions is not None and each.conditions is None:
            raise ConfigError(
                f"models.{name}: takes no conditions, but another model does. Fix the condition "
                "of that one (of a model of molecules, the number of atoms: atoms = 18)."
            )
    names, spaces = zip(*((n, p.model.space) for n, p in plan.pretrained.items()), strict=True)
    for name, space in zip(names[1:], spaces[1:], strict=True):
        if space != spaces[0]:
            raise ConfigError(
                f"models.{name}: its states are in {space}, those of {names[0]} in {spaces[0]}; "
                "merging needs one space."
            )
    layouts = {n: p.layout for n, p in plan.pretrained.items() if p.layout is not None}
    for name, layout in layouts.items():
        first = next(iter(layouts))
        if layout != layouts[first]:
            raise ConfigError(
                f"models.{name}: its atoms are written as {layout}, those of {first} as "
                f"{layouts[first]}, so that one network would read the other's elements wrongly. "
                "Merge models of one layout."
            )


def check(plan: MergePlan) -> Sequence[tuple[Gate, str]]:
    """Raise unless every gate can be made, and probe the rewards on a few samples.

    Returns:
        all gates with their lowerings.

    Raises:
        UnsupportedError: for a gate that its lowering cannot make, or a reward that cannot guide
            it.
        CapabilityError: for a reported reward without values.
    """
    gates, reported = plan.gates, plan.experiment.evaluate.reward
    first = plan.pretrained[plan.root.names[0]].model
    seed = plan.seed.child("probe")
    cond = drawn_cond(plan.conditions, 4, seed)
    x = Sampler(num_steps=4).sample(first, 4, seed=seed, cond=cond)
    if reported is not None:
        reported.require(Access.VALUE, "The evaluation")
        reported.value(x, cond)
    for gate, name in gates:
        if gate.reward is None:
            continue
        if Access.VALUE not in gate.reward.offers:
            raise CapabilityError(f"{gate}: its reward offers no values, which a report needs.")
        gate.reward.value(x, cond)
        if Access.GRAD in LOWERINGS[type(gate)][name].reward:
            gate.reward.grad(x, cond)
    return gates

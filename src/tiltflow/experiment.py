"""A run file becomes an experiment: read, resolved, and built with its models loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch

from tiltflow.algorithms.bank_plan import worth_planning
from tiltflow.config import Table, interpret
from tiltflow.density import FlowDensity
from tiltflow.errors import ConfigError
from tiltflow.flow import freeze
from tiltflow.functional import Functional
from tiltflow.kernel import Auto
from tiltflow.merge_tables import MergeExperiment
from tiltflow.models import Model, Pretrained
from tiltflow.potential import Potential
from tiltflow.runfile import Plain, override, read_toml
from tiltflow.sample import Sampler, calibrated
from tiltflow.seed import Seed
from tiltflow.tables import Experiment, MirrorDescent, TailAware
from tiltflow.types import Conditions

PRETRAINED = "pretrained"
"""The model that is tuned; ``[models]`` must have it."""


@final
@dataclass(frozen=True)
class Plan:
    """An experiment with its models loaded: everything that a run needs, nothing done yet."""

    experiment: Experiment
    resolved: Plain
    pretrained: Pretrained
    prior: FlowDensity
    objective: Functional
    reward: Potential

    @property
    def seed(self) -> Seed:
        """Root of all random streams."""
        return Seed(self.experiment.seed)

    @property
    def conditions(self) -> Conditions | None:
        """Law of the conditions of the tuned model, if it takes some."""
        return self.pretrained.conditions

    @property
    def planned(self) -> bool:
        """Whether the iterations run on a bank, with one training, or train in every step."""
        algorithm = self.experiment.algorithm
        if isinstance(algorithm, TailAware):
            return False
        if algorithm.open:
            return worth_planning(self.objective, self.prior)
        return algorithm.way == "plan"

    @property
    def training_sampler(self) -> Sampler:
        """The solver's sampler: its path laws are the ones that training sees."""
        sampler = getattr(self.experiment.solver, "sampler", None)
        return sampler if isinstance(sampler, Sampler) else self.experiment.evaluate.sampler


def resolve(data: Plain) -> Table:
    """Interpret a run file; every error names the key. ``.plain`` is the resolved file.

    A file with a ``circuit`` merges models: its table is a ``MergeExperiment``.
    """
    merging = isinstance(data, Mapping) and "circuit" in data
    tree = interpret(MergeExperiment if merging else Experiment, data, "")
    assert isinstance(tree, Table)
    if merging:
        return tree
    models = tree.plain["models"]
    if PRETRAINED not in models:
        raise ConfigError(f"models.{PRETRAINED}: missing; it is the model that is tuned.")
    return tree


def load(path: Path, assignments: Sequence[str] = ()) -> Table:
    """Read and interpret a run file with ``--set`` overrides; its name is the default ``name``."""
    data = read_toml(path)
    data.setdefault("name", path.stem)
    return resolve(override(data, assignments))


def prepare(tree: Table, device: torch.device | None = None) -> Plan:
    """Build every object of a resolved file, load the models and measure their moments.

    Raises:
        ConfigError: for values that a constructor refuses, with the path of the table.
        CheckpointError: for model files that are wrong.
    """
    solver = tree.fields["solver"].build({})
    recipes: Mapping[str, Model] = tree.fields["models"].build({})
    algorithm: MirrorDescent | TailAware = tree.fields["algorithm"].build({})
    sampler = getattr(solver, "sampler", None) or Sampler()
    root = Seed(int(tree.plain["seed"])).child("models")
    evaluation: Sampler = tree.fields["evaluate"].children()["sampler"].build({})
    samplers = sampler, evaluation
    loaded = measured(load_models(recipes, device), samplers, sampler.num_steps, root)
    scope = {
        name: algorithm.density(each.model, sampler, root.child(name), each.conditions)
        for name, each in loaded.items()
    }
    experiment: Experiment = tree.build(scope)
    plan = Plan(
        experiment, tree.plain, loaded[PRETRAINED], scope[PRETRAINED],
        experiment.objective.functional, _reward(experiment),
    )  # fmt: skip
    if isinstance(algorithm, TailAware):
        algorithm.utility_of(experiment.objective, plan.prior)
    elif not plan.planned:
        algorithm.schedule_of_rates(experiment.objective.weight)
    return plan


def _reward(experiment: Experiment) -> Potential:
    reward = experiment.evaluate.reward or getattr(experiment.objective.utility, "reward", None)
    if not isinstance(reward, Potential):
        raise ConfigError(
            f"evaluate.reward: missing; the utility {experiment.objective.utility} has no reward "
            "of its own that could be reported."
        )
    return reward


def load_models(
    recipes: Mapping[str, Model], device: torch.device | None
) -> dict[str, Pretrained]:
    """Models on their device, frozen.

    Raises:
        ConfigError: if a model takes conditions, but nothing says which; names the key.
    """
    loaded = {name: _placed(recipe.load(), device) for name, recipe in recipes.items()}
    for name, each in loaded.items():
        if each.model.takes_cond and each.conditions is None:
            raise ConfigError(
                f"models.{name}: it takes conditions, but {type(recipes[name]).__name__}.load() "
                "gives no law of them (Pretrained.conditions)."
            )
    return loaded


def measured(
    loaded: Mapping[str, Pretrained], samplers: Sequence[Sampler], num_steps: int, seed: Seed
) -> Mapping[str, Pretrained]:
    """Models with their moments, where one of a run's samplers has the kernel ``Auto``.

    They are measured once, so that every part of a run has the same. Were it left to the first
    training, a continued run would measure them elsewhere.
    """
    if not any(isinstance(sampler.kernel, Auto) for sampler in samplers):
        return loaded
    return {
        name: replace(each, model=calibrated(
            each.model, seed=seed.child(name, "calibration"), num_steps=num_steps,
            conditions=each.conditions,
        ))
        for name, each in loaded.items()
    }  # fmt: skip


def _placed(pretrained: Pretrained, device: torch.device | None) -> Pretrained:
    freeze(pretrained.model)
    if device is not None:
        for module in (pretrained.model.net, pretrained.model.trainable):
            module.to(device)
    return pretrained

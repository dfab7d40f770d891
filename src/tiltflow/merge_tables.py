"""The tables of a run file that merges models: its key ``circuit`` makes it one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from tiltflow.algorithms.lowerings import LOWERINGS, Merging
from tiltflow.errors import ConfigError
from tiltflow.models import Model
from tiltflow.operators import Gate
from tiltflow.potential import Potential
from tiltflow.runfile import nearest
from tiltflow.sample import Sampler
from tiltflow.tables import Expected, require_file_name

MERGED = "merged"
"""What the result is called among the models."""

GATES: Mapping[str, type[Gate]] = {gate.__name__.lower(): gate for gate in LOWERINGS}
"""Gates by the name that a run file knows them by."""


@final
@dataclass(frozen=True, kw_only=True)
class MergeEvaluate:
    """How every gate is measured, on fresh samples of it and of its parts.

    Args:
        num_samples: samples of each model.
        sampler: how they are drawn; its path laws give the KLs, so that it must be memoryless.
        reward: reported of every model and gate, beside the gates' own rewards.
        classes: the model that says which class a sample is of; by default the first that can.
        likelihood_steps: steps of the flow's ODE by which a gate's density is compared with its
            closed form, where there is one; 0 for no comparison.
        keep: samples kept of each model, for the report's pictures.
    """

    num_samples: int = 4096
    sampler: Sampler = field(default_factory=Sampler)
    reward: Potential | None = None
    classes: str | None = None
    likelihood_steps: int = 60
    keep: int = 4096

    def __post_init__(self) -> None:
        if self.num_samples < 16 or self.likelihood_steps < 0 or self.keep < 1:
            raise ConfigError(
                "num_samples must be at least 16, likelihood_steps at least 0 and keep at least 1."
            )
        if not self.sampler.kernel.memoryless:
            raise ConfigError(
                f"sampler.kernel: {type(self.sampler.kernel).__name__} has no memoryless path "
                "law, which the KLs need; leave it out, or choose EulerMaruyama or Ancestral."
            )


@final
@dataclass(frozen=True, kw_only=True)
class MergeExperiment:
    """A run file that merges models (``algorithms.merge``).

    Args:
        name: of the run; its directory is ``runs/<name>``.
        seed: root of all random streams.
        precision: of the networks, ``"fp32"`` or ``"bf16"``.
        circuit: the expression, see ``operators.circuit``.
        start: the model that trainings start from; by default of each gate its first.
        lowerings: how gates are made, by gate: ``intersection = "weighted"``.
        models: by name.
        rewards: of gates, by name.
        merging: settings of the trainings.
        evaluate: how the gates are measured.
        expect: numbers that ``evaluate`` compares with, by metric name; those of the result bare,
            others behind the name of the model or the text of the gate and a dot.
    """

    name: str = "run"
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    circuit: str
    start: str | None = None
    lowerings: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, Model]
    rewards: Mapping[str, Potential] = field(default_factory=dict)
    merging: Merging = field(default_factory=Merging)
    evaluate: MergeEvaluate = field(default_factory=MergeEvaluate)
    expect: Mapping[str, Expected] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_file_name(self.name)
        for name in self.models:
            if not name.isidentifier() or name == MERGED:
                raise ConfigError(
                    f"models.{name}: must be a word of letters, digits and underscores, and not "
                    f"{MERGED!r}, which the result is called."
                )
        for key, named in (("start", self.start), ("evaluate.classes", self.evaluate.classes)):
            if named is not None and named not in self.models:
                hint = nearest(named, self.models).replace("Valid keys", "Models")
                raise ConfigError(f"{key}: there is no model {named!r}. {hint}")
        for gate, lowering in self.lowerings.items():
            if gate not in GATES:
                hint = nearest(gate, GATES).replace("Valid keys", "Gates")
                raise ConfigError(f"lowerings.{gate}: there is no such gate. {hint}")
            known = LOWERINGS[GATES[gate]]
            if lowering not in known:
                hint = nearest(lowering, known).replace("Valid keys", "Lowerings")
                raise ConfigError(
                    f"lowerings.{gate}: there is no lowering {lowering!r} of it. {hint}"
                )

    @property
    def chosen(self) -> dict[type[Gate], str]:
        """The lowerings by class, for ``merge``."""
        return {GATES[name]: lowering for name, lowering in self.lowerings.items()}

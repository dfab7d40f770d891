"""What a run file's model is: a recipe, and what it loads."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from tiltflow.analytic import GaussianMixture as ExactMixture
from tiltflow.flow import FlowModel
from tiltflow.molecules import Layout
from tiltflow.potential import Potential
from tiltflow.types import Conditions


@final
@dataclass(frozen=True)
class Pretrained:
    """A loaded model, and what a report needs to show its samples.

    Args:
        model: the flow model.
        picture: height and width of a sample as a grey image in [-1, 1], or ``None``.
        classify: (N, *event) -> (N,) integers, the class of each sample, or ``None``.
        classes: names of the classes.
        judges: rewards that are reported but never trained on, by name: a reward cannot tell
            whether it was hacked, an independent one can.
        exact: the very density, where it is known.
        conditions: law of the conditions, where the model takes some.
        layout: how states are molecules, where they are.
    """

    model: FlowModel
    picture: tuple[int, int] | None = None
    classify: Callable[[Tensor], Tensor] | None = None
    classes: tuple[str, ...] = ()
    judges: Mapping[str, Potential] = field(default_factory=dict)
    exact: ExactMixture | None = None
    conditions: Conditions | None = None
    layout: Layout | None = None


class Model(abc.ABC):
    """A recipe for a pre-trained model."""

    @abc.abstractmethod
    def load(self) -> Pretrained:
        """Read or make the model; raises ``CheckpointError`` where files are wrong."""

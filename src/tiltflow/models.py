"""Pre-trained models that a run file can name.

Each class is a recipe: it is cheap to construct and check, and ``load`` does the work. A
third-party package adds its own by a subclass of ``Model`` and an entry point of group
``tiltflow.models``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

from tiltflow.adapters.checkpoint import load_tensors
from tiltflow.adapters.ddpm_images import EVENT as IMAGE
from tiltflow.adapters.ddpm_images import load_cnn, load_unet
from tiltflow.adapters.digits import CLASSES, SIDE, load_digit_judge, load_digits_flow
from tiltflow.adapters.edm import load_edm
from tiltflow.analytic import GaussianMixture as ExactMixture
from tiltflow.analytic import ring
from tiltflow.delta import MLP
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel
from tiltflow.guidance import guided
from tiltflow.potential import Potential
from tiltflow.rewards.images import Readability
from tiltflow.rewards.mnist import MnistDigit, Pixels
from tiltflow.schedule import Linear, Schedule
from tiltflow.space import Euclidean


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
    """

    model: FlowModel
    picture: tuple[int, int] | None = None
    classify: Callable[[Tensor], Tensor] | None = None
    classes: tuple[str, ...] = ()
    judges: Mapping[str, Potential] = field(default_factory=dict)
    exact: ExactMixture | None = None


class Model(abc.ABC):
    """A recipe for a pre-trained model."""

    @abc.abstractmethod
    def load(self) -> Pretrained:
        """Read or make the model; raises ``CheckpointError`` where files are wrong."""


@final
@dataclass(frozen=True)
class Gaussian(Model):
    """N(mean, diag(std^2)), with its exact flow model and a trainable correction.

    Args:
        mean: one number per dimension.
        std: a number, or one per dimension.
        schedule: the interpolant.
        hidden: widths of the correction network.
        init_seed: seed of the correction's initial weights.
    """

    mean: tuple[float, ...]
    std: float | tuple[float, ...] = 1.0
    schedule: Schedule = field(default_factory=Linear)
    hidden: tuple[int, ...] = (64, 64)
    init_seed: int = 0

    def load(self) -> Pretrained:
        mean = torch.tensor([self.mean], dtype=torch.float64)
        std = torch.tensor(self.std, dtype=torch.float64)
        if (
            not self.mean
            or (std.ndim == 1 and len(std) != mean.shape[1])
            or bool((std <= 0).any())
        ):
            raise ConfigError("Gaussian: std must be positive, one number or one per dimension.")
        exact = ExactMixture(mean, std.expand(mean.shape))
        return _analytic(exact, self.schedule, self.hidden, self.init_seed)


@final
@dataclass(frozen=True)
class GaussianMixture(Model):
    """sum_j w_j N(m_j, diag(s_j^2)), with its exact flow model and a trainable correction.

    Args:
        means: one list per component.
        stds: a number, or one per component.
        weights: positive numbers; equal by default.
        schedule: the interpolant.
        hidden: widths of the correction network.
        init_seed: seed of the correction's initial weights.
    """

    means: tuple[tuple[float, ...], ...]
    stds: float | tuple[float, ...] = 1.0
    weights: tuple[float, ...] | None = None
    schedule: Schedule = field(default_factory=Linear)
    hidden: tuple[int, ...] = (64, 64)
    init_seed: int = 0

    def load(self) -> Pretrained:
        if len({len(m) for m in self.means}) != 1:
            raise ConfigError("GaussianMixture: all means need the same number of entries.")
        stds = torch.tensor(self.stds, dtype=torch.float64)
        exact = ExactMixture(self.means, stds, self.weights)
        component = _nearest_component(exact)
        names = tuple(str(j + 1) for j in range(len(self.means)))
        return _analytic(exact, self.schedule, self.hidden, self.init_seed, component, names)


@final
@dataclass(frozen=True)
class Ring(Model):
    """Equal isotropic Gaussians on a circle, the first at angle 0.

    Args:
        count: number of Gaussians.
        radius: of the circle.
        std: of each Gaussian.
        schedule: the interpolant.
        hidden: widths of the correction network.
        init_seed: seed of the correction's initial weights.
    """

    count: int = 8
    radius: float = 2.0
    std: float = 0.25
    schedule: Schedule = field(default_factory=Linear)
    hidden: tuple[int, ...] = (64, 64)
    init_seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.radius < 0 or self.std <= 0:
            raise ConfigError("Ring: count >= 1, radius >= 0 and std > 0 are needed.")

    def load(self) -> Pretrained:
        exact = ring(self.count, self.radius, self.std)
        names = tuple(f"{360 * j // self.count}°" for j in range(self.count))
        return _analytic(
            exact, self.schedule, self.hidden, self.init_seed, _nearest_component(exact), names
        )


@final
@dataclass(frozen=True)
class Digits(Model):
    """The shipped flow model of 8x8 handwritten digits, with ten classes and a judge.

    Args:
        guidance: a reward, to train the model through ``LearnedGuidance`` along its gradient
            instead of through its own weights.
    """

    guidance: Potential | None = None

    def load(self) -> Pretrained:
        judge = Readability(classifier=load_digit_judge())
        model = load_digits_flow()
        return Pretrained(
            model if self.guidance is None else guided(model, self.guidance),
            (SIDE, SIDE), Readability().class_of,
            tuple(str(c) for c in range(CLASSES)), {"judge": judge},
        )  # fmt: skip


@final
@dataclass(frozen=True)
class DenoisingUNet(Model):
    """A published DDPM of 28x28 images, MNIST or Fashion-MNIST (``adapters.ddpm_images``).

    Args:
        path: its weights, ``model_mnist.safetensors`` or ``model_fashion.safetensors``.
        classifier: ``mnist_classifier/model.safetensors``, for classes and a judge, or ``None``.
    """

    path: Path
    classifier: Path | None = None

    def load(self) -> Pretrained:
        return _images(load_unet(self.path), self.classifier, "centred")


@final
@dataclass(frozen=True)
class DenoisingCNN(Model):
    """A published DDPM of MNIST without a U-Net, on images in [-0.5, 0.5].

    Args:
        path: its weights, ``ddpm_cnn_mnist/model.safetensors``.
        classifier: as for ``DenoisingUNet``.
    """

    path: Path
    classifier: Path | None = None

    def load(self) -> Pretrained:
        return _images(load_cnn(self.path), self.classifier, "half")


@final
@dataclass(frozen=True)
class EDM(Model):
    """A published diffusion model of QM9's molecules, at one number of atoms (``adapters.edm``).

    Args:
        path: folder of its weights and config.json.
        atoms: in every molecule.
        epoch: which weights, 341 or 21.
    """

    path: Path
    atoms: int = 18
    epoch: int = 341

    def load(self) -> Pretrained:
        return Pretrained(load_edm(self.path, epoch=self.epoch).with_atoms(self.atoms))


@final
@dataclass(frozen=True)
class Checkpoint(Model):
    """A fully connected network (``delta.MLP``) from a safetensors file of ``save_tensors``.

    Args:
        path: the file.
        event: shape of one state.
        hidden, activation, frequencies: of the network.
        predicts: what the network returns.
        schedule: the interpolant that it was trained with.
    """

    path: Path
    event: tuple[int, ...]
    hidden: tuple[int, ...] = (128, 128, 128)
    activation: str = "silu"
    frequencies: int = 0
    predicts: Literal["velocity", "endpoint", "noise", "score"] = "velocity"
    schedule: Schedule = field(default_factory=Linear)

    def load(self) -> Pretrained:
        net = MLP(
            self.event, self.hidden, activation=self.activation, frequencies=self.frequencies
        )
        net.load_state_dict(load_tensors(self.path, net.state_dict()))
        model = FlowModel(net, self.schedule, Euclidean(self.event), predicts=self.predicts)
        return Pretrained(model)


def _images(model: FlowModel, classifier: Path | None, pixels: Pixels) -> Pretrained:
    if classifier is None:
        return Pretrained(model, IMAGE[1:])
    judge = MnistDigit(classifier, pixels=pixels)
    names = tuple(str(c) for c in range(CLASSES))
    return Pretrained(model, IMAGE[1:], judge.class_of, names, {"confidence": judge})


def _analytic(
    exact: ExactMixture,
    schedule: Schedule,
    hidden: Sequence[int],
    seed: int,
    classify: Callable[[Tensor], Tensor] | None = None,
    classes: tuple[str, ...] = (),
) -> Pretrained:
    """Initial weights from a seed of their own: a run must not depend on what ran before it."""
    if not hidden:
        raise ConfigError("hidden: needs at least one layer, or there is nothing to train.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = exact.flow(schedule, tuple(hidden))
    return Pretrained(model, None, classify, classes, exact=exact)


def _nearest_component(exact: ExactMixture) -> Callable[[Tensor], Tensor]:
    def classify(x: Tensor) -> Tensor:
        return torch.cdist(x.double(), exact.means.to(x.device)).argmin(1)

    return classify


__all__ = [
    "EDM",
    "Checkpoint",
    "DenoisingCNN",
    "DenoisingUNet",
    "Digits",
    "Gaussian",
    "GaussianMixture",
    "Ring",
]

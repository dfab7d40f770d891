"""Models from files: shipped, published, and the user's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

from tiltflow.adapters.checkpoint import load_tensors
from tiltflow.adapters.ddpm_images import EVENT as IMAGE
from tiltflow.adapters.ddpm_images import load_cnn, load_unet
from tiltflow.adapters.digits import CLASSES, SIDE, load_digit_judge, load_digits_flow
from tiltflow.adapters.edm import load_edm
from tiltflow.delta import MLP
from tiltflow.flow import FlowModel
from tiltflow.guidance import guided
from tiltflow.models.base import Model, Pretrained
from tiltflow.potential import Potential
from tiltflow.rewards.images import Readability
from tiltflow.rewards.mnist import MnistDigit, Pixels
from tiltflow.schedule import Linear, Schedule
from tiltflow.space import Euclidean


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
    """A published diffusion model of QM9's molecules (``adapters.edm``).

    Args:
        path: folder of its weights and config.json.
        atoms: number of atoms of every molecule. Without it, numbers of atoms are drawn from the
            law of the model's training; they are then a condition, of which every value has a
            normaliser of its own, so that what needs a single one (a plan on a bank, a tolerance,
            a baseline at a matched distance) is refused.
        epoch: which weights, 341 or 21.
        weights: a file of weights that were trained further, instead of those in the folder.
        guidance: a reward, to train the model through ``LearnedGuidance`` along its gradient
            instead of through its own weights.
        since: time before which guidance adds nothing; the bonds of molecules, and whether they
            are valid, are decided in about the last eighth.
    """

    path: Path
    atoms: int | None = None
    epoch: int = 341
    weights: Path | None = None
    guidance: Potential | None = None
    since: float = 0.88

    def load(self) -> Pretrained:
        edm = load_edm(self.path, epoch=self.epoch, weights=self.weights)
        fixed = self.atoms is not None
        model = edm.model if self.atoms is None else edm.with_atoms(self.atoms)
        if self.guidance is not None:
            model = guided(model, self.guidance, since=self.since)
        return Pretrained(model, conditions=None if fixed else edm.sizes, layout=edm.layout)


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

"""Denoising diffusion models of 28x28 grey images, and a classifier of digits.

Three networks that others trained and published under the MIT licence, re-implemented from
descriptions of their layers, with the tensor names of the files:

* ``DenoisingUNet``: github.com/BrianPulfer/PapersReimplementations, on MNIST and on Fashion-MNIST;
* ``DenoisingCNN``: github.com/MaxTalberg/Diffusion-Model, on MNIST;
* ``MnistClassifier``: the convolutional network of BoTorch's tutorials.

All predict noise on a table of alpha-bars (DDPM, Ho et al., arXiv 2006.11239) of 1000 noise
levels. Level i = 0..999 is at this library's time t = (999 - i) / 1000, and t = 1 is clean data,
which the tables do not have: the step onto it returns the predicted image, as DDPM does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, max_pool2d, relu, silu

from tiltflow.adapters.checkpoint import load_published
from tiltflow.flow import FlowModel, Prediction, freeze
from tiltflow.schedule import Tabulated
from tiltflow.space import Euclidean, ZeroMean

_Net = TypeVar("_Net", bound=nn.Module)

EVENT = (1, 28, 28)
"""Shape of one state."""
LEVELS = 1000
"""Noise levels of the tables."""
CLASSES = 10

PUBLISHED = {
    "ddpm_unet_28/model_mnist": (
        "b85ec80e55481b4a9fbda2f4c992c5c8e395f0ef9cc15fce937ebe428c0afc80"
    ),
    "ddpm_unet_28/model_fashion": (
        "59b0b181ec958581f6a74721d177599645086faa4b6c4a38f942f1b62242c3dd"
    ),
    "ddpm_cnn_mnist/model": "551f4597fc61489088c8f5d2c03e91667dfcc3ff31e34fac2cb3054de3cb8e1c",
    "mnist_classifier/model": "80fb81336c029ed70dced4ac5a57f8563b4d643ee96e5deeaea8a6b51b3d4d68",
}
"""SHA-256 of the published weights as safetensors."""


@final
class _Held(nn.Module):
    """Tensors of a file that are not trained, under a name of their own."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


@final
class _Block(nn.Module):
    """silu(conv2(silu(conv1(norm(x))))), the norm over channels and pixels.

    Args:
        channels: of the input.
        out: channels of the output.
        side: pixels along an edge.
        normed: ``False`` leaves the norm out; its tensors are in the file all the same.
    """

    def __init__(self, channels: int, out: int, side: int, normed: bool = True) -> None:
        super().__init__()
        shape, self.normed = (channels, side, side), normed
        self.ln = (
            nn.LayerNorm(shape)
            if normed
            else _Held(weight=torch.ones(shape), bias=torch.zeros(shape))
        )
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, side, side) -> (B, out, side, side)."""
        h = self.ln(x) if self.normed else x
        return silu(self.conv2(silu(self.conv1(h))))


def _stage(side: int, *channels: int, last_normed: bool = True) -> nn.Sequential:
    """Three blocks between four numbers of channels."""
    last = len(channels) - 2
    return nn.Sequential(
        *(
            _Block(channels[i], channels[i + 1], side, last_normed or i < last)
            for i in range(last + 1)
        )
    )


def _time_mlp(features: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, channels), nn.SiLU(), nn.Linear(channels, channels)
    )  # fmt: skip


@final
class DenoisingUNet(nn.Module):
    """Noise of an image: a U-Net of 491,172 parameters over 28, 14, 7 and 3 pixels.

    Its first norm removes the mean of the image, so that it can neither see nor predict the mean:
    its states are images of zero mean. It knows 1000 noise levels and nothing in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = _Held(weight=torch.zeros(LEVELS, 100))
        self.b1 = _stage(28, 1, 10, 10, 10)
        self.down1 = nn.Conv2d(10, 10, 4, 2, 1)
        self.b2 = _stage(14, 10, 20, 20, 20)
        self.down2 = nn.Conv2d(20, 20, 4, 2, 1)
        self.b3 = _stage(7, 20, 40, 40, 40)
        self.down3 = nn.Sequential(
            nn.Conv2d(40, 40, 2, 1), nn.SiLU(), nn.Conv2d(40, 40, 4, 2, 1)
        )  # fmt: skip
        self.b_mid = _stage(3, 40, 20, 20, 40)
        self.up1 = nn.Sequential(
            nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(40, 40, 2, 1)
        )
        self.b4 = _stage(7, 80, 40, 20, 20)
        self.up2 = nn.ConvTranspose2d(20, 20, 4, 2, 1)
        self.b5 = _stage(14, 40, 20, 10, 10)
        self.up3 = nn.ConvTranspose2d(10, 10, 4, 2, 1)
        self.b_out = _stage(28, 20, 10, 10, 10, last_normed=False)
        self.conv_out = nn.Conv2d(10, 1, 3, 1, 1)
        self.te1, self.te2, self.te3 = (_time_mlp(100, c) for c in (1, 10, 20))
        self.te_mid, self.te4 = _time_mlp(100, 40), _time_mlp(100, 80)
        self.te5, self.te_out = _time_mlp(100, 40), _time_mlp(100, 20)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 1, 28, 28) and times (B,) in [0, 1], rounded to the nearest level -> like x."""
        level = (LEVELS - 1 - LEVELS * t).round().long().clamp(0, LEVELS - 1)
        return self.at(x, level)

    def at(self, x: Tensor, level: Tensor) -> Tensor:
        """The noise at levels (B,) of integers, 0 for the least noise."""
        rows = torch.as_tensor(self.time_embed.weight)[level]

        def shift(mlp: nn.Module) -> Tensor:
            out: Tensor = mlp(rows)
            return out[:, :, None, None]

        first = self.b1(x + shift(self.te1))
        second = self.b2(self.down1(first) + shift(self.te2))
        third = self.b3(self.down2(second) + shift(self.te3))
        h = self.b_mid(self.down3(third) + shift(self.te_mid))
        h = self.b4(torch.cat([third, self.up1(h)], 1) + shift(self.te4))
        h = self.b5(torch.cat([second, self.up2(h)], 1) + shift(self.te5))
        h = self.b_out(torch.cat([first, self.up3(h)], 1) + shift(self.te_out))
        out: Tensor = self.conv_out(h)
        return out


@final
class _Layer(nn.Module):
    """A 7x7 convolution and a norm over channels and pixels."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, out, 7, padding=3), nn.LayerNorm((out, *EVENT[1:]))
        )

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.net(x))


@final
class DenoisingCNN(nn.Module):
    """Noise of an image: four wide convolutions without down-sampling, smooth in time.

    Its states are images in [-0.5, 0.5]. ``alpha_bar`` has 1001 entries, of which it was trained
    on all but the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [_Layer(1, 16), _Layer(16, 32), _Layer(32, 32), _Layer(32, 16)]
        )
        self.blocks.append(nn.Conv2d(16, 1, 3, padding=1))
        layers: list[nn.Module] = [nn.Linear(32, 128)]
        for out in (128, 128, 16):
            layers += [nn.GELU(), nn.Linear(128, out)]
        self.time_embed = nn.Sequential(*layers)
        for name, size in (("frequencies", 16), ("alpha_bar", LEVELS + 1), ("beta", LEVELS + 1)):
            self.register_buffer(name, torch.zeros(size))
        self.frequencies: Tensor
        self.alpha_bar: Tensor

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 1, 28, 28) and times (B,) in [0, 1] -> like x."""
        return self.at(x, 1 - t)

    def at(self, x: Tensor, level: Tensor) -> Tensor:
        """The noise at levels (B,) in (0, 1], 1 for noise alone."""
        angle = level[:, None] * self.frequencies
        features = torch.cat([angle.sin(), angle.cos() - 1], 1)
        h = self.blocks[0](x) + self.time_embed(features)[:, :, None, None]
        for block in list(self.blocks)[1:]:
            h = block(h)
        return torch.as_tensor(h)


@final
class MnistClassifier(nn.Module):
    """Logits of the ten digits of an image in [0, 1]; 98.9 % right on MNIST's test set."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 1, 28, 28) -> (B, 10)."""
        logits: Tensor = self.fc2(self.features(pixels))
        return logits

    def features(self, pixels: Tensor) -> Tensor:
        """The last hidden layer, (B, 500), by which Frechet distances of digits are measured."""
        h = (pixels - 0.1307) / 0.3081
        for conv in (self.conv1, self.conv2):
            h = max_pool2d(relu(conv(h)), 2)
        return relu(self.fc1(h.flatten(1)))


def pixels_of_centred(x: Tensor) -> Tensor:
    """Pixels in [0, 1] of a ``DenoisingUNet``'s states, (B, 1, 28, 28) -> the same shape.

    States have no brightness of their own: the 5 % quantile of each image is taken for its
    background, and becomes 0; ink is 1. Differentiable almost everywhere.
    """
    background = torch.quantile(x.flatten(1), 0.05, dim=1)
    return (0.5 * (x - background[:, None, None, None])).clamp(0, 1)


def pixels_of_half(x: Tensor) -> Tensor:
    """Pixels in [0, 1] of a ``DenoisingCNN``'s states, (B, 1, 28, 28) -> the same shape."""
    return (x + 0.5).clamp(0, 1)


def load_unet(path: str | Path) -> FlowModel:
    """The flow model of a ``DenoisingUNet``, on images of zero mean.

    Args:
        path: ``model_mnist.safetensors``, ``model_fashion.safetensors``, or weights that
            ``adapters.checkpoint.save_tensors`` wrote.

    Raises:
        CheckpointError: if the file is missing, damaged or of another model.
    """
    net = _loaded(DenoisingUNet(), path, "ddpm_unet_28/")
    alpha_bars = (1 - torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64)).cumprod(0)
    schedule = Tabulated((1.0, *alpha_bars.tolist()))
    space = ZeroMean(EVENT, over=(0, 1, 2))
    return freeze(FlowModel(net, schedule, space, predicts=Prediction.NOISE))


def load_cnn(path: str | Path) -> FlowModel:
    """The flow model of a ``DenoisingCNN``; arguments and errors as for ``load_unet``."""
    net = _loaded(DenoisingCNN(), path, "ddpm_cnn_mnist/")
    schedule = Tabulated((1.0, *net.alpha_bar.double().tolist()[1:]))
    return freeze(FlowModel(net, schedule, Euclidean(EVENT), predicts=Prediction.NOISE))


def load_mnist_classifier(path: str | Path) -> MnistClassifier:
    """The classifier, frozen; raises as ``load_unet``."""
    return _loaded(MnistClassifier(), path, "mnist_classifier/").requires_grad_(False)


def _loaded(net: _Net, path: str | Path, prefix: str) -> _Net:
    digests = {digest: name for name, digest in PUBLISHED.items() if name.startswith(prefix)}
    net.load_state_dict(load_published(path, net.state_dict(), digests))
    # Convolutions of few channels are a quarter faster so, on a CPU.
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return net.eval()

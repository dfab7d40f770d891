"""Images as rewards see them: pixels in [0, 1], prepared for CLIP, or written as JPEG."""

from __future__ import annotations

import importlib
import io
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from tiltflow.errors import CapabilityError, ConfigError, NonFiniteError, ShapeError
from tiltflow.potential import Potential
from tiltflow.types import Access, Cond

STEP = 1 / 255
"""Of 8-bit pixels; images may leave [0, 1] by this much."""

ROUNDING = 1e-4
"""How far resized pixels may leave [0, 1] before they are clamped: far below a step of 8 bits, and
above rounding, which would otherwise take the gradient of white areas at random."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def checked_images(images: Tensor, user: str) -> Tensor:
    """The images, if they are (B, 3, H, W) of floating point within [0, 1], up to 1/255.

    Raises:
        ShapeError: for another shape, dtype or range: features of pixels in [-1, 1] or [0, 255]
            are those of other images, and no later step would notice.
        NonFiniteError: if a pixel is NaN.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ShapeError(
            f"{user} needs images (B, 3, H, W) of floating point in [0, 1], got "
            f"{tuple(images.shape)} of {images.dtype}. For states that are latents, or in "
            "another range, use Decoded(reward, decode)."
        )
    if not images.numel():
        return images
    low, high = (float(end) for end in images.detach().aminmax())
    if low != low:
        raise NonFiniteError(user, f"{len(images)} images", "a pixel", "Look at the decoder.")
    if low < -STEP or high > 1 + STEP:
        raise ShapeError(
            f"{user} needs pixels in [0, 1]; these run from {low:.3g} to {high:.3g}. Rescale and "
            "clamp them, as in Decoded(reward, decode) with a decode that ends in [0, 1]."
        )
    return images


@final
@dataclass(frozen=True)
class ClipPixels:
    """What CLIP's image encoder is given, (B, 3, H, W) in [0, 1] -> (B, 3, size, size)::

        (crop(resize(images)) - mean) / std

    The shorter side is resized to ``size`` by antialiased cubic interpolation, the width
    before the height, each clamped to [0, 1]; then the centre is cut out. It is what CLIP's own
    processor does with 8-bit images, without the rounding in between, and differentiable.
    Overshoot of the interpolation is clamped and has no gradient.

    Args:
        size: of the square, in pixels.
        mean: of each channel.
        std: of each channel.
    """

    size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if self.size < 1 or not min(self.std) > 0:
            raise ConfigError(f"ClipPixels: size={self.size} and std={self.std} must be positive.")

    def __call__(self, images: Tensor) -> Tensor:
        x = self.cut(images)
        return (x - self._channels(self.mean, x)) / self._channels(self.std, x)

    def cut(self, images: Tensor) -> Tensor:
        """The resized centre in [0, 1], before it is normalised."""
        x = _clamped(wide(checked_images(images, "ClipPixels")))
        height, width = x.shape[2:]
        short = min(height, width)
        new = (self.size * height // short, self.size * width // short)
        for shape in ((height, new[1]), new):
            if tuple(x.shape[2:]) != shape:
                x = _clamped(
                    torch.nn.functional.interpolate(x, shape, mode="bicubic", antialias=True)
                )
        top, left = (new[0] - self.size) // 2, (new[1] - self.size) // 2
        return x[:, :, top : top + self.size, left : left + self.size]

    @staticmethod
    def _channels(numbers: tuple[float, float, float], x: Tensor) -> Tensor:
        return x.new_tensor(numbers).view(3, 1, 1)


def wide(x: Tensor) -> Tensor:
    """In single precision at least: half of it cannot be interpolated, and hides differences of
    rewards."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _clamped(x: Tensor) -> Tensor:
    return x.clamp(-ROUNDING, 1 + ROUNDING)


def eight_bit(images: Tensor) -> Tensor:
    """Pixels 0 to 255, (B, 3, H, W) in [0, 1] -> (B, H, W, 3) of uint8 on the CPU."""
    x = checked_images(images, "eight_bit").detach()
    return (255 * wide(x).clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


@final
@dataclass(frozen=True, eq=False)
class JpegSize(Potential):
    """How well an image compresses, values only::

        r(x) = -bytes(JPEG(x)) / 1000,                                  in kB, r < 0

    of the 8-bit image, by Pillow. Maximal for a uniform image; ``-1 * JpegSize()`` rewards detail
    (Black et al., 2023). The number grows with the image's area, and
    belongs to this version of Pillow's encoder; it is the same for the same image.

    Args:
        quality: of the JPEG, 1 to 95.

    Raises:
        CapabilityError: if Pillow is not installed.
    """

    quality: int = 95

    def __post_init__(self) -> None:
        if self.quality not in range(1, 96):
            raise ConfigError(f"JpegSize: quality={self.quality} must be 1 to 95.")
        _pillow()

    @property
    def offers(self) -> Access:
        return Access.VALUE

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        sizes = [self._bytes(pixels.numpy()) for pixels in eight_bit(x)]
        return torch.tensor(sizes, dtype=torch.float64).div(-1000).to(wide(x))

    def _bytes(self, pixels: Any) -> int:
        file = io.BytesIO()
        _pillow().fromarray(pixels).save(file, format="JPEG", quality=self.quality)
        return file.tell()

    def __str__(self) -> str:
        return f"JpegSize({self.quality})"


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise CapabilityError("JpegSize needs Pillow: pip install pillow.") from error


__all__ = ["ClipPixels", "JpegSize", "checked_images", "eight_bit", "wide"]

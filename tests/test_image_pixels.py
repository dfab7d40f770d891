"""What rewards of images are shown: CLIP's pixels, and 8-bit ones for JPEGs."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from tiltflow.errors import CapabilityError
from tiltflow.rewards import JpegSize
from tiltflow.rewards.pixels import ClipPixels
from tiltflow.types import Access
from tiny_clip import SIZE, images, in_steps, processor


@pytest.mark.parametrize(("height", "width"), [(24, 24), (96, 70), (31, 57), (20, 15), (512, 300)])
def test_pixels_are_those_of_clips_processor(height: int, width: int) -> None:
    """Up to the rounding to 8 bits that Pillow makes after each of two passes."""
    x = in_steps(images(2, height, width))
    own = ClipPixels(SIZE)
    theirs = processor(SIZE)(list((255 * x).round().to(torch.uint8)), return_tensors="pt")
    theirs = theirs["pixel_values"].double()
    assert own(x).shape == theirs.shape == (2, 3, SIZE, SIZE)
    std = torch.tensor(own.std, dtype=torch.float64).view(3, 1, 1)
    assert float(((own(x) - theirs) * std).abs().max()) < 1.5 / 255


def test_hard_edges_are_clamped_as_pillow_clamps_them() -> None:
    """Black and white noise, enlarged: cubic interpolation leaves [0, 1] by a tenth."""
    x = (images(2, 11, 13, seed=2) > 0.5).double()
    theirs = processor(SIZE)(list((255 * x).to(torch.uint8)), return_tensors="pt")["pixel_values"]
    own = ClipPixels(SIZE)
    std = torch.tensor(own.std, dtype=torch.float64).view(3, 1, 1)
    assert float(((own(x) - theirs) * std).abs().max()) < 1.5 / 255
    free = nn.functional.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True)
    assert float(free.max()) > 1.05


def test_white_has_a_gradient() -> None:
    """Rounding of the interpolation does not take it from single pixels."""
    x = torch.ones(1, 3, 50, 50).requires_grad_()
    (grad,) = torch.autograd.grad(ClipPixels(SIZE).cut(x).sum(), x)
    assert float(grad.sum()) == pytest.approx(3 * SIZE**2, rel=1e-4)


def test_jpeg_size_is_pillows() -> None:
    """The bytes of the file that Pillow writes of the same 8-bit image, over 1000."""
    from PIL import Image

    x = torch.cat([images(3, 50, 34), torch.full((1, 3, 50, 34), 0.5, dtype=torch.float64)])
    for quality in (30, 95):
        expected = []
        for image in (255 * x).round().to(torch.uint8):
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
            expected.append(-len(file.getvalue()) / 1000)
        assert JpegSize(quality).value(x).tolist() == expected
    value = JpegSize().value(x)
    assert int(value.argmax()) == 3, "a uniform image is the smallest"
    assert JpegSize().offers is Access.VALUE
    assert bool((JpegSize(30).value(x)[:3] > value[:3]).all())
    with pytest.raises(CapabilityError, match="GRAD is missing"):
        JpegSize().grad(x)

"""From states to images in [0, 1], with gradients: what rewards of latent models see."""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tiltflow.errors import ConfigError
from tiltflow.lora import sharing_copy


def pixels(x: Tensor) -> Tensor:
    """Images in [0, 1] of states in [-1, 1], as diffusers shows them, (B, C, H, W) -> same."""
    return (0.5 * x + 0.5).clamp(0, 1)


@final
class Decoder:
    """Latents (B, c, h, w) -> images (B, 3, H, W) in [0, 1], differentiable in the latents::

        images = (VAE(latents / scaling_factor + shift_factor) + 1) / 2, clamped

    with the VAE's own factors (or its means and standard deviations of latents). To be used as
    ``Decoded(reward, decoder)``. The clamp is the pipeline's: pixels beyond the range have no
    gradient.

    Args:
        vae: ``AutoencoderKL`` or one with the same ``decode``; it is not changed.
        tiled: decode in overlapping tiles, for large images: memory of one tile, and slightly
            different images at the seams.
        checkpointed: keep no activations; the backward pass decodes a second time.
        dtype: of the decoding, e.g. ``torch.bfloat16``; makes a copy of the VAE where it differs.
            By default the VAE's own, but float32 for one in float16 whose config says that it
            overflows (``force_upcast``, Stable Diffusion XL).

    Raises:
        ConfigError: if the VAE cannot be tiled.
    """

    def __init__(
        self,
        vae: Any,
        *,
        tiled: bool = False,
        checkpointed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is None and vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            dtype = torch.float32
        other = dtype is not None and dtype != vae.dtype
        self.vae: Any = copy.deepcopy(vae).to(dtype) if other else sharing_copy(vae)
        self.vae.requires_grad_(False).eval()
        self.checkpointed = checkpointed
        if tiled and not hasattr(self.vae, "enable_tiling"):
            raise ConfigError(f"Decoder: {type(vae).__name__} has no tiles; use tiled=False.")
        if tiled:
            self.vae.enable_tiling()

    def __call__(self, latents: Tensor) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled() and latents.requires_grad:
            return torch.as_tensor(checkpoint(self._decoded, latents, use_reentrant=False))
        return self._decoded(latents)

    def _decoded(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        z = latents / config.scaling_factor
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            shape = (1, -1, 1, 1)
            z = z * z.new_tensor(std).view(shape) + z.new_tensor(mean).view(shape)
        elif config.get("shift_factor") is not None:
            z = z + config.shift_factor
        dtype = next(self.vae.parameters()).dtype
        out = self.vae.decode(z.to(dtype), return_dict=False)[0]
        return pixels(out.to(latents.dtype))

"""Denoising networks of diffusers in this library's time, signs and conditions.

A network of diffusers is asked at a timestep (0 data, 1000 noise) and returns noise, v, data or
the velocity from data to noise. ``PipelineNet`` is asked at t (0 noise, 1 data) and returns noise,
end points or the velocity from noise to data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from tiltflow.adapters.diffusers_schedules import timestep_of
from tiltflow.errors import ShapeError, UnsupportedError
from tiltflow.flow import Prediction
from tiltflow.schedule import Schedule
from tiltflow.types import Cond, expand_as

Call = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""A network's raw output, of (network, x, timestep (B,), conditions in its dtype)."""

PREDICTIONS = {
    "epsilon": Prediction.NOISE,
    "sample": Prediction.ENDPOINT,
    "v_prediction": Prediction.VELOCITY,
    "flow": Prediction.VELOCITY,
}
"""What a ``PipelineNet`` returns, by what its backbone was trained to predict."""


@final
class PipelineNet(nn.Module):
    """A denoising network of diffusers as ``net(x, t, cond)``.

    With v = alpha noise - beta data (diffusers' sign) and D = alpha' beta - alpha beta', the
    velocity of a variance-preserving path is -D v; that of a flow is minus diffusers', which runs
    from data to noise. With a guidance scale w and the conditions of nothing (the negative
    prompt), outputs are out(nothing) + w (out(cond) - out(nothing)), both asked in one batch.

    Args:
        backbone: U-Net or transformer.
        call: how it is called.
        kind: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"flow"``.
        schedule: of the model.
        total: number of timesteps it was trained with.
        scale: of guidance; 1 is none.
        nothing: conditions of one sample, needed for guidance.
        rollout_scale: guidance of roll-outs that train this network; see ``behaving``.
        clip: returns end points, clamped to [-clip, clip]; pixels beyond have no gradient.
    """

    def __init__(
        self,
        backbone: nn.Module,
        call: Call,
        kind: str,
        schedule: Schedule,
        total: int = 1000,
        *,
        scale: float = 1.0,
        nothing: Mapping[str, Tensor] | None = None,
        rollout_scale: float = 1.0,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.call, self.kind = backbone, call, kind
        self.schedule, self.total = schedule, total
        self.scale, self.rollout_scale = scale, rollout_scale
        self.nothing, self.clip = dict(nothing or {}), clip

    @property
    def predicts(self) -> Prediction:
        """What it returns."""
        return PREDICTIONS[self.kind] if self.clip is None else Prediction.ENDPOINT

    def guided(self, scale: float, nothing: Mapping[str, Tensor] | None = None) -> PipelineNet:
        """The same backbone with guidance in every output."""
        return PipelineNet(
            self.backbone, self.call, self.kind, self.schedule, self.total,
            scale=scale, nothing=nothing or self.nothing, clip=self.clip,
        )  # fmt: skip

    def behaving(self) -> PipelineNet | None:
        """The network that roll-outs of a training are made with, where it is another one."""
        return self.guided(self.rollout_scale) if self.rollout_scale != 1 else None

    def timesteps(self, t: Tensor) -> Tensor:
        """What the backbone is told at times t (B,)."""
        if self.kind == "flow":
            return (1 - t) * self.total
        return timestep_of(t, self.total)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """(B, *event), (B,) -> like x."""
        given = {k: torch.as_tensor(v) for k, v in (cond or {}).items() if isinstance(v, Tensor)}
        timestep = self.timesteps(t)
        if self.scale == 1:
            return self._converted(self._asked(x, timestep, given), x, t)
        own = {key: _entry(given, key) for key in self.nothing}
        both = {
            key: torch.cat([self.nothing[key].to(e).expand_as(e), e]) for key, e in own.items()
        }
        out = self._asked(torch.cat([x, x]), torch.cat([timestep, timestep]), both)
        nothing, something = out.chunk(2)
        return self._converted(nothing + self.scale * (something - nothing), x, t)

    def _asked(self, x: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        dtype = next(self.backbone.parameters()).dtype
        cast = {k: v.to(x.device, dtype) if v.is_floating_point() else v.to(x.device)
                for k, v in cond.items()}  # fmt: skip
        out = self.call(self.backbone, x.to(dtype), timestep, cast).to(x.dtype)
        if out.ndim == x.ndim and out.shape[1] == 2 * x.shape[1]:
            out = out[:, : x.shape[1]]  # the rest is a learned variance, which no step here uses
        return out

    def _converted(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.clip is not None:
            return self._image(out, x, t).clamp(-self.clip, self.clip)
        if self.kind == "flow":
            return -out
        if self.kind == "v_prediction":
            return -expand_as(self.schedule.wronskian(t), out) * out
        return out

    def _image(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The end point that an output means, on a path with alpha^2 + beta^2 = 1."""
        alpha, beta = (expand_as(f(t), x) for f in (self.schedule.alpha, self.schedule.beta))
        if self.kind == "v_prediction":
            return alpha * x - beta * out
        return out if self.kind == "sample" else (x - beta * out) / alpha


def _entry(cond: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in cond:
        raise ShapeError(
            f"The network needs the condition {key!r}; pass conditions=..., or cond= of the "
            "prompts: adapted(...).prompts."
        )
    return cond[key]


def of_images(net: nn.Module, x: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """``UNet2DModel``: no conditions."""
    return _first(net(x, timestep, return_dict=False))


def of_text(net: nn.Module, x: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """``UNet2DConditionModel`` of Stable Diffusion 1 and 2."""
    text = _entry(cond, "text")
    return _first(net(x, timestep, encoder_hidden_states=text, return_dict=False))


def of_text_and_size(
    net: nn.Module, x: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]
) -> Tensor:
    """``UNet2DConditionModel`` of Stable Diffusion XL."""
    added = {"text_embeds": _entry(cond, "pooled"), "time_ids": _entry(cond, "sizes")}
    out = net(
        x, timestep, encoder_hidden_states=_entry(cond, "text"), added_cond_kwargs=added,
        return_dict=False,
    )  # fmt: skip
    return _first(out)


def of_pooled_text(
    net: nn.Module, x: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]
) -> Tensor:
    """``SD3Transformer2DModel``."""
    out = net(
        hidden_states=x, timestep=timestep, encoder_hidden_states=_entry(cond, "text"),
        pooled_projections=_entry(cond, "pooled"), return_dict=False,
    )  # fmt: skip
    return _first(out)


def of_masked_text(
    net: nn.Module, x: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]
) -> Tensor:
    """``PixArtTransformer2DModel`` and ``SanaTransformer2DModel``."""
    extra: dict[str, Any] = {}
    config: Any = net.config
    if type(net).__name__ == "PixArtTransformer2DModel":
        extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        if config.sample_size == 128:  # the 1024-pixel models are told the size in pixels
            size = x.new_tensor([[8.0 * x.shape[2], 8.0 * x.shape[3]]]).expand(len(x), 2)
            ratio = size[:, :1] / size[:, 1:]
            extra = {"added_cond_kwargs": {"resolution": size, "aspect_ratio": ratio}}
    out = net(
        x, encoder_hidden_states=_entry(cond, "text"),
        timestep=timestep * config.get("timestep_scale", 1.0),
        encoder_attention_mask=_entry(cond, "text_mask"), return_dict=False, **extra,
    )  # fmt: skip
    return _first(out)


def of_packed(
    net: nn.Module,
    x: Tensor,
    timestep: Tensor,
    cond: Mapping[str, Tensor],
    *,
    told: float | None = None,
) -> Tensor:
    """``FluxTransformer2DModel``: every 2 x 2 latents (B, c, h, w) are a token of width 4 c.

    ``told``: the guidance that a distilled model was taught to imitate (Flux dev).
    """
    (count, channels, height, width), text = x.shape, _entry(cond, "text")
    tokens = x.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    rows, columns = torch.meshgrid(
        torch.arange(height // 2), torch.arange(width // 2), indexing="ij"
    )
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(x)
    guidance = None if told is None else torch.full((count,), told, device=x.device)
    out = net(
        hidden_states=tokens.reshape(count, -1, 4 * channels), timestep=timestep / 1000,
        guidance=guidance, pooled_projections=_entry(cond, "pooled"), encoder_hidden_states=text,
        txt_ids=text.new_zeros(text.shape[1], 3), img_ids=places, return_dict=False,
    )  # fmt: skip
    grid = _first(out).reshape(count, height // 2, width // 2, channels, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def _first(out: Any) -> Tensor:
    return torch.as_tensor(out[0])


def is_flux(backbone: Any) -> bool:
    """Whether states are packed into tokens."""
    return type(backbone).__name__ == "FluxTransformer2DModel"


def call_of(backbone: Any, told: float) -> Call:
    """How a network of diffusers is called.

    Args:
        backbone: the network.
        told: the guidance that a distilled one is told.

    Raises:
        UnsupportedError: for other networks, or inputs that are not known here.
    """
    inputs, outputs = (backbone.config.get(f"{side}_channels") for side in ("in", "out"))
    if outputs not in (None, inputs, 2 * inputs):
        raise UnsupportedError(
            f"{type(backbone).__name__} reads {inputs} channels and returns {outputs}: it is "
            "asked with more than a state (inpainting, edits), which this adapter does not do."
        )
    if is_flux(backbone):
        return partial(of_packed, told=told if backbone.config.guidance_embeds else None)
    name = type(backbone).__name__
    if name == "UNet2DModel" and not backbone.config.get("num_class_embeds"):
        return of_images
    if name == "UNet2DConditionModel":
        calls = {None: of_text, "text_time": of_text_and_size}
        plain = backbone.config.get("time_cond_proj_dim") is None
        if plain and backbone.config.get("addition_embed_type") in calls:
            return calls[backbone.config.get("addition_embed_type")]
    calls_by_name = {
        "SD3Transformer2DModel": of_pooled_text,
        "PixArtTransformer2DModel": of_masked_text,
        "SanaTransformer2DModel": of_masked_text,
    }
    if name in calls_by_name and not backbone.config.get("guidance_embeds"):
        return calls_by_name[name]
    raise UnsupportedError(
        f"This adapter does not know how to ask a {name} with this config. Make a FlowModel of "
        "it: a module net(x, t, cond) in this library's time (docs/adapters.md)."
    )

"""Pipelines of diffusers as flow models: pixel and latent diffusion, flow-matching transformers.

Stable Diffusion 1, 2, XL and 3, PixArt, SANA, Flux, and unconditional DDPM. Loading is
diffusers' own; schedules and grids come from the pipeline's scheduler (``diffusers_schedules``),
prompts from its text encoders, images from its VAE. Sampling and training are this library's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from tiltflow.adapters.diffusers_decode import Decoder, pixels
from tiltflow.adapters.diffusers_nets import (
    PipelineNet,
    call_of,
    is_flux,
    of_images,
)
from tiltflow.adapters.diffusers_prompts import Guidance, Prompts, conditions_of
from tiltflow.adapters.diffusers_schedules import (
    prediction_of,
    sampler_of,
    schedule_of,
    unclipped,
)
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel, freeze
from tiltflow.lora import LoRA, lora_tensors, merged, with_lora
from tiltflow.sample import Sampler
from tiltflow.space import Euclidean


@final
@dataclass(frozen=True)
class ImageModel:
    """A pipeline as a flow model, and what its states and conditions are.

    Attributes:
        model: the flow model, frozen; ``clone`` makes one to train.
        pipeline: diffusers' own, not changed.
        prompts: to be passed as ``conditions``; ``None`` for models without.
        decode: states -> images in [0, 1], to be used as ``Decoded(reward, decode)``.
        size: height and width of the images.
    """

    model: FlowModel
    pipeline: Any
    prompts: Prompts | None
    decode: Callable[[Tensor], Tensor]
    size: tuple[int, int]

    def sampler(self, num_steps: int, *, noise: bool = True) -> Sampler:
        """The steps of the pipeline's scheduler: with ``noise`` to train, without it to sample.

        Raises:
            ConfigError, UnsupportedError: as ``diffusers_schedules.times_of``.
        """
        sigmas = None
        if _part(self.pipeline) == "transformer" and is_flux(self.pipeline.transformer):
            sigmas = [1 - k / num_steps for k in range(num_steps)]  # its pipeline's own choice
        scheduler, _ = unclipped(self.pipeline.scheduler)
        return sampler_of(scheduler, num_steps, noise=noise, sigmas=sigmas, mu=self._mu())

    def _mu(self) -> float | None:
        """Shift by size, as the pipelines of Stable Diffusion 3 and Flux compute it."""
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return None
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
            calculate_shift,
        )

        _, height, width = self.model.space.event
        net = self.pipeline.transformer
        patch = 2 if is_flux(net) else net.config.patch_size
        numbers = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift,
                   config.max_shift)  # fmt: skip
        return float(calculate_shift((height // patch) * (width // patch), *numbers))

    def guided(self, model: FlowModel, scale: float) -> FlowModel:
        """This model, or a tuned one, with guidance in every output: to sample, not to train.

        What a model without guidance was tuned to is its own law; guided samples are of another.

        Raises:
            ConfigError: if the conditions of nothing are not known: they are where prompts were
                given as texts, or a ``Guidance`` with its negative prompt.
        """
        net = _net(model)
        if not net.nothing:
            raise ConfigError(
                "guided: the encoding of the negative prompt is not known; give prompts as texts, "
                "or Guidance(..., negative=Prompts(...))."
            )
        return FlowModel(
            net.guided(scale), model.schedule, model.space, predicts=model.predicts,
            delta=model.delta, takes_cond=model.takes_cond, moments=model.moments,
        )  # fmt: skip

    def with_decoder(
        self,
        *,
        tiled: bool = False,
        checkpointed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> ImageModel:
        """The same with another ``Decoder``."""
        vae = _vae(self.pipeline)
        if vae is None:
            raise ConfigError("with_decoder: the states of this model are images; it has no VAE.")
        decode = Decoder(vae, tiled=tiled, checkpointed=checkpointed, dtype=dtype)
        return replace(self, decode=decode)

    def save_lora(self, model: FlowModel, folder: str | Path) -> None:
        """Write the adapters of a tuned model as ``pytorch_lora_weights.safetensors``.

        ``pipeline.load_lora_weights(folder)`` of diffusers reads them.

        Raises:
            ConfigError: if the model was trained in full.
            UnsupportedError: if the pipeline reads no such weights (unconditional models); use
                ``tuned_pipeline(model).save_pretrained(folder)``.
        """
        if not isinstance(model.delta, LoRA):
            raise ConfigError(
                "save_lora: the model was not trained by low-rank adapters; use "
                "tuned_pipeline(model).save_pretrained(folder)."
            )
        save = getattr(type(self.pipeline), "save_lora_weights", None)
        if save is None:
            raise UnsupportedError(
                f"save_lora: {type(self.pipeline).__name__} cannot load LoRA weights; use "
                "tuned_pipeline(model).save_pretrained(folder)."
            )
        kind = "unet" if _part(self.pipeline) == "unet" else "transformer"
        tensors = {k: v.cpu().contiguous() for k, v in lora_tensors(_backbone(model)).items()}
        save(str(folder), **{f"{kind}_lora_layers": tensors})

    def tuned_pipeline(self, model: FlowModel) -> Any:
        """A plain pipeline of diffusers with the tuned network in it; other parts are shared."""
        net = _backbone(model)
        part = _part(self.pipeline)
        tuned = merged(net) if isinstance(model.delta, LoRA) else net
        parts = {**self.pipeline.components, part: tuned}
        return type(self.pipeline)(**parts, **_flags(self.pipeline))


def load_pipeline(
    name: str | Path,
    *,
    prompts: Sequence[str] | Prompts = (),
    guidance: Guidance | None = None,
    size: tuple[int, int] | None = None,
    lora: int | None = 16,
    told: float = 3.5,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> ImageModel:
    """A pipeline from a folder or the hub, by ``DiffusionPipeline.from_pretrained``.

    Args:
        name: folder or repository.
        prompts: as for ``adapted``.
        guidance: as for ``adapted``.
        size: as for ``adapted``.
        lora: as for ``adapted``.
        told: as for ``adapted``.
        device: where the whole pipeline is put.
        kwargs: of ``from_pretrained``, e.g. ``torch_dtype``, ``variant``, ``revision``.
            ``use_safetensors=True`` unless said otherwise: pickled weights can run code.

    Raises:
        ConfigError: if diffusers is missing.
        ConfigError, UnsupportedError: as ``adapted``.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise ConfigError(
            "load_pipeline needs diffusers: pip install 'tiltflow[diffusers]'."
        ) from None
    pipeline = DiffusionPipeline.from_pretrained(name, **{"use_safetensors": True, **kwargs})
    pipeline = pipeline if device is None else pipeline.to(device)
    return adapted(
        pipeline, prompts=prompts, guidance=guidance, size=size, lora=lora, told=told
    )  # fmt: skip


def adapted(
    pipeline: Any,
    *,
    prompts: Sequence[str] | Prompts = (),
    guidance: Guidance | None = None,
    size: tuple[int, int] | None = None,
    lora: int | None = 16,
    told: float = 3.5,
) -> ImageModel:
    """A pipeline of diffusers as a flow model.

    Args:
        pipeline: of Stable Diffusion 1, 2, XL or 3, PixArt, SANA, Flux, or DDPM / DDIM without
            conditions.
        prompts: texts, encoded once, or encodings; none for unconditional models.
        guidance: ``None`` for none.
        size: height and width of images in pixels; the model's own by default.
        lora: rank of the adapters that are trained; ``None`` trains all weights.
        told: the ``guidance_scale`` that a distilled model is told (Flux dev), which is one input
            of the network and no ``Guidance``.

    Raises:
        ConfigError: if prompts are missing, or not wanted; if the size does not fit.
        UnsupportedError: for other pipelines or schedulers.
    """
    part = _part(pipeline)
    backbone = getattr(pipeline, part)
    call = call_of(backbone, told)
    (scheduler, clip), vae = unclipped(pipeline.scheduler), _vae(pipeline)
    schedule, kind = schedule_of(scheduler), prediction_of(scheduler)
    event, size = _event(backbone, vae, pipeline, size)
    given, nothing = None, None
    if call is not of_images:
        given, nothing = conditions_of(pipeline, prompts, guidance, size)
    elif len(prompts) or guidance is not None:
        raise ConfigError("adapted: the model takes no prompts, and has no guidance.")
    scale = 1.0 if guidance is None else guidance.scale
    everywhere = guidance is None or guidance.mode == "everywhere"
    net = PipelineNet(
        backbone, call, kind, schedule, int(scheduler.config.num_train_timesteps),
        scale=scale if everywhere else 1.0, rollout_scale=1.0 if everywhere else scale,
        nothing=nothing.tensors if nothing is not None else None, clip=clip,
    )  # fmt: skip
    model = freeze(
        FlowModel(
            net, schedule, Euclidean(event), predicts=net.predicts,
            takes_cond=given is not None,
        )
    )  # fmt: skip
    model = model if lora is None else with_lora(model, lora)
    return ImageModel(model, pipeline, given, pixels if vae is None else Decoder(vae), size)


def _part(pipeline: Any) -> str:
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise UnsupportedError(
        f"{type(pipeline).__name__} has neither a `unet` nor a `transformer`; this adapter knows "
        "pipelines with one denoising network."
    )


def _vae(pipeline: Any) -> Any:
    return getattr(pipeline, "vae", None)


def _event(
    backbone: Any, vae: Any, pipeline: Any, size: tuple[int, int] | None
) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Shape of a state, and height and width of the images."""
    factor = 1 if vae is None else int(pipeline.vae_scale_factor)
    channels, multiple = int(backbone.config.in_channels), factor
    if is_flux(backbone):
        channels, multiple = channels // 4, 2 * factor
        size = size or (128 * factor, 128 * factor)
    if size is None:
        own = backbone.config.sample_size
        height, width = (own, own) if isinstance(own, int) else own
        size = (height * factor, width * factor)
    if any(n < 1 or n % multiple for n in size):
        raise ConfigError(f"adapted: size={size} must be multiples of {multiple} pixels.")
    return (channels, size[0] // factor, size[1] // factor), size


def _net(model: FlowModel) -> PipelineNet:
    if not isinstance(model.net, PipelineNet):
        raise ConfigError("The model was not made of a pipeline, or is a view of one.")
    return model.net


def _backbone(model: FlowModel) -> nn.Module:
    return _net(model).backbone


def _flags(pipeline: Any) -> dict[str, Any]:
    """Arguments of a pipeline's constructor that are not parts of it."""
    wanted = inspect.signature(type(pipeline).__init__).parameters
    return {k: v for k, v in pipeline.config.items()
            if k in wanted and k not in pipeline.components}  # fmt: skip


__all__ = ["Guidance", "ImageModel", "Prompts", "adapted", "load_pipeline"]

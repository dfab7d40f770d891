"""Pipelines of diffusers with tiny networks and random weights, made without any download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiltflow.adapters.diffusers_prompts import Prompts
from tiny_clip import tokenizer

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TOKENS, WIDTH, POOLED = 8, 8, 12


def ddim(**config: Any) -> Any:
    from diffusers import DDIMScheduler

    settings = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **SD}
    return DDIMScheduler(**{**settings, **config})


def unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16),
        "layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": WIDTH,
        "attention_head_dim": 4, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**{**settings, **config})


def vae(**config: Any) -> Any:
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4,
        "sample_size": 16, "scaling_factor": 0.5,
    }  # fmt: skip
    return AutoencoderKL(**{**settings, **config})


def text_encoder(projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=projection or WIDTH,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=54, d_model=WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def with_text_encoders(kind: str, folder: Path) -> Any:
    """Pipelines that read prompts. T5's and Gemma's tokenizers are CLIP's here, Gemma is T5."""
    from diffusers import (
        FluxPipeline,
        PixArtAlphaPipeline,
        SanaPipeline,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    words = tokenizer(folder, TOKENS)
    if kind in ("sana", "pixart"):
        made = SanaPipeline if kind == "sana" else PixArtAlphaPipeline
        return made(**{**KINDS[kind]().components, "tokenizer": words, "text_encoder": t5()})
    if kind == "flux":
        parts = {**flux(pooled=WIDTH).components, "tokenizer": words, "tokenizer_2": words}
        return FluxPipeline(**{**parts, "text_encoder": text_encoder(), "text_encoder_2": t5()})
    if kind == "sd":
        parts = {**stable_diffusion().components, "text_encoder": text_encoder()}
        parts["tokenizer"] = words
        return StableDiffusionPipeline(**parts, requires_safety_checker=False)
    if kind == "sdxl":
        parts = {**stable_diffusion_xl(2 * WIDTH).components, "text_encoder": text_encoder(),
                 "text_encoder_2": text_encoder(POOLED), "tokenizer": words,
                 "tokenizer_2": words}  # fmt: skip
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    encoders = {f"text_encoder{end}": text_encoder(POOLED // 2) for end in ("", "_2")}
    tokenizers = {"tokenizer": words, "tokenizer_2": words}
    parts = {**stable_diffusion_3(width=2 * WIDTH).components, **encoders, **tokenizers}
    return StableDiffusion3Pipeline(**parts)


def unconditional(**config: Any) -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(1)
    net = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16),
        layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    return DDPMPipeline(net, DDPMScheduler(**{"clip_sample": False, **config}))


def stable_diffusion(scheduler: Any = None) -> Any:
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(2)
    return StableDiffusionPipeline(
        vae(), None, None, unet(), scheduler or ddim(), None, None, requires_safety_checker=False
    )


def stable_diffusion_xl(width: int = WIDTH) -> Any:
    from diffusers import StableDiffusionXLPipeline

    torch.manual_seed(3)
    net = unet(
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + POOLED, cross_attention_dim=width,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae(), None, None, None, None, net, ddim(), add_watermarker=False
    )


def stable_diffusion_3(width: int = WIDTH, **config: Any) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(4)
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=width, caption_projection_dim=8,
        pooled_projection_dim=POOLED, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        net, FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config}),
        vae(shift_factor=0.1), None, None, None, None, None, None,
    )  # fmt: skip


def sana() -> Any:
    from diffusers import (
        AutoencoderDC,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    torch.manual_seed(5)
    net = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
        cross_attention_dim=8, caption_channels=WIDTH, sample_size=8, mlp_ratio=2.0,
    )  # fmt: skip
    coder = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), upsample_block_type="interpolate",
        downsample_block_type="stride_conv", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41,
    )  # fmt: skip
    return SanaPipeline(None, None, coder, net, FlowMatchEulerDiscreteScheduler(shift=3.0))


def pixart() -> Any:
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(6)
    net = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=8, sample_size=8, patch_size=2, caption_channels=WIDTH,
    )  # fmt: skip
    return PixArtAlphaPipeline(None, None, vae(), net, ddim())


def flux(guided: bool = False, pooled: int = POOLED) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(7)
    net = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=pooled,
        guidance_embeds=guided, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4)
    return FluxPipeline(scheduler, vae(shift_factor=0.1), None, None, None, None, net)


def prompts(kind: str, count: int = 2, seed: int = 7) -> Prompts:
    """Encodings of as many prompts as a kind of pipeline takes them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"text": torch.randn(count, TOKENS, WIDTH, generator=generator)}
    if kind in ("sdxl", "sd3", "flux"):
        tensors["pooled"] = torch.randn(count, POOLED, generator=generator)
    if kind == "sdxl":
        tensors["sizes"] = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(count, 6)
    if kind in ("sana", "pixart"):
        mask = torch.ones(count, TOKENS, dtype=torch.long)
        mask[:, -1] = 0
        tensors["text_mask"] = mask
    return Prompts(tensors)


KINDS = {
    "sd": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3, "sana": sana,
    "pixart": pixart,
}  # fmt: skip


def embeddings(kind: str, given: Prompts, nothing: Prompts | None) -> dict[str, Any]:
    """Arguments of a pipeline's call with these encodings."""
    names = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds",
             "text_mask": "prompt_attention_mask"}  # fmt: skip
    out = {names[k]: v for k, v in given.tensors.items() if k in names}
    for k, v in (nothing.tensors if nothing else {}).items():
        if k in names:
            out[f"negative_{names[k]}"] = v.expand(len(given), *v.shape[1:])
    return out

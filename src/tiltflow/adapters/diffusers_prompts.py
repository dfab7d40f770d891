"""Prompts as conditions: encoded once by a pipeline's own text encoders."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.seed import Seed
from tiltflow.types import Cond


@final
@dataclass(frozen=True, eq=False)
class Prompts:
    """Encoded prompts, drawn uniformly: the ``conditions`` of a model of images.

    A draw has the encodings, and ``"prompt"`` (B,), each sample's number in ``texts``, for rewards
    that read prompts.

    Args:
        tensors: encodings of leading length N: ``"text"`` (N, tokens, width); ``"pooled"``
            (N, width) for Stable Diffusion XL and 3, and Flux; ``"text_mask"`` (N, tokens) for
            PixArt and SANA; ``"sizes"`` (N, 6) for XL.
        texts: the prompts, if they are known.

    Raises:
        ConfigError: if the tensors do not have one leading length.
    """

    tensors: Mapping[str, Tensor]
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(tensor) for tensor in self.tensors.values()}
        if self.texts:
            lengths.add(len(self.texts))
        if len(lengths) != 1 or 0 in lengths:
            raise ConfigError(
                "Prompts: all entries must have one leading length, the number of prompts, not "
                f"{sorted(lengths)}."
            )

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def draw(self, count: int, seed: Seed) -> Cond:
        """The conditions of ``count`` samples, of prompts drawn with equal probability."""
        return self.at(torch.randint(len(self), (count,), generator=seed.generator()))

    def at(self, index: Tensor) -> Cond:
        """The conditions of samples of the prompts with numbers ``index`` (B,)."""
        return {
            **{key: tensor[index.to(tensor.device)] for key, tensor in self.tensors.items()},
            "prompt": index,
        }

    def of(self, number: int, count: int = 1) -> Cond:
        """The conditions of ``count`` samples of one prompt; of one for ``conditioned``."""
        if not 0 <= number < len(self):
            raise ConfigError(f"Prompts.of: there are {len(self)} prompts, no number {number}.")
        return self.at(torch.full((count,), number))


@final
@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: out(nothing) + scale (out(prompt) - out(nothing)).

    A model without guidance (``guidance=None``) is tilted exactly: the tuned law of every prompt
    is p(x | prompt) exp(reward), by SDE and ODE. Its samples look like those of a pipeline called
    with ``guidance_scale=1``.

    ``"everywhere"``: the guided field is the model. Reference and tuned model are guided alike, in
    roll-outs, adjoints and losses, and both halves of the tuned network are trained. The tilt is
    that of the law which the *guided SDE* samples from: a guided field is not the score of any
    noised density, so that the ODE of the same field samples from another law, before and after
    tuning, and the tilt is not promised for it. Sample with the steps of the training. Twice the
    evaluations; adjoints grow with the scale. The saved weights belong to this scale.

    ``"rollouts"``: states come from the guided model, drifts and adjoints are those of the model
    without guidance (the default of public Stable Diffusion code). Deviation: the expectation of
    adjoints is taken over guided paths, so that the fixed point is **not** the tilted law of any
    model, with or without guidance; no promise of this library holds, and KLs measured along
    roll-outs are not KLs. It is often the best looking. Only ``AdjointMatching`` accepts it.

    Args:
        scale: above 1; the pipeline's ``guidance_scale``.
        mode: ``"everywhere"`` or ``"rollouts"``.
        negative: prompt for the half without prompt; ``None`` is the pipeline's choice.
    """

    scale: float
    mode: Literal["everywhere", "rollouts"] = "everywhere"
    negative: str | Prompts | None = None

    def __post_init__(self) -> None:
        if not self.scale > 1:
            raise ConfigError(f"Guidance: scale={self.scale} must be above 1; 1 is no guidance.")
        if self.mode not in ("everywhere", "rollouts"):
            raise ConfigError(
                f"Guidance: mode={self.mode!r} must be 'everywhere' or 'rollouts'; without "
                "guidance, leave it out."
            )


@torch.no_grad()
def encoded(
    pipeline: Any, texts: Sequence[str], size: tuple[int, int], negative: str | None = None
) -> tuple[Prompts, Prompts]:
    """Prompts and the negative prompt of a pipeline, by its own ``encode_prompt``.

    Args:
        pipeline: of Stable Diffusion 1, 2, XL or 3, PixArt, SANA or Flux, with its text encoders.
        texts: prompts.
        size: height and width of the images in pixels, which XL is told.
        negative: prompt for guidance; ``None`` is what the pipeline itself takes for none.

    Raises:
        ConfigError: without prompts.
        UnsupportedError: for other pipelines, or one without its text encoder.
    """
    if not texts:
        raise ConfigError("encoded: give at least one prompt.")
    name = type(pipeline).__name__
    encode = next((e for part, e in _ENCODERS.items() if name.startswith(part)), None)
    if encode is None or pipeline.text_encoder is None or pipeline.tokenizer is None:
        raise UnsupportedError(
            f"{name} cannot encode prompts here: it has no text encoder or tokenizer, or this "
            "adapter does not know it. Give encodings: prompts=Prompts({'text': ...})."
        )
    something, nothing = encode(pipeline, list(texts), negative)
    count = len(texts)
    if name.startswith("StableDiffusionXL"):
        numbers = torch.tensor([[*size, 0, 0, *size]]).to(something["text"])
        something["sizes"] = nothing["sizes"] = numbers.expand(count, 6)
    return Prompts(something, tuple(texts)), Prompts({k: v[:1] for k, v in nothing.items()})


def conditions_of(
    pipeline: Any,
    prompts: Sequence[str] | Prompts,
    guidance: Guidance | None,
    size: tuple[int, int],
) -> tuple[Prompts, Prompts | None]:
    """The conditions of prompts, and those of nothing, encoded unless they are."""
    if not len(prompts):
        raise ConfigError("adapted: give the prompts that the model is to be used with.")
    if isinstance(prompts, str):
        raise ConfigError("adapted: prompts must be a list of texts, not one text.")
    negative = None if guidance is None else guidance.negative
    known = negative if isinstance(negative, Prompts) else None
    if isinstance(prompts, Prompts):
        if guidance is not None and known is None:
            raise ConfigError(
                "adapted: encoded prompts need an encoded negative prompt for guidance: "
                "Guidance(scale, negative=Prompts(...))."
            )
        return prompts, known
    text = negative if isinstance(negative, str) else None
    given, nothing = encoded(pipeline, prompts, size, text)
    return given, known or nothing


Encoded = tuple[dict[str, Tensor], dict[str, Tensor]]


def _negatives(texts: list[str], negative: str | None) -> list[str] | None:
    return None if negative is None else [negative] * len(texts)


def _text(pipeline: Any, texts: list[str], negative: str | None) -> Encoded:
    given = _negatives(texts, negative)
    text, nothing = pipeline.encode_prompt(texts, pipeline.device, 1, True, given)
    return {"text": text}, {"text": nothing}


def _pooled(pipeline: Any, texts: list[str], negative: str | None) -> Encoded:
    more = {"prompt_3": None} if "Diffusion3" in type(pipeline).__name__ else {}
    text, nothing, pooled, pooled_nothing = pipeline.encode_prompt(
        prompt=texts, prompt_2=None, device=pipeline.device, num_images_per_prompt=1,
        do_classifier_free_guidance=True, negative_prompt=_negatives(texts, negative), **more,
    )  # fmt: skip
    return {"text": text, "pooled": pooled}, {"text": nothing, "pooled": pooled_nothing}


def _masked(pipeline: Any, texts: list[str], negative: str | None) -> Encoded:
    call = inspect.signature(type(pipeline).__call__).parameters
    kwargs: dict[str, Any] = {"negative_prompt": negative or ""}
    if "complex_human_instruction" in call:  # SANA rewrites prompts by it, by default
        kwargs["complex_human_instruction"] = call["complex_human_instruction"].default
    text, mask, nothing, mask_nothing = pipeline.encode_prompt(
        texts, True, device=pipeline.device, **kwargs
    )
    return {"text": text, "text_mask": mask}, {"text": nothing, "text_mask": mask_nothing}


def _two(pipeline: Any, texts: list[str], negative: str | None) -> Encoded:
    """Flux encodes one list of texts at a time."""
    both = []
    for part in (texts, [negative or ""] * len(texts)):
        text, pooled, _ = pipeline.encode_prompt(part, None, device=pipeline.device)
        both.append({"text": text, "pooled": pooled})
    return both[0], both[1]


_ENCODERS: dict[str, Callable[[Any, list[str], str | None], Encoded]] = {
    "StableDiffusionXL": _pooled, "StableDiffusion3": _pooled, "StableDiffusionPipeline": _text,
    "PixArt": _masked, "Sana": _masked, "FluxPipeline": _two,
}  # fmt: skip

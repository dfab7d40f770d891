"""Rewards of images by CLIP: how well one fits its prompt, is preferred, or looks."""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tiltflow.errors import CapabilityError, CheckpointError, ConfigError, ShapeError
from tiltflow.features import Features
from tiltflow.potential import Reward
from tiltflow.rewards.pixels import ClipPixels, wide
from tiltflow.types import Cond


@final
@dataclass(frozen=True, eq=False)
class ClipFeatures(Features):
    """CLIP's embedding of images, of length one: (B, 3, H, W) in [0, 1] -> (B, width).

    What kernels of images compare: ``CosineSimilarity(ClipFeatures(model))``. It is computed in
    the model's dtype and on its device, and returned in those of the images, in single precision
    at least.

    Args:
        model: transformers' ``CLIPModel`` or one with the same vision model and projection. It is
            put into evaluation mode and its weights are frozen.
        pixels: how images are prepared; by default as OpenAI's models want them, at the size that
            the model has.

    Raises:
        ConfigError: for another kind of model, such as SigLIP.
    """

    model: nn.Module
    pixels: ClipPixels | None = None
    _pixels: ClipPixels = field(init=False, repr=False)

    def __post_init__(self) -> None:
        model: Any = self.model
        if not hasattr(model, "visual_projection") or not hasattr(model, "vision_model"):
            raise ConfigError(
                f"ClipFeatures: {type(model).__name__} has no vision_model with a "
                "visual_projection. Give transformers' CLIPModel; for other encoders, write a "
                "Differentiable reward."
            )
        model.eval().requires_grad_(False)
        size = model.config.vision_config.image_size
        object.__setattr__(self, "_pixels", self.pixels or ClipPixels(size))

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        model: Any = self.model
        weight = model.visual_projection.weight
        pixels = self._pixels(x)
        out = model.visual_projection(model.vision_model(pixel_values=pixels.to(weight))[1])
        return nn.functional.normalize(out.to(pixels), dim=1)


@final
@dataclass(frozen=True, eq=False)
class ClipScore(Reward):
    """Cosine of the angle between the embeddings of an image and of its prompt::

        r(x) = image(x) . text(prompt),     -1 <= r <= 1;   times e^logit_scale if ``scaled``

    x (B, 3, H, W) in [0, 1]; for latents, ``Decoded(ClipScore(...), decode)``. ``cond["prompt"]``
    (B,) has each sample's number in ``prompts``, as the conditions of prompts do; without it, a
    single prompt is everybody's. Texts are embedded once.

    Models of human preference with CLIP's two encoders are this reward with other weights, and
    ``scaled`` as they are published: PickScore (Kirstain et al., 2023), and HPS v2 (Wu et al.,
    2023) once converted to transformers' format. Papers also write CLIP scores times 100, or
    times 2.5 and clamped at 0 (Hessel et al., 2021): say which.

    Args:
        model: transformers' ``CLIPModel``; see ``ClipFeatures``.
        tokenizer: the model's own; called with a list of texts.
        prompts: texts.
        scaled: whether to multiply by the model's e^logit_scale, 100 for most.
        pixels: see ``ClipFeatures``.

    Raises:
        ConfigError: without prompts.

    Warns:
        UserWarning: if a prompt is longer than the model reads (77 tokens); the rest is cut.
    """

    model: nn.Module
    tokenizer: Any
    prompts: Sequence[str]
    scaled: bool = False
    pixels: ClipPixels | None = None
    features: ClipFeatures = field(init=False, repr=False)
    _texts: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not len(self.prompts):
            raise ConfigError("ClipScore: prompts must be a list of at least one text.")
        object.__setattr__(self, "features", ClipFeatures(self.model, self.pixels))
        texts = text_embeddings(self.model, self.tokenizer, self.prompts)
        object.__setattr__(self, "_texts", texts)

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        phi = self.features.value(x)
        texts = self._texts.to(phi)[self._numbers(len(x), cond).to(x.device)]
        cosine, model = (phi * texts).sum(1), cast(Any, self.model)
        return cosine * model.logit_scale.to(phi).exp() if self.scaled else cosine

    def _numbers(self, count: int, cond: Cond | None) -> Tensor:
        known = None if cond is None else cond.get("prompt")
        if known is None and len(self.prompts) == 1:
            return torch.zeros(count, dtype=torch.long)
        if not isinstance(known, Tensor) or known.is_floating_point() or known.shape != (count,):
            raise ShapeError(
                f"ClipScore has {len(self.prompts)} prompts and needs cond['prompt'] with the "
                f"number of each of the {count} samples' prompt, integers ({count},)."
            )
        if count and not 0 <= int(known.min()) <= int(known.max()) < len(self.prompts):
            raise ShapeError(
                f"ClipScore: cond['prompt'] runs from {int(known.min())} to {int(known.max())}, "
                f"but there are {len(self.prompts)} prompts, the first of which has the number 0."
            )
        return known.long()

    def __str__(self) -> str:
        return f"ClipScore({len(self.prompts)} prompts{', scaled' if self.scaled else ''})"


@torch.no_grad()
def text_embeddings(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """CLIP's embeddings of texts, of length one, (N, width); warns where it cuts a text."""
    most = int(model.config.text_config.max_position_embeddings)
    lengths = [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    cut = sum(length > most for length in lengths)
    if cut:
        warnings.warn(
            f"{cut} of {len(texts)} prompts are longer than the {most} tokens that the model "
            "reads; what comes later does not count.",
            stacklevel=5,  # the caller of ClipScore
        )
    device = model.text_projection.weight.device
    tokens = tokenizer(
        list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt"
    ).to(device)
    inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    return nn.functional.normalize(
        wide(model.text_projection(model.text_model(**inputs)[1])), dim=1
    )


@final
@dataclass(frozen=True, eq=False)
class Aesthetic(Reward):
    """A head's opinion of an image by its CLIP embedding: r(x) = head(image(x)).

    x (B, 3, H, W) in [0, 1]. With the head of LAION's aesthetic predictor (Schuhmann, 2022),
    trained on embeddings of openai/clip-vit-large-patch14, it is a score of about 1 to 10. That
    head has no activations: it is an affine function of a vector of length one.

    Args:
        model: transformers' ``CLIPModel``; see ``ClipFeatures``.
        head: (B, width) -> (B, 1) or (B,), put into evaluation mode and frozen;
            ``linear_head(path)`` reads one.
        pixels: see ``ClipFeatures``.

    Raises:
        ConfigError: if the head has another width than the model.
    """

    model: nn.Module
    head: nn.Module
    pixels: ClipPixels | None = None
    features: ClipFeatures = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", ClipFeatures(self.model, self.pixels))
        model: Any = self.model
        width = model.visual_projection.out_features
        first = next((m for m in self.head.modules() if isinstance(m, nn.Linear)), None)
        if first is not None and first.in_features != width:
            raise ConfigError(
                f"Aesthetic: the head reads embeddings of width {first.in_features}, the model's "
                f"have {width}. LAION's belongs to openai/clip-vit-large-patch14."
            )
        self.head.eval().requires_grad_(False)

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        weight = next(self.head.parameters(), x)
        phi = self.features.value(x)
        out: Tensor = self.head(phi.to(weight)).to(phi)
        return out[:, 0] if out.ndim == 2 and out.shape[1] == 1 else out


def linear_head(path: Path | str) -> nn.Sequential:
    """Linear layers in a row, without activations, from a safetensors file.

    The tensors are ``<anything>.<number>.weight`` and ``.bias``, applied in order of the numbers,
    as LAION's aesthetic predictor names them, or one ``weight`` and ``bias``.

    Raises:
        CheckpointError: if the file is missing, or its tensors are no such row that ends in one
            number.
    """
    try:
        tensors = load_file(path)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}). Convert a pickled file with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)."
        ) from error
    names = [key.removesuffix("weight") for key in tensors if key.endswith("weight")]
    layers = nn.Sequential()
    try:
        for name in sorted(names, key=lambda n: int(n.split(".")[-2]) if n else 0):
            weight, bias = tensors.pop(f"{name}weight"), tensors.pop(f"{name}bias")
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers.append(layer)
        chained = all(a.out_features == b.in_features for a, b in itertools.pairwise(layers))
        whole = not tensors and chained and layers[-1].out_features == 1
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a row of linear layers: {error}.") from error
    if not whole:
        raise CheckpointError(
            f"{path} is not a row of linear layers that fit each other and end in one number."
        )
    return layers


def load_clip(name: str, **kwargs: Any) -> tuple[nn.Module, Any]:
    """CLIP and its tokenizer by transformers, from a folder or the Hugging Face hub.

    Weights are read as safetensors only.

    Args:
        name: a folder, or a repository such as "openai/clip-vit-large-patch14".
        kwargs: for ``CLIPModel.from_pretrained``, such as ``dtype``, ``revision`` or
            ``local_files_only=True``.

    Raises:
        CapabilityError: if transformers is not installed.
        OSError: from transformers, if there is no such model with weights as safetensors.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise CapabilityError(
            "CLIP needs transformers: pip install 'tiltflow[diffusers]'."
        ) from error
    model = transformers.CLIPModel.from_pretrained(name, use_safetensors=True, **kwargs)
    which = {key: kwargs[key] for key in ("revision", "local_files_only") if key in kwargs}
    return model, transformers.AutoTokenizer.from_pretrained(name, **which)


def clip_score(
    name: str, prompts: Sequence[str], *, scaled: bool = False, **kwargs: Any
) -> ClipScore:
    """``ClipScore`` of a model by name, such as "openai/clip-vit-large-patch14" or, ``scaled``,
    "yuvalkirstain/PickScore_v1"; arguments as in ``load_clip``."""
    return ClipScore(*load_clip(name, **kwargs), prompts, scaled)


def aesthetic(
    head: Path | str, name: str = "openai/clip-vit-large-patch14", **kwargs: Any
) -> Aesthetic:
    """``Aesthetic`` of a head's file and a model by name; arguments as in ``load_clip``."""
    return Aesthetic(load_clip(name, **kwargs)[0], linear_head(head))


__all__ = [
    "Aesthetic",
    "ClipFeatures",
    "ClipScore",
    "aesthetic",
    "clip_score",
    "linear_head",
    "load_clip",
]

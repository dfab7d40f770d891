"""CLIP with random weights and a tokenizer of single letters, built without any download.

Both skip the test that asks for them where transformers is not installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiltflow.rewards.pixels import eight_bit

TOKENS, WIDTH, SIZE = 12, 16, 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer(folder: Path, tokens: int = TOKENS) -> Any:
    """One token for each letter, from files that are written here; texts of so many at most."""
    pytest.importorskip("transformers")
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{a}</w>" for a in LETTERS)]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=tokens)


def clip() -> Any:
    """In float64, for finite differences."""
    pytest.importorskip("transformers")
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": 54, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": TOKENS, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
        return CLIPModel(config).double()


def images(count: int, height: int = 40, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth colours with noise, (count, 3, height, width) in (0, 1), float64."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.randn(smooth.shape, generator=generator, dtype=torch.float64)
    return torch.sigmoid(1.5 * smooth + 0.3 * noise)


def processor(size: int) -> Any:
    """CLIP's own, by Pillow."""
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def in_steps(x: torch.Tensor) -> torch.Tensor:
    """The nearest images of 8 bits."""
    return eight_bit(x).permute(0, 3, 1, 2).double() / 255

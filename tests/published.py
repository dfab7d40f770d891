"""Where published models are: they are too large for the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

MODELS = Path(
    os.environ.get("TILTFLOW_MODELS", Path(__file__).resolve().parents[2] / "shared" / "models")
)
"""One folder per model: the folder that TILTFLOW_MODELS names, or ``shared/models`` beside the
repository."""


def published(*names: str) -> pytest.MarkDecorator:
    """Skip a test where one of these folders of models is missing."""
    missing = [name for name in names if not (MODELS / name).is_dir()]
    return pytest.mark.skipif(
        bool(missing),
        reason=f"no {', '.join(missing)} in {MODELS}; set TILTFLOW_MODELS to the folder of models",
    )

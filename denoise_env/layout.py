"""Saving pipelines so that every release of diffusers and transformers reads them."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def save_pipeline(pipeline: Any, directory: Path) -> None:
    """Write a `StableDiffusionPipeline` in the diffusers layout.

    transformers from 5.6 on names a CLIP text encoder's weights without the prefix ``text_model.`` that hub
    checkpoints have, and reads both; older releases find none of the bare names and silently start from random
    weights. So the prefix is put back.

    Args:
        pipeline: to save.
        directory: made if absent.
    """
    pipeline.save_pretrained(directory)
    path = directory / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    prefixed = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}
    save_file(prefixed, path, metadata={"format": "pt"})

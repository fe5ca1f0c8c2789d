"""The embedded world: rendered scenes with captions, a verifier, and a tiny trained Stable Diffusion."""

from pathlib import Path

from denoise_env.shapes.grammar import ALL, HELD_OUT, TRAIN, Scene, caption, parse
from denoise_env.shapes.renderer import render
from denoise_env.shapes.verifier import Reading, Verifier

WEIGHTS: Path = Path(__file__).parent / "weights"
"""A Stable Diffusion checkpoint in the diffusers layout, pretrained by `denoise_env.shapes.pretrain`."""

__all__ = [
    "ALL",
    "HELD_OUT",
    "TRAIN",
    "WEIGHTS",
    "Reading",
    "Scene",
    "Verifier",
    "caption",
    "parse",
    "render",
]

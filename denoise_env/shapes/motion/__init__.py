"""Captions of moving shapes, clips of them, and a verifier."""

from denoise_env.shapes.motion.first_frames import first_frames, kept
from denoise_env.shapes.motion.grammar import ALL, HELD_OUT, TRAIN, Motion, caption, parse
from denoise_env.shapes.motion.renderer import FRAMES, render
from denoise_env.shapes.motion.verifier import Reading, Verifier

__all__ = [
    "ALL",
    "FRAMES",
    "HELD_OUT",
    "TRAIN",
    "Motion",
    "Reading",
    "Verifier",
    "caption",
    "first_frames",
    "kept",
    "parse",
    "render",
]

"""Captions of several objects: two and their relation, or up to four of a kind; pictures of them, and a verifier."""

from denoise_env.shapes.compositions.grammar import ALL, HELD_OUT, PRETRAIN, TRAIN, Composition, Thing, caption, parse
from denoise_env.shapes.compositions.renderer import render
from denoise_env.shapes.compositions.verifier import Reading, Verifier

__all__ = [
    "ALL",
    "HELD_OUT",
    "PRETRAIN",
    "TRAIN",
    "Composition",
    "Reading",
    "Thing",
    "Verifier",
    "caption",
    "parse",
    "render",
]

"""The embedded worlds: rendered scenes with captions, verifiers, and tiny trained models of real architectures."""

from pathlib import Path

from denoise_env.shapes.grammar import ALL, HELD_OUT, TRAIN, Scene, caption, parse
from denoise_env.shapes.renderer import render
from denoise_env.shapes.verifier import Reading, Verifier

WEIGHTS: Path = Path(__file__).parent / "weights" / "stable_diffusion"
"""A Stable Diffusion checkpoint in the diffusers layout, pretrained by `denoise_env.shapes.pretrain`."""
FLUX_WEIGHTS: Path = Path(__file__).parent / "weights" / "flux"
"""A FLUX.1 checkpoint in the diffusers layout, pretrained by `denoise_env.shapes.pretrain_flux`."""
VIDEO_WEIGHTS: Path = Path(__file__).parent / "weights" / "hunyuan_video"
"""A HunyuanVideo checkpoint in the diffusers layout, pretrained by `denoise_env.shapes.pretrain_video`."""
I2V_WEIGHTS: Path = Path(__file__).parent / "weights" / "skyreels"
"""A SkyReels-I2V checkpoint in the diffusers layout, pretrained by `denoise_env.shapes.pretrain_i2v`."""
CLIP_WEIGHTS: Path = Path(__file__).parent / "weights" / "clip"
HPS_WEIGHTS: Path = Path(__file__).parent / "weights" / "hps"
"""Checkpoints of open_clip, pretrained by `denoise_env.shapes.pretrain_clip`."""
VIDEOALIGN_WEIGHTS: Path = Path(__file__).parent / "weights" / "videoalign"
"""A checkpoint in VideoAlign's layout, its base model in ``base``, by `denoise_env.shapes.pretrain_videoalign`."""

__all__ = [
    "ALL",
    "CLIP_WEIGHTS",
    "FLUX_WEIGHTS",
    "HELD_OUT",
    "HPS_WEIGHTS",
    "I2V_WEIGHTS",
    "TRAIN",
    "VIDEOALIGN_WEIGHTS",
    "VIDEO_WEIGHTS",
    "WEIGHTS",
    "Reading",
    "Scene",
    "Verifier",
    "caption",
    "parse",
    "render",
]

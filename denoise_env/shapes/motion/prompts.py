"""Captions with first frames, from which image-to-video goes on: one frame a caption, the same in every process."""

import torch

from denoise_env.shapes.motion import grammar
from denoise_env.shapes.motion.first_frames import first_frames

TRAIN = first_frames(grammar.TRAIN, torch.Generator().manual_seed(0))
"""One for each caption that may be trained on."""
HELD_OUT = first_frames(grammar.HELD_OUT, torch.Generator().manual_seed(1))
"""One for each caption that is held out."""

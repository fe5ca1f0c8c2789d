"""Weights & Biases and TensorBoard, beside the CSV that is always written."""

import io
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agents.training.checkpoints import write_atomically
from agents.training.config import TrainConfig, as_dict
from agents.training.pictures import gif, read_frames


class Logger:
    """Sends figures and images to the services the configuration names.

    A run's id at Weights & Biases is drawn when it begins and kept in its directory's file ``wandb_id``, for when it is
    resumed; its project is what the environment variable WANDB_PROJECT says, "denoise-env" by default.

    Raises:
        ValueError: a service's package is not installed.
        RuntimeError: Weights & Biases refuses to begin, as without a login.
    """

    def __init__(self, directory: Path, config: TrainConfig) -> None:
        self._wandb: Any = None
        self._writer: Any = None
        if config.wandb:
            self._wandb = _import_wandb()
            known = directory / "wandb_id"
            run_id = known.read_text(encoding="utf-8").strip() if known.exists() else secrets.token_hex(8)
            try:
                self._wandb.init(
                    project=os.environ.get("WANDB_PROJECT") or "denoise-env",
                    name=directory.name,
                    id=run_id,
                    dir=directory,
                    config=as_dict(config),
                    resume="allow",
                )
            except Exception as error:  # its own kinds, and those of the network
                raise RuntimeError(f"Weights & Biases cannot begin: {error}") from error
            directory.mkdir(parents=True, exist_ok=True)
            write_atomically(known, run_id)
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except (ImportError, AttributeError) as error:  # a folder of that name is no package, but is imported
                raise ValueError("tensorboard is not installed: pip install tensorboard") from error
            self._writer = SummaryWriter(str(directory / "tensorboard"))

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_: object) -> None:
        if self._wandb:
            self._wandb.finish()
        if self._writer:
            self._writer.close()

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Log numbers."""
        if self._wandb:
            self._wandb.log(dict(figures), step=iteration)
        if self._writer:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, iteration)

    def picture(self, iteration: int, path: Path) -> None:
        """Log a picture; one that moves as a GIF."""
        frames = read_frames(path) if self._wandb or self._writer else []
        moving = gif(frames) if len(frames) > 1 else b""
        if self._wandb:
            kind = self._wandb
            shown = kind.Video(io.BytesIO(moving), format="gif") if moving else kind.Image(str(path))
            kind.log({"samples": shown}, step=iteration)
        if self._writer and moving:
            from tensorboard.compat.proto.summary_pb2 import Summary

            image = Summary.Image(
                height=frames[0].height, width=frames[0].width, colorspace=3, encoded_image_string=moving
            )
            summary = Summary(value=[Summary.Value(tag="samples", image=image)])
            self._writer.file_writer.add_summary(summary, iteration)
        elif self._writer:
            self._writer.add_image("samples", np.asarray(frames[0]), iteration, dataformats="HWC")


def _import_wandb() -> Any:
    """The package; a folder of that name, which earlier runs leave in the working directory, is none."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb is not installed: pip install wandb") from error
    if not hasattr(wandb, "init"):
        raise ValueError(f"wandb is not installed, and {[*wandb.__path__]} is no package: pip install wandb")
    return wandb

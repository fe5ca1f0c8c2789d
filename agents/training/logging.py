"""Weights & Biases and TensorBoard, beside the CSV that is always written."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.training.checkpoints import write_atomically
from agents.training.config import TrainConfig, as_dict


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

    def image(self, iteration: int, path: Path) -> None:
        """Log a picture."""
        if self._wandb:
            self._wandb.log({"samples": self._wandb.Image(str(path))}, step=iteration)
        if self._writer:
            import numpy as np
            from PIL import Image

            self._writer.add_image("samples", np.asarray(Image.open(path)), iteration, dataformats="HWC")


def _import_wandb() -> Any:
    """The package; a folder of that name, which earlier runs leave in the working directory, is none."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb is not installed: pip install wandb") from error
    if not hasattr(wandb, "init"):
        raise ValueError(f"wandb is not installed, and {[*wandb.__path__]} is no package: pip install wandb")
    return wandb

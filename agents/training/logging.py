"""Weights & Biases and TensorBoard, beside the CSV that is always written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.training.config import TrainConfig, as_dict


class Logger:
    """Sends figures and images to the services the configuration names.

    Raises:
        ValueError: a service's package is not installed.
    """

    def __init__(self, directory: Path, config: TrainConfig) -> None:
        self._wandb: Any = None
        self._writer: Any = None
        if config.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("wandb is not installed: pip install 'denoise-env[wandb]'") from error
            self._wandb = wandb
            wandb.init(
                project="denoise-env",
                name=directory.name,
                id=directory.name,
                dir=directory,
                config=as_dict(config),
                resume="allow",
            )
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("tensorboard is not installed: pip install 'denoise-env[tensorboard]'") from error
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

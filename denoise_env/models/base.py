"""What an environment and a policy need of a generative model, and nothing else."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from denoise_env.kernels import PredictionType, Schedule
from denoise_env.weights import copies, reshard, swapped


class DenoisingModel(ABC):
    """One model family's adapter.

    Attributes:
        network: the denoiser, the module that is trained; ``trainable`` says which of its parameters.
        latent_shape: shape of one row's latents.
        prediction_type: what ``predict`` returns, in the kernels' names.
        dtype: storage dtype of the latents, and the network's compute dtype.
        device: where latents and conditioning live.
        rows_per_sample: rows that ``predict`` gives the network per row of latents (guidance: 2).
        vocabulary: the only prompts the model knows, or ``None`` where any text is a prompt.
        guidance_scale: w of classifier-free guidance, 1 for none, or ``None`` where the model cannot guide.
    """

    network: nn.Module
    latent_shape: tuple[int, ...]
    prediction_type: PredictionType
    dtype: torch.dtype = torch.float32
    rows_per_sample: int = 1
    vocabulary: tuple[str, ...] | None = None
    guidance_scale: float | None = None
    _wrapped: nn.Module | None = None
    _kept: dict[str, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @abstractmethod
    def schedule(self, num_steps: int) -> Schedule:
        """The noise levels of ``num_steps`` denoising steps.

        Raises:
            ValueError: fewer than 1, or more than the model was trained with.
        """

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> TensorDict:
        """Conditioning ``[P, ...]`` of P prompts, on the model's device.

        Raises:
            ValueError: a prompt the model cannot encode.
        """

    @abstractmethod
    def pool(self, conditioning: TensorDict) -> Tensor:
        """One float32 vector per row ``[B, E]``, for critics and for agents that cannot read all of it."""

    @abstractmethod
    def predict(
        self, latents: Tensor, timestep: Tensor, conditioning: TensorDict, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """The network's output ``[B, *latent_shape]``, guidance applied: one network call.

        Args:
            latents: ``[B, *latent_shape]``.
            timestep: 0-d or ``[B]``, entries of the schedule's timesteps.
            conditioning: ``[B]`` rows of ``encode``'s.
            guidance_scale: ``[B]``, instead of the model's; only where that is not ``None``.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """What the rewards see, ``[B, 3, H, W]`` in [0, 1] for images."""

    def render(self, latents: Tensor) -> Tensor:
        """Pictures of latents for a person, ``[B, H, W, 3]`` uint8 on the CPU."""
        return (self.decode(latents).float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Write the trained weights in the layout that the family's own library loads."""

    def describe(self) -> dict[str, Any]:
        """What identifies the architecture; checkpoints refuse to load where it differs."""
        return {
            "family": type(self).__name__,
            "latent_shape": list(self.latent_shape),
            "prediction_type": self.prediction_type,
            "trainable": {name: list(p.shape) for name, p in self.trainable().items()},
        }

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        """Call the network through ``wrapper(network)`` from now on (``DistributedDataParallel``, say).

        ``network`` stays the bare module, to which the names of its parameters refer. A wrapper may also change it in
        place and return it, as ``fully_shard`` does. To be called before anything holds the network's parameters, an
        optimizer or a reference.
        """
        self._wrapped = wrapper(self.network)

    @property
    def called(self) -> Any:
        """What ``predict`` calls: the network, or what ``wrap`` put around it."""
        return self.network if self._wrapped is None else self._wrapped

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        reshard(self.network)
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the weights are as they were at the first call of ``keep_reference``.

        To be called without gradient, and not between a pass with gradient and its backward pass.
        """
        if self._kept is None:
            raise RuntimeError("call keep_reference() before training to have a reference to compare with")
        with swapped(self.network, self.trainable(), self._kept):
            yield

    def keep_reference(self) -> None:
        """Keep a copy of the present weights for ``reference``; once, later calls do nothing."""
        if self._kept is None:
            self._kept = copies(self.trainable())

"""Points: 2-D Gaussian mixtures whose denoiser is known in closed form.

Every prompt names a mixture. Along the path x = α x0 + σ ε the posterior mean E[x0 | x] of a mixture of
N(μ_m, s² I) is exact, so the base "network" has no error of its own: whatever is off in the
samples comes from the kernel or the agent. A small residual network, zero at the start, is what training changes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from denoise_env.arguments import MAX_SEED, integer
from denoise_env.kernels import PredictionType
from denoise_env.models.base import DenoisingModel, Family, ModelOptions
from denoise_env.prompts import Prompt
from denoise_env.schedules import Schedule, check_num_steps

TRAIN_STEPS = 1000
FLOW: Literal["flow"] = "flow"
"""The checkpoint of Points as a rectified flow."""


def _mixtures() -> dict[str, list[tuple[float, float]]]:
    ring = [(math.cos(a), math.sin(a)) for a in torch.linspace(0, 2 * math.pi, 9)[:8].tolist()]
    line = torch.linspace(-1.4, 1.4, 8).tolist()
    return {
        "ring": ring,
        "line": [(x, 0.0) for x in line],
        "diagonal": [(x, x) for x in line],
        "grid": [(x, y) for x in (-1.2, -0.4, 0.4, 1.2) for y in (-0.5, 0.5)],
        "cross": [(0.5 * sign * (1 + i), 0.0) for i in (0, 1) for sign in (-1, 1)]
        + [(0.0, 0.5 * sign * (1 + i)) for i in (0, 1) for sign in (-1, 1)],
        "spiral": [(0.2 * i * math.cos(0.8 * i), 0.2 * i * math.sin(0.8 * i)) for i in range(1, 9)],
    }


MIXTURES = _mixtures()
"""Prompt → the 8 component means of its mixture (equal weights)."""
COMPONENT_STD = 0.15
"""Standard deviation s of every component."""
_BLUE = torch.tensor([30.0, 90.0, 200.0])  # of dots in pictures


class PointsNetwork(nn.Module):
    """The exact denoiser plus a residual multilayer perceptron whose last layer starts at zero."""

    means: Tensor
    alphas: Tensor
    sigmas: Tensor

    def __init__(self, path: Literal["diffusion", "flow"], width: int = 64) -> None:
        super().__init__()
        self.path = path
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
        products = (1 - betas).cumprod(0)
        self.register_buffer("means", torch.tensor(list(MIXTURES.values())), persistent=False)
        self.register_buffer("alphas", products.sqrt().float(), persistent=False)
        self.register_buffer("sigmas", (1 - products).sqrt().float(), persistent=False)
        last = nn.Linear(width, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.residual = nn.Sequential(
            nn.Linear(2 + 5 + len(MIXTURES), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last
        )

    def forward(self, latents: Tensor, timestep: Tensor, prompt_id: Tensor) -> Tensor:
        """``[B, 2]`` ε (diffusion) or velocity (flow); ``timestep`` 0-d or ``[B]``, ``prompt_id`` ``[B]``."""
        if self.path == "diffusion":
            alpha, sigma = self.alphas[timestep], self.sigmas[timestep]
        else:
            alpha, sigma = 1 - timestep, timestep
        alpha, sigma = (c.expand(len(latents))[:, None] for c in (alpha, sigma))
        angle = sigma * math.pi
        features = torch.cat(
            [
                latents,
                sigma,
                angle.sin(),
                angle.cos(),
                (2 * angle).sin(),
                (2 * angle).cos(),
                nn.functional.one_hot(prompt_id, len(self.means)).to(latents.dtype),
            ],
            1,
        )
        return self.exact(latents, alpha, sigma, prompt_id) + self.residual(features)

    def exact(self, latents: Tensor, alpha: Tensor, sigma: Tensor, prompt_id: Tensor) -> Tensor:
        """The closed-form output; ``alpha`` and ``sigma`` are ``[B, 1]``."""
        means = self.means[prompt_id].to(latents.dtype)
        variance = alpha**2 * COMPONENT_STD**2 + sigma**2
        gap = latents[:, None] - alpha[:, None] * means
        weights = (-gap.square().sum(-1) / (2 * variance)).softmax(-1)[..., None]
        x0 = (weights * (means + (alpha * COMPONENT_STD**2 / variance)[..., None] * gap)).sum(1)
        return (latents - (alpha if self.path == "diffusion" else 1) * x0) / sigma


@dataclass
class PointsOptions(ModelOptions):
    """The options of Points."""

    family = "points"

    seed: int | None = None
    """Seed of the first weights of the residual network's hidden layers. Default: the run's seed, or 0."""


class Points(DenoisingModel):
    """The Points family.

    Args:
        path: "diffusion" (Stable Diffusion's ᾱ table) or "flow" (rectified flow, no shift).
        options: the family's options; default: those of `PointsOptions`.
        device: where the network lives.

    Raises:
        ValueError: an unknown path.
    """

    latent_shape = (2,)
    portrait_size = 256
    vocabulary = tuple(MIXTURES)

    def __init__(
        self,
        path: Literal["diffusion", "flow"] = "diffusion",
        options: PointsOptions | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if path not in ("diffusion", FLOW):
            raise ValueError(f'path must be "diffusion" or "flow", not {path!r}')
        self.path = path
        self.options = options or PointsOptions()
        seed = 0 if self.options.seed is None else integer(self.options.seed, "seed", 0, MAX_SEED)
        self.prediction_type: PredictionType = "epsilon" if self.path == "diffusion" else "flow_prediction"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network: PointsNetwork = PointsNetwork(self.path).to(device)

    def schedule(self, num_steps: int) -> Schedule:
        """As in `DenoisingModel.schedule`; "leading" spacing, ᾱ = 1 after the last step."""
        check_num_steps(num_steps, TRAIN_STEPS)
        if self.path == "flow":
            return Schedule.flow(num_steps)
        timesteps = torch.arange(num_steps - 1, -1, -1) * (TRAIN_STEPS // num_steps) + (num_steps < TRAIN_STEPS)
        return Schedule.diffusion(self.network.alphas.double() ** 2, timesteps, 1.0)

    def encode(self, prompts: Sequence[Prompt]) -> TensorDict:
        """The mixtures' indices, ``prompt_id [P]``."""
        ids = [self.vocabulary.index(prompt.text) for prompt in prompts]
        return TensorDict({"prompt_id": torch.tensor(ids)}, batch_size=len(ids)).to(self.device)

    def pool(self, conditioning: TensorDict) -> Tensor:
        """The mixture's index, one-hot ``[B, 6]``."""
        return nn.functional.one_hot(conditioning["prompt_id"], len(MIXTURES)).float()

    def predict(
        self, latents: Tensor, timestep: Tensor, conditioning: TensorDict, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """As in `DenoisingModel.predict`; there is no guidance."""
        if guidance_scale is not None:
            raise ValueError("Points has no guidance: leave guidance_scale out")
        return self.called(latents, timestep, conditioning["prompt_id"])

    def decode(self, latents: Tensor) -> Tensor:
        """The points themselves, ``[B, 2]``: Points' rewards read coordinates."""
        return latents

    def render(self, latents: Tensor) -> Tensor:
        """Each point as a dot on a 64×64 picture of the square [−2, 2]² with its axes."""
        side = torch.linspace(-2, 2, 64)
        x, y = latents.float().cpu().clamp(-2, 2)[:, :, None, None].unbind(1)
        dot = (-((side[None, None] - x) ** 2 + (-side[None, :, None] - y) ** 2) / 0.03).exp()[..., None]
        paper = torch.full((64, 64, 3), 243.0)
        paper[31:33] = paper[:, 31:33] = 226.0
        return (paper + dot * (_BLUE - paper)).round().to(torch.uint8)

    def portrait(self, latents: Tensor, prompt: Prompt) -> Tensor:
        """The samples as blue dots over the density of the prompt's mixture in orange: 160×160 pixels of [−2, 2]².

        Samples outside the square lie on its border.
        """
        side = torch.linspace(-2, 2, 160)
        means = self.network.means[self.encode([prompt])["prompt_id"][0]].cpu()
        gap = (side[None, :, None] - means[:, 0]) ** 2 + (-side[:, None, None] - means[:, 1]) ** 2
        density = (-gap / (2 * COMPONENT_STD**2)).exp().sum(-1)
        picture = torch.full((160, 160, 3), 255.0)
        picture[79:81] = picture[:, 79:81] = 226.0
        picture += (density / density.max())[..., None] * 0.8 * (torch.tensor([253.0, 186.0, 116.0]) - picture)
        column, row = (latents.float().cpu() * torch.tensor([1, -1]) / 4 + 0.5).mul(159).round().clamp(1, 158).long().T
        for x in (-1, 0, 1):
            for y in (-1, 0, 1):
                picture[row + y, column + x] = _BLUE if x * y == 0 else picture[row + y, column + x] * 0.6 + _BLUE * 0.4
        return picture.round().to(torch.uint8)

    def export(self, directory: Path) -> None:
        """Write ``model.safetensors`` and ``model_index.json``."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.network.state_dict(), directory / "model.safetensors")
        (directory / "model_index.json").write_text(
            json.dumps({"_class_name": "Points", "path": self.path}), encoding="utf-8"
        )

    @classmethod
    def load(cls, checkpoint: str | None, options: PointsOptions, device: str | torch.device = "cpu") -> "Points":
        """A new model, as a diffusion (no checkpoint) or as a flow (`FLOW`); or what ``export`` wrote.

        Raises:
            ValueError: the checkpoint is damaged.
        """
        if checkpoint is None:
            return cls("diffusion", options, device)
        if checkpoint == FLOW:
            return cls(FLOW, options, device)
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = Path(checkpoint)
        try:
            model = cls(
                json.loads((directory / "model_index.json").read_text(encoding="utf-8"))["path"], options, device
            )
            model.network.load_state_dict(load_file(directory / "model.safetensors", device=str(device)))
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"cannot load Points from {checkpoint!r}: {error}") from error
        return model


FAMILY = Family(
    description="2-D Gaussian mixtures with an exact denoiser, as a diffusion or a rectified flow",
    options=PointsOptions,
    load=Points.load,
    classes=("Points",),
    preset="points",
)

"""A value function of the denoising MDP's states."""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from agents.policy import DenoisingPolicy
from agents.rollout import Rollout

MAX_SIDE = 16


class Critic(nn.Module):
    """V(x_k, k, c): latents, step and pooled prompt through a multilayer perceptron.

    Latents with more than 16 rows or columns are averaged down to 16 first.

    Args:
        policy: whose states are valued.
        width: of the two hidden layers.
        seed: of the weights. V is 0 at the start.
    """

    def __init__(self, policy: DenoisingPolicy, width: int = 256, seed: int = 0) -> None:
        super().__init__()
        mdp = policy.mdp
        pooled = mdp.model.pool(mdp.conditioning.rows(mdp.drawn[:1])).shape[1]
        size = self._shrink(torch.zeros(1, *mdp.model.latent_shape)).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.step = nn.Embedding(mdp.num_steps, width)
            self.input = nn.Linear(size + pooled, width)
            self.hidden = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.output = nn.Linear(width, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @staticmethod
    def _shrink(latents: Tensor) -> Tensor:
        if latents.ndim > 3 and max(latents.shape[-2:]) > MAX_SIDE:
            height, width = (min(side, MAX_SIDE) for side in latents.shape[-2:])
            latents = adaptive_avg_pool2d(latents.flatten(1, -3), (height, width))
        return latents.flatten(1)

    def forward(self, latents: Tensor, step: Tensor, pooled: Tensor) -> Tensor:
        """Values ``[B]`` of ``latents [B, *latent]`` at steps ``[B]`` with ``pooled [B, E]``."""
        dtype = self.input.weight.dtype
        x = torch.cat([self._shrink(latents).to(dtype), pooled.to(dtype)], 1)
        return self.output(self.hidden(self.input(x) + self.step(step.to(x.device)))).squeeze(1)

    @torch.no_grad()
    def values(self, policy: DenoisingPolicy, rollout: Rollout) -> Tensor:
        """Values ``[B, K]`` of a rollout's states."""
        rows, steps = rollout.steps.batch_size
        pooled = rollout.pooled()
        found = [self(rollout.steps["latents"][:, k], torch.full((rows,), k), pooled) for k in range(steps)]
        return torch.stack(found, 1)

"""PPO in one file, in the style of CleanRL, as a template for an agent of your own.

    python examples/ppo_single_file.py                # half a minute
    python examples/ppo_single_file.py --model shapes --controls --episodes 3840

An agent is three methods: `act`, `observe` and `update`; `agents.generic.run` is the loop around it. It knows
nothing of diffusion: it sees one vector per row and chooses the sampler's noise (or, with ``--controls``, guidance
scale, noise scale and drift). Schulman et al. 2017, with the details of Huang et al. 2022 that matter here.
"""

import argparse

import torch
from torch import nn

from agents.generic import ScriptedAgent, run
from denoise_env import ControlAction, DenoiseVectorEnv, FlatObservation, NoiseAction

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="points")
parser.add_argument("--controls", action="store_true", help="the control action instead of the noise action")
parser.add_argument("--rows", type=int, default=64, help="episodes side by side")
parser.add_argument("--num-steps", type=int, default=10, help="denoising steps")
parser.add_argument("--episodes", type=int, default=6400, help="64 rows make 100 updates of them")
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--epochs", type=int, default=10, help="passes over every batch")
parser.add_argument("--minibatch", type=int, default=160, help="steps per gradient: 64 rows of 10 steps make 4")
parser.add_argument("--clip", type=float, default=0.2, help="range of the probability ratio")
parser.add_argument("--gae-lambda", type=float, default=0.95)
parser.add_argument("--max-grad-norm", type=float, default=0.5)
parser.add_argument("--seed", type=int, default=0)


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers, orthogonal weights; a small last gain makes the first policy N(0, I), the base sampler."""
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, weight_gain in zip(layers[::2], (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, weight_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class PPO:
    """The agent."""

    def __init__(self, observations: int, actions: int, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.actor, self.critic = mlp(observations, actions, 0.01), mlp(observations, 1, 1.0)
        self.log_std = nn.Parameter(torch.zeros(actions))
        self.parameters = [*self.actor.parameters(), *self.critic.parameters(), self.log_std]
        self.optimizer = torch.optim.Adam(self.parameters, options.learning_rate, eps=1e-5)
        self.steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def policy(self, observation: torch.Tensor) -> torch.distributions.Normal:
        """A Gaussian whose std does not depend on the observation."""
        return torch.distributions.Normal(self.actor(observation), self.log_std.exp())

    @torch.no_grad()
    def act(self, observation: torch.Tensor) -> torch.Tensor:
        """Sampled actions ``[n, D]`` for observations ``[n, F]``."""
        return self.policy(observation).sample()

    def observe(self, observation, action, reward, done, next_observation) -> None:  # type: ignore[no-untyped-def]
        """Keep a step; GAE with whole episodes needs no next observation."""
        self.steps.append((observation, action, reward, done.float()))

    def update(self) -> dict[str, float]:
        """Train on the episodes since the last call."""
        options = self.options
        observations, actions, rewards, done = (torch.stack(part) for part in zip(*self.steps, strict=True))  # [K, n]
        self.steps = []
        with torch.no_grad():
            old = self.policy(observations).log_prob(actions).sum(-1)
            values = self.critic(observations)[..., 0]
            advantages, following, gae = torch.zeros_like(values), torch.zeros_like(values[0]), 0.0
            for k in reversed(range(len(rewards))):  # generalized advantage estimation, discount 1
                error = rewards[k] + (1 - done[k]) * following - values[k]
                gae = error + options.gae_lambda * (1 - done[k]) * gae
                advantages[k], following = gae, values[k]
        batch = [part.flatten(0, 1) for part in (observations, actions, old, advantages, advantages + values)]
        for _ in range(options.epochs):
            for rows in torch.randperm(len(batch[0])).split(options.minibatch):
                observation, action, old_log_prob, advantage, target = (part[rows] for part in batch)
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                ratio = (self.policy(observation).log_prob(action).sum(-1) - old_log_prob).exp()
                clipped = ratio.clamp(1 - options.clip, 1 + options.clip)
                policy_loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
                value_loss = 0.5 * (self.critic(observation)[:, 0] - target).square().mean()
                self.optimizer.zero_grad()
                (policy_loss + 0.5 * value_loss).backward()
                nn.utils.clip_grad_norm_(self.parameters, options.max_grad_norm)
                self.optimizer.step()
        return {"value_loss": value_loss.item(), "std": self.log_std.exp().mean().item()}


if __name__ == "__main__":
    options = parser.parse_args()
    env = DenoiseVectorEnv(options.model, options.rows, num_steps=options.num_steps, output="torch")
    env = FlatObservation(ControlAction(env) if options.controls else NoiseAction(env))
    agent = PPO(env.single_observation_space.shape[0], env.single_action_space.shape[0], options)
    print("before", run(env, agent, 512, seed=1234, learn=False).mean())
    returns = run(env, agent, options.episodes, seed=options.seed, desc="train")
    print("learning", [round(float(part.mean()), 3) for part in torch.tensor(returns).chunk(10)])
    best = ScriptedAgent(lambda observation: agent.actor(observation).detach())  # the policy's mean, without its noise
    print("after ", run(env, best, 512, seed=1234, learn=False).mean())

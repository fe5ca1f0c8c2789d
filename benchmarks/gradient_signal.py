"""Which denoising steps carry signal: the policy gradient's norm per step, and its agreement between rollouts.

    python -m benchmarks.gradient_signal [--model shapes] [--images 512] [--rollouts 4]

For every step k the gradient of mean(A · log-prob) is taken on several independent rollouts of the same policy.
``norm`` is its mean norm; ``cosine`` is the mean cosine between the rollouts' gradients, 0 where there is only
noise. The last two rows sum the steps, as an update does, uniformly and weighted by the kernel's std.
"""

import argparse
import itertools
from typing import Any

import torch
from torch import Tensor

from agents.grpo import GRPO, GRPOConfig
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from agents.training.progress import progress
from agents.training.seeding import epoch_order, row_seeds
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.worlds import DEFAULT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--images", type=int, default=512, help="per rollout")
    parser.add_argument("--rollouts", type=int, default=4, help="at least 2")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--microbatch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    mdp = DenoisingMDP.make(options.model, microbatch=options.microbatch)
    agent = GRPO(DenoisingPolicy(mdp), GRPOConfig(group_size=options.group_size), microbatch=options.microbatch)
    steps = agent.trainable_steps.tolist()
    bar = progress(total=options.rollouts * len(steps), desc="gradients", leave=False)
    gradients = torch.stack([rollout_gradients(agent, mdp, options, i, bar) for i in range(options.rollouts)])
    stds = agent.policy.kernel.stds[steps].float()
    print(f"{'step':>8} {'std':>8} {'norm':>8} {'cosine':>8}")
    for k, step in enumerate(steps):
        print(f"{step:>8} {stds[k]:>8.3f} {norm(gradients[:, k]):>8.3f} {cosine(gradients[:, k]):>8.3f}")
    for name, weights in (("uniform", torch.ones_like(stds)), ("std", stds / stds.mean())):
        total = torch.einsum("k,rkp->rp", weights, gradients)
        print(f"{name:>8} {'':>8} {norm(total):>8.3f} {cosine(total):>8.3f}")


def rollout_gradients(agent: GRPO, mdp: DenoisingMDP, options: argparse.Namespace, index: int, bar: Any) -> Tensor:
    """``[steps, parameters]`` of one rollout."""
    groups = options.images // options.group_size
    prompts = epoch_order(mdp.drawn_prompts, options.seed, index * groups, groups)
    generators = row_generators(row_seeds(options.seed, "signal", index, options.images))
    rollout = collect(
        mdp,
        agent.policy,
        generators,
        prompts,
        group_size=options.group_size,
        shared_noise=True,
        microbatch=options.microbatch,
    )
    advantages = agent.advantages(rollout)["advantage"]
    found = []
    for step in agent.trainable_steps.tolist():
        for start in range(0, options.images, options.microbatch):
            rows = torch.arange(start, start + options.microbatch)
            latents, action = rollout.steps["latents"][rows, step], rollout.steps["action"][rows, step]
            transition = agent.policy.transition(latents, step, rollout.conditioning(rows))
            log_prob = agent.policy.log_prob(transition, action)
            ((advantages[rows] * log_prob).sum() / options.images).backward()
        found.append(torch.cat([p.grad.flatten() for p in agent.parameters if p.grad is not None]))
        agent.optimizer.zero_grad()
        bar.update()
    return torch.stack(found)


def norm(gradients: Tensor) -> float:
    return gradients.norm(dim=1).mean().item()


def cosine(gradients: Tensor) -> float:
    unit = torch.nn.functional.normalize(gradients, dim=1)
    pairs = [unit[i] @ unit[j] for i, j in itertools.combinations(range(len(unit)), 2)]
    return torch.stack(pairs).mean().item()


if __name__ == "__main__":
    main()

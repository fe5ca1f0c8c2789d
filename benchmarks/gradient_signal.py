"""Which denoising steps carry signal: the policy gradient's norm per step, and its agreement between rollouts.

    python -m benchmarks.gradient_signal [--model shapes] [--agent grpo] [--images 512] [--rollouts 4]

For every step k the gradient of the agent's loss is taken on several independent rollouts of the same policy; without
a KL, GRPO's is that of −mean(A · log-prob) there. ``norm`` is its mean norm; ``cosine`` is the mean cosine between the
rollouts' gradients, 0 where there is only noise. Two rows sum the steps, as an update does, uniformly and weighted by
the kernel's std. ``spread`` is the largest norm of a step divided by the smallest.
"""

import argparse
import itertools
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from agents.algorithms import find_agent
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from agents.trajectory import TrajectoryAgent
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.progress import progress
from denoise_env.seeding import epoch_order, row_seeds
from denoise_env.worlds import DEFAULT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--kernel", help="default: the model's")
    parser.add_argument("--agent", default="grpo", help="one that trains recorded steps")
    parser.add_argument("--images", type=int, default=512, help="per rollout")
    parser.add_argument("--rollouts", type=int, default=4, help="at least 2")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--microbatch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    mdp = DenoisingMDP.make(options.model, microbatch=options.microbatch)
    kind = find_agent(options.agent)
    config = kind.config_type(group_size=options.group_size)
    agent = kind(DenoisingPolicy(mdp, options.kernel), config, microbatch=options.microbatch)
    if not isinstance(agent, TrajectoryAgent):
        parser.error(f"{agent.name} does not train recorded steps")
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

    norms = gradients.norm(dim=2).mean(0)
    print(f"{'spread':>8} {'':>8} {(norms.max() / norms.min()).item():>8.3f}")


def rollout_gradients(
    agent: TrajectoryAgent, mdp: DenoisingMDP, options: argparse.Namespace, index: int, bar: Any
) -> Tensor:
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
        keep_means=agent.needs_means,
    )
    targets = agent.targets(rollout)
    found = []
    for step in agent.trainable_steps.tolist():
        for start in range(0, options.images, options.microbatch):
            rows = torch.arange(start, start + options.microbatch)
            own = {name: value[rows, step] if value.ndim == 2 else value[rows] for name, value in targets.items()}
            examples = {"episode": rows, "step": torch.full_like(rows, step), **own}
            chunk = TensorDict({name: value[:, None] for name, value in examples.items()}, batch_size=(len(rows), 1))
            conditioning = rollout.conditioning(rows)
            loss, _ = agent.example_loss(rollout, agent.complete(rollout, chunk, conditioning)[:, 0], conditioning)
            (loss.sum() / options.images).backward()
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

"""Train GRPO on the tiny Stable Diffusion through the Python API: python examples/train_grpo.py"""

import argparse

from agents.grpo import GRPO, GRPOConfig
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from agents.training.evaluation import evaluate
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.seeding import epoch_order, row_seeds
from denoise_env.shapes.grammar import HELD_OUT, TRAIN

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--iterations", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

mdp = DenoisingMDP.make(num_steps=10)  # Shapes, with its prompts and its reward
policy = DenoisingPolicy(mdp, kernel="ddim", eta=1.0)
agent = GRPO(policy, GRPOConfig(group_size=16, lr=1e-4), seed=options.seed, microbatch=128)

print("before", evaluate(mdp, policy, HELD_OUT, 16, seed=1234, microbatch=96).means)
for iteration in range(options.iterations):
    rollout = collect(
        mdp,
        policy,
        row_generators(row_seeds(options.seed, "rollout", iteration, 8 * 16)),
        prompts=epoch_order(TRAIN, options.seed, start=8 * iteration, count=8),
        group_size=16,
        shared_noise=True,
        microbatch=128,
    )
    figures = agent.update(rollout, iteration)
    print(f"{iteration:3d} reward {rollout.scores.total.nanmean():.3f} grad norm {figures['grad_norm']:.3f}")
print("after ", evaluate(mdp, policy, HELD_OUT, 16, seed=1234, microbatch=96).means)

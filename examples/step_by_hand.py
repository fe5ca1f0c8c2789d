"""Step the denoising process by hand, through Gymnasium and through TorchRL.

    python examples/step_by_hand.py                   # the tiny Stable Diffusion
    python examples/step_by_hand.py --env ShapesFlux-v0   # the tiny FLUX, a rectified flow
    python examples/step_by_hand.py --env ShapesVideo-v0  # the tiny HunyuanVideo, clips
    python examples/step_by_hand.py --env Points-v0   # 2-D Gaussian mixtures

The environment holds the state: latents, step, prompt. The policy proposes the next latents: a network, a
Gaussian around its prediction, a sample, and that sample's log-prob. Nothing is hidden in between, so this is
also the place to put an agent of your own.
"""

import argparse
from pathlib import Path

import gymnasium
import torch

import denoise_env  # noqa: F401 - registers the environments
from agents.training.pictures import grid
from denoise_env.kernels import DDIM, DanceSDE
from denoise_env.torchrl_env import DenoiseTorchRLEnv

ENVS = ("Shapes-v0", "ShapesFlux-v0", "ShapesVideo-v0", "ShapesI2V-v0", "Points-v0")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env", default="Shapes-v0", choices=ENVS)
parser.add_argument("--rows", type=int, default=8, help="episodes side by side")
parser.add_argument("--num-steps", type=int, default=10, help="denoising steps")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("denoising.png"), help="a row per episode, a column per step")
options = parser.parse_args()

# 1. Gymnasium. Observations are {"latents", "step", "prompt_index"}; output="torch" keeps them tensors.
env = gymnasium.make_vec(
    f"denoise_env/{options.env}",
    num_envs=options.rows,
    num_steps=options.num_steps,
    output="torch",
    render_mode="rgb_array",
)
mdp = env.unwrapped.mdp
observation, infos = env.reset(seed=options.seed)
for i, prompt in enumerate(infos["prompt"]):
    print(f"row {i}: {prompt}")

# 2. The policy's two halves: the model's network, and a Gaussian kernel on its noise schedule.
kind = DDIM if mdp.schedule.path == "diffusion" else DanceSDE
kernel = kind(mdp.schedule, mdp.model.prediction_type)
generator = torch.Generator().manual_seed(options.seed)
film = [torch.stack([torch.from_numpy(frame) for frame in env.render()])]

# 3. The episode. Every row is at the same step k, and ends after num_steps.
finished = False
while not finished:
    latents, k = observation["latents"], int(observation["step"][0])
    conditioning = mdp.conditioning.rows(observation["prompt_index"])
    with torch.no_grad():
        output = mdp.model.predict(latents, mdp.schedule.timesteps[k], conditioning)
    transition = kernel.transition(latents, output, k)  # N(mean, std² I)
    action = transition.sample(torch.randn(latents.shape, generator=generator))
    log_prob = f"{transition.log_prob(action, 'sum').mean():9.1f}" if transition.stochastic else "no density"
    observation, reward, terminated, truncated, infos = env.step(action)
    film.append(torch.stack([torch.from_numpy(frame) for frame in env.render()]))
    finished = bool(terminated.all())
    print(f"step {k}: std {float(transition.std.max()):.3f}, log-prob {log_prob}, reward {float(reward.mean()):.3f}")

print("rewards by name:", {name: infos["reward_terms"][name].tolist() for name in mdp.rewards})
grid(torch.stack(film, 1).flatten(0, 1), len(film), options.output)
print("the film:", options.output)

# 4. TorchRL. The same environment as an EnvBase; a policy module fills in the action and its log-prob.
from agents.policy import DenoisingPolicy  # noqa: E402

torchrl_env = DenoiseTorchRLEnv.from_mdp(mdp, num_envs=options.rows)
torchrl_env.set_seed(options.seed)
rollout = torchrl_env.rollout(options.num_steps, DenoisingPolicy(mdp, kernel.name))
print("TorchRL rollout", tuple(rollout.batch_size), "reward", float(rollout["next", "reward"][:, -1].mean()))

"""Contract tests that anyone can run on their environment.

`check_vector_env` is for any Gymnasium `VectorEnv`; `check_denoising_env` adds what makes an environment a
denoising process.
"""

from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from denoise_env.gymnasium_vector import DenoiseVectorEnv
from denoise_env.vector_checks import check_vector_env, require, same

__all__ = ["check_denoising_env", "check_vector_env"]


def check_denoising_env(env: DenoiseVectorEnv, seed: int = 0) -> None:
    """Check that an environment is a denoising process with autoreset "disabled", whatever its output.

    The action becomes the latents; every row ends at step K and is never truncated; the reward comes then, the
    weighted sum of its terms (one of weight 0 is only measured: its NaN does not count); a row alone does what it
    does in the batch.

    Raises:
        AssertionError: what is wrong and what the contract is.
    """
    require(env.autoreset_mode is AutoresetMode.DISABLED, 'check an environment with autoreset_mode="disabled"')
    steps, n, model = env.mdp.num_steps, env.num_envs, env.mdp.model
    noise = torch.Generator().manual_seed(seed)
    actions = torch.randn(steps, n, *model.latent_shape, generator=noise).to(model.device, model.dtype)
    plain = {"group_size": 1, "shared_noise": False}
    first, _ = env.reset(seed=seed, options=plain)
    require(not _tensor(first["step"]).any(), "an episode must begin at step 0")
    numpy = isinstance(first["latents"], np.ndarray)
    alone = type(env).from_mdp(env.mdp, output="numpy" if numpy else "torch")
    single, _ = alone.reset(seed=seed + n - 1, options=plain)
    _check_alone(first, single, n - 1)
    for k in range(1, steps + 1):
        action = actions[k - 1].float().cpu().numpy() if numpy else actions[k - 1]
        observation, rewards, terminated, truncated, infos = env.step(action)
        single, reward, *_ = alone.step(action[-1:])
        latents = _tensor(observation["latents"])
        require(torch.equal(latents, actions[k - 1].to(latents)), "the action must become the latents")
        require((_tensor(observation["step"]) == k).all(), f"the step must be {k} after {k} steps")
        require(same(_list(observation["prompt_index"]), _list(first["prompt_index"])), "prompts must stay")
        require(not _tensor(truncated).any(), "an episode is never truncated")
        require((_tensor(terminated) == (k == steps)).all(), f"all rows must end at step {steps} and not before")
        if k < steps:
            require(not _tensor(rewards).any(), "the reward must be 0 before the last step")
        _check_alone(observation, single, n - 1)
        require(
            torch.allclose(_tensor(reward)[0], _tensor(rewards)[-1], rtol=1e-3, atol=1e-4, equal_nan=True),
            f"row {n - 1} must not depend on its batch; its reward differs from the row alone",
        )
    terms, weights = infos["reward_terms"], env.mdp.reward_weights
    total = torch.zeros_like(_tensor(rewards))
    for name, weight in weights.items():
        if weight:
            total += weight * _tensor(terms[name])
    require(torch.allclose(total, _tensor(rewards), equal_nan=True), "the reward must be the sum of its terms")
    require(torch.equal(_tensor(infos["valid"]), _tensor(rewards).isfinite()), "valid must mark finite rewards")


def _check_alone(observation: dict[str, Any], single: dict[str, Any], row: int) -> None:
    for name in single:
        require(
            same(_list(single[name][0]), _list(observation[name][row])),
            f"row {row} must not depend on its batch; its {name} differs from the row alone",
        )


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values)


def _list(values: Any) -> Any:
    return _tensor(values).tolist()

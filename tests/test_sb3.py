"""Stable-Baselines3's `VecEnv`."""

import numpy as np
import pytest
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from denoise_env import ControlAction, DenoiseVectorEnv, DenoisingMDP, FlatObservation, NoiseAction
from denoise_env.sb3 import SB3VecEnv

K, N = 3, 4


def make(output="torch", action=NoiseAction, **options):
    return SB3VecEnv(FlatObservation(action(DenoiseVectorEnv("points", N, num_steps=K, output=output, **options))))


@pytest.mark.parametrize("output", ["torch", "numpy"])
def test_the_contract(output):
    env = make(output)
    assert isinstance(env, VecEnv)
    assert env.num_envs == N
    observation = env.reset()
    plain = FlatObservation(NoiseAction(DenoiseVectorEnv("points", N, num_steps=K)))
    env.seed(3)
    observation = env.reset()
    expected, infos = plain.reset(seed=3)
    assert np.array_equal(observation, expected)
    assert [info["prompt"] for info in env.reset_infos] == infos["prompt"].tolist()
    rng = np.random.default_rng(0)
    for step in range(2 * K):
        prompts = [prompt.text for prompt in plain.unwrapped.prompts]
        action = rng.standard_normal((N, 2)).astype(np.float32)
        observation, rewards, dones, rows = env.step(action)
        expected, reward, terminated, _, infos = plain.step(action)
        for values, dtype in ((observation, np.float32), (rewards, np.float32), (dones, np.bool_)):
            assert isinstance(values, np.ndarray)
            assert values.dtype == dtype
        assert all(row in env.observation_space for row in observation)
        assert np.array_equal(rewards, reward)
        assert np.array_equal(dones, terminated)
        assert [row["prompt"] for row in rows] == infos["prompt"].tolist()
        assert all(row["prompt"] in prompts for row in rows)
        for i, row in enumerate(rows):
            assert ("terminal_observation" in row) == dones[i] == ((step + 1) % K == 0)
            if dones[i]:
                assert np.array_equal(row["terminal_observation"], expected[i])
                assert row["TimeLimit.truncated"] is False
                assert row["reward_terms"]["points"] == rewards[i]
                assert row["valid"]
        if dones.all():
            expected, infos = plain.reset()  # the streams go on
            assert [info["prompt"] for info in env.reset_infos] == infos["prompt"].tolist()
        assert np.array_equal(observation, expected)


def test_options_and_attributes():
    env = make(render_mode="rgb_array")
    env.set_options({"prompts": ["ring"] * N})
    env.reset()
    assert [info["prompt"] for info in env.reset_infos] == ["ring"] * N
    with pytest.raises(ValueError, match="one dictionary for all"):
        env.set_options([{"group_size": 2}] + [{}] * (N - 1))
    with pytest.raises(ValueError, match="Points knows no prompt 'rings'"):
        env.set_options({"prompts": ["rings"] * N})
    assert env.get_attr("prompts")[0] == env.get_attr("mdp", [0])[0].prompts
    with pytest.raises(ValueError, match="leave indices out"):
        env.env_method("render", indices=[0])
    assert len(env.env_method("render")) == N
    assert env.render().shape == (128, 128, 3)
    assert env.env_is_wrapped(VecMonitor) == [False] * N
    env.close()


def test_dictionary_observations():
    env = SB3VecEnv(NoiseAction(DenoiseVectorEnv("points", N, num_steps=K, output="torch")))
    model = PPO("MultiInputPolicy", env, n_steps=K, batch_size=N, device="cpu").learn(2 * N * K)
    assert model.num_timesteps == 2 * N * K
    observation, *_, rows = [env.step(np.zeros((N, 2), np.float32)) for _ in range(K - model.num_timesteps % K)][-1]
    assert set(observation) == set(rows[0]["terminal_observation"]) == {"latents", "step", "prompt_index"}


@pytest.mark.parametrize("action", [NoiseAction, ControlAction])
def test_ppo_and_sac_run_unmodified(action):
    env = VecMonitor(make(action=action))
    ppo = PPO("MlpPolicy", env, n_steps=K, batch_size=N, seed=0, device="cpu").learn(5 * N * K)
    assert ppo.num_timesteps == 5 * N * K
    assert ppo.ep_info_buffer[-1]["l"] == K
    assert 0 <= ppo.ep_info_buffer[-1]["r"] <= 1
    sac = SAC("MlpPolicy", env, learning_starts=N, batch_size=8, seed=0, device="cpu").learn(5 * N * K)
    assert sac.num_timesteps == 5 * N * K
    assert sac._n_updates > 0


def test_refusals():
    with pytest.raises(ValueError, match='autoreset_mode="disabled"'):
        make(autoreset_mode="same_step")
    with pytest.raises(ValueError, match="wrap the environment in NoiseAction or ControlAction"):
        SB3VecEnv(DenoiseVectorEnv("points"))


@pytest.mark.filterwarnings("ignore:the reward 'points' failed")
def test_rewards_that_cannot_be_computed():
    def broken(images, prompts):
        raise RuntimeError("no scores today")

    mdp = DenoisingMDP.make("points", num_steps=2)
    mdp.rewards["points"] = broken
    wrapped = FlatObservation(NoiseAction(DenoiseVectorEnv.from_mdp(mdp, N)))
    env, forgiving = SB3VecEnv(wrapped), SB3VecEnv(wrapped, invalid_reward=-1.0)
    idle = np.zeros((N, 2), np.float32)
    env.reset()
    env.step(idle)
    with pytest.raises(ValueError, match="reward of 4 rows could not be computed"):
        env.step(idle)
    forgiving.reset()
    forgiving.step(idle)
    _, rewards, _, rows = forgiving.step(idle)
    assert rewards.tolist() == [-1.0] * N
    assert not rows[0]["valid"]

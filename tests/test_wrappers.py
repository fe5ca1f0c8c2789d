"""The Gymnasium wrappers."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import make_vec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from denoise_env import ControlAction, DenoiseEnv, DenoiseVectorEnv, FlatObservation, NoiseAction, check_vector_env

K = 3
ACTIONS = [NoiseAction, ControlAction]
MODES = ["disabled", "same_step", "next_step"]


def make(action=NoiseAction, num_envs=3, flat=True, **options):
    env = action(DenoiseVectorEnv("points", num_envs, num_steps=K, **options))
    return FlatObservation(env) if flat else env


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("flat", [True, False])
def test_the_vector_contract(action, mode, flat):
    assert check_vector_env(make(action, autoreset_mode=mode, flat=flat)) == []


def test_shapes_fits_too(make_shapes):
    env = FlatObservation(ControlAction(DenoiseVectorEnv.from_mdp(make_shapes(num_steps=2), 2)))
    assert env.single_action_space.shape == (6,)
    assert check_vector_env(env, num_steps=3) == []


def test_spaces():
    env = make(NoiseAction)
    assert env.action_space.shape == (3, 2)
    assert (env.action_space.low == -10).all()
    assert (env.action_space.high == 10).all()
    assert make(ControlAction).single_action_space.shape == (3,)
    assert env.observation_space.shape == (3, 9)


def actions(env, episodes=2):
    noise = np.random.default_rng(0)
    return noise.standard_normal((episodes * K, *env.action_space.shape)).astype(np.float32)


def played(env, choices):
    """Observation, reward and last observation after every step; a disabled environment is reset by hand."""
    env.reset(seed=4)
    found = []
    for action in choices:
        observation, rewards, terminated, _, infos = env.step(action)
        last = np.stack(infos["final_obs"]) if "final_obs" in infos else observation
        if terminated.all() and env.metadata["autoreset_mode"].name == "DISABLED":
            observation, _ = env.reset()
        elif terminated.all() and env.metadata["autoreset_mode"].name == "NEXT_STEP":
            observation, nothing, over, *_ = env.step(action)
            assert not nothing.any()
            assert not over.any()
        found.append((observation, rewards, last))
    return found


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("mode", ["same_step", "next_step"])
def test_autoreset_plays_the_same_episodes(action, mode):
    plain, automatic = make(action), make(action, autoreset_mode=mode)
    choices = actions(plain)
    for expected, found in zip(played(plain, choices), played(automatic, choices), strict=True):
        for a, b in zip(expected, found, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("action", ACTIONS)
def test_tensors_and_numpy_agree(action):
    numpy, tensors = make(action), make(action, output="torch")
    first, _ = tensors.reset(seed=4)
    assert isinstance(first, torch.Tensor)
    choices = actions(numpy, 1)
    for step, (_, rewards, last) in zip(choices, played(numpy, choices), strict=True):
        observation, reward, *_ = tensors.step(torch.from_numpy(step))
        assert np.array_equal(observation.numpy(), last)
        assert np.array_equal(reward.numpy(), rewards)


def test_partial_resets_keep_the_other_rows_noise():
    env = make(ControlAction, num_envs=2, flat=False)
    idle = np.zeros((2, 3), np.float32)

    def last(steps, mask):
        env.reset(seed=1)
        env.step(idle)
        if mask is not None:
            env.reset(options={"reset_mask": np.array(mask)})
        for _ in range(steps):
            observation, *_ = env.step(idle)
        return observation["latents"]

    undisturbed = last(K - 1, None)
    disturbed = last(K - 1, [True, False])
    assert np.array_equal(disturbed[1], undisturbed[1])
    assert not np.array_equal(disturbed[0], undisturbed[0])


def test_order_and_bad_actions():
    env = make()
    with pytest.raises(ResetNeeded):
        env.step(np.zeros((3, 2), np.float32))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape must be \(3, 2\), not \(3, 3\)"):
        env.step(np.zeros((3, 3), np.float32))


@pytest.mark.parametrize("action", ACTIONS)
def test_a_refused_action_changes_nothing(action):
    env, other = make(action), make(action)
    zeros = np.zeros(env.action_space.shape, np.float32)
    env.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(ValueError, match="must be finite"):
        env.step(zeros + np.nan)
    assert np.array_equal(env.step(zeros)[0], other.step(zeros)[0])


def test_refusals():
    with pytest.raises(ValueError, match="already has an action of its own"):
        NoiseAction(ControlAction(DenoiseVectorEnv("points")))
    with pytest.raises(ValueError, match="already has an observation of its own"):
        FlatObservation(FlatObservation(DenoiseVectorEnv("points")))
    with pytest.raises(ValueError, match="this wraps a DenoiseVectorEnv"):
        NoiseAction(make_vec("CartPole-v1"))
    with pytest.raises(ValueError, match="max_dimensions=5"):
        FlatObservation(DenoiseVectorEnv("points"), max_dimensions=5)


def flat_controls(env):
    return FlatObservation(ControlAction(env, controls={"drift": (-2, 2)}))


@pytest.mark.parametrize("wrap", [NoiseAction, ControlAction, FlatObservation, flat_controls])
@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_the_single_environment_is_row_0_of_the_wrapped_one(wrap, output):
    env = DenoiseEnv("points", num_steps=K, output=output, wrap=wrap)
    vector = wrap(DenoiseVectorEnv("points", 3, num_steps=K, output=output))
    assert env.action_space == vector.single_action_space
    assert env.observation_space == vector.single_observation_space
    for seed in (5, None):
        found, info = env.reset(seed=seed)
        expected, infos = vector.reset(seed=seed)
        for _ in range(K + 1):
            named = isinstance(expected, dict)
            pairs = [(found[name], expected[name][0]) for name in expected] if named else [(found, expected[0])]
            assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
            assert info["prompt"] == infos["prompt"][0]
            if "valid" in info:
                break
            actions = np.full(vector.action_space.shape, 0.25, np.float32)
            actions = actions if output == "numpy" else torch.from_numpy(actions)
            found, reward, terminated, _, info = env.step(actions[0])
            expected, rewards, ended, _, infos = vector.step(actions)
            assert (reward, terminated) == (float(rewards[0]), bool(ended[0]))
    assert info["valid"] is True


@pytest.mark.parametrize("wrap", [NoiseAction, ControlAction, flat_controls])
@pytest.mark.filterwarnings("ignore:.*Box:UserWarning")
def test_gymnasium_makes_and_checks_it(wrap):
    check_env(gymnasium.make("denoise_env/Points-v0", num_steps=K, wrap=wrap).unwrapped)


def test_wrapping_a_single_environment_says_how():
    with pytest.raises(ValueError, match=r"gymnasium.make takes wrappers of its single row as wrap="):
        NoiseAction(gymnasium.make("denoise_env/Points-v0"))

"""The public checkers, on good environments, on Gymnasium's own, and on ones broken in one way each."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from registered import IDS

from denoise_env import DenoiseVectorEnv, check_denoising_env, check_vector_env

MODES = {mode.name.lower(): mode for mode in AutoresetMode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("env_id", IDS)
def test_registered_vector_envs_pass(env_id, mode):
    env = gymnasium.make_vec(env_id, num_envs=3, num_steps=3, autoreset_mode=mode, render_mode="rgb_array")
    assert check_vector_env(env) == []


@pytest.mark.parametrize("output", ["numpy", "torch"])
@pytest.mark.parametrize("env_id", IDS)
def test_registered_envs_are_denoising_processes(env_id, output):
    check_denoising_env(gymnasium.make_vec(env_id, num_envs=3, num_steps=3, output=output))


# Gymnasium's own


def test_cartpole_vector_env():
    assert check_vector_env(gymnasium.make_vec("CartPole-v1", num_envs=3)) == []


@pytest.mark.parametrize("mode", MODES)
def test_sync_vector_env(mode):
    env = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 3, autoreset_mode=MODES[mode])
    findings = check_vector_env(env)
    # SyncVectorEnv.reset takes "reset_mask" out of the dictionary that the caller passed.
    assert findings == (["reset() changed the caller's options"] if mode == "disabled" else [])


def test_sync_vector_env_without_copies():
    # copy=False hands out the same buffer again and again, as its documentation says.
    env = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 3, copy=False)
    with pytest.raises(AssertionError, match="shares memory with the one before"):
        check_vector_env(env)


# Broken in one way each


class Walk(VectorEnv):
    """A good little environment: rows walk at random and end after 3, 4, … steps."""

    def __init__(self, mode="disabled", num_envs=3):
        self.autoreset_mode = MODES[mode]
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": 1,
            "autoreset_mode": self.autoreset_mode,
        }
        self.render_mode = "rgb_array"
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(-100, 100, (2,), np.float64)
        self.single_action_space = spaces.Box(-1, 1, (2,), np.float64)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.where = np.zeros((num_envs, 2))
        self.age = np.zeros(num_envs, int)
        self.over = np.zeros(num_envs, bool)

    def begin(self, rows):
        self.where[rows] = self.np_random.normal(size=(self.num_envs, 2))[rows]
        self.age[rows] = 0
        self.over[rows] = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.begin((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        return self.where.copy(), {}

    def step(self, actions):
        fresh = self.over & (self.autoreset_mode is AutoresetMode.NEXT_STEP)
        self.where = self.where + actions
        self.age += 1
        self.begin(fresh)
        self.over = self.age >= 3 + np.arange(self.num_envs)
        ended, infos = self.over.copy(), {"age": self.age.copy(), "_age": np.ones(self.num_envs, bool)}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and ended.any():
            final = np.full(self.num_envs, None, object)
            for i in np.flatnonzero(ended):
                final[i] = self.where[i].copy()
            infos |= {"final_obs": final, "_final_obs": ended.copy()}
            infos |= {"final_info": {}, "_final_info": ended.copy()}
            self.begin(ended)
        return self.where.copy(), 1.0 - fresh, ended, np.zeros(self.num_envs, bool), infos

    def render(self):
        return tuple(np.zeros((8, 8, 3), np.uint8) for _ in range(self.num_envs))


def on_step(change, mode="disabled"):
    """A `Walk` whose step results, as a list, go through ``change(env, result)``."""

    class Broken(Walk):
        def step(self, actions):
            result = list(super().step(actions))
            return tuple(change(self, result) or result)

    return Broken(mode)


def on_reset(change, mode="disabled"):
    class Broken(Walk):
        def reset(self, *, seed=None, options=None):
            return change(self, seed, options, super().reset)

    return Broken(mode)


def declared(mode="disabled", **attributes):
    env = Walk(mode)
    for name, value in attributes.items():
        setattr(env, name, value)
    return env


def put(index, value):
    def change(env, result):
        result[index] = value(env, result) if callable(value) else value

    return change


def info(**entries):
    return lambda env, result: result[4].update(entries)


class Forgetful(Walk):
    """Steps from what it returned, which the user may have changed."""

    def step(self, actions):
        result = super().step(actions)
        self.where = result[0]
        return result

    def reset(self, **kwargs):
        self.where = self.where.copy()
        return super().reset(**kwargs)


class KeepsActions(Walk):
    last = 0.0

    def step(self, actions):
        observations, *rest = super().step(actions)
        observations = observations + 0.01 * self.last
        self.last = actions
        return observations, *rest

    def reset(self, **kwargs):
        self.last = 0.0
        return super().reset(**kwargs)


class Buffered(Walk):
    def __init__(self):
        super().__init__()
        self.buffer = np.zeros((3, 2))

    def step(self, actions):
        result = super().step(actions)
        self.buffer[:] = result[0]
        return self.buffer, *result[1:]


class ClosesOnce(Walk):
    def close(self, **kwargs):
        assert not self.closed, "closed already"
        self.closed = True


def no_num_envs():
    env = Walk()
    del env.num_envs
    return env


def unseeded(env, seed, options, reset):
    return reset(seed=None, options=options)


def short_final_obs(env, result):
    if "final_obs" in result[4]:
        result[4]["final_obs"] = np.array([np.zeros(3) for _ in range(3)])


@pytest.mark.parametrize(
    ("make", "contract"),
    [
        (lambda: gymnasium.make("CartPole-v1"), "must be a gymnasium.vector.VectorEnv"),
        (no_num_envs, "must have num_envs"),
        (lambda: declared(num_envs=0), "num_envs must be an integer of at least 1"),
        (lambda: declared(metadata={}), "must be an AutoresetMode, not None"),
        (lambda: declared(autoreset_mode=AutoresetMode.SAME_STEP), "they must agree"),
        (
            lambda: declared(observation_space=spaces.Box(-1, 1, (3, 2))),
            "observation_space must be batch_space",
        ),
        (lambda: declared(action_space=spaces.Box(-1, 1, (3, 2))), "action_space must be batch_space"),
        (lambda: declared(render_mode="human"), "render_mode is 'human'"),
        (lambda: on_reset(unseeded), "twice must give the same observations"),
        (lambda: on_reset(lambda e, s, o, reset: reset(seed=s)[0]), "must return .observations, infos."),
        (
            lambda: on_reset(lambda e, s, o, reset: (np.zeros((3, 5)), {})),
            r"reset\(\) must return observations in",
        ),
        (lambda: on_step(lambda e, result: result[:4]), "must return .observations, rewards, term"),
        (lambda: on_step(put(0, np.full((3, 2), 200.0))), r"step\(\) must return observations in"),
        (lambda: on_step(put(1, np.zeros((3, 1)))), r"rewards must be .* not float64 of shape \(3, 1\)"),
        (lambda: on_step(put(1, [0.0] * 3)), "rewards must be .* not list"),
        (lambda: on_step(put(2, lambda e, r: r[2].astype(int))), "terminations must be a bool array"),
        (lambda: on_step(put(3, np.zeros(2, bool))), "truncations must be a bool array"),
        (lambda: on_step(put(4, [{}] * 3)), "infos must be a dict, not list"),
        (lambda: on_step(info(luck=np.zeros(3))), "infos.'luck'. needs infos.'_luck'.*not missing"),
        (
            lambda: on_step(info(luck=np.zeros(3), _luck=np.zeros(3))),
            "a bool array of shape .3,., not float64",
        ),
        (lambda: on_step(info(age=np.zeros(2))), "must have one entry per row, 3, not 2"),
        (lambda: on_step(put(1, np.ones(3)), "next_step"), "NEXT_STEP: in the step after an end"),
        (
            lambda: on_step(lambda e, r: r[4].update(_final_obs=np.zeros(3, bool)), "same_step"),
            "must mark the rows",
        ),
        (lambda: on_step(short_final_obs, "same_step"), "must be an observation in single_observation_space"),
        (Buffered, "shares memory with the one before"),
        (
            lambda: on_step(put(1, lambda e, r: np.random.rand(3))),
            "the same seed and actions must give the same",
        ),
        (lambda: Forgetful("next_step"), "must keep copies of its own"),
        (KeepsActions, "must keep copies of its own"),
        (
            lambda: on_reset(lambda e, s, o, reset: reset(seed=s)),
            "must leave the observations of the other rows",
        ),
        (lambda: declared(render=lambda: ()), "a tuple of one frame per row, 3, not tuple"),
        (
            lambda: declared(render=lambda: (np.zeros((8, 8, 3)),) * 3),
            "uint8 of shape .H, W, 3., not float64",
        ),
        (ClosesOnce, r"a second close\(\) must do nothing"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Casting input x")
def test_broken_envs_are_caught(make, contract):
    with pytest.raises(AssertionError, match=contract):
        check_vector_env(make())


@pytest.mark.parametrize("mode", MODES)
def test_the_good_one_passes(mode):
    assert check_vector_env(Walk(mode)) == []


def moved_by_options(env, seed, options, reset):
    observations, infos = reset(seed=seed, options=options)
    return (observations, infos) if options is None or options else (observations + 1, infos)


def same_beginning(env, seed, options, reset):
    observations, infos = reset(seed=0, options=options)
    return observations, infos


def no_mask(env, seed, options, reset):
    if options:
        raise TypeError("no options here")
    return reset(seed=seed)


def pops_mask(env, seed, options, reset):
    options = {} if options is None else options
    mask = options.pop("reset_mask", None)
    return reset(seed=seed, options=options if mask is None else {"reset_mask": mask})


def ignores_mask(env, seed, options, reset):
    return (env.where.copy(), {}) if options else reset(seed=seed)


def last_is_first(env, result):
    if "final_obs" in result[4]:
        result[4]["final_obs"] = np.array([*result[0], None], object)[:3]


@pytest.mark.parametrize(
    ("make", "finding"),
    [
        (
            lambda: declared(metadata={"autoreset_mode": AutoresetMode.DISABLED}, render_mode=None),
            "render_modes",
        ),
        (lambda: on_reset(moved_by_options), "gives other observations than"),
        (lambda: on_reset(same_beginning), "give the same first observations"),
        (lambda: on_reset(same_beginning), "should continue the random stream"),
        (lambda: on_step(put(2, lambda e, r: np.zeros(3, bool))), "3 of 3 rows never ended in 200 steps"),
        (lambda: on_step(put(1, lambda e, r: np.full(3, np.nan))), "some rewards are NaN"),
        (lambda: on_step(last_is_first, "same_step"), "final_obs equals the first"),
        (lambda: on_step(lambda e, r: r[4].pop("final_info", None), "same_step"), 'no "final_info"'),
        (lambda: on_reset(no_mask), "raised TypeError('no options here')"),
        (lambda: on_reset(pops_mask), "changed the caller's options"),
        (lambda: on_reset(ignores_mask), "left rows in the mask as they were"),
        (lambda: declared(render=lambda: [np.zeros((8, 8, 3), np.uint8)] * 3), "returns a list"),
    ],
)
def test_softer_findings(make, finding):
    assert any(finding in sentence for sentence in check_vector_env(make()))


def test_num_steps_bounds_the_play():
    assert any("never ended in 2 steps" in sentence for sentence in check_vector_env(Walk(), num_steps=2))


# Broken denoising processes


class LateReward(DenoiseVectorEnv):
    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, rewards + 1, *rest


class Damped(DenoiseVectorEnv):
    def _read_actions(self, actions):
        return 0.5 * super()._read_actions(actions)


class Crowded(DenoiseVectorEnv):
    """Rows that depend on how many there are."""

    def reset(self, **options):
        observations, infos = super().reset(**options)
        return {**observations, "latents": observations["latents"] + self.num_envs}, infos


class Truncating(DenoiseVectorEnv):
    def step(self, actions):
        observations, rewards, terminated, _, infos = super().step(actions)
        return observations, rewards, terminated, terminated, infos


class Unweighted(DenoiseVectorEnv):
    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, 2 * rewards, *rest


@pytest.mark.parametrize(
    ("broken", "contract"),
    [
        (LateReward, "0 before the last step"),
        (Damped, "must become the latents"),
        (Crowded, "must not depend on its batch; its latents"),
        (Truncating, "never truncated"),
        (Unweighted, "the sum of its terms"),
    ],
)
def test_broken_denoising_envs_are_caught(broken, contract):
    with pytest.raises(AssertionError, match=contract):
        check_denoising_env(broken("points", 3, num_steps=3))


def test_a_reward_of_weight_0_may_fail_in_a_denoising_env():
    env = DenoiseVectorEnv("points", 3, num_steps=3)
    mdp = env.mdp
    mdp.rewards["broken"] = lambda images, prompts: images[:, 0] * torch.nan
    mdp.reward_weights["broken"] = 0.0
    check_denoising_env(env)
    mdp.reward_weights["broken"] = 1.0
    check_denoising_env(env)  # its NaN is the reward's then
    assert not env.mdp.score(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)).valid.any()


def test_a_denoising_env_is_checked_without_autoreset():
    with pytest.raises(AssertionError, match='autoreset_mode="disabled"'):
        check_denoising_env(DenoiseVectorEnv("points", 3, autoreset_mode="same_step"))

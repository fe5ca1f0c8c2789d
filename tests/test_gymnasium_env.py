"""The Gymnasium face."""

import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList
from registered import IDS

import denoise_env
from denoise_env import DDIM, DenoiseEnv, DenoiseVectorEnv, DenoisingMDP, load_model
from denoise_env.mdp import row_generators
from denoise_env.prompts import Prompt
from denoise_env.rewards.points import PointsReward

K = 3


def points(num_envs=4, **options):
    return DenoiseVectorEnv("points", num_envs, **{"num_steps": K, **options})


def zeros(env):
    return np.zeros(env.action_space.shape, np.float32)


def finish(env):
    """Step to the end of the episodes that begin now."""
    return [env.step(zeros(env)) for _ in range(env.mdp.num_steps)][-1]


# Making and declaring


@pytest.mark.parametrize("env_id", IDS)
def test_check_env(env_id):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(gymnasium.make(env_id, num_steps=K).unwrapped)
    unexpected = [str(w.message) for w in caught if "Box" not in str(w.message)]
    assert unexpected == []


@pytest.mark.parametrize("env_id", IDS)
def test_make_takes_num_steps_in_every_way(env_id):
    assert gymnasium.make(env_id).unwrapped.mdp.num_steps == 10
    assert gymnasium.make(env_id, num_steps=4).unwrapped.mdp.num_steps == 4
    assert gymnasium.make_vec(env_id, num_envs=2).mdp.num_steps == 10
    assert gymnasium.make_vec(env_id, num_envs=2, num_steps=4).mdp.num_steps == 4
    assert gymnasium.make_vec(env_id, num_envs=2, max_episode_steps=5).mdp.num_steps == 5
    one_by_one = gymnasium.make_vec(env_id, num_envs=2, vectorization_mode="sync", num_steps=4)
    assert one_by_one.envs[0].unwrapped.mdp.num_steps == 4


def test_make_ends_by_termination_and_never_truncates():
    env = gymnasium.make("denoise_env/Points-v0", num_steps=K)
    env.reset(seed=0)
    flags = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(K)]
    assert flags == [(False, False)] * (K - 1) + [(True, False)]


def test_make_through_the_module_name():
    assert gymnasium.make_vec("denoise_env:denoise_env/Points-v0", num_envs=2).num_envs == 2


def test_spec_of_a_vector_env_makes_it_again():
    env = gymnasium.make_vec("denoise_env/Points-v0", num_envs=3, num_steps=K, autoreset_mode="same_step")
    again = gymnasium.make_vec(env.spec)
    assert again.num_envs == 3
    assert again.autoreset_mode is AutoresetMode.SAME_STEP


def test_spaces():
    env = points()
    assert env.single_action_space == gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    assert env.single_observation_space["step"] == gymnasium.spaces.Discrete(K + 1)
    assert env.single_observation_space["prompt_index"] == gymnasium.spaces.Discrete(6)
    env.mdp.model.vocabulary = None
    free = DenoiseVectorEnv.from_mdp(env.mdp, 4)
    assert free.single_observation_space["prompt_index"] == gymnasium.spaces.Box(0, 2**31 - 1, (), np.int64)
    assert free.reset(seed=0)[0] in free.observation_space
    single = DenoiseEnv.from_mdp(env.mdp)
    assert single.reset(seed=0)[0] in single.observation_space


def test_importing_the_package_is_cheap():
    heavy = ("torch", "diffusers", "transformers", "torchrl", "tensordict", "peft", "wandb", "PIL")
    code = f"import sys, denoise_env; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_imports_and_a_first_model_print_nothing():
    """Warnings of the libraries beneath are not the reader's."""
    code = """
import denoise_env, denoise_env.sb3, denoise_env.torchrl_transforms
for name in denoise_env.__all__:
    getattr(denoise_env, name)
denoise_env.load_model("shapes").schedule(2)
"""
    command = [sys.executable, "-W", "default", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_public_names_exist():
    for name in denoise_env.__all__:
        assert name in dir(denoise_env)
        assert getattr(denoise_env, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = denoise_env.nothing
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert denoise_env.__version__ == project["version"]


# Episodes


def test_an_episode():
    env = points()
    observation, infos = env.reset(seed=0)
    assert observation in env.observation_space
    assert infos["prompt"].tolist() == [env.prompts[i].text for i in observation["prompt_index"]]
    rng = np.random.default_rng(0)
    for k in range(1, K + 1):
        action = rng.normal(size=(4, 2)).astype(np.float32)
        observation, rewards, terminated, truncated, infos = env.step(action)
        assert observation in env.observation_space
        np.testing.assert_array_equal(observation["latents"], action)
        assert (observation["step"] == k).all()
        assert (terminated == (k == K)).all()
        assert not truncated.any()
        assert rewards.dtype == np.float32
        if k < K:
            assert not rewards.any()
            assert "reward_terms" not in infos
    expected = PointsReward()(torch.from_numpy(action), [Prompt(p) for p in infos["prompt"].tolist()])
    np.testing.assert_array_equal(rewards, expected.numpy())
    np.testing.assert_array_equal(infos["reward_terms"]["points"], expected.numpy())
    assert infos["valid"].all()
    for mask in (infos["_reward_terms"], infos["reward_terms"]["_points"], infos["_valid"], infos["_prompt"]):
        assert mask.dtype == bool
        assert mask.all()
    assert len(DictInfoToList(env)._convert_info_to_list(infos)[0]["reward_terms"]) == 1


def test_weights_and_a_failing_reward():
    def broken(images, prompts):
        raise RuntimeError("no scores today")

    model = load_model("points")
    env = DenoiseVectorEnv.from_model(model, {"points": PointsReward(), "broken": broken}, ["ring"], 2, K)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="no scores"):
        _, rewards, *_, infos = finish(env)
    assert np.isnan(rewards).all()
    assert not infos["valid"].any()
    assert np.isfinite(infos["reward_terms"]["points"]).all()
    doubled = points(rewards={"points": 2.0})
    doubled.reset(seed=0)
    _, rewards, *_, infos = finish(doubled)
    np.testing.assert_allclose(rewards, 2 * infos["reward_terms"]["points"])


def test_torch_output_is_the_same_as_numpy():
    arrays, tensors = points(), points(output="torch")
    a, _ = arrays.reset(seed=5)
    t, _ = tensors.reset(seed=5)
    for k in range(K):
        action = torch.randn(4, 2, generator=torch.Generator().manual_seed(k))
        for name in a:
            assert isinstance(t[name], torch.Tensor)
            np.testing.assert_array_equal(a[name], t[name].numpy())
        a, *step_a, infos_a = arrays.step(action.numpy())
        t, *step_t, infos_t = tensors.step(action)
        for x, y in zip(step_a, step_t, strict=True):
            assert isinstance(y, torch.Tensor)
            np.testing.assert_array_equal(x, y.numpy())
    assert isinstance(infos_t["reward_terms"]["points"], torch.Tensor)
    np.testing.assert_array_equal(infos_a["reward_terms"]["points"], infos_t["reward_terms"]["points"].numpy())


def test_bfloat16_latents_are_float32_outside():
    mdp = DenoisingMDP.make("points", num_steps=K)
    mdp.model.dtype = torch.bfloat16
    env = DenoiseVectorEnv.from_mdp(mdp, 3)
    assert env.reset(seed=0)[0] in env.observation_space
    action = np.full((3, 2), 0.1, np.float32)
    observation = env.step(action)[0]
    assert observation["latents"].dtype == np.float32
    np.testing.assert_array_equal(observation["latents"], torch.tensor(0.1).bfloat16().float().numpy())
    tensors = DenoiseVectorEnv.from_mdp(mdp, 3, output="torch")
    assert tensors.reset(seed=0)[0]["latents"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype must be torch\.bfloat16, not torch\.float32"):
        tensors.step(torch.zeros(3, 2))


@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_nothing_returned_or_given_is_kept(output):
    one, other = points(output=output), points(output=output)
    for env in (one, other):
        action = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
        action = action.numpy() if output == "numpy" else action
        observation, _ = env.reset(seed=0)
        observation = {**observation}
        if env is one:
            for values in observation.values():
                values[...] = 7
        observation, *_ = env.step(action)
        if env is one:
            action[...] = 7
            for values in observation.values():
                values[...] = 7
    partial = {"reset_mask": np.array([True, False, False, False])}
    mine, _ = one.reset(options=partial)
    theirs, _ = other.reset(options=partial)
    for name in mine:
        assert (mine[name] == theirs[name]).all(), name


def test_single_env_is_row_0():
    env, vector = DenoiseEnv("points", num_steps=K), points()
    observation, info = env.reset(seed=9)
    batch, infos = vector.reset(seed=9)
    np.testing.assert_array_equal(observation["latents"], batch["latents"][0])
    assert info["prompt"] == infos["prompt"][0]
    for k in range(K):
        action = np.full(2, k, np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        _, rewards, *_ = vector.step(np.tile(action, (4, 1)))
        assert isinstance(reward, float)
        assert reward == rewards[0]
        assert (terminated, truncated) == (k == K - 1, False)
    assert info["reward_terms"] == {"points": reward}
    assert info["valid"] is True


# Seeds


def test_row_i_is_seed_plus_i_alone():
    batch, infos = points().reset(seed=3)
    for i in range(4):
        row, info = points(1).reset(seed=3 + i)
        np.testing.assert_array_equal(row["latents"][0], batch["latents"][i])
        assert info["prompt"][0] == infos["prompt"][i]


def test_seeds():
    env = points()
    first = env.reset(seed=0)[0]["latents"]
    second = env.reset()[0]["latents"]
    assert not np.isin(first, second).any()
    np.testing.assert_array_equal(env.reset(seed=0)[0]["latents"], first)
    np.testing.assert_array_equal(env.reset()[0]["latents"], second)
    env.reset(seed=0)
    mixed = env.reset(seed=[1, None, 1, None])[0]["latents"]
    np.testing.assert_array_equal(mixed[0], mixed[2])
    np.testing.assert_array_equal(mixed[0], first[1])
    np.testing.assert_array_equal(mixed[[1, 3]], second[[1, 3]])
    assert env.np_random_seed == 0


def test_first_reset_without_a_seed_draws_from_np_random():
    same = []
    for _ in range(2):
        env = points()
        env.np_random = np.random.default_rng(4)
        same.append(env.reset()[0]["latents"])
    np.testing.assert_array_equal(*same)
    assert not np.array_equal(points().reset()[0]["latents"], same[0])


def test_naming_the_prompts_leaves_the_noise():
    drawn = points().reset(seed=0)[0]["latents"]
    named = points().reset(seed=0, options={"prompts": ["ring", "line", "grid", "cross"]})[0]["latents"]
    np.testing.assert_array_equal(drawn, named)


# Reset options


def test_groups():
    env = points(6)
    options = {"prompts": ["ring", "line"], "group_size": 3, "shared_noise": True}
    observation, infos = env.reset(seed=0, options=options)
    assert options == {"prompts": ["ring", "line"], "group_size": 3, "shared_noise": True}
    assert infos["prompt"].tolist() == ["ring"] * 3 + ["line"] * 3
    for rows in (observation["latents"][:3], observation["latents"][3:]):
        assert (rows == rows[0]).all()
    assert not (observation["latents"][0] == observation["latents"][3]).all()
    own = env.reset(seed=0, options={"group_size": 3})[0]
    assert len(np.unique(own["latents"], axis=0)) == 6
    assert len(np.unique(own["prompt_index"][:3])) == 1


def test_groups_of_the_constructor_hold_in_autoresets():
    env = points(4, group_size=2, shared_noise=True, autoreset_mode="same_step")
    env.reset(seed=0)
    observation = finish(env)[0]
    for name in ("latents", "prompt_index"):
        np.testing.assert_array_equal(observation[name][::2], observation[name][1::2])


@pytest.mark.parametrize("mode", ["same_step", "next_step"])
def test_a_reset_that_an_autoreset_could_not_follow_is_refused_and_changes_nothing(mode):
    env, twin = (points(6, group_size=3, autoreset_mode=mode) for _ in range(2))
    action = np.ones((6, 2), np.float32)
    for e in (env, twin):
        e.reset(seed=0)
        e.step(action)
    before = (env.state, env.mdp.prompts.copy())
    for mask in ([False, True, False, False, False, False], [True] * 4 + [False] * 2):
        options = {"reset_mask": np.array(mask), "group_size": 1, "prompts": ["a new one"] * sum(mask)}
        with pytest.raises(ValueError, match=r"rows (0 to 2|3 to 5) are a group of group_size=3 that autoresets begin"):
            env.reset(seed=7, options=options)
    assert env.state is before[0]
    assert env.mdp.prompts == before[1]
    whole = {"reset_mask": np.array([True] * 3 + [False] * 3), "group_size": 1}  # of one prompt each, until they end
    for k in range(2 * K + 2):
        results = []
        for e in (env, twin):
            if k == 1:
                e.reset(options=whole)
            results.append(e.step(action))
        for one, other in zip(results[0][:4], results[1][:4], strict=True):
            np.testing.assert_equal(one, other)
    assert (env.state.step[:3] != env.state.step[3:]).all()


def test_rows_of_a_group_may_be_reset_apart_while_they_stand_at_the_same_step():
    env = points(4, group_size=2, autoreset_mode="same_step")
    env.reset(seed=0)
    env.reset(options={"reset_mask": np.array([True, False, False, False]), "group_size": 1, "prompts": ["line"]})
    assert finish(env)[0]["step"].tolist() == [0] * 4
    apart = points(4, group_size=2)  # without autoresets every reset is the caller's
    apart.reset(seed=0)
    apart.step(np.zeros((4, 2), np.float32))
    apart.reset(options={"reset_mask": np.array([True, False, False, False]), "group_size": 1})
    assert apart.state.step.tolist() == [0, 1, 1, 1]


def test_named_prompts_do_not_join_the_draw():
    env = points(64, prompts=["ring"])
    env.reset(options={"prompts": ["line"] * 64})
    assert env.prompts == [Prompt("ring"), Prompt("line")]
    assert set(env.reset(seed=0)[1]["prompt"]) == {"ring"}


@pytest.mark.parametrize("as_tensor", [False, True])
def test_partial_reset(as_tensor):
    env = points()
    env.reset(seed=0)
    before, *_ = env.step(np.ones((4, 2), np.float32))
    mask = np.array([False, True, False, True])
    options = {"reset_mask": torch.from_numpy(mask) if as_tensor else mask, "prompts": ["line", "grid"]}
    after, infos = env.reset(options=options)
    assert list(options) == ["reset_mask", "prompts"]
    assert infos["_prompt"].tolist() == mask.tolist()
    assert infos["prompt"].tolist() == [None, "line", None, "grid"]
    for name in before:
        np.testing.assert_array_equal(before[name][~mask], after[name][~mask])
    assert after["step"].tolist() == [1, 0, 1, 0]
    finished = [env.step(np.ones((4, 2), np.float32)) for _ in range(K - 1)][-1]
    observation, rewards, terminated, _, infos = finished
    assert observation["step"].tolist() == [3, 2, 3, 2]
    assert terminated.tolist() == (~mask).tolist()
    assert (rewards > 0).tolist() == (~mask).tolist()
    for name in ("_reward_terms", "_valid", "valid"):
        assert infos[name].tolist() == (~mask).tolist()
    assert infos["_prompt"].all()
    with pytest.raises(ResetNeeded, match=r"2 of 4 rows are at the end .*reset_mask"):
        env.step(zeros(env))
    env.reset(options={"reset_mask": ~mask})
    env.step(zeros(env))


def test_seeded_partial_reset_reseeds_its_rows_only():
    env = points()
    first = env.reset(seed=0)[0]["latents"]
    second = env.reset()[0]["latents"]
    env.reset(seed=0)
    mask = np.array([True, False, False, False])
    again = env.reset(seed=0, options={"reset_mask": mask})[0]["latents"]
    np.testing.assert_array_equal(again[0], first[0])
    np.testing.assert_array_equal(env.reset()[0]["latents"][1:], second[1:])


# Autoreset


def test_next_step():
    env, twin = points(autoreset_mode="next_step"), points()
    env.reset(seed=0)
    twin.reset(seed=0)
    last = finish(env)
    assert last[2].all()
    assert "reward_terms" in last[4]
    fresh, rewards, terminated, truncated, infos = env.step(zeros(env))
    expected, expected_infos = twin.reset()
    for name in fresh:
        np.testing.assert_array_equal(fresh[name], expected[name])
    assert infos["prompt"].tolist() == expected_infos["prompt"].tolist()
    for values in (rewards, terminated, truncated):
        assert not values.any()
    assert (env.step(zeros(env))[0]["step"] == 1).all()


def test_next_step_with_rows_apart():
    env = points(autoreset_mode=AutoresetMode.NEXT_STEP)
    env.reset(seed=0)
    env.step(zeros(env))
    env.reset(options={"reset_mask": np.array([True, False, False, False])})
    seen = [env.step(zeros(env))[0]["step"].tolist() for _ in range(5)]
    assert seen == [[1, 2, 2, 2], [2, 3, 3, 3], [3, 0, 0, 0], [0, 1, 1, 1], [1, 2, 2, 2]]


@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_same_step(output):
    env, twin = points(autoreset_mode="same_step", output=output), points()
    env.reset(seed=0)
    twin.reset(seed=0)
    action = torch.ones(4, 2)
    action = action.numpy() if output == "numpy" else action
    for _ in range(K - 1):
        assert "final_obs" not in env.step(action)[4]
    observation, rewards, terminated, _, infos = env.step(action)
    _, twin_rewards, *_, twin_infos = finish_with(twin, np.ones((4, 2), np.float32))
    expected, expected_infos = twin.reset()
    assert terminated.all()
    np.testing.assert_array_equal(np.asarray(rewards), twin_rewards)
    for name in expected:
        np.testing.assert_array_equal(np.asarray(observation[name]), expected[name])
    assert infos["prompt"].tolist() == expected_infos["prompt"].tolist()
    assert infos["_final_obs"].all()
    for row in infos["final_obs"]:
        assert (row["latents"] == 1).all()
        assert row["step"] == K
    final = infos["final_info"]
    assert final["prompt"].tolist() == twin_infos["prompt"].tolist()
    np.testing.assert_array_equal(final["reward_terms"]["points"], twin_rewards)
    assert final["valid"].all()
    assert "reward_terms" not in infos


def finish_with(env, action):
    return [env.step(action) for _ in range(K)][-1]


def test_same_step_with_rows_apart():
    env = points(autoreset_mode="same_step")
    env.reset(seed=0)
    env.step(zeros(env))
    env.reset(options={"reset_mask": np.array([True, False, False, False])})
    results = [env.step(zeros(env)) for _ in range(2)]
    observation, _, terminated, _, infos = results[-1]
    assert observation["step"].tolist() == [2, 0, 0, 0]
    assert terminated.tolist() == [False, True, True, True]
    assert infos["_final_obs"].tolist() == terminated.tolist()
    assert infos["final_obs"][0] is None
    assert infos["final_info"]["prompt"][0] is None
    assert infos["prompt"][0] is not None


# Errors


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((4, 3), np.float32), r"shape must be \(4, 2\), not \(4, 3\)"),
        (np.zeros((3, 2), np.float32), r"shape must be \(4, 2\), not \(3, 2\)"),
        (np.zeros((4, 2)), "float32 numpy array, not dtype float64"),
        ([[0.0, 0.0]] * 4, "float32 numpy array, not list"),
        (torch.zeros(4, 2), 'not Tensor; for tensors, output="torch"'),
        (np.full((4, 2), np.nan, np.float32), "must be finite; it has NaN or infinity"),
        (np.full((4, 2), np.inf, np.float32), "must be finite; it has NaN or infinity"),
    ],
)
def test_bad_actions_change_nothing(action, message):
    env = points()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)
    assert (env.step(zeros(env))[0]["step"] == 1).all()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((4, 2), np.float32), "a tensor of latents, not ndarray"),
        (torch.zeros(4, 3), r"shape must be \(4, 2\), not \(4, 3\)"),
        (torch.zeros(4, 2, dtype=torch.float64), "dtype must be torch.float32, not torch.float64"),
        (torch.zeros(4, 2, device="meta"), "must be on cpu, not on meta"),
        (torch.full((4, 2), torch.nan), "must be finite"),
    ],
)
def test_bad_tensor_actions(action, message):
    env = points(output="torch")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)


def test_finite_check_can_be_turned_off():
    env = points(check_finite=False)
    env.reset(seed=0)
    assert np.isnan(env.step(np.full((4, 2), np.nan, np.float32))[0]["latents"]).all()


def test_bad_single_actions():
    env = DenoiseEnv("points", num_steps=K)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(np.zeros(2, np.float32))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape must be \(2,\), not \(3,\)"):
        env.step(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"shape must be \(2,\), not None"):
        env.step([0.0, 0.0])
    with pytest.raises(TypeError, match="autoreset_mode"):
        DenoiseEnv("points", autoreset_mode="same_step")


def test_order_of_calls():
    env = points()
    with pytest.raises(ResetNeeded, match="before step"):
        env.step(zeros(env))
    with pytest.raises(ResetNeeded, match="the first reset"):
        env.reset(options={"reset_mask": np.array([True, False, False, False])})
    env.reset(seed=0)
    finish(env)
    with pytest.raises(ResetNeeded, match="4 of 4 rows are at the end after 3 steps"):
        env.step(zeros(env))
    env.close()
    env.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promts": ["ring"] * 4}, r"unknown reset option 'promts'; did you mean 'prompts'\?"),
        ({"zzz": 1}, "unknown reset option 'zzz'; there are"),
        ({"prompts": ["ring"]}, "1 prompts in groups of 1 make 1 rows, not 4"),
        ({"prompts": "ring"}, "put the one prompt in a list"),
        ({"prompts": ["ring"] * 3 + [""]}, "prompt 3 must be a non-empty string"),
        ({"prompts": ["ring"] * 3 + ["rings"]}, "Points knows no prompt 'rings'"),
        ({"group_size": 3}, "group_size must divide num_envs: 4 rows do not make groups of 3"),
        ({"group_size": 0}, "group_size must divide num_envs"),
        ({"reset_mask": np.zeros(4, bool)}, "at least one True"),
        ({"reset_mask": np.ones(3, bool)}, r"4 bools, not bool of shape \(3,\)"),
        ({"reset_mask": np.ones(4)}, r"4 bools, not float64 of shape \(4,\)"),
        (
            {"reset_mask": np.array([True, False, True, True]), "group_size": 2},
            "splits the group of rows 0 to 1",
        ),
    ],
)
def test_bad_options_change_nothing(options, message):
    env, twin = points(), points()
    env.reset(seed=0)
    twin.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.reset(seed=8, options=options)
    np.testing.assert_array_equal(env.reset()[0]["latents"], twin.reset()[0]["latents"])
    assert env.np_random_seed == 0


@pytest.mark.parametrize("seed", [-1, [0, 1], [0, 1, 2, -3], 1.5, "0", [0, 1, 2, 0.5]])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match="seed"):
        points().reset(seed=seed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"num_steps": 4, "max_episode_steps": 5}, "num_steps=4 and max_episode_steps=5"),
        ({"render_mode": "human"}, 'render_mode must be None or "rgb_array"'),
        ({"output": "jax"}, 'output must be "numpy" or "torch"'),
        ({"autoreset_mode": "never"}, "autoreset_mode must be one of"),
        ({"group_size": 3}, "4 rows do not make groups of 3"),
        ({"rewards": "point"}, "did you mean 'points'"),
        ({"guidance": 3}, "points has no option 'guidance'"),
        ({"microbatch": 0}, "microbatch must be at least 1"),
        ({"prompts": []}, "prompts must not be empty"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        points(**options)


def test_a_live_mdp_takes_no_options_of_its_own():
    with pytest.raises(ValueError, match="'num_steps' belongs to the DenoisingMDP"):
        DenoiseVectorEnv.from_mdp(points().mdp, 2, num_steps=5)


# Rendering and wrappers


def test_render():
    env = points(render_mode="rgb_array", microbatch=3)
    with pytest.raises(ResetNeeded, match="before render"):
        env.render()
    env.reset(seed=0)
    frames = env.render()
    assert len(frames) == 4
    for frame in frames:
        assert frame.shape == (64, 64, 3)
        assert frame.dtype == np.uint8
    with pytest.warns(UserWarning, match="rgb_array"):
        assert points().render() is None
    single = DenoiseEnv("points", render_mode="rgb_array")
    single.reset(seed=0)
    assert single.render().shape == (64, 64, 3)


def test_render_x0():
    env = points(render_mode="rgb_array", render_x0=True, prompts=["line"])
    plain = DenoiseVectorEnv.from_mdp(env.mdp, 4, render_mode="rgb_array")
    for e in (env, plain):
        e.reset(seed=0)
        e.step(zeros(e))
        e.reset(seed=1, options={"reset_mask": np.array([True, True, False, False])})
    # Every x̂0 of "line" lies near the line y = 0, the middle rows of the picture; noise does not.
    rows = [np.nonzero((frame < 200).any((1, 2)))[0] for frame in env.render()]
    assert all(len(r) and r.min() > 20 and r.max() < 44 for r in rows)
    for _ in range(K - 1):
        env.step(zeros(env))
        plain.step(zeros(plain))
    shown = [np.array_equal(a, b) for a, b in zip(env.render(), plain.render(), strict=True)]
    assert shown[2:] == [True, True]


def test_record_video(tmp_path):
    env = gymnasium.make("denoise_env/Points-v0", num_steps=K, render_mode="rgb_array")
    env = gymnasium.wrappers.RecordVideo(env, str(tmp_path / "one"), episode_trigger=lambda _: True)
    env.reset(seed=0)
    for _ in range(K):
        env.step(np.zeros(2, np.float32))
    assert len(env.recorded_frames) == K + 1
    env.close()
    assert len(list((tmp_path / "one").glob("*.mp4"))) == 1
    vector = gymnasium.make_vec("denoise_env/Points-v0", num_envs=2, num_steps=K, render_mode="rgb_array")
    vector = gymnasium.wrappers.vector.RecordVideo(vector, str(tmp_path / "many"), episode_trigger=lambda _: True)
    vector.reset(seed=0)
    for _ in range(K):
        vector.step(np.zeros((2, 2), np.float32))
    vector.close()
    assert len(list((tmp_path / "many").glob("*.mp4"))) == 1


def test_record_episode_statistics():
    env = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make("denoise_env/Points-v0", num_steps=K))
    env.reset(seed=0)
    steps = [env.step(np.zeros(2, np.float32)) for _ in range(K)]
    assert steps[-1][4]["episode"]["l"] == K
    assert steps[-1][4]["episode"]["r"] == pytest.approx(steps[-1][1])


@pytest.mark.parametrize("mode", ["disabled", "same_step", "next_step"])
def test_vector_record_episode_statistics(mode):
    env = gymnasium.make_vec("denoise_env/Points-v0", num_envs=2, num_steps=K, autoreset_mode=mode)
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(env)
    for _ in range(2):
        env.reset(seed=0)
        for _ in range(K):
            *_, infos = env.step(np.zeros((2, 2), np.float32))
        assert infos["episode"]["l"].tolist() == [K, K]
        assert (infos["episode"]["r"] > 0).all()
    assert env.episode_count == 4


# The faces agree


def test_gymnasium_equals_a_loop_on_the_mdp():
    mdp = DenoisingMDP.make("points", num_steps=K)
    kernel = DDIM(mdp.schedule, mdp.model.prediction_type)

    def act(latents, index, k):
        output = mdp.model.predict(latents, mdp.schedule.timesteps[k], mdp.conditioning.rows(index))
        noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(k))[: len(latents)]
        return kernel.transition(latents, output, k).sample(noise).detach()

    state = mdp.reset(row_generators(range(6, 10)))
    env = DenoiseVectorEnv.from_mdp(mdp, 4, output="torch")
    alone = DenoiseEnv.from_mdp(mdp, output="torch")
    observation, _ = env.reset(seed=6)
    single, _ = alone.reset(seed=6)
    for k in range(K):
        assert torch.equal(observation["latents"], state.latents)
        assert torch.equal(observation["prompt_index"], state.prompt_index)
        torch.testing.assert_close(single["latents"], state.latents[0])
        state = mdp.step(state, act(state.latents, state.prompt_index, k))
        observation, rewards, *_ = env.step(act(observation["latents"], observation["prompt_index"], k))
        single, reward, *_ = alone.step(act(single["latents"][None], single["prompt_index"][None], k)[0])
    scores = mdp.score(state.latents, state.prompt_index)
    assert torch.equal(rewards, scores.total)
    assert reward == pytest.approx(scores.total[0].item())

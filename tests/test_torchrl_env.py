"""The TorchRL face."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import RewardSum, TransformedEnv
from torchrl.envs.utils import check_env_specs

from denoise_env import DDIM, DenoiseTorchRLEnv, DenoiseVectorEnv, DenoisingMDP
from denoise_env.worlds import WORLDS

K = 3


def points(num_envs=4, **options):
    return DenoiseTorchRLEnv("points", num_envs, **{"num_steps": K, **options})


def sampler(mdp):
    """The base policy, its noise a function of the step alone."""
    kernel = DDIM(mdp.schedule, mdp.model.prediction_type)

    @torch.no_grad()
    def act(latents, step, index):
        k = int(step[0])
        output = mdp.model.predict(latents, mdp.schedule.timesteps[k], mdp.conditioning.rows(index))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(k))
        return kernel.transition(latents, output, k).sample(noise)

    return act


def policy(mdp):
    return TensorDictModule(sampler(mdp), in_keys=["latents", "step", "prompt_index"], out_keys=["action"])


@pytest.mark.parametrize("name", [name for name, world in WORLDS.items() if world.environment])
def test_specs(name):
    check_env_specs(DenoiseTorchRLEnv(name, num_envs=3, num_steps=2), break_when_any_done="both", seed=0)


def test_specs_of_other_models_and_rewards():
    mdp = DenoisingMDP.make("points-flow", num_steps=K)
    mdp.model.dtype, mdp.model.vocabulary = torch.bfloat16, None
    env = DenoiseTorchRLEnv.from_mdp(mdp, 3)
    check_env_specs(env)
    assert env.reset()["latents"].dtype == torch.bfloat16
    assert env.reward_keys == ["reward", ("reward_terms", "points")]
    check_env_specs(TransformedEnv(env, RewardSum()))


def test_same_trajectory_as_the_gymnasium_face():
    mdp = DenoisingMDP.make("points", num_steps=K)
    act = sampler(mdp)
    env, vector = DenoiseTorchRLEnv.from_mdp(mdp, 4), DenoiseVectorEnv.from_mdp(mdp, 4, output="torch")
    env.set_seed(6)
    for seed in (6, None):
        rollout = env.rollout(K, policy(mdp), break_when_any_done=False)
        observation, _ = vector.reset(seed=seed)
        for k in range(K):
            for name in ("latents", "step", "prompt_index"):
                assert torch.equal(rollout[name][:, k], observation[name]), name
            observation, rewards, terminated, _, infos = vector.step(act(*observation.values()))
            after = rollout["next"][:, k]
            assert torch.equal(after["latents"], observation["latents"])
            assert torch.equal(after["reward"][:, 0], rewards)
            assert torch.equal(after["terminated"][:, 0], terminated)
            assert torch.equal(after["done"][:, 0], terminated)
            assert torch.equal(after["valid"][:, 0], infos.get("valid", torch.zeros(4, dtype=torch.bool)))
        assert torch.equal(after["reward_terms", "points"][:, 0], infos["reward_terms"]["points"])
        assert after["valid"].all()


def test_seeds():
    env = points()
    env.set_seed(3)
    first = env.reset()["latents"]
    assert not torch.equal(env.reset()["latents"], first)
    env.set_seed(3)
    assert torch.equal(env.reset()["latents"], first)
    for i in range(4):
        row = points(1)
        row.set_seed(3 + i)
        assert torch.equal(row.reset()["latents"][0], first[i])
    torch.manual_seed(0)
    unseeded = points().reset()["latents"]
    torch.manual_seed(0)
    assert torch.equal(points().reset()["latents"], unseeded)


def test_groups():
    env = points(6, group_size=3, shared_noise=True)
    td = env.reset(prompts=["ring", "line"])
    assert [env.prompts[i].text for i in td["prompt_index"]] == ["ring"] * 3 + ["line"] * 3
    assert torch.equal(td["latents"][::3].repeat_interleave(3, 0), td["latents"])
    alone = env.reset(group_size=1, shared_noise=False)
    assert len(alone["latents"].unique(dim=0)) == 6
    with pytest.raises(ValueError, match="did you mean 'prompts'"):
        env.reset(promts=["ring"])
    with pytest.raises(ValueError, match="'_reset'"):
        env.reset(reset_mask=torch.ones(6, dtype=torch.bool))


def test_partial_reset():
    env = points()
    env.set_seed(0)
    td = env.step_mdp(env.rand_step(env.reset()))
    before = td.clone()
    mask = torch.tensor([True, False, False, True])
    td = env.reset(td.set("_reset", mask[:, None]))
    assert td["step"].tolist() == [0, 1, 1, 0]
    for name in ("latents", "prompt_index"):
        assert torch.equal(td[name][~mask], before[name][~mask])
    assert not (td["latents"][mask] == before["latents"][mask]).any()
    rollout = env.rollout(9, tensordict=td, auto_reset=False, break_when_any_done=False, break_when_all_done=True)
    assert rollout["next", "step"].tolist() == [[1, 2, 3], [2, 3, 3], [2, 3, 3], [1, 2, 3]]
    assert rollout["next", "done"][:, -1].all()
    assert torch.equal(rollout["next", "reward"][~mask, 1] > 0, torch.ones(2, 1, dtype=torch.bool))
    assert not rollout["next", "reward"][mask, 1].any()


def test_partial_reset_draws_what_gymnasium_draws():
    env, vector = points(), DenoiseVectorEnv("points", 4, num_steps=K, output="torch")
    env.set_seed(0)
    td = env.reset()
    vector.reset(seed=0)
    mask = torch.tensor([True, False, False, True])
    td = env.reset(td.set("_reset", mask[:, None]))
    observation, _ = vector.reset(options={"reset_mask": mask})
    assert torch.equal(td["latents"], observation["latents"])
    assert torch.equal(td["prompt_index"], observation["prompt_index"])


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.filterwarnings("ignore:.*InitTracker:FutureWarning")
def test_collector_gives_whole_episodes(compact):
    env = points(group_size=2, shared_noise=True)
    env.set_seed(0)
    collector = Collector(env, policy(env.mdp), frames_per_batch=4 * K, total_frames=8 * K, compact_obs=compact)
    batches = list(collector)
    collector.shutdown()
    assert len(batches) == 2
    for batch in batches:
        assert batch.batch_size == (4, K)
        assert batch["step"].tolist() == [list(range(K))] * 4
        assert batch["next", "done"][..., 0].tolist() == [[False] * (K - 1) + [True]] * 4
        assert (batch["next", "reward"][:, -1] > 0).all()
        assert torch.equal(batch["latents"][::2, 0], batch["latents"][1::2, 0])
    assert not torch.equal(batches[0]["latents"][:, 0], batches[1]["latents"][:, 0])


def test_failing_reward_is_nan():
    def broken(images, prompts):
        raise RuntimeError("no scores today")

    mdp = DenoisingMDP.make("points", num_steps=1)
    mdp.rewards["points"] = broken
    env = DenoiseTorchRLEnv.from_mdp(mdp, 2)
    with pytest.warns(UserWarning, match="no scores today"):
        rollout = env.rollout(1)
    assert rollout["next", "reward"].isnan().all()
    assert rollout["next", "reward_terms", "points"].isnan().all()
    assert not rollout["next", "valid"].any()
    assert rollout["next", "done"].all()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (torch.zeros(4, 3), r"shape must be \(4, 2\), not \(4, 3\)"),
        (torch.zeros(4, 2, dtype=torch.float64), "dtype must be torch.float32"),
        (torch.full((4, 2), torch.nan), "must be finite"),
    ],
)
def test_bad_actions(action, message):
    env = points()
    td = env.reset().set("action", action)
    with pytest.raises(ValueError, match=message):
        env.step(td)


def test_stepping_past_the_end():
    env = points(num_steps=1)
    td = env.step_mdp(env.rand_step(env.reset()))
    with pytest.raises(ValueError, match="over after 1 steps: reset first"):
        env.rand_step(td)


def test_the_state_is_in_the_tensordict():
    env = points()
    td = TensorDict(
        {
            "latents": torch.zeros(4, 2),
            "step": torch.full((4,), K - 1),
            "prompt_index": torch.zeros(4, dtype=torch.long),
            "action": torch.ones(4, 2),
        },
        batch_size=4,
    )
    after = env.step(td)["next"]
    assert after["done"].all()
    assert after["latents"].data_ptr() != td["action"].data_ptr()


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_envs must be at least 1"):
        points(0)
    with pytest.raises(ValueError, match="do not make groups of 3"):
        points(group_size=3)
    with pytest.raises(ValueError, match="'microbatch' belongs to the DenoisingMDP"):
        DenoiseTorchRLEnv.from_mdp(points().mdp, 2, microbatch=1)

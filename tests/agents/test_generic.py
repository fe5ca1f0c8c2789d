"""The loop of generic agents, with every kind of them."""

import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from torchrl.envs import Compose, TransformedEnv

from agents.generic import RandomAgent, ScriptedAgent, run
from agents.generic.sb3 import SB3OnPolicy
from agents.generic.torchrl import TorchRLPPO, TorchRLPPOConfig
from denoise_env import DenoiseTorchRLEnv, DenoiseVectorEnv, DenoisingMDP, FlatObservation, NoiseAction
from denoise_env.conventions import Flat, Noise
from denoise_env.sb3 import SB3VecEnv
from denoise_env.torchrl_transforms import ActionTransform, FlatTransform

K, N = 3, 64


def make(num_envs=N, **options):
    return FlatObservation(NoiseAction(DenoiseVectorEnv("points", num_envs, num_steps=K, **options)))


def sb3(env):
    options = {"n_steps": K, "batch_size": 96, "gamma": 1.0, "learning_rate": 1e-3}
    return PPO("MlpPolicy", SB3VecEnv(env), seed=0, device="cpu", **options)


def single_file(env):
    found = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "ppo_single_file.py"))
    return found["PPO"](9, 2, found["parser"].parse_args(["--minibatch", "96"]))


LEARNERS = {
    "sb3": lambda env: SB3OnPolicy(sb3(env)),
    "torchrl": lambda env: TorchRLPPO(9, 2, TorchRLPPOConfig(lr=1e-3, minibatch=96)),
    "single file": single_file,
}


def test_agents_that_do_not_learn():
    base = ScriptedAgent(lambda observation: torch.randn(len(observation), 2, generator=generator))
    found = {}
    for name in ("base", "random", "base"):
        generator = torch.Generator().manual_seed(0)
        env = make(output="torch")
        agent = base if name == "base" else RandomAgent(env.action_space)
        returns = run(env, agent, 2 * N, seed=1)
        assert returns.shape == (2 * N,)
        if name in found:
            assert np.array_equal(returns, found[name])  # the same seed, the same episodes
        found[name] = returns
    assert (found["random"] < 1e-3).mean() > 0.2 > (found["base"] < 1e-3).mean()  # noise of ±10 leads away
    assert 0 < found["base"].min() < found["base"].max() <= 1


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("output", ["torch", "numpy"])
def test_agents_that_learn(name, output):
    if output == "numpy" and name == "single file":
        pytest.skip("it is written for tensors")
    env = make(output=output)
    returns = run(env, LEARNERS[name](env), 20 * N, seed=0)
    assert returns.shape == (20 * N,)
    assert returns[-4 * N :].mean() > returns[: 2 * N].mean() + 0.2


def test_sb3_in_this_loop_is_sb3_in_its_own():
    env = make(output="torch")
    own = sb3(env).learn(3 * N * K)
    guest = sb3(env)
    run(env, SB3OnPolicy(guest), 3 * N, seed=0)
    for a, b in zip(own.policy.parameters(), guest.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_torchrl_in_its_own_loop():
    mdp = DenoisingMDP.make("points", num_steps=K)
    transforms = Compose(ActionTransform(Noise(mdp)), FlatTransform(Flat(mdp)))
    env = TransformedEnv(DenoiseTorchRLEnv.from_mdp(mdp, N), transforms)
    env.set_seed(0)
    agent = TorchRLPPO(9, 2, TorchRLPPOConfig(lr=1e-3, minibatch=96))
    returns = agent.learn(env, 20 * N)
    assert returns.shape == (20 * N,)
    assert returns[-4 * N :].mean() > returns[: 2 * N].mean() + 0.2


def test_what_an_agent_is_told():
    told = []

    class Watcher(ScriptedAgent):
        def observe(self, *step):
            told.append(step)

        def update(self):
            told.append("update")
            return {"figure": 1.0}

    env = make(2, output="torch")
    watcher = Watcher(lambda observation: torch.zeros(2, 2))
    run(env, watcher, 3)  # in whole batches: 4 episodes
    assert [isinstance(step, str) for step in told] == ([False] * K + [True]) * 2
    for before, after in itertools.pairwise(told[:K]):
        assert torch.equal(before[4], after[0])
        assert not before[3].any()
    _, _, reward, done, last = told[K - 1]
    assert done.all()
    assert (reward > 0).all()
    assert (last[:, 2] == 1).all()  # the episode's own last observation
    told.clear()
    run(env, watcher, 2, learn=False)
    assert told == []


@pytest.mark.filterwarnings("ignore:the reward 'points' failed")
def test_nobody_learns_from_nan():
    mdp = DenoisingMDP.make("points", num_steps=K)
    mdp.rewards["points"] = lambda images, prompts: torch.full((len(images),), torch.nan)
    env = FlatObservation(NoiseAction(DenoiseVectorEnv.from_mdp(mdp, 2, output="torch")))
    still = ScriptedAgent(lambda observation: torch.zeros(2, 2))
    with pytest.raises(ValueError, match="reward of 2 rows could not be computed"):
        run(env, still, 2)
    assert np.isnan(run(env, still, 2, learn=False)).all()
    transforms = Compose(ActionTransform(Noise(mdp)), FlatTransform(Flat(mdp)))
    agent = TorchRLPPO(9, 2)
    before = [p.clone() for p in agent.loss.parameters()]
    with pytest.raises(ValueError, match="reward of 2 rows could not be computed"):
        agent.learn(TransformedEnv(DenoiseTorchRLEnv.from_mdp(mdp, 2), transforms), 2)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.loss.parameters(), strict=True))


def test_the_benchmark_writes_its_table(monkeypatch, tmp_path):
    from benchmarks import generic_agents

    arguments = ["--only", "points", "--seeds", "1", "--episodes", "256", "--evaluation", "128", "--output"]
    monkeypatch.setattr("sys.argv", ["generic_agents", *arguments, str(tmp_path)])
    generic_agents.main()
    table = (tmp_path / "generic-agents.md").read_text()
    assert [row.split(" | ")[2] for row in table.splitlines()[-3:]] == ["SB3 PPO", "TorchRL PPO", "SB3 SAC"]
    for row in json.loads((tmp_path / "generic-agents.json").read_text())["results"]:
        mean, low, high = row["deterministic_gain"]
        assert low < mean < high
        assert mean == pytest.approx(row["deterministic"][0] - row["base"][0])


def test_refusals():
    with pytest.raises(ValueError, match='autoreset_mode="disabled"'):
        run(make(autoreset_mode="next_step"), ScriptedAgent(None), 1)
    with pytest.raises(ValueError, match="episodes must be at least 1"):
        run(make(), ScriptedAgent(None), 0)
    with pytest.raises(ValueError, match="multiple of the environment's 2 rows, not 3"):
        TorchRLPPO(9, 2).learn(DenoiseTorchRLEnv("points", 2), 3)
    with pytest.raises(ValueError, match="a multiple of K steps"):
        SB3OnPolicy(PPO("MlpPolicy", SB3VecEnv(make()), n_steps=K + 1, batch_size=N, device="cpu"))

"""The TorchRL transforms."""

import pytest
import torch
from torchrl.envs import Compose, TransformedEnv
from torchrl.envs.utils import check_env_specs

from denoise_env import ControlAction, DenoiseTorchRLEnv, DenoiseVectorEnv, DenoisingMDP, FlatObservation, NoiseAction
from denoise_env.conventions import Control, Flat, Noise
from denoise_env.torchrl_transforms import ActionTransform, FlatTransform

K = 3


def make(mdp, convention, rows=3):
    transforms = Compose(ActionTransform(convention(mdp)), FlatTransform(Flat(mdp)))
    return TransformedEnv(DenoiseTorchRLEnv.from_mdp(mdp, rows), transforms)


@pytest.mark.parametrize("convention", [Noise, Control])
@pytest.mark.parametrize("model", ["points", "shapes"])
def test_specs(model, convention):
    mdp = DenoisingMDP.make(model, num_steps=2)
    env = make(mdp, convention)
    assert env.action_spec.shape == (3, *convention(mdp).shape)
    check_env_specs(env, break_when_any_done="both", seed=0)


@pytest.mark.parametrize(("convention", "wrapper"), [(Noise, NoiseAction), (Control, ControlAction)])
def test_same_trajectory_as_the_gymnasium_wrappers(convention, wrapper):
    mdp = DenoisingMDP.make("points", num_steps=K)
    env = make(mdp, convention)
    vector = FlatObservation(wrapper(DenoiseVectorEnv.from_mdp(mdp, 3, output="torch")))
    env.set_seed(6)
    for seed in (6, None):
        rollout = env.rollout(K, break_when_any_done=False)
        observation, _ = vector.reset(seed=seed)
        for k in range(K):
            assert torch.equal(rollout["observation"][:, k], observation)
            observation, reward, terminated, *_ = vector.step(rollout["action"][:, k])
            assert torch.equal(rollout["next", "observation"][:, k], observation)
            assert torch.equal(rollout["next", "reward"][:, k, 0], reward)
        assert terminated.all()


def test_a_transform_is_for_one_environment():
    mdp = DenoisingMDP.make("points", num_steps=K)
    env = make(mdp, Control)
    with pytest.raises(AttributeError, match="parent"):
        TransformedEnv(DenoiseTorchRLEnv.from_mdp(mdp, 3), env.transform[0])

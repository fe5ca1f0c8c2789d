import dataclasses

import pytest
import torch
from small_runs import deterministic, run, small

from agents.training import checkpoints
from agents.training.config import TrainConfig
from agents.training.experiment import build
from agents.training.presets import make_config
from denoise_env.models import model_options
from denoise_env.shapes import WEIGHTS


def test_a_microbatch_larger_than_the_rollout_is_the_rollout():
    assert build(small(microbatch=1000)).agent.microbatch == 8


def test_a_long_prompt_file_is_not_evaluated_whole(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"a red circle on gray {i}" for i in range(100)))
    experiment = build(TrainConfig(prompts=str(file), eval_prompts=None, model="shapes", eval_rewards=()))
    assert len(experiment.mdp.drawn_prompts) == 100
    assert len(experiment.eval_prompts) == 12  # shapes has held-out prompts of its own
    options = {"model": str(WEIGHTS), "rewards": {"shapes": 1.0}, "prompts": str(file)}
    assert build(TrainConfig(**options)).eval_prompts == experiment.mdp.drawn_prompts[:32]


@pytest.mark.parametrize(
    ("model", "agent", "options"),
    [("points", "ppo", {}), ("points-flow", "dpok", {}), ("shapes", "ppo", {"lora_rank": 2})],
)
def test_the_seed_seeds_every_weight_that_is_random(model, agent, options):
    def first_weights(run_seed, **more):
        config = make_config("points", agent, model=model)
        config.model_options = model_options(model, **options, **more)
        experiment = build(dataclasses.replace(config, seed=run_seed, microbatch=None))
        return {
            name: t for name, t in experiment.agent.state().items() if t.is_floating_point() and t.unique().numel() > 1
        }

    zero, one, again, named = first_weights(0), first_weights(1), first_weights(1), first_weights(1, seed=0)
    assert zero.keys() == one.keys()
    for name in zero:
        assert not torch.equal(zero[name], one[name]), name
        assert torch.equal(one[name], again[name]), name
        assert torch.equal(named[name], zero[name]) != name.startswith("modules."), name


def test_evaluations_may_have_steps_and_a_kernel_of_their_own(tmp_path):
    plain, own = build(small()), build(small(eval_num_steps=7, eval_kernel="ode"))
    assert (plain.eval_policy.kernel.eta, plain.eval_mdp.num_steps) == (plain.policy.kernel.eta, plain.mdp.num_steps)
    assert (own.mdp.num_steps, own.eval_mdp.num_steps) == (plain.mdp.num_steps, 7)
    assert own.policy.kernel.stochastic.any()
    assert not own.eval_policy.kernel.stochastic.any()
    runs = {"noisy": {}, "ode": {"eval_num_steps": 7, "eval_kernel": "ode"}}
    first, second = (run(small(iterations=1, **o), tmp_path / name, report=False) for name, o in runs.items())
    rewards = [[row["points"] for row in deterministic(path / "eval.csv")] for path in (first, second)]
    assert rewards[0] != rewards[1]
    same = [checkpoints.load(checkpoints.latest(path / "checkpoints"))[0] for path in (first, second)]
    assert all(torch.equal(same[0][name], tensor) for name, tensor in same[1].items())  # training is the same


def test_what_an_evaluation_cannot_have_is_refused_at_start():
    with pytest.raises(ValueError, match="'flow_sde' is not defined on a diffusion"):
        build(small(eval_kernel="flow_sde"))
    with pytest.raises(ValueError, match="unknown kernel 'odd'; did you mean 'ode'"):
        build(small(eval_kernel="odd"))
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        build(small(eval_num_steps=0))
    with pytest.raises(ValueError, match="leave eval_kl or eval_kernel out"):
        build(small(eval_kernel="ode", eval_kl=True))


def test_the_last_step_may_be_noisy():
    assert not build(small(model="points-flow", kernel="flow_sde")).policy.kernel.stochastic[-1]
    assert build(small(model="points-flow", kernel="flow_sde", last_step="sde")).policy.kernel.stochastic[-1]

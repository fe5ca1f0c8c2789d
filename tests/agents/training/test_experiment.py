from small_runs import small

from agents.training.config import TrainConfig
from agents.training.experiment import build
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

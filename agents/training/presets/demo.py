"""The presets of the embedded worlds: GRPO at sizes for a laptop.

They are no published settings. What they change of DanceGRPO's, `agents.training.presets.published` has under
"dancegrpo", is: the model; 10 steps instead of 50, and no guidance; 128 or 96 images a rollout instead of 512, trained
once instead of twice; 6 of the 9 trainable steps instead of all; a higher learning rate; the steps weighed by their std
(``step_weighting``) instead of alike; and an average of the weights. On the tiny FLUX the noise is Flow-GRPO's, at
which a group's scores differ twice as much as at DanceGRPO's. ``docs/published-settings.md`` lists every
value.
"""

from agents.training.presets.record import Preset
from denoise_env.worlds import SHAPES, SHAPES_FLUX

DEMO: dict[str, Preset] = {
    SHAPES: Preset(
        "GRPO on the shipped tiny Stable Diffusion: minutes on a laptop. The default.",
        model=SHAPES,
        agent="grpo",
        agent_options={"lr": 1e-4, "step_weighting": "std", "ema_decay": 0.97},
        settings={"iterations": 130, "eval_images_per_prompt": 64},
    ),
    SHAPES_FLUX: Preset(
        "GRPO on the shipped tiny FLUX, a rectified flow: a quarter of an hour on a laptop.",
        model=SHAPES_FLUX,
        agent="grpo",
        agent_options={"lr": 1e-4, "step_weighting": "std", "ema_decay": 0.97},
        settings={"kernel": "flow_sde", "eta": 0.7, "iterations": 200, "eval_images_per_prompt": 4},
    ),
    "shapes-video": Preset(
        "GRPO on the shipped tiny HunyuanVideo, text to video: under twenty minutes on one core.",
        model="shapes-video",
        agent="grpo",
        agent_options={"lr": 2e-4, "step_weighting": "std", "ema_decay": 0.97},
        settings={"kernel": "flow_sde", "eta": 0.7, "iterations": 80, "eval_images_per_prompt": 2},
    ),
    "shapes-i2v": Preset(
        "GRPO on the shipped tiny SkyReels-I2V, image to video: under half an hour on one core.",
        model="shapes-i2v",
        agent="grpo",
        agent_options={"lr": 2e-4, "step_weighting": "std", "ema_decay": 0.95},
        settings={"kernel": "flow_sde", "eta": 0.7, "iterations": 120, "eval_images_per_prompt": 2},
    ),
    "points": Preset(
        "GRPO on 2-D Gaussian mixtures: seconds.",
        model="points",
        agent="grpo",
        agent_options={"lr": 3e-3, "step_weighting": "std", "ema_decay": 0.9},
        settings={
            "prompts_per_iteration": 6,
            "microbatch": None,
            "iterations": 100,
            "eval_images_per_prompt": 128,
            "checkpoint_every": 50,
        },
    ),
}
"""Name → preset."""

"""The embedded worlds: models that come with the package, each with prompts and rewards of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class World:
    """One world's record. A target in it is a string "module:attribute".

    Attributes:
        description: what the world is, in one line.
        family: the target of its model's `denoise_env.models.Family`.
        checkpoint: the target of what the family's loader takes as its checkpoint, or ``None`` for none.
        options: the family's options that this world sets.
        prompts: the set of prompts that is trained on, by name → target.
        held_out: the set of prompts that is only evaluated on, by name → target; if empty, the trained one is.
        rewards: the rewards that are trained on, by name → target.
        weights: of those of these rewards whose weight is not 1, by name.
        eval_rewards: the rewards that an evaluation measures besides, by name → target.
        preset: the name of the preset in `agents.training.presets` that goes with the world.
        environment: the world's Gymnasium id, if it has one.
    """

    description: str
    family: str
    preset: str
    checkpoint: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    held_out: Mapping[str, str] = field(default_factory=dict)
    rewards: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    eval_rewards: Mapping[str, str] = field(default_factory=dict)
    environment: str | None = None


def _points(description: str, **changes: Any) -> World:
    return World(
        description,
        family="denoise_env.models.points:FAMILY",
        preset="points",
        prompts={"points": "denoise_env.models.points:MIXTURES"},
        rewards={"points": "denoise_env.rewards.points:PointsReward"},
        **changes,
    )


_MOVING: dict[str, Any] = {
    "rewards": {"motion": "denoise_env.rewards.motion:MotionReward"},
    "eval_rewards": {
        "motion-correct": "denoise_env.rewards.motion:MotionCorrect",
        "motion-appearance": "denoise_env.rewards.motion:MotionAppearance",
        "motion-direction": "denoise_env.rewards.motion:MotionDirection",
        "motion-speed": "denoise_env.rewards.motion:MotionSpeed",
        "motion-consistency": "denoise_env.rewards.motion:MotionConsistency",
    },
}
_OF_CLIPS = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 12}

SHAPES, SHAPES_FLUX = "shapes", "shapes-flux"
DEFAULT = SHAPES
"""The world that is meant where no model is named."""
WORLDS: dict[str, World] = {
    SHAPES: World(
        "a tiny Stable Diffusion of coloured shapes, shipped with the package",
        family="denoise_env.models.stable_diffusion:FAMILY",
        checkpoint="denoise_env.shapes:WEIGHTS",
        options={"guidance_scale": 1.0},
        prompts={SHAPES: "denoise_env.shapes.grammar:TRAIN"},
        held_out={"shapes-held-out": "denoise_env.shapes.grammar:HELD_OUT"},
        rewards={SHAPES: "denoise_env.rewards.shapes:ShapesReward"},
        eval_rewards={"shapes-correct": "denoise_env.rewards.shapes:ShapesCorrect"},
        preset=SHAPES,
        environment="denoise_env/Shapes-v0",
    ),
    SHAPES_FLUX: World(
        "a tiny FLUX.1 of several shapes, their number and their places, shipped with the package",
        family="denoise_env.models.flux:FAMILY",
        checkpoint="denoise_env.shapes:FLUX_WEIGHTS",
        options={"guidance_scale": 2.0, "max_sequence_length": 12},
        prompts={"compositions": "denoise_env.shapes.compositions:TRAIN"},
        held_out={"compositions-held-out": "denoise_env.shapes.compositions:HELD_OUT"},
        rewards={"compositions": "denoise_env.rewards.compositions:CompositionsReward"},
        eval_rewards={"compositions-correct": "denoise_env.rewards.compositions:CompositionsCorrect"},
        preset=SHAPES_FLUX,
        environment="denoise_env/ShapesFlux-v0",
    ),
    "shapes-video": World(
        "a tiny HunyuanVideo of shapes that move, shipped with the package",
        family="denoise_env.models.hunyuan_video:FAMILY",
        checkpoint="denoise_env.shapes:VIDEO_WEIGHTS",
        options={**_OF_CLIPS, "guidance_scale": 2.0},
        prompts={"motions": "denoise_env.shapes.motion.grammar:TRAIN"},
        held_out={"motions-held-out": "denoise_env.shapes.motion.grammar:HELD_OUT"},
        preset="shapes-video",
        environment="denoise_env/ShapesVideo-v0",
        **_MOVING,
    ),
    "shapes-i2v": World(
        "a tiny SkyReels-I2V that makes a first frame of shapes move, shipped with the package",
        family="denoise_env.models.skyreels:FAMILY",
        checkpoint="denoise_env.shapes:I2V_WEIGHTS",
        options={**_OF_CLIPS, "true_cfg_scale": 1.0},
        prompts={"first-frames": "denoise_env.shapes.motion.prompts:TRAIN"},
        held_out={"first-frames-held-out": "denoise_env.shapes.motion.prompts:HELD_OUT"},
        preset="shapes-i2v",
        environment="denoise_env/ShapesI2V-v0",
        rewards=_MOVING["rewards"] | {"motion-first-frame": "denoise_env.rewards.motion:MotionFirstFrame"},
        weights={"motion-first-frame": 0.5},
        eval_rewards=_MOVING["eval_rewards"],
    ),
    "points": _points(
        "2-D Gaussian mixtures with an exact denoiser, as a diffusion", environment="denoise_env/Points-v0"
    ),
    "points-flow": _points("the same mixtures as a rectified flow", checkpoint="denoise_env.models.points:FLOW"),
}
"""Name → record; a new world is an entry here."""
PROMPT_SETS: dict[str, str] = {
    name: target for world in WORLDS.values() for name, target in {**world.prompts, **world.held_out}.items()
}
"""Name → target of every world's prompts."""

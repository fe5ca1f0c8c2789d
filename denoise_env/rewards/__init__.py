"""Rewards: one file each; `base.py` holds what a reward is, `load_reward` builds what an expression names."""

import inspect
from typing import Any, Literal

from denoise_env.rewards.base import Reward, RewardModel, UnavailableError, computes_elsewhere
from denoise_env.rewards.expressions import build_reward
from denoise_env.worlds import WORLDS

REWARDS: dict[str, str] = {
    "aesthetic": "denoise_env.rewards.aesthetic:Aesthetic",
    "clip_score": "denoise_env.rewards.clip_score:ClipScore",
    "geneval": "denoise_env.rewards.geneval:GenEval",
    "hps": "denoise_env.rewards.hps:HPS",
    "hpsv3": "denoise_env.rewards.hpsv3:HPSv3",
    "image_reward": "denoise_env.rewards.image_reward:ImageReward",
    "jpeg_compressibility": "denoise_env.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "denoise_env.rewards.jpeg:JpegIncompressibility",
    "judge": "denoise_env.rewards.judge:Judge",
    "ocr": "denoise_env.rewards.ocr:Ocr",
    "pairwise_judge": "denoise_env.rewards.judge:PairwiseJudge",
    "pickscore": "denoise_env.rewards.clip_score:PickScore",
    "remote": "denoise_env.rewards.remote:Remote",
    "shapes-clip": "denoise_env.rewards.shapes:ShapesClip",
    "shapes-hps": "denoise_env.rewards.shapes:ShapesHPS",
    "shapes-videoalign-mq": "denoise_env.rewards.motion:ShapesVideoAlignMQ",
    "shapes-videoalign-ta": "denoise_env.rewards.motion:ShapesVideoAlignTA",
    "shapes-videoalign-vq": "denoise_env.rewards.motion:ShapesVideoAlignVQ",
    "videoalign": "denoise_env.rewards.videoalign:VideoAlign",
    "videoalign_mq": "denoise_env.rewards.videoalign:VideoAlignMQ",
    "videoalign_ta": "denoise_env.rewards.videoalign:VideoAlignTA",
    "videoalign_vq": "denoise_env.rewards.videoalign:VideoAlignVQ",
    "visionreward": "denoise_env.rewards.visionreward:VisionReward",
    "visionreward_video": "denoise_env.rewards.visionreward:VisionRewardVideo",
    "threshold": "denoise_env.rewards.combinators:Threshold",
    "scale": "denoise_env.rewards.combinators:Scale",
    "clip": "denoise_env.rewards.combinators:Clip",
    "weighted_sum": "denoise_env.rewards.combinators:WeightedSum",
    "per_frame": "denoise_env.rewards.combinators:PerFrame",
    "win_rate": "denoise_env.rewards.combinators:WinRate",
}
"""Name → "module:attribute"; a new reward is a line here."""
NAMES: dict[str, str] = {
    **{name: target for world in WORLDS.values() for name, target in {**world.rewards, **world.eval_rewards}.items()},
    **REWARDS,
}
"""The same with every world's own rewards."""


def load_reward(expression: str) -> Reward:
    """The reward that an expression stands for: a name in `NAMES`, ``module:attribute`` for one of your own, or one of
    these with arguments, in the form of `denoise_env.rewards.expressions`.

    Raises:
        ValueError: no such reward (the message has the nearest name), one that cannot be imported or built, or what
            `check_reward` refuses.
    """
    reward = build_reward(expression, NAMES)
    check_reward(expression, reward)
    return reward


def check_reward(name: str, reward: Any) -> None:
    """Raise a ``ValueError`` for a reward that cannot be called with (images, prompts)."""
    if not isinstance(name, str):
        raise ValueError(f"a reward's name must be a string, not {name!r}")
    if not callable(reward):
        raise ValueError(f"the reward {name!r} is not callable but {type(reward).__name__}")
    if getattr(reward, "only_pairs", False):
        raise ValueError(f"the reward {name!r} compares pairs of samples: write win_rate({name})")
    try:
        inspect.signature(reward).bind(None, None)
    except TypeError as error:
        raise ValueError(f"the reward {name!r} must take (images, prompts): {error}") from error
    except ValueError:  # some built-in functions do not tell their arguments
        pass


def check_takes(name: str, reward: Any, makes: Literal["images", "clips"]) -> None:
    """Raise a ``ValueError`` for a reward that does not take what a model makes."""
    if getattr(reward, "takes", "either") not in ("either", makes):
        how = f": write per_frame({name})" if makes == "clips" else ""
        raise ValueError(f"the reward {name!r} takes {reward.takes}, and the model makes {makes}{how}")


__all__ = [
    "NAMES",
    "REWARDS",
    "Reward",
    "RewardModel",
    "UnavailableError",
    "check_reward",
    "check_takes",
    "computes_elsewhere",
    "load_reward",
]

"""Every algorithm's published settings, for the model family that they were published for.

Where a value comes from, and where and why one differs from what was published, is in ``docs/published-settings.md``.
What an entry leaves out is the algorithm's own default. Prompts and rewards are not part of a preset.
"""

from typing import Any

from agents.training.presets.record import Preset

SD14 = "CompVis/stable-diffusion-v1-4"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD35 = "stabilityai/stable-diffusion-3.5-medium"
FLUX = "black-forest-labs/FLUX.1-dev"
HUNYUAN = "hunyuanvideo-community/HunyuanVideo"
SKYREELS = "Skywork/SkyReels-V1-Hunyuan-I2V"

_MEMORY: dict[str, Any] = {"dtype": "bf16", "gradient_checkpointing": True}
_AT_512: dict[str, Any] = {"height": 512, "width": 512, **_MEMORY}
_AT_720: dict[str, Any] = {"height": 720, "width": 720, **_MEMORY}
_DANCE_GRID: dict[str, Any] = {"guidance_scale": 3.5, "schedule": "linspace", "shift": 3.0}
_DANCE_CLIPS: dict[str, Any] = {"num_frames": 53, "schedule": "linspace", "vae_tiling": True, **_MEMORY}
_LORA: dict[str, Any] = {"lora_rank": 32, "lora_alpha": 64.0}
_RUN: dict[str, Any] = {"microbatch": 8, "eval_images_per_prompt": 4}
_DDIM: dict[str, Any] = {"num_steps": 50, "kernel": "ddim", "eta": 1.0, **_RUN}
_ODE_40: dict[str, Any] = {"num_steps": 10, "eval_num_steps": 40, "eval_kernel": "ode", "iterations": 100_000, **_RUN}
_FLOW_SDE: dict[str, Any] = {"kernel": "flow_sde", "eta": 0.7, "prompts_per_iteration": 48, **_ODE_40}
_NOISY_END: dict[str, Any] = {**_FLOW_SDE, "last_step": "sde"}


def _sd1(description: str, model: str, agent: str, agent_options: dict, settings: dict, **changes: Any) -> Preset:
    options = {"guidance_scale": 5.0, **_AT_512, **changes}
    return Preset(description, model, agent, agent_options, {**_DDIM, **settings}, options, "stable-diffusion")


def _sd35(description: str, agent: str, agent_options: dict, settings: dict, **changes: Any) -> Preset:
    options = {"guidance_scale": 4.5, **_AT_512, **_LORA, **changes}
    return Preset(description, SD35, agent, agent_options, settings, options, "stable-diffusion-3")


def _flux(description: str, agent: str, agent_options: dict, settings: dict, **changes: Any) -> Preset:
    options = {**_DANCE_GRID, **_AT_720, **changes}
    return Preset(description, FLUX, agent, agent_options, {**_RUN, "microbatch": 4, **settings}, options, "flux")


_POPULATION: dict[str, Any] = {"std_form": "population", "std_epsilon": 1e-4}
_AVERAGE: dict[str, Any] = {"ema_decay": 0.9, "ema_warmup": True, "ema_every": 8}
_FLOW_GRPO: dict[str, Any] = {
    "group_size": 24,
    "updates_per_rollout": 2,
    "lr": 3e-4,
    "clip_range": 1e-4,
    "shared_noise": "none",
    "timestep_fraction": 1.0,
    "advantage_std": "rewards",
    "drop_zero_advantages": True,
    "kl_coef": 0.04,
    "kl_scaling": "code",
    **_POPULATION,
    **_AVERAGE,
}
_FAST: dict[str, Any] = {
    **_FLOW_GRPO,
    "clip_range": 1e-5,
    "kl_coef": 0.0,
    "shared_noise": "group",
    "window_size": 2,
    "window_strategy": "random",
    "window_reach": "first_half",
}
_DANCE: dict[str, Any] = {
    "lr": 1e-5,
    "clip_range": 1e-4,
    "shared_noise": "rollout",
    "advantage_std": "group",
    "std_form": "unbiased",
    "std_epsilon": 1e-8,
}
_DANCE_FLUX: dict[str, Any] = {
    **_DANCE,
    "group_size": 12,
    "updates_per_rollout": 2,
    "timestep_fraction": 0.6,
    "timestep_rounding": "int",
}
_DANCE_CLIPS_RUN: dict[str, Any] = {
    "num_steps": 16,
    "kernel": "dance_sde",
    "prompts_per_iteration": 32,
    **_RUN,
    "microbatch": 1,
}
_MIX: dict[str, Any] = {
    **_DANCE,
    "group_size": 12,
    "updates_per_rollout": 4,
    "window_size": 4,
    "window_strategy": "progressive",
    "window_reach": "all_but_two",
    "window_end": "shrink",
    "window_stride": 1,
    "window_every": 25,
}
_MIX_RUN: dict[str, Any] = {
    "num_steps": 25,
    "kernel": "flow_sde",
    "eta": 0.7,
    "iterations": 300,
    "prompts_per_iteration": 32,
}

PUBLISHED: dict[str, Preset] = {
    "dancegrpo": _sd1(
        "DanceGRPO on Stable Diffusion 1.4: 50 DDIM steps, groups of 16 from shared noise, every weight.",
        SD14,
        "grpo",
        {**_DANCE, "group_size": 16, "updates_per_rollout": 2, "timestep_fraction": 1.0},
        {"iterations": 300, "prompts_per_iteration": 32},
    ),
    "dancegrpo-flux": _flux(
        "DanceGRPO on FLUX.1-dev: 16 steps of its SDE, groups of 12 from shared noise, every weight.",
        "grpo",
        _DANCE_FLUX,
        {"num_steps": 16, "kernel": "dance_sde", "eta": 0.3, "iterations": 300, "prompts_per_iteration": 16},
    ),
    "dancegrpo-flux-lora": _flux(
        "DanceGRPO on FLUX.1-dev with LoRA: 12 steps of its SDE, groups of 12 from shared noise; one GPU of 80 GB.",
        "grpo",
        {**_DANCE_FLUX, "lr": 3e-4},
        {"num_steps": 12, "kernel": "dance_sde", "eta": 0.3, "iterations": 301, "prompts_per_iteration": 16},
        lora_rank=128,
        lora_alpha=256.0,
    ),
    "dancegrpo-hunyuan": Preset(
        "DanceGRPO on HunyuanVideo: 16 steps of its SDE, the 4 best and the 4 worst of 24 clips, every weight.",
        HUNYUAN,
        "grpo",
        {**_DANCE_FLUX, "group_size": 24, "best_and_worst": 8, "reward_aggregation": "losses"},
        {"eta": 0.25, "iterations": 202, **_DANCE_CLIPS_RUN},
        {"guidance_scale": 6.018, "height": 480, "width": 480, "shift": 5.0, **_DANCE_CLIPS},
        "hunyuan-video",
    ),
    "dancegrpo-skyreels": Preset(
        "DanceGRPO on SkyReels-V1, image to video: 16 steps of its SDE, groups of 8 clips, every weight.",
        SKYREELS,
        "grpo",
        {**_DANCE_FLUX, "group_size": 8, "updates_per_rollout": 1, "shared_noise": "group"},
        {"eta": 0.3, "iterations": 121, **_DANCE_CLIPS_RUN},
        {"true_cfg_scale": 5.0, "guidance_scale": 1.0, "height": 400, "width": 640, "shift": 7.0, **_DANCE_CLIPS},
        "skyreels",
    ),
    "flow-grpo": _sd35(
        "Flow-GRPO on Stable Diffusion 3.5 medium (GenEval): 10 noisy steps, a KL to the base model, LoRA.",
        "flow-grpo",
        _FLOW_GRPO,
        _NOISY_END,
    ),
    "flow-grpo-flux": Preset(
        "Flow-GRPO on FLUX.1-dev (PickScore): 6 noisy steps, no KL, LoRA.",
        FLUX,
        "flow-grpo",
        {**_FLOW_GRPO, "kl_coef": 0.0},
        {**_NOISY_END, "num_steps": 6, "eval_num_steps": 28, "eta": 0.9},
        {"guidance_scale": 3.5, "max_sequence_length": 128, "lora_rank": 64, "lora_alpha": 128.0, **_AT_512},
        "flux",
    ),
    "flow-grpo-fast": _sd35(
        "Flow-GRPO-Fast on Stable Diffusion 3.5 medium (PickScore): noise and training in a window of 2 steps.",
        "flow-grpo-fast",
        _FAST,
        {**_FLOW_SDE, "eta": 0.8},
    ),
    "flow-cps": _sd35(
        "Flow-GRPO with coefficients-preserving sampling on Stable Diffusion 3.5 medium.",
        "flow-grpo",
        {**_FLOW_GRPO, "kl_scaling": "mean"},
        {**_FLOW_SDE, "kernel": "cps", "reduction": "squared_error"},
    ),
    "mix-grpo": _flux(
        "MixGRPO on FLUX.1-dev: 25 steps, noise and training in a sliding window of 4, every weight.",
        "mix-grpo",
        _MIX,
        _MIX_RUN,
    ),
    "mix-grpo-flash": _flux(
        "MixGRPO-Flash on FLUX.1-dev: MixGRPO with fewer steps after the window, by DPM-Solver++.",
        "mix-grpo",
        {**_MIX, "window_every": 20, "after_window": "dpm_solver", "after_window_share": 0.4},
        _MIX_RUN,
    ),
    "tempflow": _sd35(
        "TempFlow-GRPO on Stable Diffusion 3.5 medium (GenEval): 6 branches at every step of 4 trajectories a prompt.",
        "tempflow",
        {
            "group_size": 216,
            "branches": 6,
            "window_size": 9,
            "window_strategy": "frozen",
            "updates_per_rollout": 2,
            "lr": 3e-4,
            "clip_range": 1e-4,
            "step_weighting": "std",
            "kl_coef": 0.004,
            **_POPULATION,
            **_AVERAGE,
        },
        {**_FLOW_SDE, "iterations": 3000},
    ),
    "grpo-guard": _sd35(
        "GRPO-Guard on Stable Diffusion 3.5 medium (GenEval): normalised ratios, balanced steps.",
        "grpo-guard",
        {
            "group_size": 24,
            "updates_per_rollout": 2,
            "lr": 1e-4,
            "clip_range": 2e-6,
            "shared_noise": "none",
            "timestep_fraction": 1.0,
            **_POPULATION,
            **_AVERAGE,
        },
        _NOISY_END,
    ),
    "flow-dppo": _sd35(
        "Flow-DPPO on Stable Diffusion 3.5 medium: a trust region of divergence instead of a clipped ratio.",
        "flow-dppo",
        {
            "group_size": 16,
            "updates_per_rollout": 2,
            "lr": 3e-4,
            "weight_decay": 0.0,
            "clip_range": 1e-5,
            "shared_noise": "none",
            "advantage_std": "rewards",
            "std_form": "unbiased",
            "timestep_fraction": 1.0,
            "window_size": 3,
            "window_strategy": "scattered",
            "window_reach": "first_half",
        },
        {"num_steps": 10, "kernel": "flow_sde", "eta": 0.7, "prompts_per_iteration": 48, "iterations": 100_000, **_RUN},
        guidance_scale=1.0,
    ),
    "ddpo-is": _sd1(
        "DDPO with importance sampling on Stable Diffusion 1.4 (aesthetic quality): 50 DDIM steps, LoRA.",
        SD14,
        "ddpo-is",
        {"updates_per_rollout": 2, "lr": 3e-4, "clip_range": 1e-4, "tracker_size": 32, "tracker_min_count": 16},
        {"iterations": 200, "prompts_per_iteration": 256},
        lora_rank=4,
    ),
    "ddpo-sf": _sd1(
        "DDPO with the score function on Stable Diffusion 1.4: as ddpo-is, one update a rollout.",
        SD14,
        "ddpo-sf",
        {"lr": 3e-4, "tracker_size": 32, "tracker_min_count": 16},
        {"iterations": 200, "prompts_per_iteration": 256},
        lora_rank=4,
    ),
    "dpok": _sd1(
        "DPOK on Stable Diffusion 1.5, for one prompt: 50 DDIM steps, a KL to the base model, LoRA.",
        SD15,
        "dpok",
        {
            "lr": 1e-5,
            "updates_per_rollout": 5,
            "clip_range": 1e-4,
            "timestep_fraction": 0.48,
            "weight_decay": 0.0,
            "max_grad_norm": 0.1,
            "critic_lr": 1e-4,
            "reward_weight": 10.0,
            "kl_coef": 0.01,
            "kl_scaling": "code",
        },
        {"iterations": 2000, "prompts_per_iteration": 10, "microbatch": 2},
        guidance_scale=7.5,
        lora_rank=4,
    ),
    "rwr": _sd1(
        "Reward-weighted regression on Stable Diffusion 1.4, as DDPO's authors ran it: 5 passes over 10,240 samples.",
        SD14,
        "rwr",
        {"lr": 1e-5, "temperature": 5.0, "epochs": 5, "updates_per_rollout": 80, "draws_per_sample": 1},
        {"prompts_per_iteration": 10_240, "iterations": 20},
        dtype="fp32",
    ),
    "nft": _sd35(
        "DiffusionNFT on Stable Diffusion 3.5 medium (GenEval): no guidance, deterministic samples, LoRA.",
        "nft",
        {
            "group_size": 24,
            "lr": 3e-4,
            "advantage_std": "rewards",
            "draws_per_sample": 9,
            "strength": 1.0,
            "reference_coef": 1e-4,
            "old_decay": 0.5,
            "old_decay_slope": 0.001,
            "old_decay_after": 0,
            "rollout_solver": "dpm_solver",
            **_POPULATION,
            "ema_decay": 0.9,
            "ema_warmup": True,
            "ema_every": 1,
        },
        {**_ODE_40, "kernel": "ode", "prompts_per_iteration": 48},
        guidance_scale=1.0,
    ),
    "awm": _sd35(
        "Advantage weighted matching on Stable Diffusion 3.5 medium (GenEval): no guidance, LoRA.",
        "awm",
        {
            "group_size": 24,
            "lr": 3e-4,
            "advantage_std": "rewards",
            "likelihood": "ghuber",
            "unit_advantages": True,
            "clip_range": 1.0,
            "reference_coef": 0.001,
            "slow_coef": 1.0,
            "old_decay": 0.3,
            "old_decay_slope": 0.001,
            "draws_per_sample": 6,
            "step_draws": "stratified",
            "step_range": (0.08, 0.85),
            "shared_steps": True,
            **_POPULATION,
            "ema_decay": 0.99,
        },
        {**_ODE_40, "num_steps": 14, "kernel": "ode", "prompts_per_iteration": 72},
        guidance_scale=1.0,
    ),
    "dpo": _sd35(
        "Online Diffusion-DPO on Stable Diffusion 3.5 medium, as Flow-GRPO's code has it: best against worst.",
        "dpo",
        {
            "group_size": 24,
            "lr": 3e-4,
            "beta": 100.0,
            "pairing": "best_worst",
            "draws_per_sample": 39,
            "step_draws": "logit_normal",
            "reference_every": 40,
        },
        {**_ODE_40, "num_steps": 40, "kernel": "ode", "prompts_per_iteration": 48},
    ),
    "dgpo": _sd35(
        "DGPO on Stable Diffusion 3.5 medium (GenEval): a preference between the good and the bad of a group, LoRA.",
        "dgpo",
        {
            "group_size": 16,
            "lr": 3e-4,
            "beta": 100.0,
            "clip_range": 1e-2,
            "reference_coef": 0.02,
            "draws_per_sample": 4,
            "step_range": (0.0, 0.5),
            "shared_steps": True,
            "shared_draws": True,
            "old_decay": 0.3,
            "old_decay_slope": 0.001,
            "old_rolls_out_after": 500,
            "rollout_solver": "dpm_solver",
            "advantage_std": "group",
            **_POPULATION,
            **_AVERAGE,
        },
        {**_ODE_40, "eval_num_steps": 14, "kernel": "ode", "prompts_per_iteration": 8},
        lora_rank=64,
        lora_alpha=128.0,
    ),
    "crd": _sd35(
        "CRD on Stable Diffusion 3.5 medium: the change of the model becomes the reward; no guidance.",
        "crd",
        {
            "group_size": 24,
            "updates_per_rollout": 2,
            "lr": 3e-4,
            "beta": 1.0,
            "centring": "update",
            "reference_coef": 0.1,
            "reference_floor": 1e-4,
            "reference_guidance": 4.5,
            "draws_per_sample": 20,
            "old_decay": 0.999,
            "old_decay_start": 0.25,
            "old_decay_slope": 0.005,
            "sampler_decay": 0.999,
            "sampler_decay_slope": 0.0075,
            "sampler_decay_after": 75,
            "advantage_std": "rewards",
        },
        {**_ODE_40, "kernel": "ode", "prompts_per_iteration": 48},
        guidance_scale=1.0,
    ),
}
"""Name → preset."""

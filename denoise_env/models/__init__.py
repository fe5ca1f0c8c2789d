"""Model families: one file each; `base.py` holds their interface, `load_model` finds one by name."""

from pathlib import Path
from typing import Any

from denoise_env.models.base import DenoisingModel
from denoise_env.naming import suggest

NAMES = {
    "points": "2-D Gaussian mixtures with an exact denoiser, as a diffusion",
    "points-flow": "the same mixtures as a rectified flow",
    "shapes": "a tiny Stable Diffusion of coloured shapes, shipped with the package",
}
"""Name → what it is. Anything else is the hub id or the path of a Stable Diffusion checkpoint."""


def check_name(name: str) -> None:
    """Refuse what is neither a name, nor a directory, nor of a hub id's form with a ``ValueError``."""
    if name in NAMES or Path(name).is_dir() or (name.count("/") == 1 and not name.startswith((".", "/"))):
        return
    hint = suggest(name, NAMES)
    raise ValueError(f"unknown model {name!r}; {hint} Or give the directory or hub id of a checkpoint.")


def world(name: str) -> str | None:
    """The embedded world a model belongs to, whose name its prompts, reward and preset have; ``None`` for others."""
    return name.split("-")[0] if name in NAMES else None


def load_model(name: str, **options: Any) -> DenoisingModel:
    """The model of a name in `NAMES`, or a Stable Diffusion checkpoint by path or hub id.

    Args:
        name: see above; a directory that a Points model exported loads as Points.
        options: the family's own (Stable Diffusion: ``guidance_scale``, ``dtype``, ``lora_rank``, …).

    Raises:
        ValueError: no such model, or an option the family does not have.
    """
    check_name(name)
    if name in ("points", "points-flow") or (Path(name) / "model.safetensors").is_file():
        from denoise_env.models.points import Points

        unknown = set(options) - {"device", "seed"}
        if unknown:
            raise ValueError(f"Points has no option {sorted(unknown)[0]!r}; it has device and seed")
        if name in NAMES:
            return Points("flow" if name == "points-flow" else "diffusion", **options)
        return Points.from_export(Path(name), options.get("device", "cpu"))
    from denoise_env.models.stable_diffusion import StableDiffusion

    if name == "shapes":
        from denoise_env.shapes import WEIGHTS

        return StableDiffusion.from_pretrained(WEIGHTS, **{"guidance_scale": 1.0, **options})
    return StableDiffusion.from_pretrained(name, **options)

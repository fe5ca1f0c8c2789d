"""Model families: one file each. `base.py` holds their interface, `pipeline.py` what diffusers families share."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from denoise_env.models.base import DenoisingModel, Family, ModelOptions
from denoise_env.naming import load_attribute, suggest
from denoise_env.worlds import WORLDS

FAMILIES = (
    "denoise_env.models.points:FAMILY",
    "denoise_env.models.stable_diffusion:FAMILY",
    "denoise_env.models.flux:FAMILY",
    "denoise_env.models.stable_diffusion_3:FAMILY",
    "denoise_env.models.stable_diffusion_xl:FAMILY",
    "denoise_env.models.flux2:FAMILY",
    "denoise_env.models.qwen_image:FAMILY",
    "denoise_env.models.z_image:FAMILY",
    "denoise_env.models.hunyuan_video:FAMILY",
    "denoise_env.models.skyreels:FAMILY",
    "denoise_env.models.wan:FAMILY",
    "denoise_env.models.wan:IMAGE_TO_VIDEO",
)
"""Where the families' records are; a new family is a file and a line here."""
INDEX = "model_index.json"


def families() -> list[Family]:
    """The records of all families."""
    return [load_attribute(target, "model family") for target in FAMILIES]


def find_family(model: str) -> tuple[Family, str | None, dict[str, Any]]:
    """A model's family, its checkpoint, and the options that go with it.

    Args:
        model: a world's name; the directory or hub id of a checkpoint, recognised by the ``_class_name`` in its
            ``model_index.json``; or "module:attribute" of a `Family` of your own, with "@directory" behind it for a
            checkpoint of that family.

    Raises:
        ValueError: no such model, or no family claims its class.
    """
    if model in WORLDS:
        world = WORLDS[model]
        checkpoint = str(load_attribute(world.checkpoint, "checkpoint")) if world.checkpoint else None
        return load_attribute(world.family, "model family"), checkpoint, dict(world.options)
    if Path(model).is_dir() or (":" not in model and model.count("/") == 1 and not model.startswith((".", "/"))):
        return _recognise(model), model, {}
    if ":" in model:
        target, _, checkpoint = model.partition("@")
        family = load_attribute(target, "model family")
        if not isinstance(family, Family):
            raise ValueError(f"{target!r} must be a denoise_env.models.Family, not {type(family).__name__}")
        indexed = checkpoint and (Path(checkpoint) / INDEX).is_file()
        if indexed and family.classes and (name := _class_of(checkpoint)) not in family.classes:
            other = _recognise(checkpoint).name
            raise ValueError(f"{checkpoint!r} holds a {name}, which is of the family {other}, not {family.name}")
        return family, checkpoint or None, {}
    raise ValueError(
        f"unknown model {model!r}; {suggest(model, WORLDS)} Or give the directory or hub id of a checkpoint."
    )


def _recognise(checkpoint: str) -> Family:
    name = _class_of(checkpoint)
    for family in families():
        if name in family.classes:
            return family
    known = {cls: family.name for family in families() for cls in family.classes}
    raise ValueError(f"{checkpoint!r} holds a {name}, which no family claims; there are {known}")


def _class_of(checkpoint: str) -> str:
    """The ``_class_name`` in a checkpoint's ``model_index.json``."""
    path = Path(checkpoint)
    index = path / INDEX
    if not path.is_dir():
        from huggingface_hub import hf_hub_download

        try:
            index = Path(hf_hub_download(checkpoint, INDEX))
        except Exception as error:  # the hub's client raises many kinds, network errors of its libraries among them
            raise ValueError(
                f"cannot find {checkpoint!r} on the hub ({type(error).__name__}): check the name and the connection, "
                "or give the directory of a downloaded checkpoint (--model DIRECTORY)"
            ) from error
    elif (path / "pytorch_lora_weights.safetensors").is_file() and not index.is_file():
        raise ValueError(f"{checkpoint!r} holds LoRA weights: give the model that they adapt, and --model.lora {path}")
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except FileNotFoundError:
        raise ValueError(f"{checkpoint!r} is no checkpoint: there is no {INDEX} in it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the {INDEX} of {checkpoint!r} cannot be read: {error!r}") from error


def model_options(model: str, **changes: Any) -> ModelOptions:
    """The options of a model's family: the model's own, except for the given changes.

    Raises:
        ValueError: no such model, or an option that its family lacks.
    """
    return _chosen(model, None, changes)[2]


def check_options(options: type[ModelOptions], names: Iterable[str]) -> None:
    """Raise a ``ValueError`` for names that are none of a family's options."""
    known = [field.name for field in dataclasses.fields(options)]
    for name in names:
        if name not in known:
            raise ValueError(f"{options.family} has no option {name!r}; {suggest(name, known)}")


def load_model(
    model: str,
    options: ModelOptions | None = None,
    *,
    device: str | torch.device = "cpu",
    check: Callable[[DenoisingModel], object] | None = None,
    **changes: Any,
) -> DenoisingModel:
    """Load a model.

    Args:
        model: as in `find_family`.
        options: the options of the model's family; default: the model's own.
        device: where the model lives.
        check: called with the model's outline, where its family has one, to refuse it.
        changes: options by name, instead of ``options``.

    Raises:
        ValueError: no such model, an option that its family lacks, or a checkpoint that cannot be loaded. Whatever an
            outline can tell is told before any weights are read.
    """
    family, checkpoint, options = _chosen(model, options, changes)
    if family.outline:
        outlined = family.outline(checkpoint, options)
        if check:
            check(outlined)
    return family.load(checkpoint, options, device)


def _chosen(
    model: str, options: ModelOptions | None, changes: Mapping[str, Any]
) -> tuple[Family, str | None, ModelOptions]:
    """A model's family, checkpoint and options; a ``ValueError`` where these are another family's."""
    family, checkpoint, own = find_family(model)
    if options is None:
        check_options(family.options, changes)
        options = family.options(**{**own, **changes})
    elif not isinstance(options, family.options):
        raise ValueError(f"{model!r} is of the family {family.name}, and the options given are of {options.family}")
    return family, checkpoint, options


def outline(model: str, options: ModelOptions | None = None) -> DenoisingModel:
    """A model without its weights, where its family can do that, and else the model itself on the CPU.

    Args:
        model: as in `find_family`.
        options: the options of the model's family; default: the model's own.

    Raises:
        ValueError: no such model, or a configuration that cannot be read.
    """
    family, checkpoint, options = _chosen(model, options, {})
    return family.outline(checkpoint, options) if family.outline else family.load(checkpoint, options, "cpu")


def model_path(model: str, options: ModelOptions | None = None) -> Literal["diffusion", "flow"]:
    """The path of a model's noise schedule; arguments and errors as in `outline`."""
    return find_family(model)[0].path or outline(model, options).schedule(1).path


__all__ = [
    "FAMILIES",
    "DenoisingModel",
    "Family",
    "ModelOptions",
    "check_options",
    "families",
    "find_family",
    "load_model",
    "model_options",
    "model_path",
    "outline",
]

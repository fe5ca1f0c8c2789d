"""What every diffusers family shares: precision, adapters, memory savers, decoding, reference, export, outline."""

import contextlib
import importlib
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from denoise_env.arguments import MAX_SEED, boolean, integer, number
from denoise_env.models.base import DenoisingModel, ModelOptions
from denoise_env.prompts import Prompt

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
NAMED = 10
"""The most prompts that a warning names."""
SHOWN = 80
"""The most characters that it shows of one."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class PipelineOptions(ModelOptions):
    """The options that every diffusers family has."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """The dtype of computation and latents. Trained parameters are float32 with either."""
    lora_rank: int = 0
    """Rank of LoRA adapters on the network's attention; 0 trains every weight of the network."""
    lora_alpha: float | None = None
    """LoRA's alpha: the adapters' output is scaled by alpha / rank. Default: the rank."""
    lora: str | None = None
    """Start from exported LoRA weights, given as a directory or a file. Rank and alpha come with them."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and more time."""
    attention_backend: str | None = None
    """A name of diffusers' attention backends ("native", "flash", "sage", …); default: diffusers' own choice."""
    vae_slicing: bool = False
    """Decode one image at a time, which takes less memory."""
    vae_tiling: bool = False
    """Decode large images in overlapping tiles. It takes less memory, but seams may show."""
    seed: int | None = None
    """Seed of the adapters' first weights. Default: the run's seed, or 0."""
    height: int | None = None
    """Image height in pixels; default: what the checkpoint was trained for."""
    width: int | None = None
    """Image width in pixels; default: what the checkpoint was trained for."""


class PipelineModel(DenoisingModel):
    """The components of a diffusers pipeline behind the model interface; a family adds its own four methods.

    Args:
        pipeline: a diffusers pipeline with its network, VAE, encoders and tokenizers.
        options: the family's options.
        device: where the network and the VAE live; encoders come there while they encode.

    Attributes:
        title: the family's name in messages.
        pipeline_class: the pipeline's class in diffusers; or several, of which the checkpoint's ``model_index.json``
            names one.
        network_names: its parts that are the network; those that a checkpoint lacks count for nothing.
        encoder_names: its parts that read prompts.
        lora_targets: the modules that get adapters, by the ends of their names or by one regular expression.
        pipeline_arguments: what the pipeline is made with beside its parts.

    Raises:
        ValueError: an option out of range, or one that this network does not have.
    """

    title: ClassVar[str]
    pipeline_class: ClassVar[str | tuple[str, ...]]
    network_names: ClassVar[tuple[str, ...]] = ("transformer",)
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    optional_encoders: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[list[str] | str] = ["to_q", "to_k", "to_v", "to_out.0"]
    pipeline_arguments: ClassVar[Mapping[str, Any]] = {}
    network: Any

    def __init__(self, pipeline: Any, options: Any, device: str | torch.device = "cpu") -> None:
        if options.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, not {options.dtype!r}")
        if integer(options.lora_rank, "lora_rank") < 0:
            raise ValueError(f"lora_rank must be 0 (train the whole network) or positive, not {options.lora_rank}")
        if options.lora_alpha is not None:
            number(options.lora_alpha, "lora_alpha", at_least=0)
        self._seed = 0 if options.seed is None else integer(options.seed, "seed", 0, MAX_SEED)
        for name in ("gradient_checkpointing", "vae_slicing", "vae_tiling"):
            boolean(getattr(options, name), name)
        self.pipeline = pipeline
        self.options = options
        self.dtype = DTYPES[options.dtype]
        with quiet():
            for frozen in self.frozen().values():
                frozen.requires_grad_(False).to(self.dtype).eval()
            pipeline.vae.to(device)
            self.network = self.make_network().eval()
            if options.lora or options.lora_rank:
                self.network.requires_grad_(False).to(self.dtype)  # first: the device need not hold it in float32
            self.network.to(device)
            if options.lora or options.lora_rank:
                self._adapt(options)
            self._save_memory(options)

    @classmethod
    def load(cls, checkpoint: str | None, options: Any, device: str | torch.device = "cpu") -> Self:
        """Load a checkpoint in the diffusers layout: a directory, or a hub id ("CompVis/stable-diffusion-v1-4").

        It is read as data: weights from safetensors alone, and parts of diffusers' and transformers' own classes.

        Raises:
            ValueError: nothing that can be loaded is there, it would run code, or an option does not fit it.
        """
        assert checkpoint is not None
        local = Path(checkpoint).is_dir()
        dtype = DTYPES[options.dtype]
        try:
            with quiet():
                kind, index = cls._read_index(checkpoint, local)
                networks = [name for name in cls.network_names if name in index]
                trained = dtype if options.lora or options.lora_rank else torch.float32
                dtypes = {"default": dtype, **dict.fromkeys(networks, trained)}
                parts = cls._arguments(cls._check_parts(checkpoint, index))
                with warnings.catch_warnings():  # older releases know the argument by no other name
                    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")
                    pipeline = kind.from_pretrained(
                        checkpoint, local_files_only=local, use_safetensors=True, torch_dtype=dtypes, **parts
                    )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, SafetensorError) as error:
            raise ValueError(f"cannot load a {cls.title} checkpoint from {checkpoint!r}: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, options, device)

    @classmethod
    def outline(cls, checkpoint: str | None, options: Any) -> Self:
        """The model on the meta device, from the checkpoint's configuration files alone: shapes, no weights.

        Raises:
            ValueError: a configuration cannot be read, is of another class or would run code, or an option does not
                fit it.
        """
        assert checkpoint is not None
        try:
            with quiet():
                kind, index = cls._read_index(checkpoint)
                found = cls._check_parts(checkpoint, index)
                plain = {name for name, value in index.items() if isinstance(value, int | float | str)}
                parts = {name: index[name] for name in plain & signature(kind).parameters.keys()}
                parts |= cls._arguments(found)
                for name, entry in found.items():
                    if name in parts:
                        continue
                    part = getattr(importlib.import_module(entry[0]), entry[1])
                    if not issubclass(part, nn.Module):
                        parts.setdefault(name, part.from_pretrained(checkpoint, subfolder=name))
                        continue
                    with torch.device("meta"):
                        if entry[0] == "diffusers":
                            module = part.from_config(part.load_config(checkpoint, subfolder=name))
                        else:
                            # Other attention asks its mask whether all is attended to, which has no answer on meta.
                            settings = {"subfolder": name, "attn_implementation": "eager"}
                            module = part(part.config_class.from_pretrained(checkpoint, **settings))
                    parts.setdefault(name, module)
                pipeline = kind(**parts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise ValueError(f"cannot load a {cls.title} checkpoint from {checkpoint!r}: {error}") from error
        options = type(options)(**{**vars(options), "lora": None})
        return cls(pipeline, options, "meta")

    @classmethod
    def _read_index(cls, checkpoint: str, local: bool = False) -> tuple[Any, dict[str, Any]]:
        """The pipeline's class in diffusers, and the checkpoint's ``model_index.json``."""
        import diffusers

        index = diffusers.DiffusionPipeline.load_config(checkpoint, local_files_only=local)
        name = cls.pipeline_class
        if not isinstance(name, str):
            if index.get("_class_name") not in name:
                raise ValueError(f"it holds a {index.get('_class_name')}, not one of {list(name)}")
            name = index["_class_name"]
        return getattr(diffusers, name), index

    @classmethod
    def _check_parts(cls, checkpoint: str, index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        parts = check_parts(checkpoint, index)
        for name in cls.encoder_names:
            if name not in parts and name not in cls.optional_encoders:
                raise ValueError(f"it has no {name}, which reads the prompts")
        return parts

    @classmethod
    def _arguments(cls, found: Mapping[str, Any]) -> dict[str, Any]:
        """What the pipeline is given instead of parts of the checkpoint: ``None`` where it lacks an encoder."""
        absent = [name for name in cls.optional_encoders if name not in found]
        absent += [name.replace("text_encoder", "tokenizer") for name in absent]
        return {**cls.pipeline_arguments, **dict.fromkeys(absent)}

    @property
    def networks(self) -> dict[str, Any]:
        """The pipeline's parts that are the network, by name."""
        return {name: part for name in self.network_names if (part := getattr(self.pipeline, name)) is not None}

    @property
    def trained_networks(self) -> dict[str, Any]:
        """Those of `networks` that are trained; here all."""
        return self.networks

    def make_network(self) -> Any:
        """The module that is the network: the one of `networks`, unless a family joins several."""
        (network,) = self.networks.values()
        return network

    def encoders(self) -> dict[str, nn.Module]:
        """As in `DenoisingModel.encoders`."""
        return {name: part for name in self.encoder_names if (part := getattr(self.pipeline, name)) is not None}

    def frozen(self) -> dict[str, nn.Module]:
        """As in `DenoisingModel.frozen`."""
        return {**self.encoders(), "vae": self.pipeline.vae}

    def _adapt(self, options: Any) -> None:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        if options.lora:
            if len(self.trained_networks) > 1 and Path(options.lora).is_file():
                raise ValueError(
                    f"{options.lora!r} is one file, and {' and '.join(self.trained_networks)} are trained: give the "
                    "directory that holds one for each"
                )
            try:
                for name, network in self.trained_networks.items():
                    path, into = Path(options.lora), {}
                    if name != self.network_names[0]:
                        path = path / name if len(self.trained_networks) > 1 or (path / name).is_dir() else path
                        into = {f"load_into_{name}": True}
                    self.pipeline.load_lora_weights(str(path), adapter_name="default", use_safetensors=True, **into)
                    network.peft_config["default"]  # raises where the file had nothing for this network
            except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
                raise ValueError(f"cannot load {self.title} LoRA weights from {options.lora!r}: {error}") from error
            rank, alpha = self._adapters.r, self._adapters.lora_alpha
            if options.lora_rank not in (0, rank) or options.lora_alpha not in (None, alpha):
                raise ValueError(
                    f"{options.lora!r} has rank {rank} and alpha {alpha:g}: leave lora_rank and lora_alpha out"
                )
        else:
            alpha = options.lora_rank if options.lora_alpha is None else options.lora_alpha
            config = LoraConfig(
                r=options.lora_rank,
                lora_alpha=alpha,
                init_lora_weights="gaussian",
                target_modules=self.lora_targets,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                for network in self.trained_networks.values():
                    network.add_adapter(config)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_("lora_" in name)
        cast_training_params(self.network, dtype=torch.float32)

    @property
    def adapted(self) -> bool:
        """Whether LoRA adapters are trained, rather than the network."""
        return any(getattr(network, "peft_config", None) for network in self.trained_networks.values())

    @property
    def _adapters(self) -> Any:
        return next(iter(self.trained_networks.values())).peft_config["default"]

    def _save_memory(self, options: Any) -> None:
        for network in self.networks.values():
            if options.gradient_checkpointing:
                network.enable_gradient_checkpointing()
            if options.attention_backend:
                try:
                    network.set_attention_backend(options.attention_backend)
                except (AttributeError, ValueError, RuntimeError, ImportError, NotImplementedError) as error:
                    reason = f"attention_backend={options.attention_backend!r} cannot be used: {error}"
                    raise ValueError(reason) from error
        if options.vae_slicing:
            self.pipeline.vae.enable_slicing()
        if options.vae_tiling:
            self.pipeline.vae.enable_tiling()

    def latent_size(self, trained: tuple[int, int], factor: int, patch: int = 1) -> tuple[int, int]:
        """Height and width of the latents, of the options' size in pixels or of the one ``trained`` on.

        Args:
            trained: height and width in pixels, used where the options have none.
            factor: pixels to a latent, along one axis.
            patch: latents to a token of the network, along one axis.

        Raises:
            ValueError: a size that latents and tokens do not divide; it names the nearest that they do.
        """
        found = []
        for name, default in zip(("height", "width"), trained, strict=True):
            given = getattr(self.options, name)
            pixels = default if given is None else integer(given, name, at_least=1)
            step = factor * patch
            if pixels % step:
                below, above = pixels // step * step, -(-pixels // step) * step
                nearest = f"{below} and {above} are" if below else f"{above} is"
                raise ValueError(
                    f"{name} must be a multiple of {step} for {self.title}, not {pixels}: {nearest} the nearest"
                )
            found.append(pixels // factor)
        return found[0], found[1]

    @abstractmethod
    def count_tokens(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """How many tokens each text has, with the special ones around it; and how many of them are read at most."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """As in `DenoisingModel.check_prompts`."""
        super().check_prompts(prompts)
        texts = list(dict.fromkeys(text for p in prompts for text in (p.text, p.negative) if text is not None))
        counts, limit = self.count_tokens(texts) if texts else ([], 0)
        long = [(text, count) for text, count in zip(texts, counts, strict=True) if count > limit]
        cut = [f"{text if len(text) <= SHOWN else text[:SHOWN] + '…'!r} ({count})" for text, count in long]
        if cut:
            more = f" and {len(cut) - NAMED} more" * (len(cut) > NAMED)
            warnings.warn(
                f"the text encoder reads {limit} tokens; of longer prompts the end is cut off: "
                f"{', '.join(cut[:NAMED])}{more}",
                stacklevel=2,
            )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which the network computes in its dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def pixels(self, decoded: Tensor) -> Tensor:
        """What a VAE decodes, in about [−1, 1], as float32 in [0, 1]."""
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def export(self, directory: Path) -> None:
        """Write a whole pipeline, or with LoRA ``pytorch_lora_weights.safetensors`` for ``load_lora_weights``.

        The adapters of the second of several networks are in a folder of its name.
        """
        if not self.adapted:
            with quiet():
                save_pipeline(self.pipeline, directory)
            return
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import get_peft_model_state_dict

        for name, network in self.trained_networks.items():
            layers = get_peft_model_state_dict(network)
            if name == "unet":
                layers = convert_state_dict_to_diffusers(layers)
            # Without the metadata alpha is lost: whoever loads the file takes it for the rank.
            named = {"lora_layers": layers, "lora_adapter_metadata": self._adapters.to_dict()}
            first = self.network_names[0]
            self.pipeline.save_lora_weights(
                directory if name == first else directory / name,
                **{f"{first}_{key}": value for key, value in named.items()},
            )

    def architecture(self) -> dict[str, Any]:
        """As in `DenoisingModel.architecture`, with the network's config and the adapters' rank and alpha."""
        networks = list(self.trained_networks.values())
        configs = [{k: v for k, v in network.config.items() if not k.startswith("_")} for network in networks]
        config = configs[0] if len(configs) == 1 else configs
        lora = {"rank": self._adapters.r, "alpha": self._adapters.lora_alpha} if self.adapted else None
        return {**super().architecture(), "lora": lora, "network": config}


def check_parts(checkpoint: str, index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts of a checkpoint, name → library and class, as its ``model_index.json`` has them.

    diffusers imports what is named there. Its older releases also run a file ``<part>/<library>.py`` of the checkpoint
    and unpickle weights without being asked. So this is to be called before anything is loaded.

    Raises:
        ValueError: a part is of another library than diffusers and transformers, brings code of its own, or has weights
            only as a pickle.
    """
    from diffusers import pipelines

    parts: dict[str, tuple[str, str]] = {}
    for name, entry in index.items():
        if not (isinstance(entry, list | tuple) and len(entry) == 2 and entry[0]):
            continue
        library, kind = entry
        if not (isinstance(library, str) and isinstance(kind, str)):
            raise ValueError(f"its {name} must be a library and a class, not {entry!r}")
        automatic = library == "transformers" and kind.startswith("Auto")  # which asks the checkpoint for code
        own = Path(str(pipelines.__file__)).parent / library  # of one kind of pipeline, such as its safety checker
        known = library in ("diffusers", "transformers") or (library.isidentifier() and own.is_dir())
        if automatic or not known or not kind.isidentifier() or kind.startswith("_"):
            raise ValueError(
                f"its {name} is {library}.{kind}: only diffusers' and transformers' own classes are loaded"
            )
        folder = Path(checkpoint) / name
        if (folder / f"{library}.py").exists():
            raise ValueError(f"its {name} brings code of its own, {name}/{library}.py, which is not run")
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        if pickles and not any("." not in path.stem for path in folder.glob("*.safetensors")):  # a dot: of a variant
            raise ValueError(f"its {name} has weights as {pickles[0]}, which can hold code: only safetensors are read")
        parts[name] = (library, kind)
    return parts


def save_pipeline(pipeline: Any, directory: Path) -> None:
    """Write a pipeline in the diffusers layout, so that every release of diffusers and transformers reads it.

    transformers from 5.6 on names a `CLIPTextModel`'s weights without the prefix ``text_model.`` that hub
    checkpoints have, and a `CLIPVisionModel`'s without ``vision_model.``, and reads both; older releases find none of
    the bare names and silently start from random weights. So the prefix is put back.

    Args:
        pipeline: the pipeline to save.
        directory: where to write it; made if absent.
    """
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextModel, CLIPVisionModel

    prefixes = {CLIPTextModel: "text_model.", CLIPVisionModel: "vision_model."}
    pipeline.save_pretrained(directory)
    for name, part in pipeline.components.items():
        if prefix := prefixes.get(type(part)):
            path = directory / name / "model.safetensors"
            weights = load_file(path)
            prefixed = {f"{prefix}{key.removeprefix(prefix)}": tensor for key, tensor in weights.items()}
            save_file(prefixed, path, metadata={"format": "pt"})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what diffusers and transformers say about what is done on purpose here."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
            logger.enable_progress_bar()

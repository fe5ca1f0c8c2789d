"""What an environment and a policy need of a generative model, and nothing else."""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from denoise_env.kernels import PredictionType
from denoise_env.prompts import Prompt
from denoise_env.schedules import Schedule
from denoise_env.weights import copies, reshard, swapped


@dataclass
class ModelOptions:
    """The options of a family; each family has a subclass, with the family's name."""

    family: ClassVar[str]


@dataclass(frozen=True)
class Family:
    """A model family's record: how it is recognised, its options, its loader.

    Attributes:
        description: what the family covers, in one line.
        options: the family's dataclass of options, each with a default.
        load: a function (checkpoint, options, device) → model. ``checkpoint`` is a directory or a hub id; or ``None``,
            for families that make their model from the options alone.
        outline: a function (checkpoint, options) → the model without weights, on the meta device; default: ``load`` on
            the CPU.
        classes: the values of ``_class_name`` in a checkpoint's ``model_index.json`` that are this family's.
        path: "diffusion" or "flow", the path of the noise schedule where all models of the family have the same;
            default: an outline of the model is asked.
        preset: the name of the preset in `agents.training.presets` that a run's defaults come from, unless the run
            names another.
    """

    description: str
    options: type[ModelOptions]
    load: Callable[[str | None, Any, str | torch.device], "DenoisingModel"]
    outline: Callable[[str | None, Any], "DenoisingModel"] | None = None
    classes: tuple[str, ...] = ()
    path: Literal["diffusion", "flow"] | None = None
    preset: str = "dancegrpo"

    @property
    def name(self) -> str:
        """The family's name."""
        return self.options.family


class DenoisingModel(ABC):
    """One model family's adapter.

    Attributes:
        network: the denoiser, the module that is trained; ``trainable`` says which of its parameters.
        latent_shape: shape of one row's latents.
        prediction_type: what `predict` returns, by the names in `denoise_env.kernels`.
        dtype: storage dtype of the latents, and the network's compute dtype.
        device: where latents and conditioning live.
        rows_per_sample: how many rows `predict` gives the network per row of latents; with guidance 2.
        vocabulary: the only prompts the model knows, or ``None`` where any text is a prompt. ``("",)`` for a model
            without prompts.
        guidance_scale: w of classifier-free guidance, 1 for none; or the scale that a network is told which was
            distilled to be guided by it (FLUX); or ``None`` where the model cannot guide.
        rows_guided: as ``rows_per_sample``, where `predict` is given another guidance scale than the model's.
        images_per_prompt: how many images a prompt must carry.
        makes: what `decode` gives rewards, "images" or "clips".
        frame_rate: frames a second at which people are shown clips.
        masks: entry of the conditioning → its mask. Such an entry is a sequence ``[P, L, ...]`` with mask ``[P, L]``
            bool, True first: it is kept without its padding, and padded to the longest of every batch. Entries
            without a mask have one fixed shape: their padding is attended to.
        longest: how many tokens of a prompt are read at most, where that is a setting. A compiled model pads masked
            entries to it, so that its network sees one shape.
        portrait_size: how many samples one `portrait` shows; 0 where samples are looked at one by one (`render`).
        decoding: held while samples are decoded, so that a thread that scores is alone with the decoder.
    """

    network: nn.Module
    latent_shape: tuple[int, ...]
    prediction_type: PredictionType
    dtype: torch.dtype = torch.float32
    rows_per_sample: int = 1
    vocabulary: tuple[str, ...] | None = None
    guidance_scale: float | None = None
    rows_guided: int = 2
    images_per_prompt: ClassVar[int] = 0
    makes: Literal["images", "clips"] = "images"
    frame_rate: float = 8.0
    masks: ClassVar[Mapping[str, str]] = {}
    longest: int | None = None
    portrait_size: ClassVar[int] = 0
    decoding: ClassVar[contextlib.AbstractContextManager[Any]] = threading.Lock()
    compiled: bool = False
    _wrapped: nn.Module | None = None
    _kept: dict[str, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """The device that the network is on."""
        return next(self.network.parameters()).device

    @abstractmethod
    def schedule(self, num_steps: int) -> Schedule:
        """The noise levels of ``num_steps`` denoising steps.

        Raises:
            ValueError: fewer than 1, or more than the model was trained with.
        """

    # --- Prompts ---

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt]) -> TensorDict:
        """Conditioning ``[P, ...]`` of P prompts, on the model's device.

        The prompts are alike: all have a negative text or none has one.
        """

    @abstractmethod
    def pool(self, conditioning: TensorDict) -> Tensor:
        """One float32 vector per row ``[B, E]``, for critics and for agents that cannot read all of it."""

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise a ``ValueError`` for a prompt that the model cannot be conditioned on, without encoding it."""
        if self.vocabulary is not None and prompt.text not in self.vocabulary:
            raise ValueError(
                f"{type(self).__name__} knows no prompt {prompt.text!r}; its prompts are {list(self.vocabulary)}"
            )
        if self.guidance_scale is None and prompt.negative is not None:
            raise ValueError(
                f"{type(self).__name__} has no guidance, so a negative text has no meaning for it: leave "
                f"{prompt.negative!r} out"
            )
        if len(prompt.images) != self.images_per_prompt:
            how = (
                "give it in Prompt's images, or in a prompt file's column image"
                if self.images_per_prompt
                else "drop it"
            )
            raise ValueError(
                f"{type(self).__name__} takes {self.images_per_prompt or 'no'} image(s) with a prompt; "
                f"{prompt.text!r} has {len(prompt.images) or 'none'}: {how}"
            )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """`check_prompt` for each; and a warning that names the prompts of which ``encode`` cuts the end off."""
        for prompt in prompts:
            self.check_prompt(prompt)

    def encoders(self) -> dict[str, nn.Module]:
        """The frozen modules that ``encode`` calls, by name.

        They are moved to the model's device while prompts are encoded, and to the host afterwards; a conditioning
        cache on disk is known by their weights.
        """
        return {}

    def frozen(self) -> dict[str, nn.Module]:
        """The modules beside the network, by name: encoders and decoder."""
        return self.encoders()

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """A context in which the encoders are on the model's device."""
        for encoder in self.encoders().values():
            encoder.to(self.device)
        try:
            yield
        finally:
            if self.device.type != "meta":
                for encoder in self.encoders().values():
                    encoder.to("cpu")

    def split(self, conditioning: TensorDict) -> list[dict[str, Tensor]]:
        """The rows of ``encode``'s conditioning, each without padding and with storage of its own."""
        masks = {entry: mask for entry, mask in self.masks.items() if entry in conditioning.keys()}  # noqa: SIM118
        lengths = {entry: row_lengths(conditioning[mask]) for entry, mask in masks.items()}
        kept = [name for name in conditioning.keys() if name not in self.masks.values()]  # noqa: SIM118
        return [
            {
                name: (conditioning[name][i, : lengths[name][i]] if name in lengths else conditioning[name][i]).clone()
                for name in kept
            }
            for i in range(len(conditioning))
        ]

    def collate(self, rows: Sequence[Mapping[str, Tensor]]) -> TensorDict:
        """Rows of ``split`` as one batch ``[n]``, masked entries padded with zeros and their masks with them."""
        batch: dict[str, Tensor] = {}
        for name in rows[0]:
            if name not in self.masks:
                batch[name] = torch.stack([row[name] for row in rows])
                continue
            lengths = torch.tensor([len(row[name]) for row in rows], device=rows[0][name].device)
            padded = nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True)
            if self.compiled and self.longest:
                extra = padded.new_zeros(len(rows), self.longest - padded.shape[1], *padded.shape[2:])
                padded = torch.cat([padded, extra], 1)
            batch[name] = padded
            batch[self.masks[name]] = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        return TensorDict(batch, batch_size=len(rows))

    # --- Denoising ---

    @abstractmethod
    def predict(
        self, latents: Tensor, timestep: Tensor, conditioning: TensorDict, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """The network's output ``[B, *latent_shape]``, guidance applied: one network call.

        Args:
            latents: ``[B, *latent_shape]``.
            timestep: 0-d or ``[B]``, entries of the schedule's timesteps.
            conditioning: ``[B]`` rows of ``encode``'s.
            guidance_scale: ``[B]``, instead of the model's; only where that is not ``None``.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """What the rewards see, float32 in [0, 1]: images ``[B, 3, H, W]``, or clips ``[B, F, 3, H, W]``."""

    def render(self, latents: Tensor) -> Tensor:
        """What a person is shown, uint8 on the CPU: images ``[B, H, W, 3]``, or clips ``[B, F, H, W, 3]``."""
        return (self.decode(latents).float() * 255).round().to(torch.uint8).movedim(-3, -1).cpu()

    def portrait(self, latents: Tensor, prompt: Prompt) -> Tensor:
        """One picture ``[H, W, 3]`` uint8 of many samples of a prompt, where ``portrait_size`` is not 0."""
        raise NotImplementedError(f"{type(self).__name__} shows its samples one by one")

    # --- Weights ---

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Write the trained weights in the layout that the family's own library loads."""

    def architecture(self) -> dict[str, Any]:
        """What identifies the architecture; checkpoints refuse to load where it differs."""
        return {
            "family": type(self).__name__,
            "latent_shape": list(self.latent_shape),
            "prediction_type": self.prediction_type,
            "trainable": {name: list(p.shape) for name, p in self.trainable().items()},
        }

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        """Call the network through ``wrapper(network)`` from now on (such as ``DistributedDataParallel``).

        ``network`` stays the bare module, to which the names of its parameters refer. A wrapper may also change it in
        place and return it, as ``fully_shard`` does. Call this before anything holds the network's parameters, such as
        an optimizer or a reference.
        """
        self._wrapped = wrapper(self.network)

    @property
    def called(self) -> Any:
        """What ``predict`` calls: the network, or what ``wrap`` put around it."""
        return self.network if self._wrapped is None else self._wrapped

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        reshard(self.network)
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def compile(self) -> None:
        """Compile the network in place with `torch.compile`; names of parameters stay as they are.

        The compiling itself happens at the first call of every shape, without and with gradient.
        """
        self.compiled = True
        self.network.compile(dynamic=False)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """A context in which the weights are as they were at the first call of `keep_reference`.

        Use it without gradient, and not between a pass with gradient and its backward pass.
        """
        if self._kept is None:
            raise RuntimeError("call keep_reference() before training to have a reference to compare with")
        with swapped(self.network, self.trainable(), self._kept):
            yield

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """The copy of the weights that `keep_reference` made, by name; empty before."""
        return self._kept or {}

    def keep_reference(self) -> None:
        """Keep a copy of the present weights for `reference`. Only the first call does so; later ones do nothing."""
        if self._kept is None:
            self._kept = copies(self.trainable())


def example_prompt(model: DenoisingModel, text: str = "a prompt") -> Prompt:
    """A prompt with as many images as the model takes; with one of the model's texts where these are all it knows."""
    images = [torch.zeros(3, 64, 64)] * model.images_per_prompt
    return Prompt(model.vocabulary[0] if model.vocabulary else text, images=images)


def row_lengths(mask: Tensor) -> list[int]:
    """How many entries of each row of ``mask [B, L]`` are True; L of a mask without data, meta or fake."""
    from torch._subclasses.fake_tensor import FakeTensor

    if mask.is_meta or isinstance(mask, FakeTensor):
        return [mask.shape[1]] * len(mask)
    return mask.sum(1).tolist()

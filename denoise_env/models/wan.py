"""Wan 2.1 and 2.2: text to video and image to video."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F

from denoise_env.arguments import number
from denoise_env.models.base import Family
from denoise_env.models.experts import Experts
from denoise_env.models.flow_match import check_schedule, flow_schedule
from denoise_env.models.pipeline import quiet
from denoise_env.models.video import VideoModel, VideoOptions
from denoise_env.prompts import Prompt, PromptImage
from denoise_env.schedules import Schedule, check_num_steps
from denoise_env.weights import is_sharded

SIZE, FRAMES = (480, 832), 81
"""What the pipelines make unless they are told otherwise."""
ExpertsName = Literal["both", "high_noise", "low_noise"]


@dataclass
class WanOptions(VideoOptions):
    """The options of Wan's text to video."""

    family = "wan"

    guidance_scale: float = 5.0
    """Scale w of classifier-free guidance, v_u + w (v_c − v_u) with and without the prompt, in rollout and in training.
    With 1 there is no guidance, and half the compute."""
    guidance_scale_2: float | None = None
    """The same for the low-noise network of Wan 2.2 A14B. Default: guidance_scale."""
    experts: ExpertsName = "both"
    """Which of Wan 2.2 A14B's two networks are trained: "both", the one for "high_noise", or the one for "low_noise".
    Both make the samples. The steps of one that is not trained are left out where steps are chosen for training;
    agents that train on noised samples choose them by step_range."""


@dataclass
class WanImageToVideoOptions(WanOptions):
    """The options of Wan's image to video."""

    family = "wan-image-to-video"


class Wan(VideoModel):
    """A `WanPipeline`'s components; arguments and errors as in `PipelineModel`.

    The latents are ``[16, f, H/8, W/8]``, or ``[48, f, H/16, W/16]`` for Wan 2.2 5B, with f = 1 + (F − 1)/4. Texts are
    cleaned as the pipeline does it, which depends on whether ftfy is installed. They are padded to 512 tokens with
    zeros, and the zeros are attended to.

    Wan 2.2 A14B has two networks: ``transformer`` denoises down to the noise level ``boundary_ratio``, and
    ``transformer_2`` from there on. ``network`` is the two as one (`Experts`).
    """

    title = "Wan"
    pipeline_class = "WanPipeline"
    network_names = ("transformer", "transformer_2")
    prediction_type = "flow_prediction"
    longest = 512
    frame_rate = 16.0
    options: WanOptions

    def __init__(self, pipeline: Any, options: Any = None, device: str | torch.device = "cpu") -> None:
        options = options or WanOptions()
        check_schedule(options)
        self.guide_by(options.guidance_scale)
        ratio, scheduler = pipeline.config.boundary_ratio, pipeline.scheduler
        self.boundary = None if ratio is None else ratio * scheduler.config.num_train_timesteps
        _check_experts(pipeline, options)
        # UniPC tells the network whole numbers.
        self.truncates = options.schedule == "pipeline" and bool(scheduler.config.get("use_flow_sigmas"))
        super().__init__(pipeline, options, device)
        if pipeline.config.expand_timesteps:  # Wan 2.2 5B
            self.frame_rate = 24.0
        patch = pipeline.transformer.config.patch_size[1]
        frames = self.latent_frames(FRAMES, pipeline.vae_scale_factor_temporal)
        size = self.latent_size(SIZE, pipeline.vae_scale_factor_spatial, patch)
        self.latent_shape = (pipeline.vae.config.z_dim, frames, *size)

    @property
    def networks(self) -> dict[str, Any]:
        """As in `PipelineModel.networks`; ``transformer_2`` only where the checkpoint has a boundary."""
        found = super().networks
        return found if self.boundary is not None else {"transformer": found["transformer"]}

    @property
    def trained_networks(self) -> dict[str, Any]:
        """As in `PipelineModel.trained_networks`; of two those that ``experts`` names."""
        left_out = {"both": None, "high_noise": "transformer_2", "low_noise": "transformer"}[self.options.experts]
        return {name: network for name, network in self.networks.items() if name != left_out}

    def make_network(self) -> Any:
        """As in `PipelineModel.make_network`; one that is not trained is kept in the model's dtype."""
        for name in self.networks.keys() - self.trained_networks.keys():
            self.networks[name].requires_grad_(False).to(self.dtype)
        return super().make_network() if self.boundary is None else Experts(self.networks, self.boundary)

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        """As in `DenoisingModel.wrap`; a ``ValueError`` where two networks are trained and get sharded."""
        super().wrap(wrapper)
        if len(self.trained_networks) == 2 and any(map(is_sharded, self.network.parameters())):
            raise ValueError(
                "the processes that share a sharded network must call it together, and their rows may need different "
                "ones of Wan 2.2 A14B's two: do not shard them, or train one (experts)"
            )

    def schedule(self, num_steps: int) -> Schedule:
        """As in `DenoisingModel.schedule`.

        Published checkpoints come with UniPC, a solver of second order. Its noise levels are used, of which the network
        is told the whole part of 1000 σ; but the ODE kernel's steps on them are Euler's, which end elsewhere. With
        random weights, where latents reach 4, the difference was up to 0.16 after 4 steps and 0.05 after 20. A
        checkpoint with a `FlowMatchEulerDiscreteScheduler` has that scheduler's levels, and the ODE kernel makes its
        pipeline's samples.
        """
        scheduler = self.pipeline.scheduler
        if not self.truncates:
            return flow_schedule(scheduler, self.options, num_steps, timestep_scale=1000)
        check_num_steps(num_steps)
        changes = {} if self.options.shift is None else {"flow_shift": self.options.shift}
        own = type(scheduler).from_config(scheduler.config, **changes)
        own.set_timesteps(num_steps)
        return Schedule.from_sigmas(own.sigmas.double(), timestep_scale=1000)

    def trained_steps(self, schedule: Schedule) -> Tensor:
        """As in `DenoisingModel.trained_steps`: those of the networks that ``experts`` names."""
        wanted = {"both": (0, 1), "high_noise": (0,), "low_noise": (1,)}[self.options.experts]
        return torch.isin(self.network_of(schedule), torch.tensor(wanted))

    def network_of(self, schedule: Schedule) -> Tensor:
        """As in `DenoisingModel.network_of`: 1 below the boundary."""
        if self.boundary is None:
            return super().network_of(schedule)
        return (self._told(schedule.timesteps) < self.boundary).long()

    def _told(self, timestep: Tensor) -> Tensor:
        return timestep.trunc() if self.truncates else timestep

    def count_tokens(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """As in `PipelineModel.count_tokens`."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = self.pipeline.tokenizer([prompt_clean(text) for text in texts]).input_ids
        return [len(ids) for ids in tokens], self.longest

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds [P, 512, 4096]`` of UMT5. On the meta device, where nothing is read, they are empty."""
        if self.device.type == "meta":
            width = self.pipeline.transformer.config.text_dim
            return {"prompt_embeds": torch.empty(len(texts), self.longest, width, dtype=self.dtype, device="meta")}
        with quiet():
            embeds, _ = self.pipeline.encode_prompt(
                list(texts),
                do_classifier_free_guidance=False,
                max_sequence_length=self.longest,
                device=self.device,
                dtype=self.dtype,
            )
        return {"prompt_embeds": embeds}

    def pool(self, conditioning: TensorDict) -> Tensor:
        """The mean of UMT5's token features ``[B, 4096]``, without padding, which is zero."""
        embeds = conditioning["prompt_embeds"].float()
        return embeds.sum(1) / (embeds != 0).any(-1).sum(1, keepdim=True)

    def predict(
        self, latents: Tensor, timestep: Tensor, conditioning: TensorDict, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """As in `DenoisingModel.predict`; rows on both sides of the boundary take a call of each network."""
        told = self._told(timestep.to(latents.device)).expand(len(latents))
        first, second = self.guidance_scale, self.options.guidance_scale_2
        if guidance_scale is None and self.rows_per_sample == 2 and self.boundary and first and second:
            guidance_scale = torch.where(told < self.boundary, second, first)
        return super().predict(latents, told, conditioning, guidance_scale)

    def call(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As in `GuidedModel.call`."""
        output: Tensor = self.called(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_image=conditioning.get("image_embeds"),
            return_dict=False,
        )[0]
        return output

    def decode(self, latents: Tensor) -> Tensor:
        """Clips ``[B, F, 3, H, W]`` float32 in [0, 1], or images ``[B, 3, H, W]`` of one frame."""
        mean, std = self.scaling()
        decoded = self.pipeline.vae.decode((latents * std + mean).to(self.dtype), return_dict=False)[0]
        return self.clip(decoded)

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Mean and std ``[C, 1, 1, 1]`` of the latents that the VAE makes."""
        config = self.pipeline.vae.config
        mean, std = (torch.tensor(each, device=self.device) for each in (config.latents_mean, config.latents_std))
        return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


class WanImageToVideo(Wan):
    """A `WanImageToVideoPipeline`'s components; arguments and errors as in `PipelineModel`.

    A prompt's image is the clip's first frame, stretched to the clip's size as the pipeline does it. Wan 2.1 and 2.2
    A14B see beside the noisy latents those of a clip that is gray after this frame, and a mask that marks it; Wan 2.1
    also CLIP's features of the image. Wan 2.2 5B has the frame in the place of its first latents, which are not
    ``free``.
    """

    pipeline_class = "WanImageToVideoPipeline"
    encoder_names = ("text_encoder", "image_encoder")
    optional_encoders = ("image_encoder",)
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]  # noqa: RUF012
    images_per_prompt = 1
    options: WanImageToVideoOptions

    def __init__(self, pipeline: Any, options: Any = None, device: str | torch.device = "cpu") -> None:
        if find_spec("ftfy") is None:
            raise ValueError("Wan's image to video cleans its prompts with the package 'ftfy': pip install ftfy")
        config = pipeline.transformer and pipeline.transformer.config
        if config and config.pos_embed_seq_len:
            raise ValueError(
                "this Wan fills in a clip between two images; only those that begin with one are supported"
            )
        sees_features = bool(config and config.image_dim)
        if sees_features and pipeline.image_encoder is None:
            raise ValueError(
                "this Wan attends to CLIP's features of the image, and the checkpoint has no image_encoder"
            )
        super().__init__(pipeline, options or WanImageToVideoOptions(), device)
        self.shared_entries = ("image_latents", "image_embeds") if sees_features else ("image_latents",)
        self.given = bool(pipeline.config.expand_timesteps)
        _, frames, height, width = self.latent_shape
        first = torch.zeros(frames, height, width, dtype=torch.bool, device=self.device)
        first[0] = True
        if not self.given:
            self._mask = first.to(self.dtype).expand(pipeline.vae_scale_factor_temporal, -1, -1, -1)
            return
        if frames == 1:
            raise ValueError("num_frames must be at least 5 for Wan 2.2 5B: its first frame is given with the prompt")
        self.free = ~first.expand(self.latent_shape)
        patch = config.patch_size[1]
        self._noisy_tokens = self.free[0, :, ::patch, ::patch].flatten().float()

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> TensorDict:
        """As in `GuidedModel.encode`, with the images' entries.

        They are ``image_latents [P, 16, f, H/8, W/8]`` of the first frame and gray ones, or for Wan 2.2 5B
        ``[P, 48, 1, H/16, W/16]`` of the first frame alone; and for Wan 2.1 ``image_embeds [P, 257, 1280]``.
        """
        from PIL import Image

        found = super().encode(prompts)
        found["image_latents"] = torch.cat([self._latents_of(prompt.images[0]) for prompt in prompts])
        if "image_embeds" in self.shared_entries:
            images = [Image.fromarray(prompt.images[0].pixels()) for prompt in prompts]
            with quiet():
                found["image_embeds"] = self.pipeline.encode_image(images, self.device).to(self.dtype)
        return found

    def _latents_of(self, image: PromptImage) -> Tensor:
        clip = self.image_pixels(image)[:, :, None]
        if not self.given:
            further = (self.latent_shape[1] - 1) * self.pipeline.vae_scale_factor_temporal
            clip = F.pad(clip, (0, 0, 0, 0, 0, further))
        posterior = self.pipeline.vae.encode(clip, return_dict=False)[0]
        mean, std = self.scaling()
        latents: Tensor = (posterior.mode().float() - mean) / std
        return latents.to(self.dtype)

    def predict(
        self, latents: Tensor, timestep: Tensor, conditioning: TensorDict, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """As in `Wan.predict`; for the latents that are given, the output that makes them the clean ones."""
        output = super().predict(latents, timestep, conditioning, guidance_scale)
        if not self.given:
            return output
        sigma = (timestep / 1000).to(latents.device).expand(len(latents)).view(-1, 1, 1, 1, 1)
        known = (latents[:, :, :1].float() - conditioning["image_latents"].float()) / sigma
        return torch.cat([known, output[:, :, 1:].float()], 2)

    def call(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As in `GuidedModel.call`."""
        image = conditioning["image_latents"]
        if self.given:
            latents, timestep = torch.cat([image, latents[:, :, 1:]], 2), timestep[:, None] * self._noisy_tokens
        else:
            latents = torch.cat([latents, self._mask.expand(len(latents), -1, -1, -1, -1), image], 1)
        return super().call(latents, timestep, conditioning)


def _check_experts(pipeline: Any, options: WanOptions) -> None:
    """Raise a ``ValueError`` for networks that are missing, or options about a second one that is not there."""
    if options.experts not in get_args(ExpertsName):
        raise ValueError(f"experts must be one of {list(get_args(ExpertsName))}, not {options.experts!r}")
    second = options.guidance_scale_2
    if second is not None:
        number(second, "guidance_scale_2", at_least=1)
    if pipeline.config.boundary_ratio is None:
        names = ["transformer"]
        if second is not None or options.experts != "both":
            setting = "experts" if second is None else "guidance_scale_2"
            raise ValueError(f"this Wan has one network: leave {setting} out, which is for the two of Wan 2.2 A14B")
    else:
        names = ["transformer", "transformer_2"]
    for name in names:
        if getattr(pipeline, name) is None:
            raise ValueError(f"this Wan checkpoint has no {name}, which denoises")
    if options.guidance_scale == 1 and second not in (None, 1):
        raise ValueError("with guidance_scale=1 nothing is guided, as in the pipeline: leave guidance_scale_2 out")


FAMILY = Family(
    description="Wan 2.1 and 2.2: text to video, rectified flow, classifier-free guidance",
    options=WanOptions,
    load=Wan.load,
    outline=Wan.outline,
    classes=("WanPipeline",),
    path="flow",
    preset="wan",
)
IMAGE_TO_VIDEO = Family(
    description="Wan 2.1 and 2.2: image to video, rectified flow, classifier-free guidance",
    options=WanImageToVideoOptions,
    load=WanImageToVideo.load,
    outline=WanImageToVideo.outline,
    classes=("WanImageToVideoPipeline",),
    path="flow",
    preset="wan",
)

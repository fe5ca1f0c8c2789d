"""What HunyuanVideo and the models made of it share: text, schedule, the network's call and the causal video VAE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from denoise_env.arguments import integer, number
from denoise_env.models.base import row_lengths
from denoise_env.models.flow_match import check_schedule, flow_schedule
from denoise_env.models.pipeline import quiet
from denoise_env.models.video import VideoModel, VideoOptions
from denoise_env.schedules import Schedule, check_num_steps


@dataclass
class HunyuanOptions(VideoOptions):
    """The options that the models made of HunyuanVideo have."""

    vae_tiling: bool = False
    """Decode frames of more than 256 pixels a side in tiles of 256, a new one every 192. It takes less memory and up to
    1.8 times the computation, and seams may show. In time a clip of more than 16 frames is always decoded in
    overlapping pieces, with this or without."""
    guidance_scale: float = 6.0
    """The scale that the network is told, times 1000. It was distilled to be guided by it, with one row a sample; 1 is
    a scale like any other."""
    true_cfg_scale: float = 1.0
    """Scale w of classifier-free guidance beside the embedded one, un + w (cond − un), with the prompts' negative
    texts; 1 for none. It doubles the compute."""
    max_sequence_length: int = 256
    """Tokens of a prompt that LLaMA reads, its end mark among them and the template before it not; CLIP reads 77."""


class HunyuanModel(VideoModel):
    """A pipeline's components around a `HunyuanVideoTransformer3DModel`; arguments and errors as in `PipelineModel`.

    The latents are ``[16, (F + 3) / 4, H/8, W/8]``.

    Attributes:
        trained: frames, height and width of the clips that the family's own pipeline makes by default.
        distilled: whether the network is told a guidance scale.
    """

    encoder_names = ("text_encoder", "text_encoder_2")
    lora_targets = [  # noqa: RUF012
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ]
    entries = ("prompt_embeds", "prompt_embeds_mask", "pooled_prompt_embeds")
    masks = {  # noqa: RUF012
        "prompt_embeds": "prompt_embeds_mask",
        "negative_prompt_embeds": "negative_prompt_embeds_mask",
    }
    prediction_type = "flow_prediction"
    trained: ClassVar[tuple[int, int, int]]
    options: HunyuanOptions

    def __init__(self, pipeline: Any, options: HunyuanOptions, device: str | torch.device = "cpu") -> None:
        check_schedule(options)
        number(options.guidance_scale, "guidance_scale", at_least=0)
        number(options.true_cfg_scale, "true_cfg_scale", at_least=1)
        self._crop = _template()["crop_start"]
        positions = pipeline.text_encoder.config.max_position_embeddings - self._crop
        self.longest = integer(options.max_sequence_length, "max_sequence_length", 1, positions)
        config = pipeline.transformer.config
        self.distilled = bool(config.guidance_embeds)
        channels = pipeline.vae.config.latent_channels * (1 + self.images_per_prompt)
        if config.in_channels != channels:
            raise ValueError(
                f"the network of {self.title} takes {channels} channels, and this one {config.in_channels}: it is made "
                "for another pipeline than the one that the checkpoint's model_index.json names"
            )
        super().__init__(pipeline, options, device)
        frames, *size = self.trained
        self.latent_shape = (
            pipeline.vae.config.latent_channels,
            self.latent_frames(frames, pipeline.vae_scale_factor_temporal),
            *self.latent_size((size[0], size[1]), pipeline.vae_scale_factor_spatial, config.patch_size),
        )

    def schedule(self, num_steps: int) -> Schedule:
        """As in `DenoisingModel.schedule`: the straight grid, shifted; the network is told 1000 σ."""
        check_num_steps(num_steps)
        sigmas = [(num_steps - k) / num_steps for k in range(num_steps)]
        return flow_schedule(self.pipeline.scheduler, self.options, num_steps, sigmas=sigmas, timestep_scale=1000)

    def count_tokens(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """As in `PipelineModel.count_tokens`: LLaMA's, without those of the template's start."""
        template = _template()["template"]
        tokens = self.pipeline.tokenizer([template.format(text) for text in texts]).input_ids
        return [len(ids) - self._crop for ids in tokens], self.options.max_sequence_length

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """LLaMA's ``prompt_embeds [P, L, 4096]`` with their mask, and CLIP's ``pooled_prompt_embeds [P, 768]``.

        LLaMA reads a text in a template that asks for a video's description; the template's start is left out.
        """
        with quiet():
            embeds, pooled, mask = self.pipeline.encode_prompt(
                list(texts), device=self.device, max_sequence_length=self.longest
            )
        rows = [
            {"prompt_embeds": row[:length].to(self.dtype), "pooled_prompt_embeds": features.to(self.dtype)}
            for row, length, features in zip(embeds, row_lengths(mask), pooled, strict=True)
        ]
        return dict(self.collate(rows).items())

    def pool(self, conditioning: TensorDict) -> Tensor:
        """CLIP's pooled features ``[B, 768]``."""
        return conditioning["pooled_prompt_embeds"].float()

    def call(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As in `GuidedModel.call`; the network is told 1000 times ``guidance [B]`` or else the options' scale."""
        scale = conditioning.get("guidance", timestep.new_tensor(self.options.guidance_scale))
        return self.called(
            hidden_states=latents,
            timestep=timestep,
            guidance=1000 * scale.to(latents.device, torch.float32).expand(len(latents)),
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_embeds_mask"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Clips ``[B, F, 3, H, W]`` float32 in [0, 1]; of one frame images ``[B, 3, H, W]``."""
        vae = self.pipeline.vae
        return self.clip(vae.decode((latents / vae.config.scaling_factor).to(self.dtype), return_dict=False)[0])


def _template() -> Mapping[str, Any]:
    """The template around a prompt, and how many tokens it begins with; of all these pipelines the same."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return DEFAULT_PROMPT_TEMPLATE

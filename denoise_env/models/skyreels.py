"""SkyReels-V1, which makes videos of a first frame."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional as F

from denoise_env.models.base import Family
from denoise_env.models.hunyuan import HunyuanModel, HunyuanOptions
from denoise_env.prompts import Prompt, PromptImage


@dataclass
class SkyReelsOptions(HunyuanOptions):
    """The options of SkyReels-V1."""

    family = "skyreels"

    true_cfg_scale: float = 6.0
    """Scale w of classifier-free guidance, un + w (cond − un), with and without the prompt's text; the image is in both
    halves. With 1 there is no guidance, and half the compute. A prompt without a negative text has the empty one, where
    the plain pipeline would not guide."""
    guidance_scale: float = 1.0
    """The scale that the network is told beside, times 1000; a network that was not distilled so is told nothing."""


class SkyReels(HunyuanModel):
    """A `HunyuanSkyreelsImageToVideoPipeline`'s components; arguments and errors as in `PipelineModel`.

    A prompt has one image, the first frame. It is stretched to the clip's height and width, whatever its own are, by
    Lanczos' filter. The VAE gives a distribution of its latents, of which one sample is drawn, with noise that follows
    from the image's pixels: a prompt has the same latents in every run, and so have two prompts with one image. They
    join the network's input as further channels, with zeros for the frames after the first.
    """

    title = "SkyReels-V1"
    pipeline_class = "HunyuanSkyreelsImageToVideoPipeline"
    images_per_prompt = 1
    shared_entries = ("first_frame",)
    trained = (97, 544, 960)
    options: SkyReelsOptions

    def __init__(self, pipeline: Any, options: Any = None, device: str | torch.device = "cpu") -> None:
        super().__init__(pipeline, options or SkyReelsOptions(), device)
        self.guide_by(self.options.true_cfg_scale)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> TensorDict:
        """As in `GuidedModel.encode`, with the images' latents ``first_frame [P, 16, 1, H/8, W/8]``."""
        found = super().encode(prompts)
        found["first_frame"] = torch.cat([self._first_frame(prompt.images[0]) for prompt in prompts])
        return found

    def _first_frame(self, image: PromptImage) -> Tensor:
        vae = self.pipeline.vae
        posterior = vae.encode(self.image_pixels(image)[:, :, None]).latent_dist
        sample = posterior.sample(torch.Generator().manual_seed(posterior_seed(image)))
        return (sample.float() * vae.config.scaling_factor).to(self.dtype)

    def call(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As in `GuidedModel.call`."""
        first_frame = F.pad(conditioning["first_frame"], (0, 0, 0, 0, 0, latents.shape[2] - 1))
        return super().call(torch.cat([latents, first_frame], 1), timestep, conditioning)


def posterior_seed(image: PromptImage) -> int:
    """The seed of the noise in an image's latents, from its pixels."""
    return int(image.digest[:16], 16)


FAMILY = Family(
    description="SkyReels-V1: image to video, rectified flow, classifier-free guidance",
    options=SkyReelsOptions,
    load=SkyReels.load,
    outline=SkyReels.outline,
    classes=("HunyuanSkyreelsImageToVideoPipeline",),
    path="flow",
    preset="dancegrpo-skyreels",
)

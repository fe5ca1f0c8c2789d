"""HunyuanVideo."""

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from denoise_env.models.base import Family
from denoise_env.models.hunyuan import HunyuanModel, HunyuanOptions
from denoise_env.prompts import Prompt


@dataclass
class HunyuanVideoOptions(HunyuanOptions):
    """The options of HunyuanVideo."""

    family = "hunyuan-video"


class HunyuanVideo(HunyuanModel):
    """A `HunyuanVideoPipeline`'s components; arguments and errors as in `PipelineModel`."""

    title = "HunyuanVideo"
    pipeline_class = "HunyuanVideoPipeline"
    trained = (129, 720, 1280)
    options: HunyuanVideoOptions

    def __init__(self, pipeline: Any, options: Any = None, device: str | torch.device = "cpu") -> None:
        super().__init__(pipeline, options or HunyuanVideoOptions(), device)
        if not self.distilled:
            raise ValueError(
                "this HunyuanVideo was not distilled to be guided (its guidance_embeds is false): only networks that "
                "are told a guidance scale are supported"
            )
        self.guidance_scale = float(self.options.guidance_scale)
        self.rows_per_sample = self.rows_guided = 1 if self.options.true_cfg_scale == 1 else 2

    def check_prompt(self, prompt: Prompt) -> None:
        """As in `DenoisingModel.check_prompt`; a negative text needs ``true_cfg_scale``."""
        if prompt.negative is not None and self.options.true_cfg_scale == 1:
            raise ValueError(
                f"HunyuanVideo's guidance is embedded in the network, where a negative text has no place: leave "
                f"{prompt.negative!r} out, or set true_cfg_scale above 1"
            )
        super().check_prompt(prompt)

    def predict(
        self, latents: Tensor, timestep: Tensor, conditioning: TensorDict, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """As in `DenoisingModel.predict`; ``guidance_scale`` is the one that the network is told."""
        told = {} if guidance_scale is None else {"guidance": guidance_scale}
        true_scale = None if self.rows_per_sample == 1 else self.options.true_cfg_scale
        return self.guide(latents, timestep, conditioning, true_scale, told)


FAMILY = Family(
    description="HunyuanVideo: text to video (one frame: to image), rectified flow, embedded guidance",
    options=HunyuanVideoOptions,
    load=HunyuanVideo.load,
    outline=HunyuanVideo.outline,
    classes=("HunyuanVideoPipeline",),
    path="flow",
    preset="dancegrpo-hunyuan",
)

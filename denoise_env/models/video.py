"""What the families of video models share: the number of frames, and clips as rewards and people see them."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from denoise_env.arguments import integer
from denoise_env.models.flow_match import FlowOptions
from denoise_env.models.guidance import GuidedModel
from denoise_env.prompts import PromptImage


@dataclass
class VideoOptions(FlowOptions):
    """The options of a video model."""

    num_frames: int | None = None
    """Frames of a clip; 1 makes images. Default: as many as the family's own pipeline makes."""


class VideoModel(GuidedModel):
    """A video pipeline's components; arguments and errors as in `PipelineModel`.

    The latents are ``[C, f, h, w]``, with one frame of latents for the clip's first frame and one for each ``stride``
    further ones.
    """

    options: VideoOptions

    def latent_frames(self, trained: int, stride: int) -> int:
        """Frames of the latents, of the options' ``num_frames`` or of those ``trained`` on; sets ``makes``.

        Raises:
            ValueError: a number of frames that the VAE cannot make; it names the nearest that it can.
        """
        given = self.options.num_frames
        frames = trained if given is None else integer(given, "num_frames", at_least=1)
        if over := (frames - 1) % stride:
            raise ValueError(
                f"num_frames must be 1 more than a multiple of {stride} for {self.title}, not {frames}: "
                f"{frames - over} and {frames - over + stride} are the nearest"
            )
        kind: Literal["images", "clips"] = "images" if frames == 1 else "clips"
        self.makes = kind
        return 1 + (frames - 1) // stride

    def image_pixels(self, image: PromptImage) -> Tensor:
        """A prompt's image ``[1, 3, H, W]`` in [−1, 1] as the VAE reads it, in the clip's size.

        An image of another size is stretched to it by Lanczos' filter, as the plain pipelines do.
        """
        from PIL import Image

        factor = self.pipeline.vae_scale_factor_spatial
        height, width = (side * factor for side in self.latent_shape[-2:])
        pixels = self.pipeline.video_processor.preprocess(Image.fromarray(image.pixels()), height, width)
        return pixels.to(self.device, self.dtype)

    def clip(self, decoded: Tensor) -> Tensor:
        """What a VAE decodes, ``[B, 3, F, H, W]`` in about [−1, 1], as `decode` returns it, in [0, 1]."""
        clips = self.pixels(decoded).transpose(1, 2)
        return clips[:, 0] if self.makes == "images" else clips

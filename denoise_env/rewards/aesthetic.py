"""LAION's aesthetic predictor v2."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from denoise_env.prompts import Prompt
from denoise_env.rewards.base import RewardModel
from denoise_env.rewards.heads import LinearHead
from denoise_env.rewards.preprocess import Preprocess
from denoise_env.rewards.pretrained import check_reference, fetch, from_transformers, load_tensors, read_tensors


class Aesthetic(RewardModel):
    """LAION's aesthetic predictor v2: higher is more beautiful, from 1 to about 10.

    The prompt does not matter. Linear layers on the normalised image embedding of OpenAI's CLIP ViT-L/14; they keep
    float32 whatever the dtype.

    Args:
        checkpoint: the predictor's file (published as `sac+logos+ava1-l14-linearMSE.pth`), or "owner/name/file" on the
            Hugging Face hub; the default is TRL's copy of it.
        encoder: a directory with the CLIP model in transformers' form, or "owner/name" on the hub.
        device: as in `RewardModel`.
        dtype: as in `RewardModel`.
        microbatch: as in `RewardModel`.
    """

    citation = "Schuhmann 2022, github.com/christophschuhmann/improved-aesthetic-predictor"

    def __init__(
        self,
        checkpoint: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        encoder: str = "openai/clip-vit-large-patch14",
        device: str | None = None,
        dtype: str = "fp32",
        microbatch: int = 32,
    ) -> None:
        super().__init__(device, dtype, microbatch)
        check_reference(checkpoint, "checkpoint", 3)
        check_reference(encoder, "encoder", 2)
        self.checkpoint, self.encoder = checkpoint, encoder

    def load_network(self) -> nn.Module:
        """The image tower; the predictor, which is to keep its precision, apart from it."""
        from transformers import AutoImageProcessor, CLIPModel

        processor = from_transformers(AutoImageProcessor, self.encoder, backend="pil")
        network = from_transformers(CLIPModel, self.encoder)
        del network.text_model, network.text_projection
        self.preprocess = Preprocess.of_transformers(processor)
        self.predictor = LinearHead(network.config.projection_dim)
        load_tensors(self.predictor, read_tensors(fetch(self.checkpoint)), self.checkpoint)
        self.predictor.eval().requires_grad_(False)
        return network

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `RewardModel`."""
        network: Any = self.network
        pixels = self.preprocess(images).to(self.dtype)
        embeddings = network.get_image_features(pixel_values=pixels).pooler_output.float()
        return self.predictor.to(images.device)(normalize(embeddings, dim=-1))

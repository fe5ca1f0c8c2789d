"""Networks that embed pictures and texts in one space: those of open_clip, and transformers' CLIP and SigLIP."""

import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from denoise_env.rewards.preprocess import Preprocess
from denoise_env.rewards.pretrained import from_transformers, sentence

OPEN_CLIP = {"open_clip": "denoise-env[rewards]"}
CONFIG = "open_clip_config.json"


class ImageTextEncoder(nn.Module):
    """An image tower and a text tower, with the preprocessing and the tokenizer that they were published with.

    Attributes:
        preprocess: pictures ``[b, 3, H, W]`` in [0, 1] → the image tower's input.
        scale: what the cosine is multiplied by in the logit, in full precision.
        bias: what is added to it in a sigmoid's logit; ``None`` where the towers were trained with a softmax.
    """

    preprocess: Callable[[Tensor], Tensor]

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        parameters: Any = model
        bias = getattr(model, "logit_bias", None)
        self.scale = parameters.logit_scale.detach().float().exp().item()
        self.bias = None if bias is None else bias.detach().float().item()

    @abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embeddings ``[b, d]`` of preprocessed pictures."""

    @abstractmethod
    def embed_texts(self, texts: list[str], device: torch.device) -> Tensor:
        """Embeddings ``[n, d]``."""

    def cosine(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The cosine of each picture and its text: ``[b]`` float32. A text that several have is embedded once.

        Args:
            images: ``[b, 3, H, W]`` in [0, 1].
            texts: b texts.
        """
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        dtype = next(self.model.parameters()).dtype
        of_images = normalize(self.embed_images(self.preprocess(images).to(dtype)).float(), dim=-1)
        of_texts = normalize(self.embed_texts(list(distinct), images.device).float(), dim=-1)
        return (of_images * of_texts[[distinct[text] for text in texts]]).sum(-1)

    def match(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The cosine, or, of towers that were trained with a sigmoid, the probability of a match: ``[b]`` float32."""
        cosine = self.cosine(images, texts)
        return cosine if self.bias is None else (cosine * self.scale + self.bias).sigmoid()


class OpenClipEncoder(ImageTextEncoder):
    """A model of open_clip. Longer texts are cut to its context.

    Args:
        name: an architecture, a JSON file that describes one, "local-dir:" and a directory, or "hf-hub:" and a
            repository.
        pretrained: an architecture's weights: their file, or open_clip's name for them.

    Raises:
        ValueError: it cannot be loaded.
    """

    def __init__(self, name: str, pretrained: str | None = None) -> None:
        import open_clip

        try:
            if name.endswith(".json"):
                path = Path(name).expanduser()
                open_clip.add_model_config(path)  # under the file's name
                name = path.stem
            model = open_clip.create_model(name, pretrained, require_pretrained=True, weights_only=True)
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            source = f" with the weights {pretrained!r}" if pretrained else ""
            raise ValueError(f"cannot load {name!r}{source} with open_clip: {sentence(error)}") from error
        super().__init__(model, Preprocess.of_open_clip(model.visual.preprocess_cfg))

    def embed_images(self, pixels: Tensor) -> Tensor:
        """As in `ImageTextEncoder`."""
        model: Any = self.model
        return model.encode_image(pixels)

    def embed_texts(self, texts: list[str], device: torch.device) -> Tensor:
        """As in `ImageTextEncoder`."""
        model: Any = self.model
        return model.encode_text(self.tokenizer(texts).to(device))


class TransformersEncoder(ImageTextEncoder):
    """A CLIP or SigLIP model of transformers. Longer texts are cut to its context.

    Args:
        reference: a directory or a repository of the hub.
        processor: where its tokenizer and image processor are, if elsewhere.

    Raises:
        ValueError: it cannot be loaded, or is another kind of model.
    """

    def __init__(self, reference: str, processor: str | None = None) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipModel

        config = from_transformers(AutoConfig, reference)
        kind = {"clip": CLIPModel, "siglip": SiglipModel}.get(config.model_type)
        if kind is None:
            raise ValueError(f"{reference!r} must be a CLIP or SigLIP model, not {config.model_type}")
        pixels = from_transformers(AutoImageProcessor, processor or reference, backend="pil")
        self.tokenizer = from_transformers(AutoTokenizer, processor or reference)
        self.options = {
            "padding": "max_length" if kind is SiglipModel else True,  # SigLIP attends its padding
            "max_length": config.text_config.max_position_embeddings,
            "truncation": True,
            "return_tensors": "pt",
        }
        super().__init__(from_transformers(kind, reference), Preprocess.of_transformers(pixels))

    def embed_images(self, pixels: Tensor) -> Tensor:
        """As in `ImageTextEncoder`."""
        model: Any = self.model
        return model.get_image_features(pixel_values=pixels).pooler_output

    def embed_texts(self, texts: list[str], device: torch.device) -> Tensor:
        """As in `ImageTextEncoder`."""
        model: Any = self.model
        tokens = self.tokenizer(texts, **self.options)
        names = ("input_ids",) if self.bias is not None else ("input_ids", "attention_mask")
        return model.get_text_features(**{name: tokens[name].to(device) for name in names}).pooler_output


def check_architecture(name: str) -> None:
    """Raise a ``ValueError`` for an architecture that the installed open_clip does not know, or a missing JSON file."""
    if name.endswith(".json"):
        if not Path(name).expanduser().is_file():
            raise ValueError(f"there is no file {name!r}")
        return
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    configs = Path(package.origin).parent / "model_configs"
    if not (configs / f"{name}.json").is_file():
        raise ValueError(f"open_clip has no architecture {name!r}; see open_clip.list_models()")


def check_directory(path: str) -> None:
    """Raise a ``ValueError`` for a directory that has no open_clip model in it."""
    if not (Path(path).expanduser() / CONFIG).is_file():
        raise ValueError(f"the directory {path!r} has no {CONFIG}, with which open_clip's models are saved")

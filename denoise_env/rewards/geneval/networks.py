"""The networks of GenEval: a Mask2Former that finds objects, and a CLIP that names their colours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoise_env.rewards.geneval.rules import CLASSES, COLORS, THRESHOLD, Detection

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, with which all Mask2Formers normalise."""
STRIDE = 32
"""The sides of a picture are padded to a multiple of this."""
ASPECT = 1333 / 800
"""The longest side that a picture is resized to, over the shortest."""
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
"""GenEval's prompts of a class in a colour."""


def load_mask2former(checkpoint: str) -> nn.Module:
    """A Mask2Former for the 80 classes of COCO, from a directory or the hub.

    Its keys are those of transformers' ``Mask2FormerForUniversalSegmentation``; what that has for training is left
    out, as it needs SciPy. Called with normalised images ``[b, 3, H, W]``, it returns the classes' logits
    ``[b, queries, 81]``, "none" last, and the masks' logits ``[b, queries, H/4, W/4]``.

    Raises:
        ValueError: the checkpoint is for other classes.
    """
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerModel, Mask2FormerPreTrainedModel

    class Mask2Former(Mask2FormerPreTrainedModel):
        _keys_to_ignore_on_load_unexpected = (r"^criterion\.",)

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = Mask2FormerModel(config)
            self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            output = self.model(images, output_hidden_states=True)
            queries = output.transformer_decoder_intermediate_states[-1].transpose(0, 1)
            return self.class_predictor(queries), output.masks_queries_logits[-1]

    network = Mask2Former.from_pretrained(checkpoint)
    names = network.config.id2label
    if len(names) != len(CLASSES) or names[0] != CLASSES[0]:
        raise ValueError(f"the detector {checkpoint!r} must know COCO's 80 classes, and knows {list(names.values())}")
    return network


class Mask2FormerDetector(nn.Module):
    """Finds objects and their masks, with the pictures' sizes and the scores of GenEval's detector.

    Args:
        network: as `load_mask2former` returns it.
        resolution: the shortest side that pictures are resized to; the longest is at most `ASPECT` times this.
    """

    def __init__(self, network: nn.Module, resolution: int) -> None:
        super().__init__()
        self.network, self.resolution = network, resolution

    def forward(self, images: Tensor) -> list[list[Detection]]:
        """As in `Detector`."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        sides = images.shape[-2:]
        scale = min(self.resolution / min(sides), self.resolution * ASPECT / max(sides))
        size = [int(side * scale + 0.5) for side in sides]
        inputs = (F.interpolate(images, size, mode="bilinear") - mean) / std
        bottom, right = (-side % STRIDE for side in size)
        inputs = F.pad(inputs, (0, right, 0, bottom))
        found = []
        for classes, masks in zip(*self.network(inputs), strict=True):
            scores, places = classes.softmax(-1)[:, :-1].flatten().topk(len(classes))
            places = places[scores > THRESHOLD]  # a mask only lowers the score
            masks = masks[None, places // len(CLASSES)]
            if masks.numel():
                masks = F.interpolate(masks, inputs.shape[-2:], mode="bilinear")[..., : size[0], : size[1]]
                masks = F.interpolate(masks, sides, mode="bilinear")
            found.append(_detections(masks[0], scores[: len(places)], places % len(CLASSES)))
        return found


def _detections(logits: Tensor, scores: Tensor, classes: Tensor) -> list[Detection]:
    """The detections of n masks' logits ``[n, H, W]``, scores ``[n]`` and classes ``[n]``, above the threshold."""
    masks = logits > 0
    inside = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    found = []
    for mask, score, label in zip(masks, (scores * inside).tolist(), classes.tolist(), strict=True):
        if score > THRESHOLD:
            x, y = (mask.any(axis).nonzero()[[0, -1], 0].tolist() for axis in (0, 1))
            found.append(Detection(CLASSES[label], score, (x[0], y[0], x[1] + 1, y[1] + 1), mask))
    return found


class ClipColors(nn.Module):
    """Names the colour of an object: that whose texts are most like the crop.

    Args:
        checkpoint: a CLIP of transformers, a directory or a name on the hub.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.clip = CLIPModel.from_pretrained(checkpoint)
        self.processor = CLIPImageProcessorPil.from_pretrained(checkpoint)
        self.tokenizer = CLIPTokenizer.from_pretrained(checkpoint)
        self.texts: dict[str, Tensor] = {}

    def forward(self, crops: Sequence[np.ndarray], labels: Sequence[str]) -> list[str]:
        """As in `ColorClassifier`."""
        if not crops:
            return []
        device = self.clip.device
        inputs = self.processor(list(crops), return_tensors="pt", input_data_format="channels_last")
        images = self.clip.get_image_features(inputs["pixel_values"].to(device)).pooler_output
        texts = torch.stack([self._texts(label).to(device) for label in labels])
        best = torch.einsum("nd,ncd->nc", images, texts).argmax(1)
        return [COLORS[i] for i in best.tolist()]

    def _texts(self, label: str) -> Tensor:
        """A normalised vector for each colour of a class ``[10, d]``: the mean of its templates'."""
        if label not in self.texts:
            texts = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.clip.device)
            features = F.normalize(self.clip.get_text_features(**tokens).pooler_output, dim=-1)
            self.texts[label] = F.normalize(features.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)
        return self.texts[label]

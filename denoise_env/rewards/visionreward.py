"""VisionReward's checklists: yes-or-no questions about an image or clip, weighted (arXiv 2412.21059)."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from denoise_env.arguments import number
from denoise_env.prompts import Prompt
from denoise_env.rewards.base import RewardModel

MASKS = {0: [22, 23, 24, 28, 29], 1: [25, 26], 2: [27]}
"""Of the 30 questions on an image: what is asked of a body, a face and hands counts only if the image shows one."""
ALIGNMENT = 'Does this figure show "[[prompt]]"? Please answer yes or no.'
"""VQAScore's question (arXiv 2404.01291)."""
MAX_FRAMES = 24


# --- The rule ---


def image_score(answers: Tensor, alignment: Tensor, weights: Tensor, intercept: float) -> Tensor:
    """The score of images, of 28 weights: of the alignment, then of all questions but the three masks.

    Args:
        answers: ``[B, 30]`` bool, whether each question was answered with yes, which counts 1, and else -1.
        alignment: ``[B]`` in [0, 1].
        weights: ``[28]``.
        intercept: is added.
    """
    values = answers.float() * 2 - 1
    for mask, masked in MASKS.items():
        values[:, masked] *= answers[:, mask, None]
    return torch.cat([alignment[:, None], values[:, len(MASKS) :]], 1) @ weights + intercept


def video_score(answers: Tensor, weights: Tensor) -> Tensor:
    """The score of clips: the mean of the answers, 1 for yes and -1 for no, times their weights.

    Args:
        answers: ``[B, Q]`` bool.
        weights: ``[Q]``.
    """
    return ((answers.float() * 2 - 1) * weights).mean(1)


def seconds(count: int, fps: float) -> list[int]:
    """The frames of a clip that are looked at: the nearest to each full second, up to 24."""
    last = round((count - 1) / fps)
    return [min(range(count), key=lambda i: abs(i / fps - second)) for second in range(last + 1)][:MAX_FRAMES]


# --- Who answers ---


class Answerer(nn.Module):
    """Asks a vision-language model of transformers; the first token of its answer counts.

    Args:
        model: an ``AutoModelForImageTextToText``.
        processor: its ``AutoProcessor``, with a chat template.

    Raises:
        ValueError: the tokenizer begins yes and no with the same token.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        encode = processor.tokenizer.encode
        self.yes, self.no = (
            sorted({encode(word, add_special_tokens=False)[0] for word in words})
            for words in (("yes", "Yes"), ("no", "No"))
        )
        if {*self.yes} & {*self.no}:
            raise ValueError("the model's tokenizer begins yes and no with the same token")

    def readable(self, prompt: str) -> bool:
        """Whether a prompt has none of the tokenizer's special tokens in it."""
        return not any(token in prompt for token in self.processor.tokenizer.get_added_vocab())

    def forward(self, pictures: Tensor, questions: Sequence[str]) -> Tensor:
        """The probability of yes rather than no, in either case of its first letter: ``[b]``.

        Args:
            pictures: b images or clips, ``[b, 3, H, W]`` or ``[b, F, 3, H, W]`` uint8.
            questions: one for each.
        """
        kind = "image" if pictures.ndim == 4 else "video"
        chats = [[{"role": "user", "content": [{"type": kind}, {"type": "text", "text": q}]}] for q in questions]
        text = self.processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        seen: dict[str, Any] = {f"{kind}s": [[picture] for picture in pictures.cpu()]}
        if kind == "video":
            seen["do_sample_frames"] = False
        inputs = self.processor(text=text, **seen, padding=True, padding_side="left", return_tensors="pt")
        weight = next(self.model.parameters())
        inputs = {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        return (logits[:, self.yes].logsumexp(1) - logits[:, self.no].logsumexp(1)).sigmoid()


# --- The rewards ---


class Checklist(RewardModel):
    """What the checklists of images and clips share.

    Their questions and weights are published, and are read from those files. The published answering models are not
    in transformers; any of its vision-language models answers instead, so scores are not the published ones.

    Another answering model is a subclass whose ``load_network`` returns a module with the methods of `Answerer`.

    A row whose prompt has a special token of the tokenizer in it is NaN.
    """

    citation = "VisionReward (arXiv 2412.21059)"

    def __init__(
        self, questions: str, weights: str, model: str, device: str | None, dtype: str, microbatch: int
    ) -> None:
        super().__init__(device, dtype, microbatch)
        self.questions = [line.strip() for line in _read(questions, "questions").splitlines() if line.strip()]
        try:
            self._read_weights(json.loads(_read(weights, "weights")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"cannot use the weights {weights!r} with the {len(self.questions)} questions of {questions!r}: {error}"
            ) from error
        self.model = model

    @abstractmethod
    def _read_weights(self, published: Any) -> None: ...

    def load_network(self) -> nn.Module:
        """As in `RewardModel`."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(self.model, dtype=self.dtype)
        return Answerer(model, AutoProcessor.from_pretrained(self.model))

    def ask(self, pictures: Tensor, prompts: Sequence[Prompt], questions: Sequence[str]) -> Tensor:
        """The probability of yes to each of Q questions, ``[b, Q]``; ``[[prompt]]`` in one stands for the prompt."""
        assert self.network is not None
        pixels = (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
        columns = [self.network(pixels, [q.replace("[[prompt]]", p.text) for p in prompts]) for q in questions]
        return torch.stack(columns, 1)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `RewardModel`."""
        network: Any = self.network
        rows = [i for i, prompt in enumerate(prompts) if network.readable(prompt.text)]
        scores = torch.full((len(images),), torch.nan, device=images.device)
        if rows:
            scores[rows] = self._score(images[rows], [prompts[i] for i in rows]).to(scores)
        return scores

    @abstractmethod
    def _score(self, pictures: Tensor, prompts: Sequence[Prompt]) -> Tensor: ...


class VisionReward(Checklist):
    """VisionReward of images: a weighted checklist, with alignment; higher is better.

    The alignment with the prompt is VQAScore, the probability of yes to its question, by the same answering model
    (published: by clip-flant5-xxl).

    Args:
        questions: file of the 30 questions, one a line (VisionReward_Image/VisionReward_image_qa_select.txt of
            THUDM/VisionReward).
        weights: file of the 28 weights, ``{"coef": [...], "intercept": [...]}`` (weight_select.json beside it).
        model: hub id or folder of the vision-language model that answers.
        device: where it runs; default: where the images are.
        dtype: precision of its weights.
        microbatch: images per call of it, with one question each.

    Raises:
        ValueError: an argument out of its range, or a file that is missing or of another form.
    """

    def __init__(
        self,
        questions: str,
        weights: str,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        device: str | None = None,
        dtype: str = "bf16",
        microbatch: int = 8,
    ) -> None:
        super().__init__(questions, weights, model, device, dtype, microbatch)

    def _read_weights(self, published: Any) -> None:
        self.weights = torch.tensor([number(weight, "a weight") for weight in published["coef"]])
        self.intercept = number(published["intercept"][0], "the intercept")
        if (len(self.questions), len(self.weights)) != (30, 28):
            raise ValueError(f"there must be 30 questions and 28 weights, not {len(self.weights)}")

    def _score(self, pictures: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        yes = self.ask(pictures, prompts, [*self.questions, ALIGNMENT])
        return image_score(yes[:, :-1] > 0.5, yes[:, -1], self.weights.to(yes), self.intercept)


class VisionRewardVideo(Checklist):
    """VisionReward of clips: a weighted checklist; higher is better.

    Args:
        questions: file of the questions, one a line (VisionReward_Video/VisionReward_video_qa_select.txt of
            THUDM/VisionReward, 29 of them).
        weights: file with the list of as many weights (weight.json beside it).
        model: hub id or folder of the vision-language model that answers; it must take videos.
        fps: frames per second of the clips, one of which it looks at, up to 24 in all.
        device: where it runs; default: where the clips are.
        dtype: precision of its weights.
        microbatch: clips per call of it, with one question each.

    Raises:
        ValueError: an argument out of its range, or a file that is missing or of another form.
    """

    takes = "clips"

    def __init__(
        self,
        questions: str,
        weights: str,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        fps: float = 8.0,
        device: str | None = None,
        dtype: str = "bf16",
        microbatch: int = 4,
    ) -> None:
        super().__init__(questions, weights, model, device, dtype, microbatch)
        self.fps = number(fps, "fps", at_least=1e-3)

    def _read_weights(self, published: Any) -> None:
        self.weights = torch.tensor([number(weight, "a weight") for weight in published])
        if not self.questions or len(self.questions) != len(self.weights):
            raise ValueError(f"there must be as many, not {len(self.weights)}")

    def _score(self, pictures: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        yes = self.ask(pictures[:, seconds(pictures.shape[1], self.fps)], prompts, self.questions)
        return video_score(yes > 0.5, self.weights.to(yes))


def _read(file: str, what: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"cannot read the {what} {file!r}: {error}; VisionReward's repository has the file") from error

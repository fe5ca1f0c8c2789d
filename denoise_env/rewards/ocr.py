"""The reward of rendered text: can the text that the prompt puts in quotation marks be read in the picture?"""

import importlib.util
import re
import shutil
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from denoise_env.arguments import boolean
from denoise_env.prompts import Prompt
from denoise_env.rewards.base import Takes, UnavailableError, check_samples, pixels

Read = Callable[[np.ndarray], str]
"""Reads the text in an RGB image, uint8 ``[H, W, 3]``; "" where there is none."""


def paddleocr(language: str, gpu: bool) -> Read:
    """PaddleOCR 2 or 3, without its models for turned or warped pages."""
    from paddleocr import PaddleOCR

    if hasattr(PaddleOCR, "predict"):
        page = ("use_doc_orientation_classify", "use_doc_unwarping", "use_textline_orientation")
        new = PaddleOCR(lang=language, device="gpu" if gpu else "cpu", **dict.fromkeys(page, False))
        return lambda image: "".join(text for result in new.predict(image) for text in result["rec_texts"])
    old = PaddleOCR(lang=language, use_gpu=gpu, use_angle_cls=False, show_log=False)

    def read(image: np.ndarray) -> str:
        lines = old.ocr(image, cls=False)[0] or []
        return "".join(text for _, (text, confidence) in lines if confidence > 0)

    return read


def easyocr(language: str, gpu: bool) -> Read:
    """EasyOCR."""
    import easyocr

    reader = easyocr.Reader([language], gpu=gpu, verbose=False)
    return lambda image: "".join(reader.readtext(image, detail=0))


def tesseract(language: str, gpu: bool) -> Read:
    """Tesseract, which runs on the CPU only."""
    import pytesseract
    from PIL import Image

    code = "eng" if language == "en" else language
    return lambda image: pytesseract.image_to_string(Image.fromarray(image), lang=code)


ENGINES: dict[str, tuple[Callable[[str, bool], Read], list[str], str]] = {
    "paddleocr": (paddleocr, ["paddleocr", "paddle"], "pip install paddleocr paddlepaddle"),
    "easyocr": (easyocr, ["easyocr"], "pip install easyocr"),
    "tesseract": (tesseract, ["pytesseract"], "pip install pytesseract, and the program tesseract itself"),
}
"""Name → what makes the engine, the modules that it imports, and how it is installed."""


class Ocr:
    """How much of the quoted text can be read in the picture, from 0 to 1; higher is better.

    The target is the text between the first two double quotes of the prompt, or the prompt's metadata ``text`` where
    it has this. With the target t and the text r that was read, both in lower case and without spaces, the score is 1
    where r contains t, and otherwise 1 - min(d, len(t)) / len(t), d being the Levenshtein distance of r and t
    (Flow-GRPO, arXiv 2505.05470, and its code).

    A prompt without a target gets NaN, and so does a picture on which the engine fails, which Flow-GRPO gives 0.

    Args:
        engine: "paddleocr", "easyocr" or "tesseract"; "auto" takes the first of these that is installed. Scores of
            different engines do not compare; Flow-GRPO's are those of PaddleOCR 2.
        language: the language's code, as the engine names it. "en" is English for all.
        gpu: whether the engine runs on the GPU, where it can.

    Raises:
        ValueError: the engine is unknown or not installed, or a prompt's metadata ``text`` is not a string.
    """

    takes: Takes = "images"
    range = (0.0, 1.0)
    citation = "Flow-GRPO, arXiv 2505.05470"

    def __init__(self, engine: str = "auto", language: str = "en", gpu: bool = False) -> None:
        if engine not in ("auto", *ENGINES):
            raise ValueError(f"the engine must be 'auto' or one of {list(ENGINES)}, not {engine!r}")
        names = list(ENGINES) if engine == "auto" else [engine]
        installed = [name for name in names if _installed(name)]
        if not installed:
            missing = "an engine that reads text" if engine == "auto" else f"the engine {engine!r}"
            raise ValueError(f"ocr needs {missing}: {'; or '.join(ENGINES[name][2] for name in names)}")
        self.engine, self.language, self.gpu = installed[0], language, boolean(gpu, "gpu")
        self.read: Read | None = None

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `Reward`; warns of pictures on which the engine failed.

        Raises:
            UnavailableError: the engine cannot be started, for instance because its models cannot be downloaded.
        """
        check_samples(images, prompts, self.takes)
        targets = [find_target(prompt) for prompt in prompts]
        scores = torch.full((len(images),), torch.nan)
        failures = []
        for i, (image, target) in enumerate(zip(pixels(images).numpy(), targets, strict=True)):
            if target:
                read = self._start()
                try:
                    scores[i] = text_score(read(image), target)
                except (MemoryError, torch.OutOfMemoryError):
                    raise
                except Exception as error:
                    failures.append(f"{type(error).__name__}: {error}")
        if failures:
            warnings.warn(f"{self.engine} failed on {len(failures)} images, first with {failures[0]}", stacklevel=2)
        return scores.to(images.device)

    def _start(self) -> Read:
        if self.read is None:
            try:
                self.read = ENGINES[self.engine][0](self.language, self.gpu)
            except (Exception, SystemExit) as error:
                raise UnavailableError(f"{self.engine} cannot be started: {type(error).__name__}: {error}") from error
        return self.read

    def elsewhere(self, device: torch.device) -> bool:
        """Whether the model is on another device than the CPU, and the engine on the CPU."""
        return device.type != "cpu" and not self.gpu


def _installed(name: str) -> bool:
    modules = all(importlib.util.find_spec(module) for module in ENGINES[name][1])
    return modules and (name != "tesseract" or shutil.which("tesseract") is not None)


def find_target(prompt: Prompt) -> str:
    """The text that a picture must show, lower case and without spaces; "" where the prompt has none."""
    text = prompt.metadata.get("text")
    if text is None:
        quoted = re.search('"([^"]*)"', prompt.text)
        text = quoted[1] if quoted else ""
    if not isinstance(text, str):
        raise ValueError(f"the metadata 'text' of the prompt {prompt.text!r} must be a string, not {text!r}")
    return _normal(text)


def text_score(read: str, target: str) -> float:
    """The score of `Ocr` for what was read; ``target`` is as `find_target` returns it."""
    read = _normal(read)
    if target in read:
        return 1.0
    return 1 - min(levenshtein(read, target), len(target)) / len(target)


def _normal(text: str) -> str:
    return "".join(text.lower().split())


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of a character that turn ``a`` into ``b``.

    >>> levenshtein("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]

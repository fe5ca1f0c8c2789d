import importlib.machinery
import math
import shutil
import sys
import types

import numpy as np
import pytest
import torch

from denoise_env.mdp import DenoisingMDP
from denoise_env.prompts import Prompt
from denoise_env.rewards import UnavailableError, load_reward, ocr
from denoise_env.rewards.ocr import ENGINES, Ocr

IMAGE = torch.zeros(3, 4, 6)
IMAGE[0, :, :3] = 0.5  # 127.5, rounded to even: 128
MODULES = [module for _, modules, _ in ENGINES.values() for module in modules]


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    """Hides what is installed; a test puts its own modules in the place."""
    find = ocr.importlib.util.find_spec
    hidden = types.SimpleNamespace(find_spec=lambda name: find(name) if name in sys.modules else None)
    monkeypatch.setattr(ocr, "importlib", types.SimpleNamespace(util=hidden))
    monkeypatch.setattr(shutil, "which", lambda program: None)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def install(monkeypatch):
    def put(name, **attributes):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.fixture
def reads(install):
    """Installs an engine that reads the next of some texts in each image; an exception is raised."""

    def engine(*texts):
        left = list(texts)

        class Reader:
            def __init__(self, *_, **__):
                pass

            def readtext(self, image, detail):
                text = left.pop(0)
                if isinstance(text, BaseException):
                    raise text
                return [text]

        install("easyocr", Reader=Reader)
        return left

    return engine


def score(*prompts, reward=None):
    prompts = [Prompt.of(prompt) for prompt in prompts]
    return (reward or load_reward("ocr"))(IMAGE.expand(len(prompts), -1, -1, -1), prompts).tolist()


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        ("Hello World", 1.0),
        ("Helo World", 0.9),
        ("Hello", 0.5),
        ("xxHello Worldyy", 1.0),
        ("HELLO\nworld\t", 1.0),
        ("qqqqqqqqqqqqqqqqqqqqqqqqqqqqqq", 0.0),
        ("", 0.0),
        ("Hello Wrold", 0.8),
        ("HelloXWorld", 0.9),
    ],
)
def test_known_scores(reads, read, expected):
    reads(read)
    assert score('a sign that says "Hello World" in "red"') == [pytest.approx(expected)]


def test_which_text_is_the_target(reads):
    left = reads("abcd", "abcd", "abcd", "abcd")
    found = score(
        'says "abcd"',
        Prompt('says "wxyz"', metadata={"text": "AB cd"}),
        Prompt("no quotes", metadata={"text": "abcx"}),
        'says "" and "abcd"',  # the first pair is empty
        'one " alone',
        "nothing",
        Prompt("nothing", metadata={"text": " "}),
        'two lines "ab\ncx"',
    )
    nan = math.nan
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor([1, 1, 0.75, nan, nan, nan, nan, 0.75]), equal_nan=True
    )
    assert not left, "pictures without a target must not be read"


def test_a_target_that_is_no_string_is_refused(reads):
    reads()
    with pytest.raises(ValueError, match="metadata 'text' of the prompt 'x' must be a string, not 3"):
        score(Prompt("x", metadata={"text": 3}))


def test_a_failure_is_nan_and_told(reads):
    reads("ab", RuntimeError("broken"), "ab", KeyError("k"))
    with pytest.warns(UserWarning, match="easyocr failed on 2 images, first with RuntimeError: broken"):
        found = score(*['"ab"'] * 4)
    torch.testing.assert_close(torch.tensor(found), torch.tensor([1, math.nan, 1, math.nan]), equal_nan=True)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_running_out_of_memory_is_raised(reads, error):
    reads(error())
    with pytest.raises(error):
        score('"ab"')


def test_an_engine_that_does_not_start_is_unavailable(install):
    class Reader:
        def __init__(self, *_, **__):
            raise OSError("no network")

    install("easyocr", Reader=Reader)
    reward = load_reward("ocr")  # starts nothing yet
    assert math.isnan(score("no target", reward=reward)[0])
    with pytest.raises(UnavailableError, match="easyocr cannot be started: OSError: no network"):
        score('"ab"', reward=reward)


# --- Engines: modules with the signatures and results of the real ones ---


def check_image(image):
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8
    assert image[0, 0].tolist() == [128, 0, 0], "RGB"


class Paddle2:
    """PaddleOCR 2: a list for each image, ``None`` where it has no text; a line is [box, (text, confidence)]."""

    made = 0

    def __init__(self, use_angle_cls, lang, use_gpu, show_log):
        Paddle2.made += 1
        assert (use_angle_cls, lang, use_gpu, show_log) == (False, "en", False, False)
        box = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
        lines = [[box, ("Hello", 0.99)], [box, ("noise", 0.0)], [box, ("World", 0.5)]]
        self.results = [[lines], [None], [[]]]

    def ocr(self, img, det=True, rec=True, cls=True):
        check_image(img)
        assert cls is False
        return self.results.pop(0)


class Paddle3:
    """PaddleOCR 3: a result for each image, a mapping whose ``rec_texts`` are the lines."""

    def __init__(
        self, lang=None, use_doc_orientation_classify=None, use_doc_unwarping=None, use_textline_orientation=None,
        device=None,
    ):  # fmt: skip
        assert use_doc_orientation_classify is use_doc_unwarping is use_textline_orientation is False
        self.lines = [["Hello", "World"], [], []] if (lang, device) == ("en", "cpu") else [[lang], [device]]

    def predict(self, input):
        check_image(input)
        return [{"rec_texts": self.lines.pop(0), "rec_scores": []}]

    def ocr(self, img, **_):
        raise AssertionError("deprecated in 3")


def test_paddleocr_2(install):
    install("paddleocr", PaddleOCR=Paddle2)
    install("paddle")
    install("easyocr")
    reward, before = load_reward("ocr"), Paddle2.made
    assert score(*['"Hello World"'] * 3, reward=reward) == [1, 0, 0]
    assert (reward.engine, Paddle2.made - before) == ("paddleocr", 1)


def test_paddleocr_3(install):
    install("paddleocr", PaddleOCR=Paddle3)
    install("paddle")
    assert score(*['"Hello World"'] * 3) == [1, 0, 0]
    assert score('"french"', '"gpu"', reward=Ocr("paddleocr", language="french", gpu=True)) == [1, 1]


def test_easyocr(install):
    class Reader:
        def __init__(self, lang_list, gpu=True, verbose=True):
            self.said = [*lang_list, gpu, verbose]

        def readtext(self, image, detail=1):
            check_image(image)
            assert detail == 0
            return ["Hello", "World"] if self.said == ["en", False, False] else list(map(str, self.said))

    install("easyocr", Reader=Reader)
    assert score('"Hello World"') == [1]
    assert score('"deTrueFalse"', reward=load_reward("ocr(language='de', gpu=True)")) == [1]


def test_tesseract(install, monkeypatch):
    def image_to_string(image, lang=None):
        check_image(np.asarray(image))
        return f"Hello\nWorld\n\n{lang}\x0c"

    install("pytesseract", image_to_string=image_to_string)
    with pytest.raises(ValueError, match="the program tesseract itself"):
        load_reward("ocr(engine='tesseract')")
    monkeypatch.setattr(shutil, "which", {"tesseract": "/usr/bin/tesseract"}.get)
    assert score('"Hello World eng"') == [1]
    assert score('"Worlddeu"', reward=Ocr("tesseract", language="deu")) == [1]


def test_nothing_installed():
    with pytest.raises(
        ValueError, match=r"ocr needs an engine that reads text: pip install paddleocr paddlepaddle; or"
    ):
        load_reward("ocr")
    with pytest.raises(ValueError, match=r"ocr needs the engine 'easyocr': pip install easyocr$"):
        load_reward("ocr(engine='easyocr')")
    with pytest.raises(ValueError, match=r"must be 'auto' or one of \['paddleocr', 'easyocr', 'tesseract'\]"):
        load_reward("ocr('magic')")


def test_paddleocr_without_paddle_is_not_installed(install):
    install("paddleocr", PaddleOCR=Paddle2)
    with pytest.raises(ValueError, match="pip install paddleocr paddlepaddle"):
        load_reward("ocr")


def test_it_computes_elsewhere_where_the_model_is_on_a_gpu(reads):
    reads()
    assert [Ocr().elsewhere(torch.device(name)) for name in ("cpu", "cuda")] == [False, True]
    assert not Ocr(gpu=True).elsewhere(torch.device("cuda"))


def test_rows_without_a_target_are_invalid_in_an_environment(reads):
    reads("ab")
    mdp = DenoisingMDP.make("shapes", rewards="ocr", prompts=["a red circle", 'says "ab"'], num_steps=2)
    scores = mdp.score(torch.zeros(2, *mdp.model.latent_shape), torch.tensor([0, 1]))
    assert scores.valid.tolist() == [False, True]
    assert scores.total[1] == 1

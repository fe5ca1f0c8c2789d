import re
import sys
import types

import pytest
import torch

from denoise_env.prompts import Prompt
from denoise_env.rewards import NAMES, load_reward
from denoise_env.rewards.expressions import own_code, strings

PROMPTS = [Prompt("a"), Prompt("b")]
IMAGES = torch.tensor([0.25, 0.75])[:, None, None, None].expand(2, 3, 4, 4)


class Level:
    """Mean brightness, times a factor."""

    takes = "images"
    range = (0.0, 1.0)
    citation = "Somebody 2026"

    def __init__(self, factor=1.0, *, names=(), quiet=False):
        self.factor, self.names, self.quiet = factor, names, quiet

    def __call__(self, images, prompts):
        return self.factor * images.mean((1, 2, 3))


def made(text):
    return lambda images, prompts: torch.full((len(images),), float(len(text)))


@pytest.fixture(autouse=True)
def own(monkeypatch):
    module = types.ModuleType("mine.deep")
    module.Level, module.made, module.three = Level, made, 3
    module.bright = lambda images, prompts: images.mean((1, 2, 3))
    monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))
    monkeypatch.setitem(sys.modules, "mine.deep", module)


def score(expression):
    return load_reward(expression)(IMAGES, PROMPTS).tolist()


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("mine.deep:bright", [0.25, 0.75]),
        ("mine.deep:Level", [0.25, 0.75]),
        ("mine.deep:Level()", [0.25, 0.75]),
        (" mine.deep:Level( -2e0 ) ", [-0.5, -1.5]),
        ("mine.deep:Level(factor=4)", [1, 3]),
        ("mine.deep:Level(names=['x', \"y\"], quiet=True)", [0.25, 0.75]),
        ("mine.deep:made('threshold(')", [10, 10]),
        ("threshold(mine.deep:bright, 0.25)", [0, 1]),
        ("threshold(above=0.5,reward=mine.deep:Level(2))", [0, 1]),
        ("scale(threshold(mine.deep:bright, 0.5), 3, -1)", [-1, 2]),
        ("weighted_sum([mine.deep:bright, mine.deep:Level(2)], [1, -0.5])", [0, 0]),
        ("clip(mine.deep:bright, 0.3, 0.5)", [pytest.approx(0.3), 0.5]),
    ],
)
def test_what_an_expression_stands_for(expression, expected):
    assert score(expression) == expected


def test_arguments_arrive_as_they_are_written():
    reward = load_reward("mine.deep:Level(0.5, names=['a:b', 'c=d', (1, -2)], quiet=None)")
    assert (reward.factor, reward.names, reward.quiet) == (0.5, ["a:b", "c=d", [1, -2]], None)


def test_names_with_dashes_are_names():
    assert "shapes-correct" in NAMES
    reward = load_reward("threshold(shapes-correct, 0.5)")
    assert type(reward.rewards[0]).__name__ == "ShapesCorrect"


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("treshold(mine.deep:bright, 0.5)", "unknown reward 'treshold'; did you mean 'threshold'?"),
        ("threshold(briht, 0.5)", "unknown reward 'briht'; there are ["),
        ("threshold(mine.deep:bright", "cannot read the reward 'threshold(mine.deep:bright'"),
        ("0.5 * mine.deep:bright", "cannot load the reward '0.5 * mine.deep:bright'"),
        ("mine.deep:bright + mine.deep:Level()", "must be a name, module:attribute, or one of these with arguments"),
        ("threshold(mine.deep:bright + 1, 0.5)", "numbers, strings, True, False, None and lists of them, not"),
        ("threshold(mine.deep:bright, 0.5)(3)", "numbers, strings, True, False, None and lists of them, not"),
        ("threshold(lambda: 0, 0.5)", "cannot read the reward"),
        ("mine.deep:Level(**{})", "must be written out, without stars"),
        ("mine.deep:Level(*[1])", "must be written out, without stars"),
        ("mine.deep:Level(1, 2)", "too many positional arguments; it is mine.deep:Level(factor=1.0, *, names=()"),
        ("mine.deep:Level(gain=2)", "got an unexpected keyword argument 'gain'; it is mine.deep:Level(factor=1.0"),
        ("threshold", "missing a required argument: 'reward'; it is threshold(reward, above)"),
        ("mine.deep:three(1)", "takes no arguments: it is int"),
        ("threshold(mine.deep:bright, 'high')", "the threshold must be a finite number, not 'high'"),
        ("threshold(0.3, 0.5)", "Threshold takes rewards, not 0.3"),
        ("threshold(mine.deep:bright, above=)", "cannot read the reward"),
        ("threshold(mine.deep:bright, 1e999)", "the threshold must be a finite number, not inf"),
        ("'mine.deep:bright'", "cannot load the reward"),
        ("(3)", "this is no call"),
        ("3", "unknown reward '3'"),
        ("(" * 400, "cannot read the reward"),
        ("  ", "unknown reward '  '"),
        ("mine.deep:Level(\n", "cannot read the reward"),
    ],
)
def test_what_is_refused(expression, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_reward(expression)


def test_nothing_but_calls_is_evaluated(monkeypatch, tmp_path):
    ran = tmp_path / "ran"
    for attack in (
        f"threshold(__import__('os').system('touch {ran}'), 1)",
        f"threshold((lambda: open({str(ran)!r}, 'w'))(), 1)",
        f"mine.deep:made.__globals__(open({str(ran)!r}, 'w'))",
        f"builtins:open({str(ran)!r}, 'w').write('x')",
        f"[threshold for threshold in [open({str(ran)!r}, 'w')]]",
        f"mine.deep:Level(f'{{open({str(ran)!r}, \"w\")}}')",
    ):
        with pytest.raises(ValueError, match="reward"):
            load_reward(attack)
        assert not ran.exists(), attack


def test_what_an_expression_would_import_and_read():
    expression = "weighted_sum([my.own:reward, hps(checkpoint='/a/b:c.pt'), other:thing(\"x\", key='y')], [1, 2, 3])"
    assert own_code(expression) == ["my.own:reward", "other:thing"]
    assert strings(expression) == ["/a/b:c.pt", "x", "y"]
    assert own_code("shapes") == strings("shapes") == []

import html
import json
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_runs import run, small

from agents.training.pictures import grid
from agents.training.report import MOST_LOOKS, headline, write_report

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import browser

WORDS = ["</script><b>bold</b>", "50 % of $x_1$ & $\\frac$", "קופסה אדומה (red)", "a 🟥 box", "", "'\"` {x} <!-- \\"]


def invented(directory, words=WORDS, looks=(0, 50, 100), metrics=None):
    """A finished run's files, of invented figures."""
    directory.mkdir()
    name = words[0] if words else "r"
    for at in looks:
        grid(
            torch.full((len(words) * 2, 32, 32, 3), at % 256, dtype=torch.uint8), 2, directory / f"samples/{at:06d}.png"
        )
    (directory / "samples" / "prompts.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    agent = {"name": f"own:{name}", "group_size": 4}
    config = {"agent": agent, "model": {"name": name}, "seed": 0, "iterations": 100, "prompts_per_iteration": 2}
    (directory / "config.json").write_text(json.dumps({**config, "prompts": words[-1]}))
    (directory / "versions.json").write_text(json.dumps({"command": f"denoise-env train --model '{name}'"}))
    quoted = '"' + name.replace('"', '""') + '"'
    columns = {"reward": [0.1, 0.2], "seconds": [1, 1], "loss": [0.3, 0.1], "clip_fraction": [0, 0], **(metrics or {})}
    head = ["iteration", *columns, quoted.replace('"', '"reward/', 1)]
    rows = [[i + 1, *(column[i] for column in columns.values()), 0.2 + i] for i in range(2)]
    (directory / "metrics.csv").write_text("\n".join(",".join(map(str, row)) for row in [head, *rows]) + "\n", "utf-8")
    ends = ["", "_low", "_high", "_prompts_low", "_prompts_high"]
    head = ["iteration", *(f"{quoted[:-1]}{end}" + '"' for end in ends), "diversity", "kl", "images", "unscored"]
    rows = [[i, 0.5, 0.4, 0.6, 0.3, 0.7, 0.2 - i / 1000, "nan", 8, 0] for i in (0, 100)]
    (directory / "eval.csv").write_text("\n".join(",".join(map(str, row)) for row in [head, *rows]) + "\n", "utf-8")
    return directory


def titles(page):
    return [html.unescape(title) for title in re.findall(r'<figure><h3 dir="auto">(.*?)</h3>', page)]


def test_the_headline_is_the_first_and_the_last_evaluation():
    rows = [
        {"iteration": i, "a": i / 10, "a_low": 0.0, "a_high": 1.0, "images": 4.0, "unscored": 0.0} for i in (0, 5, 9)
    ]
    assert headline(rows) == [("a", rows[0], rows[2])]


def test_a_single_prompt_has_no_interval_over_prompts(tmp_path):
    (tmp_path / "one.txt").write_text("ring")
    config = small(iterations=1, eval_prompts=str(tmp_path / "one.txt"))
    page = (run(config, tmp_path / "run") / "report.html").read_text()
    assert "over images: [" in page
    assert "over prompts: [" not in page
    assert "nan" not in page.split("<h2>")[1]


def test_one_image_a_prompt_has_no_interval_over_images(tmp_path):
    directory = invented(tmp_path / "run", words=["ring"])
    table = directory / "eval.csv"
    table.write_text(table.read_text().replace(",0.4,0.6,", ",nan,nan,"))
    page = write_report(directory).read_text(encoding="utf-8")
    assert "over images: [–, –] → [–, –]" in page
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", page, re.S))


def test_a_run_shows_its_curves_and_a_scatter_of_its_prompts(tmp_path):
    options = {"iterations": 4, "eval_every": 2, "sample_every": 2, "eval_kl": True, "num_steps": 3}
    directory = run(small(**options), tmp_path / "run")
    page = (directory / "report.html").read_text()
    shown = titles(page)
    assert shown[:3] == ["points", "evaluation: diversity", "evaluation: kl"]
    assert {"training: grad_norm", "training: kl_reference"} <= set(shown)
    assert "training: clip_fraction" not in shown  # one update per rollout: no ratio leaves the clip
    assert "clip_fraction 0" in page
    labels = re.findall(r"rotate\(-90\)[^>]*>(.*?)<", page)
    assert len(labels) == len(shown) == page.count(">iteration</text>")
    assert labels[:3] == ["reward", "std", "nats a trajectory"]
    assert [path.name for path in sorted((directory / "samples").glob("*.png"))] == [f"{i:06d}.png" for i in (0, 2, 4)]
    assert page.count("<img ") == 6 * 4  # six mixtures: before, and three behind the slider
    assert Image.open(directory / "samples" / "000000.png").size == (160, 6 * 161 - 1)


def test_the_page_stands_alone_and_takes_no_word_for_markup(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = write_report(invented(tmp_path / "run <i>&amp;")).read_text(encoding="utf-8")
    assert re.findall(r"<(?:script|link|img)[^>]*?(?:src|href)=\"(?!data:)", page) == []
    for word in filter(None, WORDS):
        assert f'<figcaption dir="auto">{html.escape(word)}</figcaption>' in page
        assert html.escape(word) == word or word not in page
    assert "(the empty prompt)" in page
    assert page.count("<script>") == page.count("</script>") == 1
    assert "run &lt;i&gt;&amp;amp;" in page


def test_a_long_runs_page_holds_some_of_its_pictures(tmp_path):
    page = write_report(invented(tmp_path / "run", ["a", "b"], [*range(0, 100, 10), 1_000_000, 9_999_999])).read_text()
    assert page.count('class="look"') == 1 + MOST_LOOKS
    (tmp_path / "run" / "samples" / "notes.png").write_bytes(b"not ours")
    grid(torch.zeros(4, 32, 32, 3, dtype=torch.uint8), 2, tmp_path / "run" / "samples" / "10000000.png")
    page = write_report(tmp_path / "run").read_text()
    shown = [int(i) for i in re.findall(r'class="look"><h3>iteration (\d+)<', page)]
    assert shown[:2] == [0, 0]
    assert shown[-1] == 10_000_000
    assert len(shown) == 1 + MOST_LOOKS
    assert f"{MOST_LOOKS} of 13 pictures" in page


def test_a_measured_kl_of_nothing_and_a_flat_zero_are_no_panels(tmp_path):
    page = write_report(invented(tmp_path / "run", ["a"], metrics={"q": [0.5, 0.5], "margin": [0.5, 0.6]})).read_text()
    assert titles(page) == ["a", "evaluation: diversity", "training: loss", "training: margin"]
    assert "The same in every iteration: <bdi>clip_fraction 0, q 0.5</bdi>" in page


needs_browser = pytest.mark.skipif(not browser.find() and not os.environ.get("CI"), reason="no Chromium here")


@needs_browser
def test_the_page_in_a_browser(tmp_path):
    page = write_report(invented(tmp_path / "run")).as_uri()
    visible = "[...document.querySelectorAll('.after .look')].filter(l => l.offsetHeight).map(l => l.innerText)"
    with browser.Browser(browser.find(), tmp_path / "profile", size=(1280, 900)) as tab:
        tab.open(page)
        assert [text.split("\n")[0] for text in tab.run(visible)] == ["iteration 100"]
        tab.run("document.querySelector('.slide input').focus()")
        tab.run(
            "(() => { const s = document.querySelector('.slide input'); s.value = 1;"
            "s.dispatchEvent(new Event('input', {bubbles: true})) })()"
        )
        assert [text.split("\n")[0] for text in tab.run(visible)] == ["iteration 50"]
        assert WORDS[0] in tab.run("document.querySelector('.look').innerText")
        assert tab.run("document.querySelectorAll('b').length") == 2  # the model's name and the card's figures
        captions = "[...document.querySelectorAll('.pair > :first-child figcaption')]"
        directions = captions + ".map(c => getComputedStyle(c).direction)"
        assert tab.run(directions) == ["rtl" if "(red)" in word else "ltr" for word in WORDS]
        assert tab.run("document.documentElement.scrollWidth") <= 1280
        tab.media("print")
        assert tab.run("getComputedStyle(document.querySelector('.slide')).display") == "none"
        assert [text.split("\n")[0] for text in tab.run(visible)] == ["iteration 50"]  # the one that was chosen
        tab.media("screen")
        tab.resize(400, 800)
        assert tab.run("document.documentElement.scrollWidth") <= 400
        assert tab.errors == []
        assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []


def test_a_page_escapes_everything_that_a_run_can_hold(tmp_path):
    """Names, settings, prompts and whatever else somebody has put into the files of a run that is handed on."""
    evil = "<script>alert(1)</script>"
    (tmp_path / "prompts.txt").write_text("ring\nline\n")
    directory = run(small(iterations=1), tmp_path / '"><img src=x onerror=alert(1)>')
    config = json.loads((directory / "config.json").read_text())
    config = {name: value if name in NUMBERS else spoilt(value, evil) for name, value in config.items()} | {evil: evil}
    config["agent"]["group_size"] = 4
    (directory / "config.json").write_text(json.dumps(config))
    about = json.loads((directory / "versions.json").read_text())
    (directory / "versions.json").write_text(json.dumps(spoilt(about, evil) | {evil: evil}))
    (directory / "samples" / "prompts.txt").write_text(f"{evil}\n" * 6)
    for name in ("metrics.csv", "eval.csv"):
        table = (directory / name).read_text()
        (directory / name).write_text(table.replace("points", evil).replace("reward,", f"{evil},reward,"))
    for row in (directory / "metrics.csv").read_text().splitlines()[1:]:
        (directory / "metrics.csv").write_text(
            (directory / "metrics.csv").read_text().replace(row, row.replace(",", ",0.5,", 1))
        )
    page = write_report(directory).read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert html.escape(evil) in page


NUMBERS = ("iterations", "prompts_per_iteration")


def spoilt(value, text):
    """A JSON value with a text in the place of all that it holds, except for a mapping's own names."""
    if isinstance(value, dict):
        return {name: spoilt(item, text) for name, item in value.items()}
    return text

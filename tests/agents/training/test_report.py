import html
import json

from small_runs import run, small

from agents.training.report import headline, write_report


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

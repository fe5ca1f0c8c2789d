from small_runs import run, small

from agents.training.report import headline


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

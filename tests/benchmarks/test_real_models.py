import pytest

from agents.training.presets.published import PUBLISHED
from benchmarks.real_models import BEGIN, END, MAIN, PAGE, page_row


def page_lines():
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()[2:]


def test_the_page_has_a_line_for_every_model_and_choice_of_trained_weights():
    named = [line.split(" | ")[0].removeprefix("| ") for line in page_lines()]
    kinds = {(preset.family, "lora_rank" in preset.model_options) for preset in PUBLISHED.values()}
    assert {(PUBLISHED[name].family, "lora_rank" in PUBLISHED[name].model_options) for name in named} == kinds
    assert set(MAIN) == set(named)


@pytest.mark.slow
def test_a_line_of_the_page_is_what_the_code_computes(tmp_path):
    assert page_row("ddpo-is", tmp_path).strip() in page_lines()

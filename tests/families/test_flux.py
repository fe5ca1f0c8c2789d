"""FLUX.1: what is its own beside the contract of all families."""

import warnings

import pytest

from denoise_env.prompts import Prompt

NAME = "flux"


def test_guidance_of_a_network_that_is_not_told_has_no_effect_and_that_is_said(load):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load(NAME, "schnell").guidance_scale is None
        assert load(NAME).guidance_scale == 3.5
    with pytest.warns(UserWarning, match="not distilled to be guided: guidance_scale=2.5 has no effect"):
        assert load(NAME, "schnell", guidance_scale=2.5).guidance_scale is None


def test_a_negative_text_without_classifier_free_guidance_is_refused(load):
    prompt = Prompt("a red circle", negative="blurry")
    with pytest.raises(ValueError, match=r"guidance is embedded in the network.* 'blurry' out, or set true_cfg_scale"):
        load(NAME).check_prompt(prompt)
    load(NAME, "dev, true guidance").check_prompt(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0"),
        ({"true_cfg_scale": 0.5}, "true_cfg_scale must be at least 1"),
        ({"max_sequence_length": 513}, "max_sequence_length must be at most 512"),
        ({"schedule": "karras"}, "schedule must be one of"),
        ({"shift": 0.0}, "shift must be positive"),
    ],
)
def test_bad_options_are_refused(load, options, message):
    with pytest.raises(ValueError, match=message):
        load(NAME, **options)

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from denoise_env.shapes import HELD_OUT, TRAIN, WEIGHTS, render
from denoise_env.shapes.pretrain import main, sample, share_right


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)


def test_shipped_weights_are_small():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 8e6


def test_shipped_pipeline_is_consistent(pipe):
    assert isinstance(pipe.tokenizer, CLIPTokenizer)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.text_encoder.config.eos_token_id == pipe.tokenizer.eos_token_id
    assert pipe.text_encoder.config.bos_token_id == pipe.tokenizer.bos_token_id
    assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}


def test_shipped_scheduler_is_stable_diffusions(pipe):
    expected = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    assert {key: pipe.scheduler.config[key] for key in expected} == expected


def test_latents_are_standardised_and_decode_back(pipe, generator):
    pictures = render(HELD_OUT * 4, generator) * 2 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pictures).latent_dist.mean
        decoded = pipe.vae.decode(latents).sample
    assert latents.shape == (48, 4, 8, 8)
    assert (latents.std() * pipe.vae.config.scaling_factor).item() == pytest.approx(1, abs=0.15)
    assert (decoded - pictures).square().mean() < 0.01


def test_shipped_weights_leave_room_to_learn(pipe, generator):
    shares = share_right(pipe, HELD_OUT, 120, generator)
    assert 0.5 < shares["all"] < 0.85
    assert 0.3 < shares["score"] < shares["all"]


def test_samples_of_one_prompt_differ(pipe, generator):
    images = sample(pipe, [TRAIN[0]] * 8, generator)
    assert images.shape == (8, 3, 32, 32)
    assert torch.pdist(images.flatten(1)).min() > 1


def test_the_caption_matters(pipe, verifier, generator):
    right = share_right(pipe, TRAIN, 60, generator)["colour"]
    empty = sample(pipe, [""] * 60, generator)
    assert right > 0.7 > 0.4 > verifier.correct(empty, TRAIN)["colour"].float().mean()


def test_a_tiny_run_writes_a_loadable_pipeline(tmp_path, capsys):
    main(
        [
            "--out",
            str(tmp_path),
            "--vae-steps",
            "12",
            "--steps",
            "12",
            "--batch-size",
            "8",
            "--pictures",
            "60",
            "--eval-images",
            "12",
            "--seed",
            "3",
        ]
    )
    assert "held out, 12 samples" in capsys.readouterr().out
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert sample(pipe, ["a red circle on gray", "zebra"], torch.Generator().manual_seed(0)).isfinite().all()
    assert (tmp_path / "tokenizer" / "vocab.json").is_file()
    assert (tmp_path / "tokenizer" / "merges.txt").is_file()


def test_runs_with_one_seed_agree(tmp_path):
    args = ["--vae-steps", "3", "--steps", "3", "--batch-size", "4", "--pictures", "20", "--eval-images", "0"]
    for name in ("first", "second"):
        main(["--out", str(tmp_path / name), *args])
    first, second = (
        {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.safetensors")}
        for name in ("first", "second")
    )
    assert len(first) == 3
    assert first == second

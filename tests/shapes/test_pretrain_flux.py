import pytest
import torch
from diffusers import FluxPipeline

from denoise_env.models.flow_match import pack
from denoise_env.shapes.compositions import HELD_OUT, TRAIN
from denoise_env.shapes.compositions.grammar import PRETRAIN
from denoise_env.shapes.pretrain_flux import SOURCE, Flow, Texts, build_pipeline, main, sample, train_texts

TINY = ["--text-steps", "2", "--vae-steps", "3", "--steps", "3", "--distill-steps", "2"]
TINY += ["--batch-size", "4", "--pictures", "20"]


def test_no_held_out_caption_is_drawn():
    assert not set(SOURCE.captions) & set(HELD_OUT)
    assert set(SOURCE.captions) == set(PRETRAIN)


def test_a_tiny_run_writes_a_loadable_pipeline(tmp_path, capsys):
    main(["--out", str(tmp_path), *TINY, "--eval-images", "12", "--seed", "3"])
    assert "held out, guidance 3.5, 12 samples" in capsys.readouterr().out
    pipe = FluxPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert sample(pipe, ["two red circles on gray", "zebra"], torch.Generator().manual_seed(0)).isfinite().all()
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 8e6


def test_runs_with_one_seed_agree(tmp_path):
    for name in ("first", "second"):
        main(["--out", str(tmp_path / name), *TINY, "--eval-images", "0"])
    first, second = (
        {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.safetensors")}
        for name in ("first", "second")
    )
    assert len(first) == 4
    assert first == second


@pytest.mark.slow
def test_the_text_encoders_learn_to_tell_all_that_a_caption_says(generator):
    assert train_texts(build_pipeline(), 400, generator) > 0.9


@torch.no_grad()
def test_the_network_is_trained_as_the_plain_pipeline_calls_it():
    """One Euler step of the pipeline over the whole way is the noise less the velocity that is trained."""
    pipe = build_pipeline()
    pipe.set_progress_bar_config(disable=True)
    captions = [TRAIN[0], TRAIN[-1]]
    noise = pack(torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)))
    flow, texts = Flow(pipe.transformer), Texts(pipe)(captions)
    velocity = flow(noise, torch.ones(2), texts, torch.full((2,), 2.5))
    found = pipe(
        captions,
        height=32,
        width=32,
        num_inference_steps=1,
        guidance_scale=2.5,
        max_sequence_length=16,
        latents=noise,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, noise - velocity, rtol=0, atol=1e-5)
    assert (velocity - flow(noise, torch.ones(2), texts, torch.ones(2))).abs().max() > 1e-6
    assert pytest.approx(1.0) == pipe.scheduler.config.shift

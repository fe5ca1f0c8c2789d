import pytest
import torch
from diffusers import HunyuanSkyreelsImageToVideoPipeline
from test_pretrain_video import TINY

from denoise_env.shapes.motion import FRAMES, TRAIN, render
from denoise_env.shapes.pretrain_i2v import build_pipeline, encode_clips, main, sample
from denoise_env.shapes.pretrain_video import LATENTS, TOKENS, Flow, read_captions


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    pipe = build_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_the_network_is_trained_as_the_plain_pipeline_calls_it(pipe):
    """One Euler step of the pipeline over the whole way is the noise less the velocity that is trained."""
    captions = [TRAIN[0], TRAIN[1]]
    frames = render(captions, torch.Generator().manual_seed(0), frames=1)[:, 0]
    noise = torch.randn(2, LATENTS, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    size = {"height": 32, "width": 32, "num_frames": FRAMES, "num_inference_steps": 1, "output_type": "latent"}
    generator = torch.Generator().manual_seed(1)
    found = pipe(frames, captions, max_sequence_length=TOKENS, latents=noise, generator=generator, **size).frames
    generator.manual_seed(1)
    firsts = [pipe.vae.encode(frame[None, :, None] * 2 - 1).latent_dist.sample(generator) for frame in frames]
    given = torch.cat(firsts) * pipe.vae.config.scaling_factor
    velocity = Flow(pipe.transformer)(noise, torch.ones(2), (*read_captions(pipe, captions), given), torch.ones(2))
    torch.testing.assert_close(found, noise - velocity, rtol=0, atol=1e-5)
    other = Flow(pipe.transformer)(noise, torch.ones(2), (*read_captions(pipe, captions), given.flip(0)), torch.ones(2))
    assert (velocity - other).abs().max() > 1e-6


def test_first_frames_are_encoded_alone(pipe):
    latents, places, firsts = encode_clips(pipe, 4, torch.Generator().manual_seed(0))
    assert (latents.shape, places.shape, firsts.shape) == ((4, LATENTS, 3, 8, 8), (4,), (4, LATENTS, 1, 8, 8))
    clips = render(
        [TRAIN[i] for i in places], torch.Generator(), frames=1
    )  # other places of the objects, the same colours
    alone = pipe.vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    assert (firsts - alone).abs().mean() < (firsts - alone.flip(0)).abs().mean()


@pytest.mark.slow
def test_a_tiny_run_writes_a_loadable_pipeline(tmp_path, capsys):
    main(["--out", str(tmp_path), *TINY, "--eval-clips", "4", "--seed", "3"])
    assert "first frame" in capsys.readouterr().out.splitlines()[-1]
    pipe = HunyuanSkyreelsImageToVideoPipeline.from_pretrained(tmp_path, local_files_only=True)
    captions = ["a red circle growing on gray", "zebra"]
    assert sample(pipe, captions, torch.rand(2, 3, 32, 32), torch.Generator().manual_seed(0)).isfinite().all()
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 8e6

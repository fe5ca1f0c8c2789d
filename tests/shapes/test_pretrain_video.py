import pytest
import torch
from diffusers import AutoencoderKL, HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from denoise_env.shapes.motion import ALL, FRAMES, HELD_OUT, TRAIN
from denoise_env.shapes.pretrain_video import (
    CLOSE_UPS,
    LATENTS,
    SOURCE,
    STILLS,
    TOKENS,
    Flow,
    build_pipeline,
    main,
    read_captions,
    sample,
)
from denoise_env.shapes.pretraining import FlowConfig, Source, train_flow, train_vae

TINY = [
    "--text-steps",
    "2",
    "--vae-steps-stills",
    "1",
    "--vae-steps",
    "2",
    "--vae-steps-whole",
    "1",
    "--steps",
    "2",
    "--distill-steps",
    "1",
]
TINY += ["--batch-size", "4", "--clips", "8"]


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    pipe = build_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_templates_start_is_what_the_pipeline_crops(pipe):
    start, _ = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
    assert len(pipe.tokenizer(start).input_ids) == DEFAULT_PROMPT_TEMPLATE["crop_start"]


@torch.no_grad()
def test_the_network_reads_every_word_of_a_caption(pipe):
    longest = max(ALL, key=lambda text: len(text.split()))
    tokens, pooled, mask = read_captions(pipe, [longest, TRAIN[0], ""])
    assert (tokens.shape, pooled.shape) == ((3, TOKENS, 64), (3, 64))
    assert mask.sum(1).tolist() == [len(longest.split()) + 1, len(TRAIN[0].split()) + 1, 1]
    alone = read_captions(pipe, [TRAIN[0]])
    torch.testing.assert_close(tokens[1][mask[1] > 0], alone[0][0][mask[1] > 0])
    torch.testing.assert_close(pooled[1], alone[1][0])


def test_no_held_out_caption_is_drawn():
    assert set(SOURCE.captions) == set(CLOSE_UPS.captions) == set(TRAIN)
    assert not set(SOURCE.captions) & set(HELD_OUT)


@pytest.mark.parametrize(("source", "frames"), [(CLOSE_UPS, FRAMES), (STILLS, 1)])
def test_close_ups_show_the_object(source, frames):
    clips, _ = source.draw(64, torch.Generator().manual_seed(0))
    assert clips.shape == (64, 3, frames, 16, 16)
    assert (clips.amax((2, 3, 4)) - clips.amin((2, 3, 4))).amax(1).min() > 0.3


@torch.no_grad()
def test_the_network_is_trained_as_the_plain_pipeline_calls_it(pipe):
    """One Euler step of the pipeline over the whole way is the noise less the velocity that is trained."""
    captions = [TRAIN[0], "zebra"]
    noise = torch.randn(2, LATENTS, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    flow, texts = Flow(pipe.transformer), read_captions(pipe, captions)
    velocity = flow(noise, torch.ones(2), texts, torch.full((2,), 2.5))
    settings = {"height": 32, "width": 32, "num_frames": FRAMES, "num_inference_steps": 1, "output_type": "latent"}
    found = pipe(captions, guidance_scale=2.5, max_sequence_length=TOKENS, latents=noise, **settings).frames
    torch.testing.assert_close(found, noise - velocity, rtol=0, atol=1e-5)
    assert (velocity - flow(noise, torch.ones(2), texts, torch.ones(2))).abs().max() > 1e-6


def test_a_stopped_autoencoder_goes_on_as_if_it_had_not(tmp_path):
    """The file is of the step before the last, as it is where the run was stopped in between."""
    source, ends = (
        Source(TRAIN, lambda captions, generator: torch.rand(len(captions), 3, 8, 8, generator=generator)),
        [],
    )
    for _ in range(2):
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
        train_vae(vae, source, 101, torch.Generator().manual_seed(1), batch_size=1, path=tmp_path / "vae.pt")
        ends.append(vae.decoder.conv_out.weight.detach().clone())
    assert torch.equal(*ends)


def test_a_stopped_flow_goes_on_as_if_it_had_not(tmp_path):
    network, ends = torch.nn.Linear(4, 4), []
    start = {name: value.clone() for name, value in network.state_dict().items()}
    latents, texts = torch.randn(8, 4), (torch.zeros(2, 1),)
    config = FlowConfig(tmp_path, steps=103, distill_steps=2, batch_size=2)
    for _ in range(2):
        network.load_state_dict(start)
        places, generator = torch.zeros(8, dtype=torch.long), torch.Generator().manual_seed(0)
        train_flow(
            lambda net: lambda noisy, *_: net(noisy), network, latents, places, texts, config, generator,
            tmp_path / "flow.pt",
        )  # fmt: skip
        ends.append(network.weight.detach().clone())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], start["weight"])


@pytest.mark.slow
def test_a_tiny_run_writes_a_loadable_pipeline(tmp_path, capsys):
    main(["--out", str(tmp_path), *TINY, "--eval-clips", "4", "--seed", "3"])
    assert "held out, guidance 3.5: appearance" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.pt"))
    pipe = HunyuanVideoPipeline.from_pretrained(tmp_path, local_files_only=True)
    generator = torch.Generator().manual_seed(0)
    assert sample(pipe, ["a red circle growing on gray", "zebra"], generator).isfinite().all()
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 8e6
    clip = pipe("a red circle growing on gray", height=32, width=32, num_frames=5, num_inference_steps=1)
    assert len(clip.frames[0]) == 5

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch.nn.functional import one_hot
from transformers import CLIPTokenizer, T5Tokenizer

from agents.policy import DenoisingPolicy
from agents.rollout import begin, denoise
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.models.flow_match import pack, unpack
from denoise_env.shapes import FLUX_WEIGHTS
from denoise_env.shapes.compositions import HELD_OUT, TRAIN, Verifier, render
from denoise_env.shapes.compositions.grammar import PRETRAIN, RELATIONS
from denoise_env.shapes.compositions.renderer import encode
from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES
from denoise_env.shapes.pretrain_flux import (
    NOTHING,
    SOURCE,
    Flow,
    build_pipeline,
    main,
    read_captions,
    sample,
    share_right,
    told,
)
from denoise_env.worlds import SHAPES_FLUX, WORLDS

TINY = ["--text-steps", "2", "--vae-steps", "3", "--steps", "3", "--distill-steps", "2"]
TINY += ["--batch-size", "4", "--pictures", "20"]


GUIDANCE = WORLDS[SHAPES_FLUX].options["guidance_scale"]


@pytest.fixture(scope="module")
def pipe():
    return FluxPipeline.from_pretrained(FLUX_WEIGHTS, local_files_only=True)


def test_shipped_weights_are_small():
    assert sum(file.stat().st_size for file in FLUX_WEIGHTS.rglob("*") if file.is_file()) <= 8e6


def test_shipped_pipeline_is_consistent(pipe):
    assert type(pipe.tokenizer) is CLIPTokenizer
    assert type(pipe.tokenizer_2) is T5Tokenizer
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert pipe.transformer.config.guidance_embeds
    assert pipe.text_encoder.config.eos_token_id == pipe.tokenizer.eos_token_id
    for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)):
        assert encoder.config.vocab_size == len(tokenizer)
        assert tokenizer.unk_token_id not in tokenizer(list(HELD_OUT)).input_ids
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.float32}


def test_latents_are_standardised_and_decode_back(pipe, generator):
    pictures = render(HELD_OUT, generator, board=True) * 2 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pictures).latent_dist.mean
        decoded = pipe.vae.decode(latents).sample
    assert latents.shape == (132, 8, 8, 8)
    assert (latents.std() * pipe.vae.config.scaling_factor).item() == pytest.approx(1, abs=0.15)
    assert (decoded - pictures).square().mean() < 0.015


def test_shipped_weights_leave_room_to_learn(pipe, generator):
    shares = share_right(pipe, HELD_OUT, 264, generator, GUIDANCE)
    assert 0.5 < shares["score"] < 0.85
    assert shares["all"] < shares["score"]


@pytest.mark.slow
def test_the_caption_and_the_guidance_matter(pipe):
    """With the same noise: held-out captions' scores told two scales, and with another caption as the prompt."""
    scores = {}
    for prompts, scale in ((HELD_OUT, 1.0), (HELD_OUT, GUIDANCE), ((*HELD_OUT[1:], HELD_OUT[0]), GUIDANCE)):
        images = sample(pipe, prompts, torch.Generator().manual_seed(0), scale)
        scores[prompts is HELD_OUT, scale] = Verifier().score(images, HELD_OUT).mean()
    assert scores[True, GUIDANCE] > scores[True, 1.0] + 0.01
    assert scores[False, GUIDANCE] < scores[True, GUIDANCE] - 0.2


@torch.no_grad()
def test_the_world_samples_what_the_plain_pipeline_samples(pipe):
    mdp = DenoisingMDP.make(SHAPES_FLUX, num_steps=5)
    latents, index = begin(mdp, row_generators(range(3)), HELD_OUT[::50])
    noise = latents[:, 0].clone()
    denoise(mdp, DenoisingPolicy(mdp, "ode"), latents, index)
    settings = {"height": 32, "width": 32, "num_inference_steps": 5, "guidance_scale": GUIDANCE}
    theirs = pipe(
        list(HELD_OUT[::50]), max_sequence_length=12, latents=pack(noise), output_type="latent", **settings
    ).images
    torch.testing.assert_close(latents[:, -1], unpack(theirs, 8, 8), rtol=0, atol=1e-4)


def test_no_held_out_caption_is_drawn():
    assert not set(SOURCE.captions) & set(HELD_OUT)
    assert set(SOURCE.captions) == set(PRETRAIN)


@pytest.mark.slow
def test_a_tiny_run_writes_a_loadable_pipeline(tmp_path, capsys):
    main(["--out", str(tmp_path), *TINY, "--eval-images", "12", "--seed", "3"])
    assert "held out, guidance 3.5, 12 samples" in capsys.readouterr().out
    pipe = FluxPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert sample(pipe, ["two red circles on gray", "zebra"], torch.Generator().manual_seed(0)).isfinite().all()
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 8e6


@pytest.mark.slow
def test_runs_with_one_seed_agree(tmp_path):
    for name in ("first", "second"):
        main(["--out", str(tmp_path / name), *TINY, "--eval-images", "0"])
    first, second = (
        {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.safetensors")}
        for name in ("first", "second")
    )
    assert len(first) == 4
    assert first == second


def share_read(features, truths):
    """Of held-out captions the share of which a linear map of the features tells all, after a fit by least squares to
    those of pretraining; features ``[n, …, 64]`` and truths ``[n, …, parts]`` of both sets."""
    (known, new), (truth, wanted) = features, truths
    classes = (truth.flatten(0, -2).amax(0) + 1).tolist()
    answers = [
        one_hot(part.clamp(min=0), n) * (part != NOTHING)[..., None]
        for part, n in zip(truth.unbind(-1), classes, strict=True)
    ]
    ways = torch.linalg.lstsq(known.flatten(0, -2), torch.cat(answers, -1).flatten(0, -2).float()).solution
    read = torch.stack([part.argmax(-1) for part in (new @ ways).split(classes, -1)], -1)
    return ((read == wanted) | (wanted == NOTHING)).flatten(1).all(1).float().mean()


@torch.no_grad()
def test_the_text_encoders_tell_what_a_caption_says(pipe):
    sets = PRETRAIN, HELD_OUT
    pooled, tokens = zip(*(read_captions(pipe, captions) for captions in sets), strict=True)
    assert share_read(pooled, [encode(captions) + 1 for captions in sets]) > 0.95
    assert share_read(tokens, [torch.stack([told(text) for text in captions]) for captions in sets]) > 0.95


def test_what_a_token_is_to_tell():
    """Colour, shape and place of the word's object, the number of objects, the background."""
    place = dict(zip(RELATIONS, range(1, 5), strict=True))
    red_circle = [list(COLOURS).index("red"), SHAPES.index("circle")]
    blue_cross = [list(COLOURS).index("blue"), SHAPES.index("cross")]
    scene, none = [1, list(BACKGROUNDS).index("gray")], [NOTHING] * 3
    assert told("a red circle left of a blue cross on gray").tolist() == [
        *[[*red_circle, place["left of"], *scene]] * 5,
        *[[*blue_cross, place["right of"], *scene]] * 3,
        *[[*none, *scene]] * 4,
    ]
    assert told("a blue cross below a red circle on gray")[[3, 4]].tolist() == [
        [*blue_cross, place["below"], *scene],
        [*red_circle, place["above"], *scene],
    ]
    scene = [2, list(BACKGROUNDS).index("black")]
    assert told("three red circles on black")[2:4].tolist() == [[*red_circle, 0, *scene], [*none, *scene]]


@torch.no_grad()
def test_the_network_is_trained_as_the_plain_pipeline_calls_it():
    """One Euler step of the pipeline over the whole way is the noise less the velocity that is trained."""
    pipe = build_pipeline()
    pipe.set_progress_bar_config(disable=True)
    captions = [TRAIN[0], TRAIN[-1]]
    noise = pack(torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)))
    flow, texts = Flow(pipe.transformer), read_captions(pipe, captions)
    velocity = flow(noise, torch.ones(2), texts, torch.full((2,), 2.5))
    found = pipe(
        captions,
        height=32,
        width=32,
        num_inference_steps=1,
        guidance_scale=2.5,
        max_sequence_length=12,
        latents=noise,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, noise - velocity, rtol=0, atol=1e-5)
    assert (velocity - flow(noise, torch.ones(2), texts, torch.ones(2))).abs().max() > 1e-6
    assert pytest.approx(1.0) == pipe.scheduler.config.shift

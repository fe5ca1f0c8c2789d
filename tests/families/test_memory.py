"""The memory that `DryRun` predicts is what PyTorch's allocator hands out, as its profiler has it."""

import json
from dataclasses import replace

import pytest
import torch
from cases import CASES, prompts_of

from denoise_env.models import model_options, outline
from denoise_env.models.memory import DryRun

ROWS = 2
CONVOLUTIONAL = ("stable-diffusion", "stable-diffusion-xl")
MASKED = ("qwen-image", "z-image", "hunyuan-video", "skyreels")  # their prompts are as long as their text
VIDEO_VAE = ("qwen-image", "hunyuan-video", "skyreels", "wan")
LARGER = {"stable-diffusion-3": 1, "flux": 4}  # the former's positions end there; the latter's network is the smallest


def allocated(run, path):
    """The most bytes that the allocator had handed out during ``run``, beyond those before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])


def settings(name, **changes):
    case = CASES[name]
    height, width = (side * LARGER.get(name, 2) for side in case.size)
    options = {**next(iter(case.variants.values())).options, "height": height, "width": width, **changes}
    return options | ({"max_sequence_length": 16} if name in MASKED else {})


def long_row(model, name):
    """The conditioning of a prompt of many words."""
    return model.split(model.encode([replace(prompts_of(name)[0], text="a red circle on gray " * 4)]))[0]


def update(model, row, grad=True):
    latents = torch.randn(ROWS, *model.latent_shape, dtype=model.dtype)
    conditioning = model.collate([{name: value.clone() for name, value in row.items()}] * ROWS)
    with torch.set_grad_enabled(grad):
        output = model.predict(latents, model.schedule(2).timesteps[:1].expand(ROWS), conditioning)
        if grad:
            output.float().square().mean().backward()


@pytest.mark.filterwarnings("ignore:the text encoder reads")
@pytest.mark.parametrize(("rank", "checkpointing"), [(0, False), (2, True)], ids=["full", "lora, checkpointing"])
@pytest.mark.parametrize("name", CASES)
def test_an_update_takes_what_the_dry_run_says(load, checkpoints, tmp_path, name, rank, checkpointing):
    # On a CPU without instructions for it, a convolution in bf16 takes buffers of its own.
    dtype = "fp32" if name in CONVOLUTIONAL or not rank else "bf16"
    options = settings(name, lora_rank=rank, dtype=dtype, gradient_checkpointing=checkpointing)
    checkpoint = str(checkpoints(name, next(iter(CASES[name].variants))))
    predicted = DryRun(outline(checkpoint, model_options(checkpoint, **options)), cuda=False).predict(ROWS, grad=True)
    model = load(name, **options)
    row = long_row(model, name)
    update(model, row)  # so that there are gradients
    assert predicted == pytest.approx(allocated(lambda: update(model, row), tmp_path / "trace.json"), rel=0.1)


@pytest.mark.filterwarnings("ignore:the text encoder reads")
@pytest.mark.parametrize("name", CASES)
def test_a_rollout_and_a_decoding_take_what_the_dry_run_says(load, checkpoints, tmp_path, name):
    options = settings(name, lora_rank=2)
    checkpoint = str(checkpoints(name, next(iter(CASES[name].variants))))
    dry = DryRun(outline(checkpoint, model_options(checkpoint, **options)), cuda=False)
    model = load(name, **options)
    row = long_row(model, name)
    update(model, row, grad=False)
    found = allocated(lambda: update(model, row, grad=False), tmp_path / "call.json")
    assert dry.predict(ROWS) == pytest.approx(found, rel=0.1)
    if name.startswith(VIDEO_VAE):  # on a CPU its convolutions, of three dimensions, take buffers of their own
        return
    latents = torch.zeros(ROWS, *model.latent_shape)
    with torch.no_grad():
        found = allocated(lambda: model.decode(latents), tmp_path / "decode.json")
    assert dry.decode(ROWS) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("name", CASES)
def test_every_encoder_is_run(checkpoints, name):
    checkpoint = str(checkpoints(name, next(iter(CASES[name].variants))))
    dry = DryRun(outline(checkpoint, model_options(checkpoint, **settings(name, dtype="bf16"))))
    four, one = dry.encode(4), dry.encode(1)
    assert four >= one > 0
    assert four > one or CASES[name].images  # images are encoded one by one, which may take the most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "stable-diffusion"])
def test_cuda_keeps_more_in_float32(checkpoints, name):
    checkpoint = str(checkpoints(name, next(iter(CASES[name].variants))))
    sizes = []
    for cuda, dtype in ((False, "bf16"), (True, "bf16"), (True, "fp32"), (False, "fp32")):
        options = model_options(checkpoint, **settings(name, dtype=dtype, lora_rank=2))
        sizes.append(DryRun(outline(checkpoint, options), cuda).predict(ROWS, grad=True))
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]

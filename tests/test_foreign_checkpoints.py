"""A model's checkpoint is data: pickles and code in it are refused, whatever release of diffusers reads it."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from denoise_env.models import load_model
from denoise_env.models.description import describe
from denoise_env.models.pipeline import check_parts
from denoise_env.shapes import WEIGHTS

CODE = "from pathlib import Path\nPath({marker!r}).touch()\nclass Part: pass\nclass UNet2DConditionModel: pass\n"


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "weights"
    shutil.copytree(WEIGHTS, path)
    return path


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def index(path, **parts):
    file = path / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))


def refused(path, match, **options):
    with pytest.raises(ValueError, match=match) as error:
        load_model(str(path), **options)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ],
)
def test_pickled_weights_are_refused(checkpoint, tmp_path, part, file):
    weights = checkpoint / part / f"{file}.safetensors"
    names = {"diffusion_pytorch_model": "diffusion_pytorch_model.bin", "model": "pytorch_model.bin"}
    torch.save(load_file(weights), checkpoint / part / names[file])  # honest weights, in a form that can hold code
    weights.unlink()
    refused(checkpoint, rf"its {part} has weights as {names[file]}, which can hold code: only safetensors are read")
    with (checkpoint / part / names[file]).open("wb") as pickled:
        pickle.dump(Evil(tmp_path / "marker"), pickled)
    shutil.copy(checkpoint / part / names[file], weights)
    refused(checkpoint, "cannot load a Stable Diffusion checkpoint")
    assert not (tmp_path / "marker").exists()


def test_pickled_adapters_are_refused(tmp_path):
    for name in ("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"):
        path = tmp_path / name.rpartition(".")[2] / name
        path.parent.mkdir()
        with path.open("wb") as file:
            pickle.dump(Evil(tmp_path / "marker"), file)
        for given in (path, path.parent):
            with pytest.raises(ValueError, match="cannot load Stable Diffusion LoRA weights"):
                load_model("shapes", lora=str(given))
    assert not (tmp_path / "marker").exists()


def test_pickled_points_are_refused(tmp_path):
    load_model("points").export(tmp_path)
    with (tmp_path / "model.safetensors").open("wb") as file:
        pickle.dump(Evil(tmp_path / "marker"), file)
    refused(tmp_path, "cannot load Points")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("entry", "file", "match"),
    [
        (["my_code", "Part"], "unet/my_code.py", r"unet is my_code\.Part: only"),
        (["my_code", "Part"], "my_code.py", r"unet is my_code\.Part: only"),
        (["diffusers", "UNet2DConditionModel"], "unet/diffusers.py", "brings code of its own, unet/diffusers.py"),
        (["os.path", "Part"], None, r"unet is os\.path\.Part: only"),
        (["diffusers.utils", "Part"], None, r"unet is diffusers\.utils\.Part: only"),
        (["transformers", "AutoModel"], None, r"unet is transformers\.AutoModel: only"),
        (["diffusers", "__loader__"], None, r"unet is diffusers\.__loader__: only"),
        ([["diffusers"], "UNet2DConditionModel"], None, "must be a library and a class"),
        (["diffusers", "NoSuchClass"], None, "NoSuchClass"),
    ],
)
def test_code_of_a_checkpoint_is_refused(checkpoint, tmp_path, monkeypatch, entry, file, match):
    index(checkpoint, unet=entry)
    if file:
        (checkpoint / file).write_text(CODE.format(marker=str(tmp_path / "marker")))
    monkeypatch.setattr(sys, "path", [*sys.path, str(checkpoint)])
    refused(checkpoint, match)
    with pytest.raises(ValueError, match=match):
        describe(str(checkpoint))
    assert not (tmp_path / "marker").exists()


def test_parts_are_checked_before_diffusers_loads_any_and_it_is_told_to_take_no_pickles(checkpoint, monkeypatch):
    """So that releases of diffusers that would import, run or unpickle what is there never come to it."""
    called = []
    from_pretrained = StableDiffusionPipeline.from_pretrained

    def recorded(*arguments, **options):
        called.append(options)
        return from_pretrained(*arguments, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", recorded)
    load_model(str(checkpoint))
    assert called[0]["use_safetensors"] is True
    assert not {"trust_remote_code", "custom_pipeline"} & called[0].keys()
    index(checkpoint, scheduler=["my_code", "Part"])
    refused(checkpoint, "scheduler is my_code.Part")
    assert len(called) == 1


def test_the_parts_of_published_checkpoints_are_known():
    parts = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "image_encoder": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    assert check_parts("nowhere", parts).keys() == {"feature_extractor", "safety_checker", "unet"}

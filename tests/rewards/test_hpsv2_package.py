"""HPS against the code of the package hpsv2, where that is installed: its networks, its tokenizer, its preprocessing.

Its requirements (pytest 7.2, protobuf below 4) are older than those of these tests, which need nothing but its code:
``pip install --no-deps hpsv2 clint args``.
"""

import gzip
import json
import warnings

import pytest
import torch
from PIL import Image
from tiny_clip import OPEN_CLIP, PROMPTS, TEXTS, pictures, save_open_clip, to_tensor

from denoise_env.rewards.hps import HPS

pytest.importorskip("hpsv2.src", reason="the package hpsv2 is not installed", exc_type=ImportError)
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def package():
    """Its open_clip; the wheel lacks the vocabulary, which open_clip has too."""
    import open_clip

    real, own = gzip.open, f"{next(iter(open_clip.__path__))}/{VOCABULARY}"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(gzip, "open", lambda path, *mode: real(own if str(path).endswith(VOCABULARY) else path, *mode))
        from hpsv2.src import open_clip as found
        from hpsv2.src.open_clip import factory
    return found, factory


@pytest.fixture(scope="module")
def theirs(package, tmp_path_factory):
    """The package's network, tokenizer and transform of pictures, with random weights; and the folder of these."""
    directory = tmp_path_factory.mktemp("hps")
    save_open_clip(directory)
    (directory / "tiny-hps.json").write_text(json.dumps(OPEN_CLIP))
    package[1].add_model_config(directory / "tiny-hps.json")
    network, _, transform = package[0].create_model_and_transforms(
        "tiny-hps", None, precision="fp32", output_dict=True, light_augmentation=True, aug_cfg={},
        with_score_predictor=False, with_region_predictor=False,
    )  # fmt: skip
    network.load_state_dict(torch.load(directory / "open_clip_pytorch_model.bin", weights_only=True))
    return network.eval(), package[0].get_tokenizer("ViT-H-14"), transform, directory


@pytest.mark.parametrize("size", [(90, 61), (48, 110), (64, 64), (200, 70)])
@torch.no_grad()
def test_scores_are_those_of_the_package(theirs, size):
    network, tokenizer, transform, directory = theirs
    expected = []
    for picture, text in zip(pictures(5, *size), TEXTS, strict=True):
        output = network(transform(Image.fromarray(picture))[None], tokenizer([text]))
        expected.append((output["image_features"] @ output["text_features"].T).diagonal())
    found = HPS(str(directory))(to_tensor(*pictures(5, *size)), PROMPTS)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-6)

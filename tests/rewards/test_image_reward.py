"""ImageReward from a file with the published names, against its networks written out in plain tensor operations."""

import math

import pytest
import torch
from PIL import Image
from tiny_clip import pictures, to_tensor
from torch.nn.functional import conv2d, gelu, layer_norm

from denoise_env.prompts import Prompt
from denoise_env.rewards import UnavailableError, load_reward
from denoise_env.rewards.image_reward import ImageReward, normalized

PICTURES = pictures()
IMAGES = to_tensor(*PICTURES)
TEXTS = ["a photo of two clocks", "a red cat", "a red cat", "two " * 50, ""]
PROMPTS = [Prompt(text) for text in TEXTS]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "two", "clocks", "red", "cat"]
VISION, TEXT, LAYERS = 128, 64, 2  # widths: two heads, and one


def published_tensors():
    """Random tensors with the names and order of dimensions of ImageReward.pt."""
    shapes = {
        "cls_token": (1, 1, VISION),
        "pos_embed": (1, 17, VISION),
        "patch_embed.proj.weight": (VISION, 3, 16, 16),
        "patch_embed.proj.bias": (VISION,),
        "norm.weight": (VISION,),
        "norm.bias": (VISION,),
    }
    for i in range(LAYERS):
        for name, outputs, inputs in (
            ("attn.qkv", 3 * VISION, VISION),
            ("attn.proj", VISION, VISION),
            ("mlp.fc1", 96, VISION),
            ("mlp.fc2", VISION, 96),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (outputs, inputs), f"blocks.{i}.{name}.bias": (outputs,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (VISION,), f"blocks.{i}.{name}.bias": (VISION,)}
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}

    text = {
        "embeddings.word_embeddings.weight": (len(WORDS) + 2, TEXT),
        "embeddings.position_embeddings.weight": (40, TEXT),
        "embeddings.LayerNorm.weight": (TEXT,),
        "embeddings.LayerNorm.bias": (TEXT,),
    }
    for i in range(LAYERS):
        linears = [("intermediate.dense", 80, TEXT), ("output.dense", TEXT, 80)]
        for attention, width in (("attention", TEXT), ("crossattention", VISION)):
            linears += [
                (f"{attention}.self.query", TEXT, TEXT),
                (f"{attention}.self.key", TEXT, width),
                (f"{attention}.self.value", TEXT, width),
                (f"{attention}.output.dense", TEXT, TEXT),
            ]
        for name, outputs, inputs in linears:
            text |= {
                f"encoder.layer.{i}.{name}.weight": (outputs, inputs),
                f"encoder.layer.{i}.{name}.bias": (outputs,),
            }
        for name in ("attention.output", "crossattention.output", "output"):
            text |= {f"encoder.layer.{i}.{name}.LayerNorm.{kind}": (TEXT,) for kind in ("weight", "bias")}
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}

    for number, outputs, inputs in ((0, 1024, TEXT), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        shapes |= {f"mlp.layers.{number}.weight": (outputs, inputs), f"mlp.layers.{number}.bias": (outputs,)}

    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        scale = "orm" in name and name.endswith("weight")
        deviation = shape[-1] ** -0.5 if name.startswith("mlp") and len(shape) > 1 else 0.2 if len(shape) > 1 else 0.1
        tensors[name] = torch.randn(shape, generator=draw) * deviation + scale
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return tensors


def attention(query, key, value, heads, mask=None):
    batch, length, width = query.shape
    query, key, value = (x.view(batch, -1, heads, width // heads).transpose(1, 2) for x in (query, key, value))
    logits = query @ key.transpose(2, 3) / math.sqrt(width // heads)
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None] == 0, -math.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width)


def by_hand(tensors, pixels, tokens, mask):
    """The network's output [b], before it is normalised."""

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x, name, eps):
        return layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    p = "blip.visual_encoder."
    patches = conv2d(pixels, tensors[p + "patch_embed.proj.weight"], tensors[p + "patch_embed.proj.bias"], stride=16)
    x = torch.cat([tensors[p + "cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], 1)
    x = x + tensors[p + "pos_embed"]
    for i in range(LAYERS):
        block = f"{p}blocks.{i}."
        query, key, value = linear(norm(x, block + "norm1", 1e-6), block + "attn.qkv").chunk(3, -1)
        x = x + linear(attention(query, key, value, VISION // 64), block + "attn.proj")
        x = x + linear(gelu(linear(norm(x, block + "norm2", 1e-6), block + "mlp.fc1")), block + "mlp.fc2")
    picture = norm(x, p + "norm", 1e-6)

    p = "blip.text_encoder."
    x = tensors[p + "embeddings.word_embeddings.weight"][tokens]
    x = norm(
        x + tensors[p + "embeddings.position_embeddings.weight"][: tokens.shape[1]], p + "embeddings.LayerNorm", 1e-12
    )
    for i in range(LAYERS):
        layer = f"{p}encoder.layer.{i}."
        for name, seen, hidden in (("attention", None, mask), ("crossattention", picture, None)):
            source = x if seen is None else seen
            each = [
                linear(y, f"{layer}{name}.self.{part}")
                for y, part in ((x, "query"), (source, "key"), (source, "value"))
            ]
            out = linear(attention(*each, TEXT // 64, hidden), f"{layer}{name}.output.dense")
            x = norm(x + out, f"{layer}{name}.output.LayerNorm", 1e-12)
        out = linear(gelu(linear(x, layer + "intermediate.dense")), layer + "output.dense")
        x = norm(x + out, layer + "output.LayerNorm", 1e-12)

    x = x[:, 0]
    for number in (0, 2, 4, 6, 7):
        x = linear(x, f"mlp.layers.{number}")
    return x[:, 0]


def expected_scores(tensors, images=PICTURES, texts=TEXTS):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    process = image_transform_v2(PreprocessCfg(size=64), is_train=False)
    pixels = torch.stack([process(Image.fromarray(image)) for image in images])
    rows = [[2, *(WORDS.index(word) for word in text.split()[:33]), 3] for text in texts]
    tokens = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    return (by_hand(tensors, pixels, tokens, tokens != 0) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from transformers import BertTokenizer

    directory = tmp_path_factory.mktemp("image_reward")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(directory)
    tensors = published_tensors()
    torch.save(tensors, directory / "ImageReward.pt")
    return directory, tensors


def build(saved, **options):
    return ImageReward(str(saved[0] / "ImageReward.pt"), str(saved[0]), **options)


def test_scores_are_those_of_the_networks_written_out(saved):
    directory, tensors = saved
    expected = expected_scores(tensors)
    assert expected.std() > 0.1
    reward = load_reward(
        f"image_reward(checkpoint={str(directory / 'ImageReward.pt')!r}, tokenizer={str(directory)!r})"
    )
    scores = reward(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 110), (64, 64), (131, 67)])
def test_other_shapes(saved, size):
    images = pictures(5, *size)
    scores = build(saved)(to_tensor(*images), PROMPTS)
    torch.testing.assert_close(scores, expected_scores(saved[1], images), rtol=0, atol=1e-5)


def test_the_normalisation():
    torch.testing.assert_close(
        normalized(torch.tensor([0.0, 1.0])), torch.tensor([-0.161780, 0.805956]), rtol=0, atol=1e-6
    )


def test_decoder_and_encoder_tokens_follow_the_vocabulary(saved):
    reward = build(saved)
    reward.load_network()
    assert reward.tokenizer("[DEC] a [ENC]")["input_ids"] == [2, len(WORDS), 5, len(WORDS) + 1, 3]


def test_rows_and_microbatches_change_nothing(saved):
    whole, one = build(saved)(IMAGES, PROMPTS), build(saved)
    torch.testing.assert_close(build(saved, microbatch=2)(IMAGES, PROMPTS), whole, rtol=0, atol=1e-5)
    alone = torch.cat([one(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)


def test_bf16_leaves_the_head_its_precision(saved):
    reward, exact = build(saved, dtype="bf16"), build(saved)(IMAGES, PROMPTS)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), exact, rtol=0, atol=0.1)
    assert torch.equal(reward.head.layers["0"].weight, saved[1]["mlp.layers.0.weight"])
    assert {p.dtype for p in reward.network.parameters()} == {torch.bfloat16}


# --- Files ---


def test_missing_tensors_are_named(saved, tmp_path):
    tensors = dict(saved[1])
    del tensors["blip.visual_encoder.blocks.1.attn.proj.weight"], tensors["mlp.layers.7.bias"]
    torch.save(tensors, tmp_path / "ImageReward.pt")
    named = r"it lacks head\.layers\.7\.bias, vision\.encoder\.layers\.1\.self_attn\.projection\.weight"
    with pytest.raises(UnavailableError, match=named):
        ImageReward(str(tmp_path / "ImageReward.pt"), str(saved[0]))(IMAGES, PROMPTS)


def test_a_file_of_another_model(saved, tmp_path):
    torch.save({"layers.0.weight": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(UnavailableError, match=r"weights of ImageReward: it lacks blip\.text_encoder\..* and 3 more"):
        ImageReward(str(tmp_path / "ImageReward.pt"), str(saved[0]))(IMAGES, PROMPTS)


def test_refused_arguments():
    with pytest.raises(ValueError, match=r"there is no checkpoint '/no/such\.pt'; give a file"):
        ImageReward("/no/such.pt")
    with pytest.raises(ValueError, match=r"there is no tokenizer '\./none'; give a directory"):
        ImageReward(tokenizer="./none")

from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)
from transformers.models.mask2former import modeling_mask2former

from denoise_env.prompts import Prompt
from denoise_env.rewards import UnavailableError, load_reward
from denoise_env.rewards.geneval import GenEval, Networks
from denoise_env.rewards.geneval.networks import ClipColors, Mask2FormerDetector, load_mask2former
from denoise_env.rewards.geneval.rules import CLASSES, COLORS, Detection
from denoise_env.shapes.tokenizer import build_tokenizer

DOG, CUP = CLASSES.index("dog"), CLASSES.index("cup")
TEMPLATES = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")


def pictures(count, height, width, seed=0):
    """Smooth random pictures, of whole bytes."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255).round() / 255


def normalized(images):
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (images - mean) / std


@pytest.fixture(scope="module")
def make_detector(tmp_path_factory):
    """Saves a tiny Mask2Former with random weights; some classes are likely. Returns it and its directory."""

    def make(labels=MappingProxyType({i: f"thing {i}" if i else "person" for i in range(80)})):
        torch.manual_seed(0)
        swin = SwinConfig(
            image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        width = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "dim_feedforward": 32}
        config = Mask2FormerConfig(
            backbone_config=swin, **width, encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2,
            num_attention_heads=2, num_queries=12, id2label=dict(labels),
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)  # SciPy, for the loss only
            network = Mask2FormerForUniversalSegmentation(config).eval()
        with torch.no_grad():  # confident classes, and masks that cover about half of a picture each
            network.class_predictor.weight *= 25
            network.class_predictor.bias[[DOG % len(labels), CUP % len(labels)]] += 5
            for layer in network.model.transformer_module.decoder.mask_predictor.mask_embedder.children():
                for weight in layer.parameters():
                    weight *= 4
            projection, means = network.model.pixel_level_module.decoder.mask_projection, []
            hook = projection.register_forward_hook(lambda *call: means.append(call[-1].mean((0, 2, 3))))
            network(normalized(pictures(2, 384, 384)))
            hook.remove()
            projection.bias -= means[0]
        path = tmp_path_factory.mktemp("detector")
        network.save_pretrained(path)
        return network, str(path)

    return make


@pytest.fixture(scope="module")
def detector(make_detector):
    return make_detector()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Saves a tiny CLIP with random weights and a tokenizer of GenEval's words. Returns it and its directory."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer([t.format(c=c, name=n) for t in TEMPLATES for c in COLORS for n in CLASSES], 77)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    vision = {**size, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config={**size, **ids}, vision_config=vision, projection_dim=16)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 2 if weight.ndim > 1 else 1  # far apart texts, and images whose colours differ
        model.vision_model.embeddings.patch_embedding.weight *= 100
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return model, tokenizer, str(path)


# --- The detector ---


@torch.no_grad()
def test_the_network_is_that_of_transformers(detector):
    network, path = detector
    images = torch.randn(2, 3, 64, 96)
    expected = network(images)
    classes, masks = load_mask2former(path).eval()(images)
    torch.testing.assert_close(classes, expected.class_queries_logits)
    torch.testing.assert_close(masks, expected.masks_queries_logits)


@torch.no_grad()
def test_detections_are_those_of_transformers(detector):
    network, path = detector
    images = pictures(2, 384, 384)
    found = Mask2FormerDetector(load_mask2former(path).eval(), 384)(images)
    expected = Mask2FormerImageProcessor().post_process_instance_segmentation(
        network(normalized(images)), threshold=0.3, return_binary_maps=True
    )
    assert [len(one) for one in found] == [len(one["segments_info"]) for one in expected]
    assert min(map(len, found)) >= 2
    assert len({detection.label for one in found for detection in one}) >= 2
    for ours, theirs in zip(found, expected, strict=True):
        ours = sorted(ours, key=lambda detection: -detection.score)
        order = sorted(zip(theirs["segments_info"], theirs["segmentation"], strict=True), key=lambda s: -s[0]["score"])
        for detection, (info, mask) in zip(ours, order, strict=True):
            assert detection.label == CLASSES[info["label_id"]]
            assert detection.score == pytest.approx(info["score"], abs=2e-5)
            assert (detection.mask != mask.bool()).float().mean() < 1e-4
            left, top, right, bottom = detection.box
            rows, columns = np.where(detection.mask.numpy())
            assert (left, top) == (columns.min(), rows.min())
            assert (right, bottom) == (columns.max() + 1, rows.max() + 1)


class Fixed(nn.Module):
    """A network with the given logits, which keeps what it saw."""

    def __init__(self, classes, masks):
        super().__init__()
        self.classes, self.masks = classes, masks

    def forward(self, images):
        self.seen = images
        return self.classes, self.masks


def logits(*queries):
    """Class logits ``[1, q, 81]`` of the given probabilities, by class; the rest is "none"."""
    rows = torch.full((1, len(queries), 81), 1e-9)
    for query, likely in enumerate(queries):
        for label, probability in likely.items():
            rows[0, query, label] = probability
        rows[0, query, -1] = 1 - sum(likely.values())
    return rows.log()


def test_a_picture_is_resized_and_padded_as_geneval_does():
    # 40 x 70 at 64: the longest side may be 106.6, so 70 * 1.523 = 106.6 and 40 * 1.523 = 60.9; then multiples of 32
    masks = torch.full((1, 1, 16, 32), -9.0)
    masks[..., :16] = 9.0  # the left 64 pixels of 128
    network = Fixed(logits({DOG: 0.99}), masks)
    color = torch.tensor([0.2, 0.5, 0.7])
    ((found,),) = Mask2FormerDetector(network, 64)(color[:, None, None].expand(1, 3, 40, 70))
    assert network.seen.shape == (1, 3, 64, 128)
    expected = normalized(color[:, None, None]).expand(3, 61, 107)
    torch.testing.assert_close(network.seen[0, :, :61, :107], expected)
    assert not network.seen[0, :, 61:].any()
    assert not network.seen[0, :, :, 107:].any()
    left, top, right, bottom = found.box
    assert (left, top, bottom) == (0, 0, 40)
    assert right == pytest.approx(64 * 70 / 107, abs=1)  # 41.9; 35 if the padding were in the picture
    assert found.mask.shape == (40, 70)


def test_a_square_picture_is_resized_to_the_resolution():
    network = Fixed(logits({DOG: 0.99}), torch.ones(1, 1, 8, 8))
    Mask2FormerDetector(network, 800)(torch.rand(1, 3, 64, 64))
    assert network.seen.shape == (1, 3, 800, 800)


def test_which_detections_there_are():
    half = torch.full((8, 8), -9.0)
    half[:4] = 2.0
    soft = torch.full((8, 8), -0.1)
    soft[2:4, 2:6] = 0.1
    empty = torch.full((8, 8), -1.0)
    masks = torch.stack([half, soft, empty])[None]
    classes = logits({DOG: 0.5, CUP: 0.4}, {DOG: 0.7}, {CUP: 0.99})
    (found,) = Mask2FormerDetector(Fixed(classes, masks), 32)(torch.rand(1, 3, 32, 32))
    # three queries keep their three best classes: the empty mask scores 0, and 0.4 of the first query is not among them
    scores = {one.label: one.score for one in found}
    assert set(scores) == {"dog"}
    assert len(found) == 2
    best, other = sorted(found, key=lambda one: -one.score)
    assert best.score == pytest.approx(0.5 * torch.tensor(2.0).sigmoid().item(), abs=0.03)
    assert other.score == pytest.approx(0.7 * 0.515, abs=0.01)
    (found,) = Mask2FormerDetector(Fixed(logits({DOG: 0.29}), masks[:, :1]), 32)(torch.rand(1, 3, 32, 32))
    assert found == []


@pytest.mark.parametrize("labels", [{0: "person", 1: "dog"}, {i: f"thing {i}" for i in range(80)}])
def test_a_detector_of_other_classes_is_refused(make_detector, labels):
    _, path = make_detector(labels)
    with pytest.raises(ValueError, match="must know COCO's 80 classes"):
        load_mask2former(path)


# --- The colours ---


@torch.no_grad()
def color_vectors(clip, name):
    """The formula's vector of each colour, from one text at a time: ``[10, d]``."""
    model, tokenizer, _ = clip
    vectors = []
    for color in COLORS:
        tokens = [tokenizer(template.format(c=color, name=name), return_tensors="pt") for template in TEMPLATES]
        embeds = [model(**one, pixel_values=torch.zeros(1, 3, 32, 32)).text_embeds[0] for one in tokens]  # normalised
        mean = torch.stack(embeds).mean(0)
        vectors.append(mean / mean.norm())
    return torch.stack(vectors)


@torch.no_grad()
def expected_color(clip, image, vectors):
    model, tokenizer, path = clip
    pixels = CLIPImageProcessorPil.from_pretrained(path)(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    scores = vectors @ model(**tokenizer("a", return_tensors="pt"), pixel_values=pixels).image_embeds[0]
    first, second = scores.topk(2).values
    assert first - second > 1e-5, "a tie tells nothing"
    return COLORS[scores.argmax()]


@torch.no_grad()
def test_colors_are_those_of_the_formula(clip):
    colors = ClipColors(clip[2]).eval()
    noise = np.random.default_rng(0)
    shades = noise.integers(0, 256, (8, 3))
    sizes = [(40, 30), (3, 50), (60, 3), (1, 1), (33, 32), (90, 20), (32, 32), (8, 9)]
    crops = [np.full((*size, 3), shade, np.uint8) for size, shade in zip(sizes, shades, strict=True)]
    crops = [(crop + noise.integers(0, 20, crop.shape)).clip(0, 255).astype(np.uint8) for crop in crops]
    names = ["dog", "cup"] * 4
    found = colors(crops, names)
    vectors = {name: color_vectors(clip, name) for name in {*names}}
    assert found == [expected_color(clip, crop, vectors[name]) for crop, name in zip(crops, names, strict=True)]
    assert len(set(found)) >= 3
    assert colors([], []) == []
    assert set(colors.texts) == {"dog", "cup"}


# --- The reward ---


class Boxes:
    """Finds one dog where the picture is red, two where it is green; a cup everywhere."""

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        self.seen.append(images)
        found = []
        for image in images:
            dogs = 1 if image[0].mean() > image[1].mean() else 2
            mask = torch.zeros(image.shape[1:], dtype=torch.bool)
            mask[1:3, 1:4] = True
            boxes = [Detection("dog", 0.95 - i / 10, (1, 1, 4, 3), mask) for i in range(dogs)]
            found.append([*boxes, Detection("cup", 0.5, (5, 1, 8, 3))])
        return found


class Names:
    def __init__(self):
        self.seen = []

    def __call__(self, crops, labels):
        self.seen += zip(crops, labels, strict=True)
        return ["red" if crop[0, 0, 0] > 200 else "green" for crop in crops]


def fake(mode, **options):
    reward = GenEval(mode, **options)
    reward.load_network = lambda: Networks(Boxes(), Names())
    return reward


def prompt(*include, tag="colors", **others):
    return Prompt("a photo", metadata={"tag": tag, "include": list(include), **others})


RED_DOG = prompt({"class": "dog", "count": 1, "color": "red"})
TWO_DOGS = prompt({"class": "dog", "count": 2}, tag="counting", exclude=[{"class": "dog", "count": 3}])
LEFT_OF = prompt({"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}, tag="position")
RED, GREEN = (torch.tensor(color)[:, None, None].expand(3, 6, 8) for color in ([0.9, 0.1, 0.1], [0.1, 0.9, 0.1]))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("score", [1, 0.0, 0.5, 1, 1 / 3]),
        ("correct", [1, 0, 0, 1, 1]),
        ("strict", [1, 0, 0, 1, 0]),
    ],
)
def test_rows(mode, expected):
    images = torch.stack([RED, GREEN, GREEN, GREEN, RED, GREEN])
    prompts = [RED_DOG, RED_DOG, TWO_DOGS, Prompt("without"), LEFT_OF, LEFT_OF]
    # under "counting" the green picture has one dog: the second's 0.85 is not above 0.9
    reward = fake(mode, microbatch=4)
    found = reward(images, prompts)
    expected = [*expected[:3], torch.nan, *expected[3:]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), equal_nan=True)
    assert [len(images) for images in reward.network.detector.seen] == [3, 2], "rows without metadata are not looked at"


def test_what_the_networks_are_given():
    reward = fake("correct")
    reward(torch.stack([RED + 0.0005, GREEN]), [RED_DOG, RED_DOG])
    (seen,) = reward.network.detector.seen
    torch.testing.assert_close(seen[0, :, 0, 0], torch.tensor([230, 26, 26]) / 255)  # of 0.9005 * 255 = 229.6
    (red, _), (green, label) = reward.network.colors.seen
    assert label == "dog"
    assert (red == [230, 26, 26]).all()
    assert red.shape == green.shape == (2, 3, 3)
    assert (green == [26, 230, 26]).all()


def test_only_rows_without_metadata():
    reward = fake("score")
    assert reward(torch.stack([RED, RED]), [Prompt("a"), Prompt("b", metadata={"tag": "x"})]).isnan().all()
    assert reward.network.detector.seen == []


def test_bad_metadata_are_told():
    with pytest.raises(ValueError, match="unknown GenEval class 'dragon'"):
        fake("score")(RED[None], [prompt({"class": "dragon", "count": 1})])


@torch.no_grad()
def test_the_real_classes_end_to_end(detector, clip):
    network, folder = detector
    vectors = color_vectors(clip, "dog")
    images = pictures(2, 384, 384, seed=3)
    found = Mask2FormerImageProcessor().post_process_instance_segmentation(
        network(normalized(images)), threshold=0.3, return_binary_maps=True
    )
    prompts, expected = [], []
    assert [sum(info["label_id"] == DOG for info in one["segments_info"]) for one in found] != [1, 1]
    for image, one in zip(images, found, strict=True):
        segments = sorted(zip(one["segments_info"], one["segmentation"], strict=True), key=lambda s: -s[0]["score"])
        dogs = [mask.bool().numpy() for info, mask in segments if info["label_id"] == DOG]
        assert dogs
        whole = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        crops = []
        for mask in dogs:
            rows, columns = np.where(mask)
            shown = Image.composite(whole, Image.new("RGB", whole.size, "#999"), Image.fromarray(mask))
            crops.append(shown.crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)))
        colors = [expected_color(clip, np.asarray(crop), vectors) for crop in crops]
        for count in (len(dogs), 1):
            for color in {colors[0], "black"}:
                prompts.append((image, prompt({"class": "dog", "count": count, "color": color})))
                exact, hits = len(dogs) == count, colors[:count].count(color)
                graded = (1 + hits / count) / 2 if exact else (1 - abs(count - len(dogs)) / count) / 2
                right = hits == count
                expected.append({"score": graded, "correct": float(right), "strict": float(right and exact)})
    images, prompts = torch.stack([image for image, _ in prompts]), [prompt for _, prompt in prompts]
    for mode in ("score", "correct", "strict"):
        reward = load_reward(f"geneval({mode!r}, detector={folder!r}, clip={clip[2]!r}, resolution=384, microbatch=5)")
        scores = reward(images, prompts).tolist()
        assert scores == pytest.approx([one[mode] for one in expected])
        assert len(set(scores)) >= 2


def test_arguments():
    assert load_reward("geneval").mode == "score"
    assert (GenEval().range, GenEval("correct").range, GenEval("strict").range) == ((-14, 1), (0, 1), (0, 1))
    for expression, message in [
        ("geneval('best')", r"the mode must be one of \['score', 'correct', 'strict'\], not 'best'"),
        ("geneval(detector='/nowhere/x')", "there is no detector '/nowhere/x'; give a directory"),
        ("geneval(clip='./nowhere')", "there is no clip './nowhere'; give a directory"),
        ("geneval(clip='')", "clip must be a directory, or owner/name on the Hugging Face hub, not ''"),
        ("geneval(resolution=8)", "resolution must be at least 32"),
        ("geneval(microbatch=0)", "microbatch must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_reward(expression)


def test_a_directory_without_a_checkpoint_is_unavailable(tmp_path):
    with pytest.raises(UnavailableError, match="GenEval cannot be loaded"):
        GenEval(detector=str(tmp_path))(RED[None], [RED_DOG])

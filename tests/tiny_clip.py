"""Tiny random models of the real classes, saved as real ones are, and pictures to show them."""

import json

import numpy as np
import torch

from denoise_env.prompts import Prompt

TEXTS = ["a photo of two clocks", "a red cat", "a red cat", "the “dog” &amp; its bone", ""]
PROMPTS = [Prompt(text) for text in TEXTS]
OPEN_CLIP = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def fixture_picture(width, height):
    """uint8 [H, W, 3]: the picture that the reference values are of."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([(7 * x + 3 * y) % 256, (2 * x + 11 * y) % 256, (x * y) % 256], -1).astype(np.uint8)


def to_tensor(*pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255


def pictures(count=5, width=90, height=61, seed=0):
    """uint8 arrays with coarse and fine structure."""
    draw = np.random.default_rng(seed)
    coarse = (
        draw.integers(0, 256, (count, 4, 5, 3)).repeat(-(-height // 4), 1).repeat(-(-width // 5), 2)[:, :height, :width]
    )
    fine = draw.integers(-60, 60, (count, height, width, 3))
    return list((coarse + fine).clip(0, 255).astype(np.uint8))


def randomize(model, seed=0):
    """Weights large enough for scores to differ."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "logit" not in name:
            scale = name.endswith("weight") and parameter.ndim == 1
            torch.nn.init.normal_(parameter, 1.0 if scale else 0.0, 0.3 if parameter.ndim > 1 else 0.1)
    return model.eval()


def save_open_clip(directory, config=OPEN_CLIP, preprocess=None):
    import open_clip

    model = randomize(open_clip.CLIP(**config))
    (directory / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess or {}})
    )
    torch.save(model.state_dict(), directory / "open_clip_pytorch_model.bin")
    return model


def clip_tokenizer():
    """CLIP's real tokenizer, of transformers, with the merges that open_clip brings."""
    from open_clip import SimpleTokenizer
    from transformers import CLIPTokenizer

    simple = SimpleTokenizer()
    vocabulary = {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(word, word): number
        for word, number in simple.encoder.items()
    }
    return CLIPTokenizer(vocab=vocabulary, merges=list(simple.bpe_ranks))


def save_clip(directory, **processor):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**text, "hidden_size": 64, "image_size": 64, "patch_size": 16}
    text |= {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    model = randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=40)))
    model.save_pretrained(directory)
    sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    CLIPImageProcessorPil(**{**sizes, **processor}).save_pretrained(directory)
    clip_tokenizer().save_pretrained(directory)
    return model


def save_siglip(directory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessorPil, SiglipModel

    text = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**text, "image_size": 64, "patch_size": 16}
    text |= {"vocab_size": 40, "max_position_embeddings": 16, "projection_size": 64}
    model = randomize(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
    torch.nn.init.constant_(model.logit_scale, 1.7)
    torch.nn.init.constant_(model.logit_bias, -1.3)
    model.save_pretrained(directory)
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(directory)
    words = ["<pad>", "<eos>", "<unk>", "a", "photo", "of", "two", "clocks", "red", "cat", "the", "dog"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return model

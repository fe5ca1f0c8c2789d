"""A tiny random Qwen2-VL with its tokenizer, in the published layout."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from denoise_env.rewards import hpsv3, videoalign

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What Qwen2-VL-Instruct's own chat template writes for one user's turn."""


@cache
def _bpe() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([videoalign.TEMPLATE, hpsv3.TEMPLATE, "yes no Yes No " * 9], trainer)
    return bpe.to_str()


def tokenizer() -> PreTrainedTokenizerFast:
    """Trained on the templates, with Qwen2-VL's special tokens after the words."""
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_bpe()), **names)
    fast.add_tokens(SPECIAL, special_tokens=True)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def config(rows: int) -> Qwen2VLConfig:
    """Two layers each, 32 wide, with the published patch sizes; ``rows`` tokens in the vocabulary."""
    ids = tokenizer().convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    text = {
        **{"vocab_size": rows, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope},
        **{"bos_token_id": ids("<|endoftext|>"), "eos_token_id": ids("<|im_end|>"), "initializer_range": 0.3},
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "initializer_range": 0.1}
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


def model(rows: int, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(seed)
    return Qwen2VLForConditionalGeneration(config(rows)).eval()


def save_base(folder: Path) -> Path:
    """What is read of the base model: its configuration (of a larger vocabulary) and tokenizer."""
    config(len(tokenizer()) + 100).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def old_name(name: str) -> str:
    """A tensor's name under transformers 4."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")

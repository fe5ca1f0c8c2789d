"""Tokenizers of the real classes with small vocabularies, for pipelines that are built where no hub is."""

from collections.abc import Sequence
from typing import Any

from denoise_env.shapes.grammar import ALL
from denoise_env.shapes.tokenizer import build_tokenizer

WORDS = (*ALL, "a prompt with more words than the others have", "blurry")


def clip_tokenizer(length: int = 24, words: Sequence[str] = WORDS) -> Any:
    return build_tokenizer(words, length)


def t5_tokenizer(words: Sequence[str] = WORDS) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    learner.train_from_iterator(words, trainer)
    vocab = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    return T5Tokenizer(vocab=[(piece, -float(place)) for piece, place in vocab], extra_ids=0)


def llama_tokenizer() -> Any:
    """One to which the start of HunyuanVideo's template is 95 tokens, as it is to LLaMA 3's own."""
    import json

    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special = {"unk_token": "<unk>", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    special["pad_token"] = "<pad>"
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=318, special_tokens=[*special.values(), *marks], show_progress=False)
    learner.train_from_iterator([*WORDS, DEFAULT_PROMPT_TEMPLATE["template"]], trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return LlamaTokenizer(model["vocab"], merges, padding_side="right", extra_special_tokens=marks, **special)

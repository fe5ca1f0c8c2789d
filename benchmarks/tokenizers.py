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

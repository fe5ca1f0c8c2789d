"""Small tokenizers of the embedded world: CLIP's byte pairs and T5's words."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

MAX_LENGTH = 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(corpus: Iterable[str], max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """Learn byte-pair merges from a corpus, in CLIP's vocabulary layout.

    The vocabulary is the 256 bytes, the same at a word's end (``</w>``), one entry per merge, and two special
    tokens, so that any prompt tokenizes and every word of a small corpus is one token.

    Args:
        corpus: the texts to learn from.
        max_length: tokens of a padded prompt, the special ones included.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator((text.lower() for text in corpus), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=max_length)


def build_t5_tokenizer(corpus: Iterable[str], max_length: int = MAX_LENGTH) -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the corpus' words, and for all others single bytes' characters.

    Args:
        corpus: the texts that the words are of.
        max_length: tokens of a padded prompt, the special one included.
    """
    words = sorted({word for text in corpus for word in text.lower().split()})
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet(), *"".join(words)})
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), ("▁", -10.0)]
    scored += [(f"▁{word}", -1.0) for word in words] + [(letter, -10.0) for letter in letters]
    return T5Tokenizer(vocab=scored, extra_ids=0, model_max_length=max_length)

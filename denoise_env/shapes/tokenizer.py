"""Small tokenizers of the embedded worlds: CLIP's byte pairs, T5's words and Llama 3's byte pairs."""

import json
import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

MAX_LENGTH = 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LLAMA_BOS, LLAMA_EOS, LLAMA_PAD = "<|begin_of_text|>", "<|eot_id|>", "<pad>"
LLAMA_SPECIAL = (LLAMA_BOS, LLAMA_EOS, LLAMA_PAD, "<|start_header_id|>", "<|end_header_id|>")
LLAMA_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""What Llama 3 takes for a word, but for English contractions: letters with the space before them, up to three digits,
marks, line ends, blanks."""


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


def build_llama_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer in Llama 3's layout, of a begin token and byte pairs, to which every word of the corpus is one token.

    Args:
        corpus: the texts to learn from; special tokens are left out of them.
    """
    special = [AddedToken(token, special=True, normalized=False) for token in LLAMA_SPECIAL]
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(LLAMA_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
        show_progress=False,
    )
    specials = re.compile("|".join(re.escape(token) for token in LLAMA_SPECIAL))
    tokenizer.train_from_iterator((part for text in corpus for part in specials.split(text)), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    begin = (LLAMA_BOS, tokenizer.token_to_id(LLAMA_BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{LLAMA_BOS} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=LLAMA_BOS, eos_token=LLAMA_EOS, pad_token=LLAMA_PAD, padding_side="right"
    )

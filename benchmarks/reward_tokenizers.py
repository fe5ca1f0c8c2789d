"""The tokenizers of rewards where no hub is: CLIP's own, and small ones of the real classes."""

from collections.abc import Sequence
from typing import Any

from benchmarks.tokenizers import WORDS


def published_clip_tokenizer() -> Any:
    """CLIP's own, with the merges that open_clip brings."""
    from open_clip import SimpleTokenizer
    from transformers import CLIPTokenizer

    simple = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): number for word, number in simple.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(simple.bpe_ranks))


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    words = dict.fromkeys(word for text in WORDS for word in text.split())
    return BertTokenizer(vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])})


QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'text' %}{{ content['text'] }}{% else %}"
    "<|vision_start|><|{{ content['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen2_tokenizer(more: Sequence[str] = ()) -> Any:
    """Qwen2's kind, learned from the rewards' templates, so that a word of theirs is about one token there too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from denoise_env.rewards import hpsv3, videoalign

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator([videoalign.TEMPLATE, hpsv3.TEMPLATE, "yes no Yes No", *WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learner, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=QWEN_CHAT
    )
    tokenizer.add_tokens([*QWEN_SPECIAL, *more], special_tokens=True)
    return tokenizer

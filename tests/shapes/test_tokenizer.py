import pytest

from denoise_env.shapes import ALL
from denoise_env.shapes.tokenizer import MAX_LENGTH, build_llama_tokenizer, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(ALL)


@pytest.fixture(scope="module", params=["built", "reloaded"])
def either(request, tokenizer, tmp_path_factory):
    if request.param == "built":
        return tokenizer
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return type(tokenizer).from_pretrained(folder)


def test_every_word_is_one_token(either):
    for text in ALL:
        ids = either(text).input_ids
        assert len(ids) == 5 + 2
        assert (ids[0], ids[-1]) == (either.bos_token_id, either.eos_token_id)
        assert either.decode(ids, skip_special_tokens=True) == text


def test_prompts_are_padded_with_eos(either):
    ids = either(["", *ALL], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (73, MAX_LENGTH)
    assert ids[0].tolist() == [either.bos_token_id] + [either.eos_token_id] * (MAX_LENGTH - 1)
    assert len(ids.unique(dim=0)) == 73


@pytest.mark.parametrize("text", ["a zebra!", "über 日本", "🙂 x"])
def test_any_text_tokenizes(either, text):
    ids = either(text).input_ids
    assert either.eos_token_id not in ids[1:-1]
    assert either.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_long_prompts_are_cut(either):
    ids = either("zebra " * 30, truncation=True).input_ids
    assert len(ids) == MAX_LENGTH
    assert ids[-1] == either.eos_token_id


def test_llamas_tokenizer_keeps_words_whole_and_any_text():
    corpus = [f"<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>" for text in ALL]
    tokenizer = build_llama_tokenizer(corpus)
    for text in corpus[::7]:
        ids = tokenizer(text).input_ids
        assert len(ids) == 1 + 4 + 5 + 1
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids[1:]) == text
    for text in ("a zebra!", "über 日本", "🙂 x, 12345"):
        assert tokenizer.decode(tokenizer(text).input_ids[1:]) == text

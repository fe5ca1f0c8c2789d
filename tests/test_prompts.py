"""Prompts: identity by content, images, metadata, files and named sets."""

import copy
import csv
import io
import itertools
import json
import pickle
import random
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
from PIL import Image

from denoise_env.prompt_files import load_prompts
from denoise_env.prompts import Prompt, PromptImage, check_prompts

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
NESTED = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "score": 0.5, "hard": True, "note": None}


@pytest.fixture
def frame(tmp_path):
    """A PNG file that holds `PIXELS`."""
    Image.fromarray(PIXELS).save(tmp_path / "frame.png")
    return tmp_path / "frame.png"


def sources(frame):
    """`PIXELS` in every form that a prompt takes."""
    tensor = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)
    floating = tensor.float() / 255
    return {
        "path": frame,
        "string": str(frame),
        "PIL": Image.fromarray(PIXELS),
        "PIL from a file": Image.open(frame),
        "array": PIXELS,
        "strided array": np.repeat(PIXELS, 2, 1)[:, ::2],
        "uint8 tensor": tensor,
        "float tensor": floating,
        "double tensor with a gradient": floating.double().requires_grad_(),
        "half tensor": floating.half(),
        "image": PromptImage(PIXELS),
    }


# --- Identity ---


def test_the_same_content_is_the_same_prompt():
    one = Prompt("a cat", "blurry", metadata=NESTED)
    other = Prompt("a cat", "blurry", metadata=dict(reversed(NESTED.items())))
    assert one == other
    assert hash(one) == hash(other)
    assert one.key == other.key
    assert len({one, other}) == 1
    assert str(one) == one.text == "a cat"
    assert one.image is None


def test_every_part_of_the_content_counts():
    texts, negatives = ["a", "b", "ab", "", " a"], [None, "", "a", "b"]
    images = [(), PIXELS, [PIXELS, PIXELS], PIXELS[:, ::-1], PIXELS.reshape(6, 4, 3), PIXELS[:2]]
    metadata = [{}, {"n": 1}, {"n": 1.5}, {"n": "1"}, {"n": True}, {"n": None}, {"n": [1]}, {"n": {"1": 1}}, {"m": 1}]
    prompts = [Prompt(*parts) for parts in itertools.product(texts, negatives, images, metadata)]
    assert len({prompt.key for prompt in prompts}) == len(set(prompts)) == len(prompts)
    assert len({prompt.conditioning_key for prompt in prompts}) == len(prompts) / len(metadata)
    for prompt in prompts[:: len(metadata)]:
        assert prompt.conditioning_key == replace(prompt, metadata={"other": 1}).conditioning_key


def test_the_key_is_the_content_and_not_the_process():
    code = "from denoise_env.prompts import Prompt; print(Prompt('a cat', metadata={'b': [1], 'a': 'ü'}).key)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == Prompt("a cat", metadata={"a": "ü", "b": [1]}).key


def test_a_prompt_is_equal_to_prompts_alone():
    prompt = Prompt("a cat", images=PIXELS)
    assert prompt != "a cat"
    assert prompt.image != PIXELS.tobytes()
    assert prompt.image != prompt
    with pytest.raises(TypeError):
        _ = prompt < "a cat"


def test_prompts_sort_the_same_from_any_order():
    prompts = [Prompt(text, metadata={"n": n}) for text in "cab" for n in range(4)]
    shuffled = random.Random(0).sample(prompts, len(prompts))
    assert sorted(set(shuffled)) == sorted(set(prompts))
    assert [prompt.text for prompt in sorted(shuffled)] == list("aaaabbbbcccc")


def test_pickles_and_copies_are_equal(frame):
    prompt = Prompt("a cat", "blurry", [frame, PIXELS[:2]], NESTED)
    for other in (pickle.loads(pickle.dumps(prompt)), copy.deepcopy(prompt), copy.copy(prompt), replace(prompt)):
        assert other == prompt
        assert other.metadata == NESTED
        assert [image.pixels().tolist() for image in other.images] == [PIXELS.tolist(), PIXELS[:2].tolist()]
        with pytest.raises(TypeError, match="read-only"):
            other.metadata["include"][0]["count"] = 3


def test_a_string_is_a_prompt_with_nothing_but_this_text():
    prompt = Prompt("a cat", metadata={"n": 1})
    assert Prompt.of(prompt) is prompt
    assert Prompt.of("a cat") == Prompt("a cat") == replace(prompt, metadata={})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": 3}, "a prompt's text must be a string, not 3"),
        ({"text": None}, "a prompt's text must be a string, not None"),
        ({"text": "a \ud83d cat"}, r"text has half a character \(a lone surrogate\) in it: 'a \\ud83d cat'"),
        ({"text": "a", "negative": 3}, "a prompt's negative text must be a string, not 3"),
        ({"text": "a", "negative": "\udc00"}, "negative text has half a character"),
        ({"text": "a", "metadata": ["b"]}, r"metadata must be a mapping, not \['b'\]"),
        ({"text": "a", "metadata": None}, "metadata must be a mapping, not None"),
    ],
)
def test_a_prompt_of_other_types_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Prompt(**arguments)


# --- Metadata ---


def test_metadata_is_a_copy_that_reads_as_what_was_given():
    given = copy.deepcopy(NESTED)
    prompt = Prompt("a cat", metadata=MappingProxyType(given))
    given["include"][0]["count"] = 3
    given["new"] = 1
    assert prompt.metadata == NESTED
    assert json.loads(json.dumps(prompt.metadata)) == NESTED
    assert prompt == Prompt("a cat", metadata=NESTED)
    assert Prompt("a", metadata={"size": (1, 2)}) == Prompt("a", metadata={"size": [1, 2]})


CHANGES = {
    "set": lambda m: m.__setitem__("tag", 1),
    "delete": lambda m: m.__delitem__("tag"),
    "update": lambda m: m.update(tag=1),
    "clear": lambda m: m.clear(),
    "pop": lambda m: m.pop("tag"),
    "popitem": lambda m: m.popitem(),
    "setdefault": lambda m: m.setdefault("new", 1),
    "or": lambda m: m.__ior__({"new": 1}),
    "nested": lambda m: m["include"][0].update(count=3),
    "list set": lambda m: m["include"].__setitem__(0, 1),
    "list delete": lambda m: m["include"].__delitem__(0),
    "append": lambda m: m["include"].append(1),
    "extend": lambda m: m["include"].extend([1]),
    "add": lambda m: m["include"].__iadd__([1]),
    "times": lambda m: m["include"].__imul__(2),
    "insert": lambda m: m["include"].insert(0, 1),
    "list pop": lambda m: m["include"].pop(),
    "remove": lambda m: m["include"].remove({"class": "cat", "count": 2}),
    "list clear": lambda m: m["include"].clear(),
    "sort": lambda m: m["include"].sort(),
    "reverse": lambda m: m["include"].reverse(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_metadata_cannot_be_changed(change):
    prompt = Prompt("a cat", metadata=NESTED)
    with pytest.raises(TypeError, match="a prompt's metadata is read-only"):
        change(prompt.metadata)
    assert prompt.metadata == NESTED


@pytest.mark.parametrize("name", ["text", "negative", "images", "metadata", "key", "new"])
def test_a_prompt_cannot_be_changed(name):
    prompt = Prompt("a cat", images=PIXELS)
    with pytest.raises(FrozenInstanceError):
        setattr(prompt, name, "x")
    with pytest.raises(FrozenInstanceError):
        setattr(prompt.image, "size", (1, 1))  # noqa: B010
    assert prompt == Prompt("a cat", images=PIXELS)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"score": float("nan")}, r"metadata\['score'\] must be a JSON value \(.*\), not nan"),
        ({"score": float("-inf")}, r"metadata\['score'\] must be a JSON value .* not -inf"),
        ({"of": {"kinds": {"a"}}}, r"metadata\['of'\]\['kinds'\] must be a JSON value .* not set"),
        ({"rows": [1, 2j]}, r"metadata\['rows'\]\[1\] must be a JSON value .* not complex"),
        ({"x": torch.zeros(1)}, r"metadata\['x'\] must be a JSON value .* not Tensor"),
        ({"raw": b"1"}, r"metadata\['raw'\] must be a JSON value .* not bytes"),
        ({3: "x"}, "the keys of metadata must be strings, not 3"),
        ({"a": {None: 1}}, r"the keys of metadata\['a'\] must be strings, not None"),
    ],
)
def test_metadata_that_is_not_json_is_refused_by_its_name(metadata, message):
    with pytest.raises(ValueError, match=message):
        Prompt("a cat", metadata=metadata)


# --- Images ---


def test_the_same_pixels_from_anywhere_are_the_same_image(frame):
    expected = Prompt("a cat", images=PIXELS)
    for name, source in sources(frame).items():
        for images in (source, [source], (source,)):
            prompt = Prompt("a cat", images=images)
            assert prompt == expected, name
            assert prompt.conditioning_key == expected.conditioning_key
            assert prompt.image is prompt.images[0]
            assert prompt.image == expected.image
            assert hash(prompt.image) == hash(expected.image)
            assert np.array_equal(prompt.image.pixels(), PIXELS), name
            assert prompt.image.pixels().dtype == np.uint8
            assert prompt.image.size == (6, 4)
    assert expected != Prompt("a cat")
    assert expected.conditioning_key != Prompt("a cat").conditioning_key


def test_images_keep_their_order():
    one, other = PIXELS, 255 - PIXELS
    prompt = Prompt("a cat", images=[one, other])
    assert [image.pixels().tolist() for image in prompt.images] == [one.tolist(), other.tolist()]
    assert prompt != Prompt("a cat", images=[other, one])


def test_an_image_does_not_follow_its_source():
    array, tensor = PIXELS.copy(), torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)
    picture = Image.fromarray(PIXELS)
    images = [PromptImage(source) for source in (array, tensor, picture)]
    array[:], _, _ = 0, tensor.zero_(), picture.paste(0, (0, 0, 6, 4))
    for image in images:
        image.pixels()[:] = 7
        assert np.array_equal(image.pixels(), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    picture = Image.fromarray(PIXELS).convert(mode)
    picture.save(tmp_path / "picture.tiff")
    expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(PromptImage(picture).pixels(), expected)
    assert np.array_equal(PromptImage(tmp_path / "picture.tiff").pixels(), expected)


def test_an_image_is_turned_as_its_orientation_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    image = PromptImage(tmp_path / "turned.png")
    assert np.array_equal(image.pixels(), np.rot90(PIXELS, -1))
    assert image.size == (4, 6)


def test_pixels_of_a_path_are_not_kept(frame):
    large = np.zeros((256, 256, 3), np.uint8)
    Image.fromarray(large).save(frame)
    assert len(pickle.dumps(PromptImage(frame))) < 1000
    assert len(pickle.dumps(PromptImage(large))) > large.nbytes


def test_a_relative_path_stays_the_same_file(frame, monkeypatch):
    monkeypatch.chdir(frame.parent)
    image = PromptImage("frame.png")
    monkeypatch.chdir("/")
    assert np.array_equal(image.pixels(), PIXELS)


def test_a_file_that_changed_is_not_the_image_any_more(frame):
    image = PromptImage(frame)
    Image.fromarray(PIXELS).save(frame, compress_level=0)  # other bytes, the same pixels
    assert np.array_equal(image.pixels(), PIXELS)
    Image.fromarray(255 - PIXELS).save(frame)
    with pytest.raises(ValueError, match=r"the image '.*frame\.png' has changed since the prompt was made"):
        image.pixels()
    frame.unlink()
    with pytest.raises(ValueError, match=r"there is no image '.*frame\.png'"):
        image.pixels()


def test_an_image_is_told_in_short(frame):
    assert repr(PromptImage(frame)) == "PromptImage('frame.png', 6x4)"
    assert repr(PromptImage(PIXELS)) == "PromptImage(6x4)"
    assert len(repr(Prompt("a cat", images=PIXELS))) < 100


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PIXELS.astype(np.float32), r"array must be uint8 \[H, W, 3\], not float32 \[4, 6, 3\]"),
        (PIXELS[..., 0], r"array must be uint8 \[H, W, 3\], not uint8 \[4, 6\]"),
        (PIXELS[None], r"not uint8 \[1, 4, 6, 3\]"),
        (PIXELS.transpose(2, 0, 1), r"not uint8 \[3, 4, 6\]"),
        (PIXELS[:0], r"not uint8 \[0, 6, 3\]"),
        (torch.zeros(4, 6, 3), r"tensor must be uint8 or float \[3, H, W\], not float32 \[4, 6, 3\]"),
        (torch.zeros(1, 3, 4, 6), r"not float32 \[1, 3, 4, 6\]"),
        (torch.zeros(3, 0, 6), r"not float32 \[3, 0, 6\]"),
        (torch.zeros(3, 4, 6, dtype=torch.long), r"not int64 \[3, 4, 6\]"),
        (torch.linspace(-1, 1, 72).view(3, 4, 6), r"must lie in \[0, 1\]; this one goes from -1 to 1"),
        (torch.full((3, 4, 6), torch.nan), r"must lie in \[0, 1\]; this one goes from nan to nan"),
        (Image.new("F", (2, 2)), "8 bits a channel; its mode is 'F'"),
        (3, "an image must be a path, a PIL image, an array or a tensor, not int"),
        (None, "an image must be a path, .* not NoneType"),
        ([[1]], "an image must be a path, .* not list"),
    ],
)
def test_what_is_no_image_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        Prompt("a cat", images=source)


def broken(frame):
    """Files that are no images, by name."""
    data = frame.read_bytes()
    flipped = bytearray(data)
    flipped[20] ^= 255
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(deep := io.BytesIO(), "png")
    return {"cut": data[:-30], "head": data[:20], "empty": b"", "text": b"a cat", "flipped": flipped, "16-bit": deep}


@pytest.mark.parametrize("kind", ["cut", "head", "empty", "text", "flipped", "16-bit"])
def test_a_broken_image_is_refused_by_its_path(frame, kind):
    content = broken(frame)[kind]
    frame.write_bytes(content.getvalue() if isinstance(content, io.BytesIO) else content)
    with pytest.raises(ValueError, match=r"cannot read the image '.*frame\.png': \w+"):
        Prompt("a cat", images=frame)


def test_an_image_that_is_not_there_is_refused_by_its_path(tmp_path):
    with pytest.raises(ValueError, match=r"there is no image '.*nothing\.png'"):
        Prompt("a cat", images=tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="cannot read the image"):
        Prompt("a cat", images=tmp_path)


# --- Checks ---


def test_strings_and_prompts_make_prompts():
    prompt = Prompt("b", metadata={"n": 1})
    checked = check_prompts(["a", prompt, "a"])
    assert checked == [Prompt("a"), prompt, Prompt("a")]
    assert checked[1] is prompt
    assert (
        check_prompts(np.array(["a", "b"])) == check_prompts(text for text in "ab") == check_prompts({"a": 1, "b": 2})
    )


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts must not be empty"),
        ("ring", r"prompts must be a list of strings; put the one prompt in a list: \['ring'\]"),
        (Prompt("ring"), r"put the one prompt in a list: \[Prompt\(text='ring'"),
        ({"ring"}, "prompts must be a list of strings, not set"),
        (None, "prompts must be a list of strings, not NoneType"),
        ([""], "prompt 0 must be a non-empty string, not ''"),
        (["a", " \n"], r"prompt 1 must be a non-empty string, not ' \\n'"),
        (["a", 3], "prompt 1 must be a non-empty string, not 3"),
        (["a", None], "prompt 1 must be a non-empty string, not None"),
        (["a", Prompt("", metadata={"n": 1})], r"prompt 1 must be a non-empty string, not Prompt\(text=''"),
    ],
)
def test_bad_prompts_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        check_prompts(prompts)


def test_an_empty_text_is_allowed_where_it_is_asked_for():
    assert check_prompts(["", Prompt("")], allow_empty=True) == [Prompt("")] * 2
    for prompts, message in [([], "must not be empty"), ([3], "prompt 0"), ("", "put the one prompt in a list")]:
        with pytest.raises(ValueError, match=message):
            check_prompts(prompts, allow_empty=True)


# --- Files ---


def write(tmp_path, name: str, content: str | bytes) -> str:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(tmp_path / name)


def test_a_text_file_has_a_prompt_on_every_line(tmp_path):
    file = write(tmp_path, "prompts.txt", 'a cat\n\n  a dog, "big" \n \t\na cat\na line\u2028separator\x0c!')
    assert load_prompts(file) == [Prompt(t) for t in ["a cat", 'a dog, "big"', "a cat", "a line\u2028separator\x0c!"]]


JSONL = """
{"prompt": "a cat", "negative_prompt": "blurry", "image": "frame.png", "metadata": {"n": 1}, "tags": ["x", {"y": null}]}

{"prompt": " a d\u00f6g\u2028", "negative_prompt": "", "image": ["sub/other.png", "frame.png"]}
{"prompt": "a \\u00fcber\\ud83d\\ude00 \\"cat\\"\\n", "negative_prompt": null, "image": null, "metadata": null, "a": 1}
"""


def test_a_jsonl_file(tmp_path, frame):
    (tmp_path / "sub").mkdir()
    Image.fromarray(255 - PIXELS).save(tmp_path / "sub" / "other.png")
    assert load_prompts(write(tmp_path, "prompts.jsonl", JSONL)) == [
        Prompt("a cat", "blurry", PIXELS, {"n": 1, "tags": ["x", {"y": None}]}),
        Prompt(" a dög\u2028", "", [255 - PIXELS, PIXELS]),
        Prompt('a über😀 "cat"\n', metadata={"a": 1}),
    ]


def test_a_csv_file(tmp_path, frame):
    text = (
        'source, prompt ,image,negative_prompt,metadata\nme,"a ""cat"", big",frame.png,blurry,7\n\n'
        f'"you\nand me"," a\n\ndög ",,,\n,a cat,{frame},,"{{}}"\n'
    )
    assert load_prompts(write(tmp_path, "prompts.csv", text)) == [
        Prompt('a "cat", big', "blurry", PIXELS, {"source": "me", "metadata": "7"}),
        Prompt(" a\n\ndög ", metadata={"source": "you\nand me", "metadata": ""}),
        Prompt("a cat", images=PIXELS, metadata={"source": "", "metadata": "{}"}),
    ]


FILES = {"txt": "a cat\nein Hündchen\n", "jsonl": JSONL, "csv": 'prompt,n\n"a ""cat""",1\nein Hündchen,"a,\nb"\n'}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no mark", "mark"])
@pytest.mark.parametrize("kind", FILES)
def test_byte_order_marks_and_line_ends_change_nothing(tmp_path, frame, kind, mark, end):
    (tmp_path / "sub").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "sub" / "other.png")
    plain = write(tmp_path, f"plain.{kind}", FILES[kind])
    other = write(tmp_path, f"other.{kind.upper()}", mark + FILES[kind].replace("\n", end).encode())
    assert load_prompts(other) == load_prompts(plain)


def test_any_texts_survive_the_files(tmp_path):
    draw = random.Random(1)
    letters = "ab ,;\"'\\{}[]:\n\t#\u2028üß😀\ufeff"
    texts = ["x" + "".join(draw.choices(letters, k=draw.randrange(12))) for _ in range(300)]
    rows = [(text, draw.choice(texts), draw.choice(texts)) for text in texts]
    expected = [Prompt(text, negative, metadata={"of": of}) for text, negative, of in rows]
    lines = [
        json.dumps({"prompt": text, "negative_prompt": negative, "of": of}, ensure_ascii=draw.random() < 0.5)
        for text, negative, of in rows
    ]
    assert load_prompts(write(tmp_path, "prompts.jsonl", "\n".join(lines))) == expected
    table = csv.writer(buffer := io.StringIO(newline=""))
    table.writerows([("prompt", "negative_prompt", "of"), *rows])
    assert load_prompts(write(tmp_path, "prompts.csv", buffer.getvalue())) == expected
    plain = [" ".join(text.split("\n")).strip() for text in texts]
    assert load_prompts(write(tmp_path, "prompts.txt", "\n".join(plain))) == [Prompt(text) for text in plain]


GOOD = '{"prompt": "a cat"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", GOOD * 6 + "{'prompt': 1}", r"line 7: invalid JSON: Expecting property name .*\(character 2\)"),
        ("p.jsonl", GOOD + "\n" + '{"prompt": "a"', r"line 3: invalid JSON: Expecting .*\(character 15\)"),
        ("p.jsonl", GOOD + GOOD.strip() * 2, "line 2: invalid JSON: Extra data"),
        ("p.jsonl", GOOD + '["a cat"]', r"line 2: a line must be a JSON object, not '\[\"a cat\"\]'"),
        ("p.jsonl", GOOD + "[" * 100_000, "line 2: "),
        ("p.jsonl", GOOD + '{"prompt": "a", "n": ' + "9" * 5000 + "}", "line 2: "),
        ("p.jsonl", GOOD + '{"text": "a"}', "line 2: there is no 'prompt'"),
        ("p.jsonl", GOOD + '{"prompt": null}', "line 2: there is no 'prompt'"),
        ("p.jsonl", GOOD + '{"prompt": 3}', "line 2: 'prompt' must be a non-empty string, not 3"),
        ("p.jsonl", GOOD + '{"prompt": " "}', "line 2: 'prompt' must be a non-empty string, not ' '"),
        ("p.jsonl", GOOD + '{"prompt": "\\ud83d"}', "line 2: a prompt's text has half a character"),
        ("p.jsonl", '{"prompt": "a", "negative_prompt": 3}', "line 1: 'negative_prompt' must be a string, not 3"),
        ("p.jsonl", '{"prompt": "a", "image": 3}', "line 1: 'image' must be a path or a list of paths, not 3"),
        ("p.jsonl", '{"prompt": "a", "image": ["b", 3]}', r"line 1: 'image' must be a path .* not \['b', 3\]"),
        ("p.jsonl", '{"prompt": "a", "image": "nothing.png"}', r"line 1: there is no image '.*nothing\.png'"),
        ("p.jsonl", GOOD + '{"prompt": "a", "image": ["p.jsonl"]}', r"line 2: cannot read the image '.*p\.jsonl'"),
        ("p.jsonl", '{"prompt": "a", "metadata": "b"}', "line 1: 'metadata' must be an object, not 'b'"),
        ("p.jsonl", '{"prompt": "a", "n": 1, "metadata": {"n": 2}}', "line 1: 'n' is both a column and in 'metadata'"),
        ("p.jsonl", GOOD + '{"prompt": "a", "n": [NaN]}', r"line 2: metadata\['n'\]\[0\] must be .* not nan"),
        ("p.jsonl", GOOD.encode() * 3 + b'{"prompt": "\xe9"}', "line 4: not UTF-8"),
        ("p.jsonl", "\n \n", r"p\.jsonl' holds no prompts"),
        ("p.csv", "prompt,n\na,1\nb", r"line 3: 1 cells, but the header has 2: \['prompt', 'n'\]"),
        ("p.csv", 'prompt,n\n"a\nb",1\n\nb,1,2\n', "line 5: 3 cells, but the header has 2"),
        ("p.csv", 'prompt,n\na,1\n"b\nc,1\nd,1\n', "line 3: unexpected end of data"),
        ("p.csv", 'prompt,n\na,1\n"b"c,1\n', "line 3: ',' expected after '\"'"),
        ("p.csv", "prompt,n\na,1\n,1\n", "line 3: 'prompt' must be a non-empty string, not ''"),
        ("p.csv", "text,n\na,1\n", r"line 1: the header must have a column 'prompt' .* not \['text', 'n'\]"),
        ("p.csv", "\nprompt;n\na;1\n", r"line 2: the header must have a column 'prompt' .* not \['prompt;n'\]"),
        ("p.csv", "prompt,n,n\na,1,2\n", "line 1: the header must have .* no column twice"),
        ("p.csv", "prompt,image\na,\nb,nothing.png\n", r"line 3: there is no image '.*nothing\.png'"),
        ("p.csv", "prompt,image\na,\nb,p.csv\n", r"line 3: cannot read the image '.*p\.csv'"),
        ("p.csv", b"prompt\na\n\xff\n", "line 3: not UTF-8"),
        ("p.csv", "prompt,n\n", r"p\.csv' holds no prompts"),
        ("p.csv", "", r"p\.csv' holds no prompts"),
        ("p.txt", b"a\r\nb\r\ncaf\xe9\r\n", r"line 3: not UTF-8 \(invalid continuation byte\)"),
        ("p.txt", "a cat".encode("utf-16"), "line 1: not UTF-8"),
        ("p.txt", "\ufeff\n \n", r"p\.txt' holds no prompts"),
        ("p.json", "[]", r"the prompt file '.*p\.json' must end in one of \['\.txt', '\.jsonl', '\.csv'\]"),
        ("prompts", "a cat", r"must end in one of"),
    ],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path, name, content, message):
    file = write(tmp_path, name, content)
    where = rf"{name}, {message}" if message.startswith("line") else message
    with pytest.raises(ValueError, match=where):
        load_prompts(file)


def test_a_bad_image_is_named_by_the_first_line_that_has_it(tmp_path, frame):
    (tmp_path / "broken.png").write_bytes(frame.read_bytes()[:40])
    images = ["frame.png", "broken.png", "nothing.png", "broken.png"]
    text = "".join(f"a cat,{image}\n" for image in images)
    with pytest.raises(ValueError, match=r"p\.csv, line 3: cannot read the image '.*broken\.png'"):
        load_prompts(write(tmp_path, "p.csv", "prompt,image\n" + text))


def test_lines_are_checked_before_any_image_is_read(tmp_path):
    text = "prompt,image\na,nothing.png\nb\n"
    with pytest.raises(ValueError, match="line 3: 1 cells"):
        load_prompts(write(tmp_path, "p.csv", text))


def test_an_image_on_many_lines_is_read_once(tmp_path, frame):
    prompts = load_prompts(write(tmp_path, "p.csv", "prompt,image\n" + "a cat,frame.png\n" * 50))
    assert len({id(prompt.image) for prompt in prompts}) == 1
    assert len(prompts) == 50


# --- Named sets ---

WORDS = ("a cat", Prompt("", metadata={"n": 1}))
NAMED = {"words": f"{__name__}:WORDS", "points": "denoise_env.models.points:MIXTURES", "gone": "json:nothing"}


def test_a_named_set():
    assert load_prompts("words", NAMED) == [Prompt("a cat"), WORDS[1]]
    assert all(isinstance(prompt, Prompt) for prompt in load_prompts("points", NAMED))
    with pytest.raises(ValueError, match="cannot load the prompt set 'json:nothing'"):
        load_prompts("gone", NAMED)


def test_a_name_goes_before_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").write_text("a dog")
    assert load_prompts("words", NAMED)[0] == Prompt("a cat")


@pytest.mark.parametrize(
    ("source", "named", "message"),
    [
        ("nowhere.txt", {}, "there is no prompt file 'nowhere.txt'$"),
        ("word", NAMED, "no prompt file 'word', and it is none of the named sets; did you mean 'words'?"),
        ("xyz", NAMED, r"none of the named sets; there are \['words', 'points', 'gone'\]"),
        (".", {}, r"there is no prompt file '\.'"),
        ("a cat " * 1000, {}, "there is no prompt file"),
    ],
)
def test_what_is_neither_a_set_nor_a_file_is_refused(source, named, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(source, named)


def test_importing_is_light():
    code = "import sys, denoise_env.prompt_files; print([m for m in ('torch', 'PIL', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

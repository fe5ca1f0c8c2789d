import base64
import io
import itertools
import math
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from servers import free_port, scripted

from denoise_env.prompts import Prompt
from denoise_env.rewards import UnavailableError, connection, load_reward
from denoise_env.rewards.connection import RemoteError
from denoise_env.rewards.judge import Judge, PairwiseJudge
from denoise_env.rewards.judge_templates import PAIRS, SCORES

PROMPTS = [Prompt("a cat"), Prompt("two dogs")]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(connection, "BACKOFF", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def tokens(**logprobs):
    top = [{"token": token, "logprob": logprob} for token, logprob in logprobs.items()]
    return {"choices": [{"logprobs": {"content": [{"token": top[0]["token"], "top_logprobs": top}]}}]}


def says(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def shown(value):
    """The pictures and the text of a request."""
    *pictures, last = value["messages"][0]["content"]
    prefix = "data:image/png;base64,"
    arrays = []
    for picture in pictures:
        assert picture["type"] == "image_url"
        url = picture["image_url"]["url"]
        assert url.startswith(prefix)
        arrays.append(np.array(Image.open(io.BytesIO(base64.b64decode(url.removeprefix(prefix))))))
    assert last["type"] == "text"
    return arrays, last["text"]


def score(answer, *, images=None, **options):
    """What a judge makes of one answer."""
    with scripted(lambda _: answer) as server:
        return Judge(server.url, "m", **options)(torch.rand(1, 3, 8, 8) if images is None else images, PROMPTS[:1])


# --- Yes or no ---


def test_the_probability_of_yes_against_no():
    assert score(tokens(Yes=-0.1, No=-2.5)).item() == pytest.approx(0.916827, abs=1e-6)


def test_ways_of_writing_are_added_up():
    found = score(tokens(**{"Yes": math.log(0.3), " yes": math.log(0.2), "no": math.log(0.1), "NO": math.log(0.15)}))
    assert found.item() == pytest.approx(0.5 / 0.75, abs=1e-6)


def test_a_word_that_is_not_among_the_tokens_counts_nothing():
    assert score(tokens(Yes=-0.1, Maybe=-3.0)).item() == 1.0
    assert score(tokens(No=-0.1, Maybe=-3.0)).item() == 0.0


def test_neither_word_is_no_score():
    with pytest.warns(UserWarning, match="no score for 1 of 1 rows: neither Yes nor No .* 'maybe'"):
        assert score(tokens(Maybe=-0.1, Not=-2.0)).isnan().all()


def test_what_is_asked():
    images = (torch.arange(2 * 3 * 4 * 4) % 256).view(2, 3, 4, 4) / 255
    with scripted(lambda _: tokens(Yes=-1.0, No=-1.0)) as server:
        judge = load_reward(f'judge(url="{server.url}/v1/", model="qwen", question="Is it {{prompt}}?")')
        assert judge(images, PROMPTS).tolist() == [0.5, 0.5]
    assert judge.elsewhere(torch.device("cpu"))
    requests = {shown(value)[1]: value for _, value in server.requests}
    assert set(requests) == {"Is it a cat?", "Is it two dogs?"}
    for i, value in enumerate([requests["Is it a cat?"], requests["Is it two dogs?"]]):
        (picture,), _ = shown(value)
        assert np.array_equal(picture, (images[i] * 255).round().byte().permute(1, 2, 0).numpy())
        del value["messages"]
        assert value == {
            **{"model": "qwen", "max_completion_tokens": 1, "logprobs": True, "top_logprobs": 20},
            "temperature": 0.0,
        }


def test_every_so_many_th_frame_of_a_clip_is_shown():
    clip = torch.linspace(0, 1, 9)[None, :, None, None, None].expand(1, 9, 3, 8, 8)
    with scripted(lambda _: tokens(Yes=-1.0)) as server:
        Judge(server.url, "m", every=4)(clip, PROMPTS[:1])
    pictures, _ = shown(server.requests[0][1])
    assert [picture[0, 0, 0] for picture in pictures] == [0, 128, 255]


# --- Scores in words ---


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({"mode": "score"}, "It is fine.\nFinal Score: 7.5", 0.75),
        ({"mode": "score", "pattern": r"(\d+) of", "low": 1, "high": 5}, "4 of 5", 0.75),
        ({"mode": "score", "pattern": [r"a=(\d)", r"b=(\d)"], "low": 0, "high": 4}, "b=4 a=1", 0.625),
        ({"template": "unified_reward_1.5"}, "cat (animal): 1\nFinal Score: 4.2", 0.84),
        ({"template": "unified_reward_1.5"}, "Final Score:\n3", 0.6),
        (
            {"template": "unified_reward_2.0"},
            "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 3",
            0.625,
        ),
        ({"template": "unified_reward_2.0", "low": 0}, "Alignment Score (1-5): 4, Coherence Score (1-5): 3.5, Style "
         "Score (1-5): 3", 0.7),
    ],
)  # fmt: skip
def test_scores_are_read_and_rescaled(options, text, expected):
    assert score(says(text), **options).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "score"}, "I would rather not."),
        ({"mode": "score"}, ""),
        ({"mode": "score"}, None),
        ({"mode": "score"}, "Final Score: 11"),
        ({"mode": "score"}, "Final Score: -1"),
        ({"template": "unified_reward_1.5"}, "Final Score: 15"),
        ({"template": "unified_reward_1.5"}, "Final Score: 0"),
        ({"template": "unified_reward_2.0"}, "Alignment Score (1-5): 4\nStyle Score (1-5): 3"),
        ({"template": "unified_reward_2.0"}, "Alignment Score (1-5): 4 Coherence Score (1-5): 6 Style Score (1-5): 3"),
    ],
)
def test_an_answer_without_a_score_on_the_scale_is_none(options, text):
    with pytest.warns(UserWarning, match=r"no score from \d to \d+ in its answer"):
        assert score(says(text), **options).isnan().all()


def test_templates():
    images = torch.zeros(1, 3, 20, 10)
    images[:, :, 10:] = 1
    with scripted(lambda _: says("Final Score: 5")) as server:
        Judge(server.url, "m", template="unified_reward_1.5")(images, PROMPTS[:1])
    (picture,), text = shown(server.requests[0][1])
    assert picture.shape == (512, 512, 3)
    assert picture[:200].max() == 0
    assert picture[300:].min() == 255
    assert text.startswith("<image>\nYou are given a text caption")
    assert text.endswith("after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [a cat]")
    assert PAIRS["unified_reward_think"].count("Dimension name: \n") == 1
    assert all(text.count("{prompt}") == 1 for text in [*(s.question for s in SCORES.values()), *PAIRS.values()])


# --- Servers that fail ---


@pytest.mark.parametrize(
    "garbage",
    [
        b"<html>",
        b'{"choices": [',
        b"[" * 100_000,
        {},
        {"choices": []},
        {"choices": [7]},
        {"choices": [{"logprobs": None}]},
        {"choices": [{"logprobs": {"content": []}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": 3, "logprob": 0}]}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "Yes", "logprob": "x"}]}]}}]},
        tokens(Yes=math.nan, No=-1.0),
        [1, 2],
    ],
)
def test_garbage_is_asked_again_and_is_never_a_score(garbage):
    answers = (200, {}, garbage)
    with scripted(lambda request: answers if request.count < 3 else tokens(Yes=-1.0, No=-1.0)) as server:
        judge = Judge(server.url, "m", retries=2)
        assert judge(torch.rand(1, 3, 8, 8), PROMPTS[:1]).tolist() == [0.5]
        assert len(server.requests) == 3
    with scripted(lambda _: answers) as server:
        judge = Judge(server.url, "m", retries=1)
        with pytest.raises(RemoteError, match=r"/v1/chat/completions: its answer cannot be used: .*tried 2 times"):
            judge(torch.rand(1, 3, 8, 8), PROMPTS[:1])


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(status):
    def answer(request):
        busy = (status, {"Retry-After": "1"}, {"error": {"message": "too busy"}})
        return busy if request.count == 1 else tokens(Yes=-1.0, No=-1.0)

    with scripted(answer) as server:
        assert Judge(server.url, "m")(torch.rand(1, 3, 8, 8), PROMPTS[:1]).tolist() == [0.5]
    (first, _), (second, _) = server.requests
    assert second - first >= 1


def test_what_asking_again_cannot_change_is_asked_once():
    with scripted(lambda _: (404, {}, {"error": {"message": "no model\n'm'"}})) as server:
        with pytest.raises(RemoteError, match=r"it answers 404: no model 'm'$"):
            Judge(server.url, "m")(torch.rand(1, 3, 8, 8), PROMPTS[:1])
        assert len(server.requests) == 1
    with scripted(lambda _: (302, {"Location": "http://127.0.0.1:9/"}, {})) as server:
        with pytest.raises(RemoteError, match=r"it answers 302$"):
            Judge(server.url, "m")(torch.rand(1, 3, 8, 8), PROMPTS[:1])
        assert len(server.requests) == 1


def test_timeouts_end():
    def trickle(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    for slow in (lambda _: time.sleep(2), trickle):
        with scripted(lambda _, slow=slow: slow) as server:
            start = time.monotonic()
            with pytest.raises(RemoteError, match=r"no (whole )?answer in 0\.2 s"):
                Judge(server.url, "m", timeout=0.2, retries=1)(torch.rand(1, 3, 8, 8), PROMPTS[:1])
            assert time.monotonic() - start < 1.5


def test_rows_that_fail_are_nan_and_the_others_are_scored():
    def answer(request):
        return (400, {}, {"error": "refused"}) if "dogs" in shown(request.value)[1] else tokens(Yes=-1.0, No=-1.0)

    with scripted(answer) as server, pytest.warns(UserWarning, match="no score for 1 of 2 rows: .*400: refused"):
        scores = Judge(server.url, "m")(torch.rand(2, 3, 8, 8), PROMPTS)
    assert scores[0] == 0.5
    assert scores[1].isnan()


def test_a_server_that_is_gone_is_not_asked_for_every_row():
    with scripted(lambda _: (500, {}, {})) as server:
        with pytest.raises(RemoteError, match="it answers 500"):
            Judge(server.url, "m", retries=0, concurrency=2)(torch.rand(50, 3, 4, 4), [Prompt("a")] * 50)
        assert len(server.requests) <= 4
    with pytest.raises(RemoteError, match="ConnectError"):
        Judge(f"http://127.0.0.1:{free_port()}", "m", retries=1)(torch.rand(1, 3, 8, 8), PROMPTS[:1])


def test_requests_at_a_time():
    lock, now, most = threading.Lock(), itertools.count(), []
    running = set()

    def answer(request):
        me = next(now)
        with lock:
            running.add(me)
            most.append(len(running))
        time.sleep(0.05)
        with lock:
            running.discard(me)
        return tokens(Yes=-1.0, No=-1.0)

    with scripted(answer) as server:
        Judge(server.url, "m", concurrency=3)(torch.rand(12, 3, 4, 4), [Prompt("a")] * 12)
    assert max(most) == 3


# --- Keys ---


def test_the_key_is_read_from_the_environment_when_it_is_needed(monkeypatch):
    seen = []

    def answer(request):
        seen.append(request.headers.get("Authorization"))
        return tokens(Yes=-1.0)

    with scripted(answer) as server:
        judge = Judge(server.url, "m", api_key_env="MY_KEY")
        images = torch.rand(1, 3, 8, 8)
        monkeypatch.setenv("OPENAI_API_KEY", "another")
        judge(images, PROMPTS[:1])
        monkeypatch.setenv("MY_KEY", "secret")
        judge(images, PROMPTS[:1])
    assert seen == [None, "Bearer secret"]
    assert "secret" not in repr(vars(judge)) + repr(vars(judge.connection))


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert score(tokens(Yes=-1.0, No=-1.0)).item() == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('url="http://user:pw@h:1", model="m"', "no user, password"),
        ('url="http://h:1?key=3", model="m"', "no user, password"),
        ('url="ftp://h", model="m"', "must be http://HOST:PORT"),
        ('url="h:80", model="m"', "must be http://HOST:PORT"),
        ('url=3, model="m"', "url must be a string"),
        ('url="http://h", model=""', "the model must be a text"),
        ('url="http://h", model="m", mode="maybe"', "mode must be"),
        ('url="http://h", model="m", template="none"', "template must be one of .*unified_reward_1.5"),
        ('url="http://h", model="m", pattern="(x)"', "belong to mode"),
        ('url="http://h", model="m", mode="score", pattern="x"', "first group"),
        ('url="http://h", model="m", mode="score", pattern="("', "cannot be read"),
        ('url="http://h", model="m", mode="score", low=3, high=3', "low must be below high"),
        ('url="http://h", model="m", timeout=0', "timeout must be at least"),
        ('url="http://h", model="m", concurrency=0', "concurrency must be at least 1"),
        ('url="http://h", model="m", api_key_env=""', "environment variable's name"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_reward(f"judge({arguments})")


# --- Pairs ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>Image 2 is better at first</think><answer>Image 1 is better</answer>", 1.0),
        ("<think>…</think>\n<answer>\nImage 2 is better\n</answer>", 0.0),
        ("<answer>Video 1 is better</answer>", 1.0),
        ("<answer>Image 1 is better</answer> no: <answer>image 2 is better.</answer>", 0.0),
        ("<answer>Tie</answer>", 0.5),
        ("I think that Image 2 is better.", 0.0),
        ("Image 1 is better, or Image 2 is better.", None),
        ("<answer>Image 1 is better than what Image 2 is better at: Image 2 is better</answer>", None),
        ("<think>Image 1 is", None),
        ("", None),
    ],
)
@pytest.mark.filterwarnings("ignore:the judge gave no score")
def test_which_is_better(text, expected):
    with scripted(lambda _: says(text)) as server:
        found = PairwiseJudge(server.url, "m").compare(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8), PROMPTS[:1])
    assert found.item() == expected if expected is not None else found.isnan().all()


@pytest.mark.parametrize("clips", [False, True])
def test_win_rates_of_a_judge(clips):
    """The judge's verdicts are those of the fixture: 01→0, 02→2, 03 tie, 12→2, 13→1, 23→2."""
    verdicts = {(0, 1): "1", (0, 2): "2", (0, 3): None, (1, 2): "2", (1, 3): "1", (2, 3): "1"}

    def answer(request):
        pictures, text = shown(request.value)
        assert text.startswith("You are an objective and precise evaluator")
        assert "「a cat」" in text
        count = len(pictures) // 2
        assert count == (2 if clips else 1)
        pair = tuple(sorted_pair[0, 0, 0] // 10 for sorted_pair in (pictures[0], pictures[count]))
        which = verdicts[pair]
        return says(f"<answer>{f'Image {which} is better' if which else 'tie'}</answer>")

    images = (torch.arange(4) * 10 / 255)[:, None, None, None].expand(4, 3, 8, 8)
    if clips:
        images = images[:, None].expand(4, 5, 3, 8, 8)
    with scripted(answer) as server:
        reward = load_reward(
            f'win_rate(pairwise_judge(url="{server.url}", model="m", template="unified_reward_think"))'
        )
        assert reward.compares_group
        assert reward.elsewhere(torch.device("cpu"))
        found = reward(images, [Prompt("a cat")] * 4, group_size=4)
    assert found.tolist() == pytest.approx([0.5, 1 / 3, 1, 1 / 6])
    assert len(server.requests) == 6


def test_a_single_sample_has_no_comparison():
    with pytest.raises(UnavailableError, match="win_rate"):
        PairwiseJudge("http://h", "m")(torch.rand(1, 3, 8, 8), PROMPTS[:1])

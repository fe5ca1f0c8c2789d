import contextlib
import math
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from servers import free_port, scripted, serving

from agents.policy import DenoisingPolicy
from agents.rollout import collect
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.prompts import Prompt
from denoise_env.rewards import connection, load_reward
from denoise_env.rewards.connection import RemoteError
from denoise_env.rewards.remote import Remote
from denoise_env.shapes.grammar import ALL
from denoise_env.shapes.renderer import render

PROMPTS = [Prompt("a"), Prompt("b"), Prompt("c")]
IMAGES = torch.rand(3, 3, 4, 4)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(connection, "BACKOFF", 0.01)


def same(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)


# --- The same scores as here ---


@pytest.fixture(scope="module")
def shapes():
    with serving(load_reward("shapes"), max_batch=5) as url:
        yield url


def pictures():
    """Pictures that the verifier is sure and unsure of, the last with a text that is no caption."""
    generator = torch.Generator().manual_seed(0)
    captions = list(ALL[:6])
    drawn = render([*captions[:5], ALL[20], captions[0]], generator)
    noise = torch.rand(drawn.shape, generator=generator)
    return (0.8 * drawn + 0.2 * noise).clamp(0, 1), [Prompt(text) for text in (*captions, "no caption at all")]


def test_float_values_give_the_scores_of_this_process(shapes):
    images, prompts = pictures()
    found = load_reward(f'remote(url="{shapes}", format="float", microbatch=5)')(images, prompts)
    here = [load_reward("shapes")(images[i], prompts[i]) for i in (slice(0, 5), slice(5, 7))]  # the same batches
    assert torch.equal(found[:6], torch.cat(here)[:6])
    assert found[6].isnan()


def test_png_gives_the_scores_of_the_rounded_images(shapes):
    images, prompts = pictures()
    found = load_reward(f'remote(url="{shapes}", microbatch=5)')(images, prompts)
    rounded = torch.from_numpy(np.rint(images.numpy() * 255).astype(np.uint8)).float() / 255
    here = [load_reward("shapes")(rounded[i], prompts[i]) for i in (slice(0, 5), slice(5, 7))]
    assert torch.equal(found[:6], torch.cat(here)[:6])
    assert found[6].isnan()
    exact = load_reward("shapes")(images, prompts)
    assert (found - exact)[:6].abs().max() < 0.05
    assert found[:6].max() > 0.5


@pytest.mark.parametrize("format", ["png", "float"])
def test_clips_and_whole_prompts_arrive(format):
    seen = []

    def reward(images, prompts):
        seen.append((images, prompts))
        return torch.arange(len(images))

    clips = torch.randint(0, 256, (2, 4, 3, 5, 6)) / 255
    prompts = [
        Prompt("é", metadata={"n": [1, {"x": None}]}, images=[torch.rand(3, 2, 3), torch.rand(3, 4, 4)]),
        Prompt(""),
    ]
    with serving(reward) as url:
        remote = Remote(url, format=format)
        same(remote(clips, prompts), [0.0, 1.0])
        assert remote.elsewhere(torch.device("cpu"))
    ((images, arrived),) = seen
    assert torch.equal(images, clips)
    assert arrived == prompts


def test_microbatches():
    with serving(lambda images, prompts: images.amax((1, 2, 3))) as url:
        images = (torch.arange(7) / 255)[:, None, None, None].expand(7, 3, 2, 2)
        found = Remote(url, microbatch=3)(images, [Prompt("a")] * 7)
    assert torch.equal(found, torch.arange(7) / 255)


# --- Servers of others, and bad ones ---


def answers(*values):
    """A server that gives these answers one after the other, the last for ever."""
    return scripted(lambda request: values[min(request.count, len(values)) - 1])


def test_flow_factorys_form():
    with answers({"rewards": [1, 2.5, -3]}) as server:
        same(Remote(server.url)(IMAGES, PROMPTS), [1.0, 2.5, -3.0])
    ((_, sent),) = server.requests
    assert set(sent) == {"prompt", "image", "video"}
    assert sent["prompt"] == ["a", "b", "c"]
    assert sent["video"] is None
    assert all(isinstance(image, str) for image in sent["image"])


def test_null_and_nan_stay_nan():
    with answers((200, {}, b'{"rewards": [null, NaN, 0.25]}')) as server:
        same(Remote(server.url)(IMAGES, PROMPTS), [math.nan, math.nan, 0.25])


def test_what_the_server_could_not_score_is_told():
    def reward(images, prompts):
        raise KeyError("no target")

    with serving(reward) as url, pytest.warns(UserWarning, match="did not score 3 rows: KeyError: 'no target'"):
        assert Remote(url)(IMAGES, PROMPTS).isnan().all()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"rewards": [1, 2]}, "it has 2 rewards for 3 samples"),
        ({"rewards": [1, 2, 3, 4]}, "it has 4 rewards for 3 samples"),
        ({"rewards": {"a": 1}}, "no list 'rewards'"),
        ({"rewards": [1, 2, "3"]}, "no number but '3'"),
        ({"rewards": [1, 2, True]}, "no number but True"),
        ({"rewards": [1, 2, [3]]}, "no number but"),
        ({"rewards": [1, 2, 10**400]}, "out of range"),
        ({"rewards": [1, 2, 3], "errors": "x"}, "'errors' are no list"),
        ({"scores": [1, 2, 3]}, "no list 'rewards'"),
        ([1, 2, 3], "no list 'rewards'"),
        (b"", "it is not JSON"),
        (b"\x80\x04K\x01.", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"\x1f\x8b\x08\x00", "it is not JSON"),
    ],
)
def test_answers_that_cannot_be_used(answer, message):
    bad = (200, {}, answer)
    with answers(bad, bad, {"rewards": [1, 2, 3]}) as server:
        same(Remote(server.url, retries=2)(IMAGES, PROMPTS), [1.0, 2.0, 3.0])
    with answers(bad) as server, pytest.raises(RemoteError, match=message):
        Remote(server.url, retries=1)(IMAGES, PROMPTS)
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_statuses_that_may_pass(status):
    with answers((status, {"Retry-After": "0"}, {}), {"rewards": [1, 2, 3]}) as server:
        same(Remote(server.url)(IMAGES, PROMPTS), [1.0, 2.0, 3.0])
    with answers((status, {}, {"detail": "busy\n" * 500})) as server, pytest.raises(RemoteError) as error:
        Remote(server.url, retries=2)(IMAGES, PROMPTS)
    assert len(server.requests) == 3
    assert f"it answers {status}: busy busy" in str(error.value)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 413, 422])
def test_statuses_that_do_not_pass(status):
    with answers((status, {"Location": "/health"}, {"detail": "no"})) as server:
        with pytest.raises(RemoteError, match=f"it answers {status}: no"):
            Remote(server.url)(IMAGES, PROMPTS)
        assert len(server.requests) == 1


def test_the_waits_double_and_are_drawn(monkeypatch):
    waits = []
    monkeypatch.setattr(connection.time, "sleep", waits.append)
    monkeypatch.setattr(connection, "BACKOFF", 0.5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    with answers((500, {}, {})) as server, pytest.raises(RemoteError):
        Remote(server.url, retries=4)(IMAGES, PROMPTS)
    assert all(0.25 * 2**i <= wait <= 0.5 * 2**i for i, wait in enumerate(waits))
    assert len({wait / 2**i for i, wait in enumerate(waits)}) == 4
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    for header, expected in (("7", 7), ("99999", connection.LONGEST_WAIT), ("-5", 0.5), ("soon", 0.5), ("1e3", 0.5)):
        waits.clear()
        with answers((503, {"Retry-After": header}, {})) as server, pytest.raises(RemoteError):
            Remote(server.url, retries=1)(IMAGES, PROMPTS)
        assert waits[0] == expected or (expected == 0.5 and waits[0] <= 0.5)


def test_an_answer_that_is_too_long_is_refused():
    sent = []

    def flood(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(10**12))
        handler.end_headers()
        for _ in range(2_000):
            handler.wfile.write(b" " * 2**16)
            sent.append(2**16)

    with answers(flood) as server, pytest.raises(RemoteError, match="longer than 16,777,216 bytes"):
        Remote(server.url)(IMAGES, PROMPTS)
    time.sleep(0.2)
    assert len(server.requests) == 1
    assert sum(sent) < 60 * 2**20


def test_a_server_that_hangs():
    with answers(lambda _: time.sleep(3)) as server:
        start = time.monotonic()
        with pytest.raises(RemoteError, match=r"no answer in 0\.2 s \(tried 2 times\)"):
            Remote(server.url, timeout=0.2, retries=1)(IMAGES, PROMPTS)
        assert time.monotonic() - start < 2


def test_a_server_that_breaks_off():
    def hang_up(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b'{"rewards": [1, 2, 3')
        handler.close_connection = True

    with answers(hang_up, {"rewards": [1, 2, 3]}) as server:
        same(Remote(server.url)(IMAGES, PROMPTS), [1.0, 2.0, 3.0])
    with answers(hang_up) as server, pytest.raises(RemoteError, match="RemoteProtocolError"):
        Remote(server.url, retries=0)(IMAGES, PROMPTS)


def test_a_server_that_is_gone_and_comes_back():
    port = free_port()

    def reward(images, prompts):
        return torch.ones(len(images))

    remote = Remote(f"http://127.0.0.1:{port}", retries=1)
    with serving(reward, port=port):
        same(remote(IMAGES, PROMPTS), [1.0, 1.0, 1.0])
    with pytest.raises(RemoteError, match=r"ConnectError: .*\(tried 2 times\)"):
        remote(IMAGES, PROMPTS)
    with serving(reward, port=port):
        same(remote(IMAGES, PROMPTS), [1.0, 1.0, 1.0])


def test_an_outage_costs_the_retries_once():
    port = free_port()
    remote = Remote(f"http://127.0.0.1:{port}", retries=2)
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"/compute: ConnectError: .*\(tried 3 times\)"):
            remote(IMAGES, PROMPTS)
        for _ in range(2):
            with pytest.raises(RemoteError, match=r"/compute: still silent: ConnectError: [^(]*$"):
                remote(IMAGES, PROMPTS)
        with serving(lambda images, prompts: torch.ones(len(images)), port=port):
            same(remote(IMAGES, PROMPTS), [1.0, 1.0, 1.0])


def test_a_server_that_was_silent_is_asked_for_a_sign_of_life(monkeypatch):
    monkeypatch.setattr(connection, "SIGN_OF_LIFE", 0.2)
    paths, health = [], [None]

    def answer(request):
        paths.append(request.path)
        if request.path != "/health":
            return (200, {}, {"rewards": [1, 2, 3]}) if health == [404] else time.sleep(2)
        return (health[0], {}, {}) if health[0] else time.sleep(2)

    with scripted(answer) as server:
        remote = Remote(server.url, timeout=1.0, retries=1)
        for message in (r"no answer in 1 s \(tried 2 times\)", r"still silent: no answer in 0\.2 s$"):
            with pytest.raises(RemoteError, match=message):
                remote(IMAGES, PROMPTS)
        health[0] = 500  # it lives, and does not score
        with pytest.raises(RemoteError, match=r"/compute: no answer in 1 s$"):
            remote(IMAGES, PROMPTS)
        health[0] = 404  # a server of others
        same(remote(IMAGES, PROMPTS), [1.0, 2.0, 3.0])
        same(remote(IMAGES, PROMPTS), [1.0, 2.0, 3.0])
    assert paths == ["/compute", "/compute", "/health", *["/health", "/compute"] * 2, "/compute"]


@pytest.mark.parametrize("answer", [(503, {}, {}), (200, {}, b"")])
def test_a_server_that_answers_anything_is_not_silent(answer):
    with answers(answer) as server:
        remote = Remote(server.url, retries=1)
        for count in (2, 4):
            with pytest.raises(RemoteError, match=r"\(tried 2 times\)"):
                remote(IMAGES, PROMPTS)
            assert len(server.requests) == count


def test_a_full_queue_is_waited_for():
    door = threading.Event()

    def reward(images, prompts):
        door.wait(10)
        return torch.ones(len(images))

    with serving(reward, max_batch=1, max_queue=3) as url:
        found = []
        one, two, three = (
            threading.Thread(target=lambda: found.append(Remote(url, retries=5)(IMAGES, PROMPTS))) for _ in range(3)
        )
        for thread in (one, two, three):
            thread.start()
            time.sleep(0.1)
        door.set()
        for thread in (one, two, three):
            thread.join(10)
    assert [f.tolist() for f in found] == [[1, 1, 1]] * 3


# --- Tokens and arguments ---


def test_tokens(monkeypatch):
    monkeypatch.setenv("RIGHT", "sesame")
    monkeypatch.setenv("WRONG", "mellon")
    with serving(lambda images, prompts: torch.ones(len(images)), token="sesame") as url:
        right, wrong, none = Remote(url, token_env="RIGHT"), Remote(url, token_env="WRONG"), Remote(url)
        same(right(IMAGES, PROMPTS), [1.0, 1.0, 1.0])
        assert right.check() == f"{url} answers: ok"
        for remote in (wrong, none):
            with pytest.raises(RemoteError, match="/compute: it answers 401: this server wants a token"):
                remote(IMAGES, PROMPTS)
            with pytest.raises(RemoteError, match="/health: it answers 401"):
                remote.check()
    with pytest.raises(RemoteError, match="/health: ConnectError"):
        right.check()
    with answers({"hello": 1}) as server, pytest.raises(RemoteError, match="it has no 'status'"):
        Remote(server.url).check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "missing a required argument: 'url'"),
        ('url="127.0.0.1:80"', "http://HOST:PORT"),
        ("url=8000", "cannot be read"),
        ('url="http://[::1"', "cannot be read"),
        ('url="http://a:b@h"', "no user, password"),
        ('url="http://h", timeout=-1', "timeout must be at least"),
        ('url="http://h", retries=-1', "retries must be at least 0"),
        ('url="http://h", retries=1.5', "retries must be an integer"),
        ('url="http://h", microbatch=0', "microbatch must be at least 1"),
        ('url="http://h", format="jpeg"', "format must be 'png' or 'float'"),
        ('url="http://h", token_env="NOT_SET"', "NOT_SET, which holds the server's token, is not set"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ValueError, match=message):
        load_reward(f"remote({arguments})")


def test_bad_samples_are_not_sent():
    with answers({"rewards": [1, 2, 3]}) as server:
        for images in (IMAGES * 3, IMAGES[:2], IMAGES * math.nan, IMAGES[:, :1]):
            with pytest.raises(ValueError, match=r"samples must|images need"):
                Remote(server.url)(images, PROMPTS)
    assert not server.requests


def test_building_one_asks_nobody():
    with scripted(lambda _: {}) as server:
        load_reward(f'scale(remote(url="{server.url}"), 2)')
    assert not server.requests


# --- In a rollout ---


@pytest.mark.slow
def test_a_rollout_while_the_server_dies_and_comes_back():
    port = free_port()
    name = f'remote(url="http://127.0.0.1:{port}", format="float", retries=0)'
    mdp = DenoisingMDP.make("shapes", {name: 1.0, "shapes": 1.0}, num_steps=2)
    policy = DenoisingPolicy(mdp)

    def rollout():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = collect(mdp, policy, row_generators(range(6)), group_size=2, microbatch=2).scores
        return scores, [str(w.message) for w in caught if "reward" in str(w.message)]

    calls = []

    def dying(images, prompts):
        calls.append(len(images))
        return shapes(images, prompts)

    shapes = load_reward("shapes")
    with contextlib.ExitStack() as stack:
        stack.enter_context(serving(dying, port=port))
        scores, warned = rollout()
        assert not warned
        assert scores.valid.all()
        torch.testing.assert_close(scores.values[name], scores.values["shapes"])
        assert calls == [2, 2, 2]  # each microbatch by itself
    scores, warned = rollout()
    assert len(warned) == 3
    assert all(f"the reward {name!r} failed on 2 rows: RemoteError" in message for message in warned)
    assert not scores.valid.any()
    assert scores.values[name].isnan().all()
    assert scores.values["shapes"].isfinite().all()
    with serving(dying, port=port):
        scores, warned = rollout()
    assert not warned
    assert scores.valid.all()
    torch.testing.assert_close(scores.values[name], scores.values["shapes"])

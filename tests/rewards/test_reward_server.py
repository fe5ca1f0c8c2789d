import base64
import contextlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from servers import post, serving

from agents import cli
from denoise_env.prompts import Prompt
from denoise_env.rewards import UnavailableError
from denoise_env.rewards.combinators import WinRate
from denoise_env.rewards.server import RewardServer, is_loopback


def png(level=0, size=(4, 4), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, level if mode != "RGB" else (level, level, level)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def raw(values):
    values = np.asarray(values, "<f4")
    return {"shape": list(values.shape), "float32": base64.b64encode(values.tobytes()).decode()}


def brightness(images, prompts):
    """Of images and of clips."""
    return (images.flatten(1).mean(1) * 255).round(decimals=3)


class Slow:
    """Brightness, with a record of the batches and a door that is shut."""

    def __init__(self):
        self.batches, self.open, self.entered = [], threading.Event(), threading.Event()

    def __call__(self, images, prompts):
        self.batches.append(len(images))
        self.entered.set()
        assert self.open.wait(20)
        return brightness(images, prompts)


# --- The form ---


def test_images_and_clips_in_flow_factorys_form():
    with serving(brightness) as url:
        answer = httpx2.get(f"{url}/health")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        body = {"prompt": ["a", "b"], "image": [png(10), png(30)], "video": None}
        more = {"condition_images": None, "condition_videos": None, "kwargs": None}
        assert post(url, {**body, **more}).json() == {"rewards": [10, 30], "errors": []}
        clips = {"prompt": ["a", "b"], "image": None, "video": [[png(10), png(30)], [png(2)]]}
        assert post(url, clips).json() == {"rewards": [20, 2], "errors": []}


def test_the_reward_is_given_what_was_sent():
    seen = []

    def reward(images, prompts):
        seen.extend(zip(images, prompts, strict=True))
        return torch.zeros(len(images))

    values = torch.rand(3, 5, 4)
    with serving(reward) as url:
        body = {
            "prompt": ["a", "ü"],
            "image": [raw(values), raw(torch.ones(3, 5, 4))],
            "metadata": [{"count": 2, "tags": ["x"]}, None],
            "condition_images": [[png(7), png(8, (2, 3))], None],
        }
        assert post(url, body).json()["rewards"] == [0, 0]
    (image, prompt), (other, second) = seen
    assert torch.equal(image, values)
    assert torch.equal(other, torch.ones(3, 5, 4))
    assert prompt.text == "a"
    assert prompt.metadata == {"count": 2, "tags": ["x"]}
    assert [condition.pixels()[0, 0, 0] for condition in prompt.images] == [7, 8]
    assert second == Prompt("ü")


@pytest.mark.parametrize(
    ("mode", "color", "expected"), [("L", 9, 9), ("RGBA", (9, 9, 9, 0), 9), ("P", 0, 0), ("1", 1, 255)]
)
def test_pngs_of_other_modes_become_rgb(mode, color, expected):
    with serving(brightness) as url:
        assert post(url, {"prompt": ["a"], "image": [png(color, mode=mode)]}).json()["rewards"] == [expected]


def bomb(width, height):
    """A few bytes that say they are a PNG of this size, and hold zeros enough for it."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(min(height * (1 + 3 * width), 10**7)), 9)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


GOOD = {"prompt": ["a"], "image": [png()]}


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"", 422, "it is not JSON"),
        (b"\x80\x04\x95.", 422, "it is not JSON"),
        (b"[" * 100_000, 422, "it is not JSON"),
        ([], 422, "must be a JSON object"),
        ({}, 422, "prompt must be a list"),
        ({**GOOD, "prompt": "a"}, 422, "prompt must be a list"),
        ({**GOOD, "prompt": []}, 422, "prompt must be a list"),
        ({**GOOD, "prompt": [3]}, 422, "text must be a string"),
        ({**GOOD, "prompt": ["a", "b"]}, 422, "image must be a list as long as prompt, 2"),
        ({**GOOD, "image": None}, 422, "one of image and video"),
        ({**GOOD, "video": [[png()]]}, 422, "one of image and video"),
        ({**GOOD, "image": png()}, 422, "image must be a list"),
        ({**GOOD, "image": [None]}, 422, "image[0]: an image must be a base64 string"),
        ({**GOOD, "image": ["%%%"]}, 422, "image[0]: it is not base64"),
        ({**GOOD, "image": ["aaaa"]}, 422, "image[0]: it is no PNG that can be read"),
        ({**GOOD, "image": [png()[:60]]}, 422, "image[0]: it is no PNG that can be read"),
        ({**GOOD, "image": [png(9, mode="I;16")]}, 422, "more than 8 bits"),
        ({**GOOD, "image": [{"shape": [3, 2, 2], "float32": "AAAA"}]}, 422, "take 48 bytes, not 3"),
        ({**GOOD, "image": [{"shape": [3, 2], "float32": ""}]}, 422, "shape of float values"),
        ({**GOOD, "image": [{"shape": [3, True, 2], "float32": ""}]}, 422, "shape of float values"),
        ({**GOOD, "image": [raw(torch.full((3, 2, 2), 2.0))]}, 422, "must lie in [0, 1]"),
        ({**GOOD, "image": [raw(torch.full((3, 2, 2), torch.nan))]}, 422, "must lie in [0, 1]"),
        ({**GOOD, "image": [{"shape": [3, 10**6, 10**6], "float32": ""}]}, 413, "too many"),
        ({**GOOD, "image": [{"shape": [3, -1, 2], "float32": ""}]}, 413, "too many"),
        ({**GOOD, "image": [bomb(100_000, 100_000)]}, 422, "exceeds limit"),
        ({**GOOD, "image": [bomb(8_000, 8_000)]}, 413, "an image of 8000x8000 is too large"),
        ({"prompt": ["a", "b"], "image": [bomb(1_000, 1_000)] * 2}, 413, "image[1]: an image of 1000x1000"),
        ({"prompt": ["a"], "video": [[]]}, 422, "video[0] must be a list of at least one image"),
        ({"prompt": ["a"], "video": [png()]}, 422, "video[0] must be a list of images"),
        ({"prompt": ["a"], "video": [[png(), png(0, (2, 2))]]}, 422, "all of one size"),
        ({**GOOD, "metadata": [3]}, 422, "metadata must be a mapping"),
        ({**GOOD, "metadata": {}}, 422, "metadata must be a list"),
        (b'{"prompt": ["a"], "image": [], "metadata": [{"x": NaN}]}', 422, "one of image"),
        ({**GOOD, "condition_images": ["x"]}, 422, "condition_images[0] must be a list"),
        ({**GOOD, "condition_videos": [[["x"]]]}, 422, "condition_videos are not supported"),
        ({"prompt": ["a"] * 9, "image": [png()] * 9}, 413, "9 samples are more than may wait, 8"),
        (b" " * 6_000_000, 413, "a request may have 5,000,000 bytes"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_wrong_is_one_sentence(refusing, body, status, sentence):
    answer = post(refusing, body)
    assert answer.status_code == status
    assert sentence in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]


@pytest.fixture(scope="module")
def refusing():
    with serving(brightness, max_queue=8, max_body=5_000_000, max_decoded=5_000_000) as url:
        yield url


def test_metadata_that_is_not_finite_or_nested_too_deeply(refusing):
    text = json.dumps({**GOOD, "metadata": [{"x": "here"}]})
    assert "must be a JSON value" in post(refusing, text.replace('"here"', "NaN").encode()).json()["detail"]
    deep = text.replace('"here"', "[" * 900 + "]" * 900)
    assert post(refusing, deep.encode()).status_code == 422


def test_other_types_and_methods(refusing):
    assert post(refusing, GOOD, **{"Content-Type": "text/plain"}).status_code == 415
    assert httpx2.get(f"{refusing}/compute").status_code == 405
    assert httpx2.get(f"{refusing}/docs").status_code == 404


# --- Tokens ---


def test_every_request_wants_the_token():
    with serving(brightness, token="sesame") as url:
        for wrong in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "Bearer"}, {"Authorization": "é"}):
            wrong = {name: text.encode("latin-1") for name, text in wrong.items()}
            assert post(url, GOOD, **wrong).status_code == 401
            assert httpx2.get(f"{url}/health", headers=wrong).status_code == 401
        right = {"Authorization": "Bearer sesame"}
        assert post(url, GOOD, **right).json()["rewards"] == [0]
        assert httpx2.get(f"{url}/health", headers=right).status_code == 200


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("", False), ("10.0.0.1", False), ("example.org", False), ("127.0.0.1.example.org", False)],
)  # fmt: skip
def test_loopback(host, loopback):
    assert is_loopback(host) is loopback


# --- Batches and the queue ---


def test_requests_of_several_clients_are_scored_together():
    reward = Slow()
    with serving(reward, max_batch=6) as url, ThreadPoolExecutor(8) as clients:
        first = clients.submit(post, url, {"prompt": ["x"], "image": [png(1)]})
        assert reward.entered.wait(10)
        bodies = [{"prompt": ["x", "y"], "image": [png(10 * i), png(10 * i + 1)]} for i in range(5)]
        others = [clients.submit(post, url, body) for body in bodies]
        odd = clients.submit(post, url, {"prompt": ["x"], "image": [png(77, (6, 4))]})
        time.sleep(0.5)  # all of them wait now
        reward.open.set()
        assert first.result().json()["rewards"] == [1]
        assert [other.result().json()["rewards"] for other in others] == [[10 * i, 10 * i + 1] for i in range(5)]
        assert odd.result().json()["rewards"] == [77]
    assert reward.batches[0] == 1
    assert sorted(reward.batches[1:]) == [1, 4, 6]  # 10 rows of one size, 1 of another


def test_requests_that_come_at_once_are_one_batch():
    reward = Slow()
    reward.open.set()
    with serving(reward) as url, ThreadPoolExecutor(4) as clients:
        for _ in range(5):
            assert all(r.status_code == 200 for r in clients.map(lambda _: post(url, GOOD), range(4)))
    assert sum(reward.batches) == 20
    assert max(reward.batches) > 1


def test_a_large_request_is_scored_in_batches():
    reward = Slow()
    reward.open.set()
    with serving(reward, max_batch=4) as url:
        levels = list(range(10))
        body = {"prompt": ["x"] * 10, "image": [png(level) for level in levels]}
        assert post(url, body).json()["rewards"] == levels
    assert reward.batches == [4, 4, 2]


def test_a_full_queue_refuses_and_empties():
    reward = Slow()
    with serving(reward, max_batch=1, max_queue=2) as url, ThreadPoolExecutor(3) as clients:
        scored = clients.submit(post, url, GOOD)
        assert reward.entered.wait(10)
        waiting = clients.submit(post, url, {"prompt": ["a", "b"], "image": [png(), png()]})
        time.sleep(0.5)
        refused = post(url, GOOD)
        assert refused.status_code == 503
        assert httpx2.get(f"{url}/health").status_code == 200  # also while it scores
        assert refused.headers["Retry-After"] == "1"
        assert refused.json() == {"detail": "2 samples wait already: try again"}
        reward.open.set()
        assert scored.result().json()["rewards"] == [0]
        assert waiting.result().json()["rewards"] == [0, 0]
        assert post(url, GOOD).json()["rewards"] == [0]


# --- Rewards that fail ---


def test_a_row_without_a_score_is_null():
    def reward(images, prompts):
        return torch.tensor([float(prompt.text) for prompt in prompts])

    with serving(reward) as url:
        body = {"prompt": ["1", "nan", "inf", "-2.5"], "image": [png()] * 4}
        assert post(url, body).json() == {"rewards": [1, None, None, -2.5], "errors": []}


def test_what_fails_is_told_and_does_not_harm_others():
    door = Slow()

    def reward(images, prompts):
        door(images, prompts)
        if any(prompt.text == "bad" for prompt in prompts):
            raise KeyError("no\nmetadata")
        return torch.ones(len(images))

    with serving(reward) as url, ThreadPoolExecutor(4) as clients:
        clients.submit(post, url, GOOD)
        assert door.entered.wait(10)
        texts = [["a", "bad"], ["b"], ["c", "d"]]
        found = [clients.submit(post, url, {"prompt": t, "image": [png()] * len(t)}) for t in texts]
        time.sleep(0.3)
        door.open.set()
        bad, one, two = (each.result().json() for each in found)
    assert bad == {"rewards": [None, None], "errors": ["KeyError: 'no\\nmetadata'"]}
    assert one == {"rewards": [1], "errors": []}
    assert two == {"rewards": [1, 1], "errors": []}
    assert door.batches[:2] == [1, 5]


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (UnavailableError("no weights"), 500, "no weights"),
        (MemoryError(), 503, "out of memory with 1 samples"),
        (torch.OutOfMemoryError("x"), 503, "out of memory with 1 samples"),
    ],
)
def test_a_reward_that_cannot_score_at_all(error, status, sentence):
    def reward(images, prompts):
        raise error

    with serving(reward) as url:
        answer = post(url, GOOD)
        assert answer.status_code == status
        assert sentence in answer.json()["detail"]


def test_wrong_shapes_and_exits_are_errors_of_the_rows():
    def reward(images, prompts):
        if prompts[0].text == "exit":
            sys.exit("bye")
        return torch.zeros(7)

    with serving(reward) as url:
        assert post(url, {**GOOD, "prompt": ["exit"]}).json() == {"rewards": [None], "errors": ["SystemExit: bye"]}
        assert "shape (7,) for 1 samples" in post(url, GOOD).json()["errors"][0]


# --- Chance ---


def fuzzed(chance, strange):
    """A request's body and headers, wrong in some place most of the time."""

    def value(depth=0):
        kinds = [*strange, chance.randbytes(9).hex()]
        if depth < 3 and chance.random() < 0.5:
            items = [value(depth + 1) for _ in range(chance.randrange(4))]
            return items if chance.random() < 0.5 else dict(zip(["shape", "float32", "x"], items, strict=False))
        return chance.choice(kinds)

    kind = chance.randrange(6)
    if kind == 0:
        return chance.randbytes(chance.randrange(2000)), {}
    if kind == 1:
        return b"[" * chance.randrange(50_000), {}
    body = {
        "prompt": ["a", "b"],
        "image": [png(3), raw(torch.rand(3, 2, 2))],
        "metadata": [{}, {"x": 1}],
        "video": None,
    }
    if kind == 2:
        body["prompt"] = ["a"] * chance.randrange(5000)
    for _ in range(chance.randrange(3)):
        name = chance.choice([*body, "condition_images", "condition_videos"])
        column = body.get(name)
        if isinstance(column, list) and column and chance.random() < 0.7:
            column[chance.randrange(len(column))] = value()
        else:
            body[name] = value()
    data = json.dumps(body).encode()
    if kind == 3:
        data = bytearray(data)
        data[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(data), {}
    headers = {"Content-Type": chance.choice(["application/json", "application/json; charset=x", "text/html"])}
    return data, headers if kind == 4 else {}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_five_hundred_bad_requests_leave_it_well():
    chance = random.Random(0)
    strange = [None, True, -1, 10**30, 1e308, "", "x", png(), png()[:-9], bomb(3000, 3000), bomb(500, 500)]
    levels = [0, 51, 255]
    good = {"prompt": ["a"] * 3, "image": [png(level) for level in levels]}
    seen = set()
    with serving(brightness, max_decoded=10**6, max_body=10**6) as url:
        with httpx2.Client(trust_env=False, timeout=20) as client:
            for i in range(500):
                data, headers = fuzzed(chance, strange)
                headers = {"Content-Type": "application/json", **headers}
                answer = client.post(f"{url}/compute", content=data, headers=headers)
                seen.add(answer.status_code)
                value = answer.json()
                if answer.status_code == 200:
                    assert all(score is None or 0 <= score <= 255 for score in value["rewards"])
                else:
                    assert isinstance(value["detail"], str)
                if i % 50 == 0:
                    assert client.get(f"{url}/health").json() == {"status": "ok"}
                    assert post(url, good).json() == {"rewards": levels, "errors": []}
        assert post(url, good).json() == {"rewards": levels, "errors": []}
    assert seen == {200, 413, 415, 422}


# --- The command ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes", "--host", "0.0.0.0"], "any machine could send requests"),
        (["shapes", "--token-env", "NOT_SET"], "NOT_SET, which --token-env names, is not set"),
        (["shapes", "--token-env", "ODD"], "printable ASCII"),
        (["shape"], "did you mean 'shapes'?"),
        (["win_rate(shapes)"], "win_rate(remote(url=…))"),
        (["shapes", "--max-batch", "0"], "max_batch must be at least 1"),
        (["shapes", "--max-queue", "0"], "max_queue must be at least 1"),
        (["shapes", "--device", "toaster"], "cannot use the device 'toaster'"),
    ],
)
def test_what_the_command_refuses(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.setenv("ODD", "pass\x07wort")
    assert cli.main(["serve-reward", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_cannot_be_listened_on(capsys):
    with serving(brightness) as url:
        for port in (url.rpartition(":")[2], "70000"):
            assert cli.main(["serve-reward", "shapes", "--port", port]) == 1
            assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_a_reward_that_compares_groups_is_refused():
    with pytest.raises(ValueError, match="compares the samples of a group cannot be served"):
        RewardServer(WinRate(brightness))


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_stop(tmp_path):
    (tmp_path / "own.py").write_text(
        "import time\n"
        "def reward(images, prompts):\n"
        "    if prompts[0].text == 'hang':\n        time.sleep(60)\n"
        "    return (images.mean((1, 2, 3)) * 255).round()\n"
    )
    command = [sys.executable, "-m", "denoise_env", "serve-reward", "own:reward", "--token-env", "TOKEN"]
    environment = {**os.environ, "TOKEN": "sesame", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = {"cwd": tmp_path, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # in a background job it is ignored
    numbers = [signal.SIGINT, signal.SIGTERM]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(command, **options)) for _ in numbers]
        for process in processes:
            stack.callback(process.kill)
        for number, process in zip(numbers, processes, strict=True):
            url = process.stdout.readline().split(" is served on ")[1].split(";")[0]
            assert url.startswith("http://127.0.0.1:")
            assert f"""remote(url="{url}", token_env="TOKEN")""" in process.stdout.readline()
            right = {"Authorization": "Bearer sesame"}
            assert post(url, GOOD).status_code == 401
            assert post(url, {**GOOD, "image": [png(5)]}, **right).json()["rewards"] == [5]
            hung = []
            hang = {**GOOD, "prompt": ["hang"]}
            thread = threading.Thread(
                target=lambda u=url, h=hang, r=right, a=hung: a.append(post(u, h, **r)), daemon=True
            )
            thread.start()
            time.sleep(0.5)
            process.send_signal(number)
            assert process.wait(20) == 128 + number
            thread.join(5)
            assert hung[0].status_code == 503
            assert hung[0].json() == {"detail": "the server is stopping"}
            error = process.stderr.read()
            assert "denoise-env: stopped; start again with: denoise-env serve-reward own:reward" in error
            assert "Traceback" not in error

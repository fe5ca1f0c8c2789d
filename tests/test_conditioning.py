"""Conditioning: encoded once, kept within budgets, on the device by row; on disk for those who ask."""

import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from tensordict import TensorDict

from denoise_env.conditioning import ConditioningStore, fingerprint
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.models.base import DenoisingModel
from denoise_env.prompts import Prompt
from denoise_env.schedules import Schedule

TOKENS, FEATURES = 512, 4096  # T5-XXL's


class Texts(DenoisingModel):
    """A model of any text: the same noise for the same text, as many tokens as it has words where they are masked."""

    latent_shape = (2,)
    prediction_type = "flow_prediction"
    dtype = torch.bfloat16
    guidance_scale = 1.0

    def __init__(self, tokens=8, features=4, masked=False, seed=0):
        self.network = torch.nn.Linear(1, 1)
        self.encoder = torch.nn.Linear(1, 1)
        for parameter in self.encoder.parameters():
            torch.nn.init.constant_(parameter, float(seed))
        self.tokens, self.features, self.calls = tokens, features, []
        self.masks = {"embeds": "mask"} if masked else {}

    def schedule(self, num_steps):
        return Schedule.flow(num_steps)

    def encoders(self):
        return {"encoder": self.encoder}

    def embed(self, text):
        generator = torch.Generator().manual_seed(sum(text.encode()))
        return torch.randn(self.tokens, self.features, generator=generator).to(self.dtype)

    def encode(self, prompts):
        self.calls.append([p.text for p in prompts])
        assert len({p.negative is None for p in prompts}) == 1
        embeds = torch.stack([self.embed(p.text) for p in prompts])
        if not self.masks:
            return TensorDict({"embeds": embeds}, batch_size=len(prompts))
        lengths = torch.tensor([len(p.text.split()) for p in prompts])
        mask = torch.arange(self.tokens) < lengths[:, None]
        return TensorDict({"embeds": embeds * mask[..., None], "mask": mask}, batch_size=len(prompts))

    def pool(self, conditioning):
        return conditioning["embeds"].float().mean(1)

    def predict(self, latents, timestep, conditioning, guidance_scale=None):
        return latents

    def decode(self, latents):
        return latents

    def export(self, directory):
        raise NotImplementedError


def texts(count):
    return [f"prompt {i}" for i in range(count)]


def test_rows_are_those_of_their_prompts_in_any_order_and_number():
    store = ConditioningStore(Texts())
    index = store.index(texts(5))
    rows = store.rows(index[[3, 1, 3, 0]])["embeds"]
    for row, i in zip(rows, (3, 1, 3, 0), strict=True):
        assert torch.equal(row, store.model.embed(f"prompt {i}"))


def test_what_a_caller_does_to_a_batch_does_not_reach_the_next():
    store = ConditioningStore(Texts())
    index = store.index(texts(3))
    first = store.rows(index[[0, 2]])
    kept = first.clone()
    first["embeds"] = first["embeds"] * 0
    first["more"] = torch.ones(2)
    again = store.rows(index[[0, 2]])
    assert set(again.keys()) == set(kept.keys())
    assert torch.equal(again["embeds"], kept["embeds"])
    assert torch.equal(store.rows(index[[2, 0]])["embeds"], kept["embeds"].flip(0))


def test_only_what_is_asked_for_is_encoded_and_only_once():
    model = Texts()
    store = ConditioningStore(model)
    index = store.index(texts(100))
    assert model.calls == []
    store.rows(index[[7, 9, 7]])
    store.rows(index[[9, 8]])
    assert model.calls == [["prompt 7", "prompt 9"], ["prompt 8"]]
    store.prepare(index[:40])
    assert [len(call) for call in model.calls[2:]] == [16, 16, 5]  # 40, less the three that are known
    store.rows(index[:40])
    assert store.encoded == 40


def test_metadata_makes_another_prompt_with_the_same_conditioning():
    store = ConditioningStore(Texts())
    index = store.index([Prompt("a", metadata={"n": 1}), Prompt("a", metadata={"n": 2}), "a"])
    assert index.tolist() == [0, 1, 2]
    store.rows(index)
    assert store.encoded == 1


def test_prompts_with_and_without_a_negative_text_are_encoded_apart(make_shapes):
    mdp = make_shapes(guidance_scale=3.0)
    plain, negative = "a red circle on gray", Prompt("a red circle on gray", negative="a blue square on gray")
    store = mdp.conditioning
    both = store.rows(store.index([plain, negative, Prompt(plain, negative="")]))
    assert torch.equal(both["negative_prompt_embeds"][0], both["negative_prompt_embeds"][2])
    assert torch.equal(
        both["negative_prompt_embeds"][1], store.rows(store.index(["a blue square on gray"]))["prompt_embeds"][0]
    )
    latents = torch.randn(1, 4, 8, 8).expand(3, -1, -1, -1)
    output = mdp.model.predict(latents, mdp.schedule.timesteps[0], both)
    torch.testing.assert_close(output[0], output[2])
    assert (output[0] - output[1]).abs().max() > 1e-3
    alone = mdp.model.predict(latents[:1], mdp.schedule.timesteps[0], store.rows(store.index([plain])))
    torch.testing.assert_close(alone[0], output[0])


def test_masked_text_is_padded_to_the_longest_of_the_batch():
    model = Texts(masked=True)
    store = ConditioningStore(model)
    index = store.index(["one", "one two three", "one two"])
    rows = store.rows(index)
    assert rows["embeds"].shape == (3, 3, 4)
    assert rows["mask"].tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert not rows["embeds"][0, 1:].any()
    alone = store.rows(index[2:])
    assert alone["embeds"].shape == (1, 2, 4)
    assert torch.equal(alone["embeds"][0], rows["embeds"][2, :2])
    assert store.host_bytes == (1 + 3 + 2) * 4 * 2  # no padding is kept
    model.compiled, model.longest = True, 8
    assert store.rows(index)["embeds"].shape == (3, 8, 4)
    assert store.rows(index)["mask"].sum(1).tolist() == [1, 3, 2]


def test_attended_padding_keeps_its_fixed_length():
    store = ConditioningStore(Texts())
    assert store.rows(store.index(["one", "one two"]))["embeds"].shape == (2, 8, 4)


def test_the_host_budget_holds_and_what_it_drops_is_encoded_again():
    model = Texts()
    row = 8 * 4 * 2
    store = ConditioningStore(model, host_bytes=3 * row)
    index = store.index(texts(10))
    for i in index.split(2):
        store.rows(i)
        assert store.host_bytes <= 3 * row
    store.rows(index[[9]])
    assert store.encoded == 10
    assert torch.equal(store.rows(index[[0]])["embeds"][0], model.embed("prompt 0"))
    assert store.encoded == 11
    nothing = ConditioningStore(model, host_bytes=0)
    assert torch.equal(nothing.rows(nothing.index(["prompt 0"]))["embeds"][0], model.embed("prompt 0"))
    assert nothing.host_bytes == 0


class Elsewhere(Texts):
    """Says that its device is not the host; tensors that go there are counted."""

    device = torch.device("meta")


def test_the_device_holds_its_budget_and_encoders_leave_it():
    model = Elsewhere()
    row = 8 * 4 * 2
    store = ConditioningStore(model, device_bytes=3 * row)
    index = store.index(texts(6))
    for i in (0, 1, 0, 2, 3, 0):
        assert store.rows(index[[i]])["embeds"].device.type == "meta"
        assert store.device_bytes <= 3 * row
    assert (store.device_bytes, store.host_bytes) == (3 * row, 4 * row)


def test_a_refused_prompt_leaves_the_prompts_as_they_were(points):
    store = ConditioningStore(Texts())
    store.index(["a"])
    for bad, message in (
        ([" "], "prompt 0 must be a non-empty string"),
        (["b", 3], "prompt 1 must be"),
        ("b", "put the one prompt in a list"),
        ([], "must not be empty"),
        (["b", Prompt("c", images=np.zeros((4, 4, 3), np.uint8))], "Texts takes no image"),
    ):
        with pytest.raises(ValueError, match=message):
            store.index(bad)
    assert store.prompts == [Prompt("a")]
    with pytest.raises(ValueError, match="has no guidance, so a negative text has no meaning"):
        points.conditioning.index([Prompt("ring", negative="line")])


class Framed(Texts):
    images_per_prompt = 1


def test_a_model_of_first_frames_wants_one():
    store = ConditioningStore(Framed())
    with pytest.raises(ValueError, match=r"Framed takes 1 image\(s\) with a prompt; 'a' has none"):
        store.index(["a"])
    first, second = (Prompt("a", images=np.full((4, 4, 3), value, np.uint8)) for value in (0, 1))
    assert store.index([first, second, first]).tolist() == [0, 1, 0]


def test_resets_and_evaluation_share_a_store_but_not_what_they_draw():
    model = Texts()
    reward = {"x": lambda images, prompts: images[:, 0].float()}
    train = DenoisingMDP(model, reward, ["a", "b"], 2)
    other = DenoisingMDP(model, reward, ["c", "b"], 2, conditioning=train.conditioning)
    train.reset(row_generators([0]), ["d"])
    drawn = {train.prompts[i].text for i in train.reset(row_generators(range(64))).prompt_index.tolist()}
    assert drawn == {"a", "b"} == {p.text for p in train.drawn_prompts}
    assert {other.prompts[i].text for i in other.reset(row_generators(range(64))).prompt_index.tolist()} == {"b", "c"}


# --- On disk ---


def test_rows_on_disk_are_read_by_the_next_process_and_not_encoded(tmp_path):
    first = ConditioningStore(Texts(), directory=tmp_path)
    rows = first.rows(first.index(texts(3)))
    again = ConditioningStore(Texts(), directory=tmp_path)
    assert torch.equal(again.rows(again.index(texts(3)))["embeds"], rows["embeds"])
    again.prepare(again.index(texts(3)))
    assert again.encoded == 0


def test_a_cache_of_another_checkpoint_is_refused(tmp_path):
    store = ConditioningStore(Texts(), directory=tmp_path / "a")
    assert not (tmp_path / "a").exists()  # until there is a row to write
    store.rows(store.index(["a"]))
    with pytest.raises(ValueError, match="was made by another checkpoint, precision, length or size"):
        ConditioningStore(Texts(seed=1), directory=tmp_path / "a")
    assert fingerprint(Texts()) == fingerprint(Texts())
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ValueError, match="cannot be used"):
        ConditioningStore(Texts(), directory=tmp_path / "file")
    with pytest.raises(ValueError, match="no conditioning cache and not empty"):
        ConditioningStore(Texts(), directory=tmp_path)
    (tmp_path / "a" / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be used"):
        ConditioningStore(Texts(), directory=tmp_path / "a")


def test_a_truncated_row_is_named_and_what_is_being_written_is_not_read(tmp_path):
    store = ConditioningStore(Texts(), directory=tmp_path)
    store.rows(store.index(["a"]))
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    again = ConditioningStore(Texts(), directory=tmp_path)
    with pytest.raises(ValueError, match=rf"{path.name} of the conditioning cache is truncated or damaged"):
        again.rows(again.index(["a"]))
    path.unlink()
    path.with_name(f".{path.name}.1.tmp").write_bytes(whole[:20])  # another process has begun to write it
    assert torch.equal(again.rows(again.index(["a"]))["embeds"][0], Texts().embed("a"))
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_two_processes_fill_one_cache(tmp_path):
    program = """
import sys, torch
from test_conditioning import Texts, texts
from denoise_env.conditioning import ConditioningStore
store = ConditioningStore(Texts(), host_bytes=0, directory=sys.argv[1])
index = store.index(texts(200))
order = torch.randperm(200, generator=torch.Generator().manual_seed(int(sys.argv[2])))
for part in index[order].split(3):
    rows = store.rows(part)["embeds"]
    for i, row in zip(part.tolist(), rows):
        assert torch.equal(row, store.model.embed(f"prompt {i}"))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(seed)], env=environment) for seed in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 200
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_fifty_thousand_prompts_of_t5_xxl():
    """[512, 4096] bf16 is 4 MiB a prompt, 205 GiB in all: construction encodes nothing, budgets hold, and an
    iteration encodes the prompts it draws."""
    model = Texts(TOKENS, FEATURES)
    model.embed = lambda text: torch.full((TOKENS, FEATURES), len(text), dtype=torch.bfloat16)
    row, process = TOKENS * FEATURES * 2, psutil.Process()
    before = process.memory_info().rss
    started = time.perf_counter()
    mdp = DenoisingMDP(
        model,
        {"x": lambda images, prompts: images[:, 0].float()},
        texts(50_000),
        2,
        conditioning=ConditioningStore(model, host_bytes=40 * row),
    )
    seconds = time.perf_counter() - started
    assert (seconds < 10, mdp.conditioning.encoded) == (True, 0)  # 2 s on two idle cores
    peak = 0
    for iteration in range(4):
        state = mdp.reset(row_generators(range(iteration * 32, iteration * 32 + 32)))
        mdp.conditioning.prepare(state.prompt_index)
        for chunk in state.prompt_index.split(8):
            rows = mdp.conditioning.rows(chunk)
            assert rows["embeds"].nbytes == 8 * row
            peak = max(peak, process.memory_info().rss - before)
            del rows
        assert mdp.conditioning.encoded <= 32 * (iteration + 1)
        assert mdp.conditioning.host_bytes <= 40 * row
    print(f"\nconstruction {seconds:.2f} s; at most {peak / 2**20:.0f} MiB more than before")
    assert peak < (40 + 16 + 16 + 3 * 8 + 40) * row  # the budget, a batch being encoded, its rows, a microbatch

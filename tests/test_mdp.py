"""The denoising MDP: reset, step, score."""

import math
import re
import sys
import types

import pytest
import torch
from tensordict import TensorDict

from denoise_env.mdp import DenoisingMDP, State, row_generators
from denoise_env.models.base import DenoisingModel, Family, ModelOptions
from denoise_env.models.points import MIXTURES, Points
from denoise_env.prompts import Prompt
from denoise_env.rewards import NAMES, load_reward
from denoise_env.rewards.points import PointsReward
from denoise_env.schedules import Schedule

PROMPTS = list(MIXTURES)


def first_coordinate(images, prompts):
    return images[:, 0]


def prompt_length(images, prompts):
    return torch.tensor([float(len(p.text)) for p in prompts])


def build(prompts=PROMPTS, rewards=None, model=None, **options) -> DenoisingMDP:
    return DenoisingMDP(model or Points(), rewards or {"x": first_coordinate}, prompts, 4, **options)


class EchoOptions(ModelOptions):
    family = "echo"


class Echo(DenoisingModel):
    """Takes any text; counts what it encodes."""

    latent_shape = (1, 2, 2)
    prediction_type = "epsilon"
    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.network = torch.nn.Linear(1, 1)
        self.encoded: list[str] = []

    def schedule(self, num_steps):
        return Schedule.flow(num_steps)

    def encode(self, prompts):
        self.encoded += [p.text for p in prompts]
        return TensorDict({"length": torch.tensor([len(p.text) for p in prompts])}, batch_size=len(prompts))

    def pool(self, conditioning):
        return conditioning["length"].float()[:, None]

    def predict(self, latents, timestep, conditioning):
        raise AssertionError("the environment never calls the network")

    def decode(self, latents):
        return latents.float().expand(-1, 3, -1, -1).clamp(0, 1)

    def export(self, directory):
        raise NotImplementedError


# --- Reset ---


@pytest.mark.parametrize("prompts", [None, ["ring", "grid", "line", "ring", "cross"]])
def test_a_row_does_not_depend_on_its_batch(prompts) -> None:
    seeds = [3, 1, 4, 1, 5]
    batch = build().reset(row_generators(seeds), prompts)
    for i, seed in enumerate(seeds):
        alone = build().reset(row_generators([seed]), prompts and prompts[i : i + 1])
        assert torch.equal(batch.latents[i], alone.latents[0])
        if prompts is None:
            assert batch.prompt_index[i] == alone.prompt_index[0]
    assert torch.equal(batch.latents[1], batch.latents[3])  # the same seed
    assert not torch.equal(batch.latents[0], batch.latents[1])


def test_reset_starts_every_row_from_standard_noise_at_step_zero() -> None:
    state = build().reset(row_generators(range(2000)))
    assert state.latents.shape == (2000, 2)
    assert state.latents.dtype == torch.float32
    assert state.step.tolist() == [0] * 2000
    assert abs(state.latents.mean().item()) < 4 / math.sqrt(4000)
    assert state.latents.std().item() == pytest.approx(1, abs=4 / math.sqrt(8000))


def test_latents_come_in_the_models_dtype() -> None:
    model = Echo()
    state = build(["a"], model=model).reset(row_generators([0, 1]))
    assert state.latents.dtype == torch.bfloat16
    assert state.latents.shape == (2, 1, 2, 2)


def test_reset_draws_from_all_its_prompts_evenly() -> None:
    index = build().reset(row_generators(range(1200))).prompt_index
    counts = index.bincount(minlength=6)
    assert (counts - 200).abs().max() < 4 * math.sqrt(200 * 5 / 6)


def test_prompts_that_join_later_do_not_change_what_reset_draws() -> None:
    mdp = build(["ring", "grid"])
    before = mdp.reset(row_generators(range(50))).prompt_index
    mdp.reset(row_generators([0]), ["spiral"])
    assert torch.equal(mdp.reset(row_generators(range(50))).prompt_index, before)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("prompts", [None, ["grid", "line"]])
def test_groups(shared: bool, prompts) -> None:
    """A group has one prompt; with shared noise also one start, its first row's."""
    mdp = build()
    state = mdp.reset(row_generators(range(6)), prompts, group_size=3, shared_noise=shared)
    index = state.prompt_index.view(2, 3)
    assert (index == index[:, :1]).all()
    if prompts:
        assert [mdp.prompts[i].text for i in index[:, 0]] == prompts
    groups = state.latents.view(2, 3, 2)
    assert torch.equal(groups[:, 0], groups[:, 1]) == shared
    assert not torch.equal(groups[0, 0], groups[1, 0])
    leaders = mdp.reset(row_generators([0, 3]), prompts)
    assert torch.equal(groups[:, 0], leaders.latents)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (4, {"group_size": 3}, "4 rows cannot be divided into groups of 3"),
        (4, {"group_size": 0}, "groups of 0"),
        (0, {}, "0 rows cannot be divided"),
        (4, {"prompts": ["ring"], "group_size": 2}, "1 prompts in groups of 2 make 2 rows, not 4"),
        (1, {"prompts": []}, "must not be empty"),
        (4, {"prompts": "ring"}, r"put the one prompt in a list: \['ring'\]"),
        (1, {"prompts": [" "]}, "prompt 0 must be a non-empty string, not ' '"),
        (2, {"prompts": ["ring", 3]}, "prompt 1 must be a non-empty string, not 3"),
        (1, {"prompts": ["circle"]}, "knows no prompt 'circle'"),
    ],
)
def test_reset_refuses(rows: int, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().reset(row_generators(range(rows)), **options)


# --- Prompts ---


def test_a_prompts_index_never_changes_and_it_is_encoded_once() -> None:
    model = Echo()
    mdp = build(["b", "aa", "b"], model=model)
    assert [p.text for p in mdp.prompts] == ["b", "aa"]
    state = mdp.reset(row_generators([0, 1, 2, 3]), ["ccc", "aa", "ccc", "b"])
    assert state.prompt_index.tolist() == [2, 1, 2, 0]
    assert model.encoded == []
    assert mdp.conditioning.rows(torch.tensor([2, 0, 2]))["length"].tolist() == [3, 1, 3]
    assert model.encoded == ["ccc", "b"]
    assert mdp.conditioning.rows(torch.arange(3))["length"].tolist() == [1, 2, 3]
    assert model.encoded == ["ccc", "b", "aa"]


def test_a_refused_prompt_leaves_the_table_as_it_was() -> None:
    mdp = build(["ring"])
    with pytest.raises(ValueError, match="knows no prompt"):
        mdp.conditioning.index(["grid", "circle"])
    assert [p.text for p in mdp.prompts] == ["ring"]
    assert mdp.conditioning.index(["line", "ring"]).tolist() == [1, 0]


def test_many_prompts_are_encoded_in_order() -> None:
    words = ["x" * n for n in range(1, 200)]
    rows = build(words, model=Echo()).conditioning.rows(torch.arange(199))
    assert rows["length"].tolist() == list(range(1, 200))


def test_metadata_reaches_the_rewards() -> None:
    def count(images, prompts):
        assert [p.metadata["of"] for p in prompts] == [p.text for p in prompts]
        return torch.tensor([float(p.metadata["count"]) for p in prompts])

    prompts = [Prompt(p, metadata={"count": i, "of": p}) for i, p in enumerate(PROMPTS)]
    mdp = build(prompts, rewards={"count": count}, microbatch=2)
    index = torch.tensor([5, 0, 3, 3, 1])
    assert mdp.score(torch.zeros(5, 2), index).total.tolist() == [5, 0, 3, 3, 1]


def test_prompts_without_metadata_have_empty_mappings() -> None:
    seen = []
    mdp = build(rewards={"spy": lambda images, prompts: seen.extend(p.metadata for p in prompts) or images[:, 0]})
    mdp.score(torch.zeros(2, 2), torch.tensor([0, 1]))
    assert seen == [{}, {}]


# --- Step ---


def test_an_episode() -> None:
    mdp = build()
    state = mdp.reset(row_generators([0, 1]), ["ring", "grid"])
    for k in range(mdp.num_steps):
        action = torch.full((2, 2), float(k))
        state = mdp.step(state, action)
        assert torch.equal(state.latents, action)
        assert state.step.tolist() == [k + 1] * 2
    assert [mdp.prompts[i].text for i in state.prompt_index] == ["ring", "grid"]
    with pytest.raises(ValueError, match="over after 4 steps: reset first"):
        mdp.step(state, action)


def test_one_row_at_its_end_refuses_the_step() -> None:
    state = State(torch.zeros(2, 2), torch.tensor([1, 4]), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="episode is over"):
        build().step(state, torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([[0.0, 0.0]], "a tensor of latents, not list"),
        (torch.zeros(1, 2), r"shape must be \(3, 2\), not \(1, 2\)"),
        (torch.zeros(3, 2, 1), r"not \(3, 2, 1\)"),
        (torch.zeros(3, 2, dtype=torch.float64), "dtype must be torch.float32, not torch.float64"),
        (torch.zeros(3, 2, device="meta"), "must be on cpu, not on meta"),
        (torch.tensor([[0.0, 0.0], [0.0, math.nan], [0.0, 0.0]]), "NaN or infinity"),
        (torch.tensor([[0.0, 0.0], [0.0, 0.0], [math.inf, 0.0]]), "NaN or infinity"),
    ],
)
def test_step_refuses_a_bad_action(action, message: str) -> None:
    mdp = build()
    with pytest.raises(ValueError, match=message):
        mdp.step(mdp.reset(row_generators(range(3))), action)


# --- Score ---


def latents(rows: int = 7) -> torch.Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))


INDEX = torch.tensor([0, 1, 2, 3, 4, 5, 0])


def test_total_is_the_weighted_sum_and_values_stay_apart() -> None:
    rewards = {"x": first_coordinate, "length": prompt_length}
    scores = build(rewards=rewards, reward_weights={"x": 2.0, "length": -0.5}).score(latents(), INDEX)
    length = torch.tensor([float(len(PROMPTS[i])) for i in INDEX])
    assert torch.equal(scores.values["x"], latents()[:, 0])
    assert torch.equal(scores.values["length"], length)
    torch.testing.assert_close(scores.total, 2 * latents()[:, 0] - 0.5 * length)
    assert scores.valid.all()
    assert scores.errors == {}
    assert scores.total.dtype == torch.float32


def test_points_reward_is_a_gaussian_around_the_first_component() -> None:
    target = torch.tensor([MIXTURES[PROMPTS[i]][0] for i in INDEX])
    got = build(rewards={"points": PointsReward()}).score(latents(), INDEX).total
    torch.testing.assert_close(got, (-2 * (latents() - target).square().sum(1)).exp())
    mdp = build(["ring", "elsewhere"], {"points": PointsReward()}, model=Echo())
    mdp.model.decode = lambda x: torch.tensor(MIXTURES["ring"][:1]).expand(len(x), 2)
    scores = mdp.score(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))
    assert scores.values["points"][0] == 1
    assert scores.valid.tolist() == [True, False]


@pytest.mark.parametrize("microbatch", [1, 2, 3, 7, 100])
def test_the_microbatch_bounds_the_calls_and_does_not_change_the_result(microbatch: int) -> None:
    sizes = []

    def spy(images, prompts):
        sizes.append(len(images))
        assert len(images) == len(prompts)
        return images[:, 0] + len(prompts[0].text) * 0

    rewards = {"points": PointsReward(), "length": prompt_length, "spy": spy}
    whole = build(rewards=rewards).score(latents(), INDEX)
    sizes.clear()
    parts = build(rewards=rewards, microbatch=microbatch).score(latents(), INDEX)
    assert max(sizes) <= microbatch
    assert sum(sizes) == 7
    assert torch.equal(parts.total, whole.total)
    assert all(torch.equal(parts.values[name], whole.values[name]) for name in rewards)


def raises(images, prompts):
    raise RuntimeError("out of tea")


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (raises, "RuntimeError: out of tea"),
        (lambda i, p: i, r"ValueError: it returned shape \(2, 2\) for 2 images"),
        (lambda i, p: i[:1, 0], r"it returned shape \(1,\) for 2 images"),
        (lambda i, p: 0.5, r"it returned shape \(\) for 2 images"),
        (lambda i, p: None, "RuntimeError|TypeError"),
    ],
)
def test_a_failing_reward_masks_only_the_rows_it_was_called_with(bad, error: str) -> None:
    def sometimes(images, prompts):
        return bad(images, prompts) if Prompt("line") in prompts else images[:, 0]

    mdp = build(rewards={"sometimes": sometimes, "x": first_coordinate}, microbatch=2)
    with pytest.warns(UserWarning, match="reward 'sometimes' failed on 2 rows"):
        scores = mdp.score(latents(), INDEX)  # rows 0 and 1 share a call with "line"
    assert scores.valid.tolist() == [False] * 2 + [True] * 5
    assert torch.equal(scores.total.isnan(), ~scores.valid)
    assert torch.equal(scores.values["x"], latents()[:, 0])
    assert torch.equal(scores.values["sometimes"][2:], latents()[2:, 0])
    assert re.search(error, scores.errors["sometimes"])
    assert "x" not in scores.errors


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_masks_its_row_alone(nonsense: float) -> None:
    def reward(images, prompts):
        return torch.tensor([1.0, nonsense, 3.0])

    scores = build(rewards={"r": reward}).score(latents(3), INDEX[:3])
    assert scores.valid.tolist() == [True, False, True]
    assert scores.values["r"][[0, 2]].tolist() == [1, 3]
    assert scores.values["r"][1].isnan()
    assert scores.total[1].isnan()


def test_a_reward_of_weight_0_is_measured_and_does_not_touch_the_total() -> None:
    def fails(images, prompts):
        return images[:, 1].where(images[:, 0] > 0, torch.nan)

    rewards = {"fails": fails, "x": first_coordinate}
    scores = build(rewards=rewards, reward_weights={"fails": 0.0, "x": 2.0}).score(latents(), INDEX)
    assert 0 < scores.values["fails"].isnan().sum() < 7
    assert torch.equal(scores.total, 2 * latents()[:, 0])
    assert scores.valid.all()
    swapped = build(rewards=rewards, reward_weights={"fails": 1.0, "x": 0.0}).score(latents(), INDEX)
    assert torch.equal(swapped.valid, latents()[:, 0] > 0)
    assert torch.equal(swapped.total.isnan(), ~swapped.valid)
    nothing = build(rewards=rewards, reward_weights={"fails": 0.0, "x": 0.0}).score(latents(), INDEX)
    assert nothing.total.tolist() == [0.0] * 7
    assert nothing.valid.all()


def test_lists_and_integers_are_rewards_too() -> None:
    scores = build(rewards={"r": lambda i, p: [1, 2, 3]}).score(latents(3), INDEX[:3])
    assert scores.total.tolist() == [1, 2, 3]
    assert scores.total.dtype == torch.float32


@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("aliased", [True, False])
def test_rewards_have_tensors_and_lists_of_their_own(microbatch, aliased) -> None:
    """Points' decoder returns the latents themselves, other decoders new tensors."""
    seen = []

    def vandal(images, prompts):
        seen.append((images.clone(), list(prompts)))
        images.zero_()
        prompts.clear()
        return torch.zeros(len(images))

    mdp = build(rewards={"a": vandal, "b": vandal, "c": vandal}, microbatch=microbatch)
    if not aliased:
        decode = mdp.model.decode
        mdp.model.decode = lambda x: decode(x).clone()
    given, index = latents(), INDEX.clone()
    mdp.score(given, index)
    assert torch.equal(given, latents())
    assert torch.equal(index, INDEX)
    for first, *others in zip(*(seen[i::3] for i in range(3)), strict=True):
        for other in others:
            assert torch.equal(first[0], other[0])
            assert first[1:] == other[1:]
    assert torch.equal(torch.cat([images for images, *_ in seen[::3]]), latents())


def test_pictures_are_copied_for_all_readers_but_the_last() -> None:
    where = []
    mdp = build(rewards={name: lambda i, p: where.append(i.data_ptr()) or i[:, 0] for name in "abc"})
    decoded = latents()
    mdp.model.decode = lambda x: decoded
    mdp.score(latents(), INDEX)
    assert [pointer == decoded.data_ptr() for pointer in where] == [False, False, True]
    where.clear()
    mdp.score(decoded, INDEX)  # the state reads them too
    assert decoded.data_ptr() not in where


def test_a_failing_reward_keeps_its_traceback() -> None:
    mdp = build(rewards={"bad": raises, "x": first_coordinate})
    with pytest.warns(UserWarning, match="out of tea"):
        scores = mdp.score(latents(), INDEX)
    assert scores.errors == {"bad": "RuntimeError: out of tea"}
    assert set(scores.tracebacks) == {"bad"}
    assert "in raises" in scores.tracebacks["bad"]
    assert scores.tracebacks["bad"].endswith("RuntimeError: out of tea\n")


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_running_out_of_memory_is_not_a_verdict_on_the_rows(error) -> None:
    def greedy(images, prompts):
        raise error

    with pytest.raises(error):
        build(rewards={"greedy": greedy}).score(latents(), INDEX)


def test_score_builds_no_graph() -> None:
    assert not build().score(latents().requires_grad_(), INDEX).total.requires_grad


# --- Building ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_weights": {"y": 1.0}}, r"reward_weights name \['y'\], the rewards are \['x'\]"),
        ({"microbatch": 0}, "microbatch must be at least 1"),
        ({"prompts": []}, "must not be empty"),
        ({"prompts": "ring"}, "must be a list"),
    ],
)
def test_building_refuses(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_an_environment_needs_a_reward_and_a_step() -> None:
    with pytest.raises(ValueError, match="at least one reward"):
        DenoisingMDP(Points(), {}, PROMPTS)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        DenoisingMDP(Points(), {"x": first_coordinate}, PROMPTS, 0)


@pytest.mark.parametrize("name", ["points", "points-flow"])
def test_make_knows_the_world_of_its_name(name: str) -> None:
    mdp = DenoisingMDP.make(name, num_steps=3)
    assert [p.text for p in mdp.prompts] == PROMPTS
    assert list(mdp.rewards) == ["points"]
    assert (mdp.num_steps, mdp.schedule.num_steps) == (3, 3)
    assert mdp.schedule.path == ("flow" if name == "points-flow" else "diffusion")


def test_make_takes_weights_by_name() -> None:
    mdp = DenoisingMDP.make("points", {"points": 0.5}, ["ring"])
    at_target = torch.tensor(MIXTURES["ring"][:1])
    assert mdp.score(at_target, torch.tensor([0])).total.item() == 0.5


def test_make_refuses_a_checkpoint_without_prompts_and_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_family")
    module.FAMILY = Family("takes any text", EchoOptions, lambda checkpoint, options, device: Echo())
    monkeypatch.setitem(sys.modules, "my_family", module)
    with pytest.raises(ValueError, match="'my_family:FAMILY' has no prompts of its own: name them"):
        DenoisingMDP.make("my_family:FAMILY", "points")
    with pytest.raises(ValueError, match="'my_family:FAMILY' has no rewards of its own: name them"):
        DenoisingMDP.make("my_family:FAMILY", prompts=["a cat"])

    def unreachable(*arguments):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(ValueError, match=r"cannot find 'some/model' on the hub \(ConnectionError\)"):
        DenoisingMDP.make("some/model", "points", ["a cat"])


def test_the_empty_text_is_the_prompt_of_an_unconditional_model_and_of_no_other(monkeypatch) -> None:
    class Unconditional(Echo):
        vocabulary = ("",)

    module = types.ModuleType("my_family")
    module.FAMILY = Family("takes no text", EchoOptions, lambda checkpoint, options, device: Unconditional())
    module.TEXTS = Family("takes any text", EchoOptions, lambda checkpoint, options, device: Echo())
    module.reward = lambda images, prompts: images.flatten(1).mean(1)
    monkeypatch.setitem(sys.modules, "my_family", module)
    for prompts in (None, "", [""], [Prompt("", metadata={"count": 2})]):
        mdp = DenoisingMDP.make("my_family:FAMILY", "my_family:reward", prompts)
        assert [p.text for p in mdp.prompts] == [""]
        state = mdp.reset(row_generators([0, 1]), ["", ""])
        assert mdp.score(state.latents, state.prompt_index).valid.all()
    with pytest.raises(ValueError, match="prompt 0 must be a non-empty string, not ''"):
        DenoisingMDP.make("my_family:TEXTS", "my_family:reward", "")


# --- Rewards by name ---


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's with rewards in it."""
    module = types.ModuleType("my_rewards")

    class Constant:
        def __call__(self, images, prompts):
            return torch.full((len(images),), 2.0)

    class NeedsMore:
        def __init__(self, weights):
            raise AssertionError

    class Exits:
        def __init__(self):
            raise SystemExit("no weights here")

    module.Constant, module.half, module.number = Constant, lambda i, p: torch.full((len(i),), 0.5), 3
    module.NeedsMore, module.Exits, module.one = NeedsMore, Exits, lambda images: images
    monkeypatch.setitem(sys.modules, "my_rewards", module)


@pytest.mark.usefixtures("own")
def test_rewards_of_ones_own_by_module_and_attribute() -> None:
    mdp = DenoisingMDP.make("points", {"my_rewards:Constant": 1.0, "my_rewards:half": 10.0})
    assert mdp.score(latents(2), INDEX[:2]).total.tolist() == [7, 7]


def test_load_reward_by_name() -> None:
    assert isinstance(load_reward("points"), PointsReward)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("point", "unknown reward 'point'; did you mean 'points'?"),
        ("shape-correct", "did you mean 'shapes-correct'?"),
        ("zzz", f"unknown reward 'zzz'; there are {list(NAMES)}"),
        ("", "unknown reward ''"),
        (
            "no_such_module:reward",
            "cannot load the reward 'no_such_module:reward': No module named 'no_such_module'",
        ),
        ("my_rewards:missing", "cannot load the reward 'my_rewards:missing'"),
        ("my_rewards:number", "'my_rewards:number' is not callable but int"),
        ("my_rewards:one", "'my_rewards:one' must take (images, prompts): too many positional arguments"),
        (
            "my_rewards:NeedsMore",
            "cannot build the reward 'my_rewards:NeedsMore': missing a required argument: 'weights'",
        ),
        ("my_rewards:Exits", "cannot build the reward 'my_rewards:Exits': SystemExit: no weights here"),
        (3, "unknown reward 3; there are"),
    ],
)
def test_load_reward_refuses(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_reward(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def reward(images, prompts:\n", "SyntaxError|was never closed"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("from math import nothing", "cannot import name 'nothing'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused_with_a_sentence(text, message, tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_rewards.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"cannot load the reward 'broken_rewards:reward': .*({message})"):
        DenoisingMDP.make("points", "broken_rewards:reward")
    sys.modules.pop("broken_rewards", None)

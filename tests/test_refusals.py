"""A refused or interrupted call changes nothing, in any face; what counts as an integer, a number, a boolean."""

import contextlib
from functools import cache

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from snapshots import snapshot
from torchrl.envs import TransformedEnv

from denoise_env import (
    ControlAction,
    DenoiseEnv,
    DenoiseTorchRLEnv,
    DenoiseVectorEnv,
    DenoisingMDP,
    FlatObservation,
    NoiseAction,
)
from denoise_env.conventions import Control, Flat, Noise
from denoise_env.models import load_model
from denoise_env.models.stable_diffusion import StableDiffusion, StableDiffusionOptions
from denoise_env.prompts import Prompt
from denoise_env.rewards.points import PointsReward
from denoise_env.sb3 import SB3VecEnv
from denoise_env.schedules import Schedule
from denoise_env.torchrl_transforms import ActionTransform

K, N = 2, 4


@pytest.fixture(scope="module")
def model():
    return load_model("points")


class Face:
    """One way to drive the environment: how to make it, and what its valid calls return, as a snapshot."""

    rows, shape = N, (2,)

    def __init__(self, model):
        mdp = DenoisingMDP(model, {"points": PointsReward()}, ["ring", "line", "grid"], K)
        self.mdp, self.env = mdp, self.make(mdp)

    def action(self, value=0.5):
        return np.full((self.rows, *self.shape), value, np.float32)

    def reset(self, **options):
        return snapshot(self.env.reset(**options))

    def step(self):
        return snapshot(self.env.step(self.action()))

    def state(self):
        return snapshot(self.env)


class Vector(Face):
    mode, output = "disabled", "numpy"

    def make(self, mdp):
        env = DenoiseVectorEnv.from_mdp(mdp, N, group_size=2, autoreset_mode=self.mode, output=self.output)
        env.np_random = np.random.default_rng(0)
        env.action_space.seed(0)
        return env


class Torch(Vector):
    output = "torch"

    def action(self, value=0.5):
        return torch.full((N, 2), value)


class SameStep(Vector):
    mode = "same_step"


class NextStep(Vector):
    mode = "next_step"


class ControlVector(Vector):
    shape = (3,)

    def make(self, mdp):
        return FlatObservation(ControlAction(super().make(mdp)))


class ControlSameStep(ControlVector):
    mode = "same_step"


class Single(Face):
    def make(self, mdp):
        env = DenoiseEnv.from_mdp(mdp)
        env.np_random = np.random.default_rng(0)
        return env

    def action(self, value=0.5):
        return np.full(self.shape, value, np.float32)


class SingleControl(Single):
    shape = (3,)

    def make(self, mdp):
        env = DenoiseEnv.from_mdp(mdp, wrap=ControlAction)
        env.np_random = np.random.default_rng(0)
        return env


class TorchRL(Face):
    def make(self, mdp):
        torch.manual_seed(0)
        return DenoiseTorchRLEnv.from_mdp(mdp, N, group_size=2)

    def action(self, value=0.5):
        return torch.full((N, *self.shape), value)

    def reset(self, seed=None, **options):
        if seed is not None:
            self.env.set_seed(seed)
        self.td = self.env.reset(**options)
        return snapshot(self.td.to_dict())

    def step(self):
        after = self.env.step(self.td.clone().set("action", self.action()))
        self.td = self.env.step_mdp(after)
        return snapshot(after.to_dict())

    def state(self):
        return super().state(), torch.get_rng_state().numpy().tobytes()


class TorchRLControl(TorchRL):
    shape = (3,)

    def make(self, mdp):
        return TransformedEnv(super().make(mdp), ActionTransform(Control(mdp)))


class SB3(Face):
    shape = (3,)

    def make(self, mdp):
        vector = DenoiseVectorEnv.from_mdp(mdp, N)
        vector.np_random = np.random.default_rng(0)
        return SB3VecEnv(FlatObservation(ControlAction(vector)))

    def reset(self, seed=None, **options):
        if seed is not None:
            self.env.seed(seed)
        return snapshot(self.env.reset())


FACES = {
    face.__name__: face
    for face in (
        Vector,
        Torch,
        SameStep,
        NextStep,
        ControlVector,
        ControlSameStep,
        Single,
        SingleControl,
        TorchRL,
        TorchRLControl,
        SB3,
    )
}

SEEDS = [-1, True, "0", b"1", 1.5, 2**64, np.float64(1), np.bool_(True), [True, 1, 2, 3], [0, 1, 2], np.array([[1, 2]])]
OPTIONS = [
    {"group_size": True},
    {"group_size": 2.0},
    {"group_size": "2"},
    {"group_size": 3},
    {"shared_noise": "no"},
    {"shared_noise": 1},
    {"prompts": ["circle"] * 4, "group_size": 1},
    {"prompts": "ring"},
    {"nonsense": 1},
]
MASKS = [[1, 0, 0, 0], [True, False, False, False], [True], "yes", np.ones(4)]


def refusals(name):
    """(what it is, call) of every call that a face refuses."""
    face = FACES[name]
    gym = issubclass(face, Vector | Single)
    for seed in SEEDS:
        if gym:
            yield f"reset(seed={seed!r})", lambda f, seed=seed: f.env.reset(seed=seed)
        elif face is SB3:
            yield f"seed({seed!r})", lambda f, seed=seed: f.env.seed(seed)
        else:
            yield f"set_seed({seed!r})", lambda f, seed=seed: f.env.set_seed(seed)
    for options in OPTIONS:
        if gym:
            yield f"reset({options})", lambda f, o=options: f.env.reset(seed=7, options=o)
        elif face is SB3:
            yield f"set_options({options})", lambda f, o=options: f.env.set_options(o)
        else:
            yield f"reset(**{options})", lambda f, o=options: f.env.reset(**o)
    for mask in MASKS if issubclass(face, Vector) else ():
        yield f"mask {mask}", lambda f, m=mask: f.env.reset(seed=7, options={"reset_mask": m})
    for options in ([("group_size", 2)], "group_size", 5) if gym else ():
        yield f"options {options!r}", lambda f, o=options: f.env.reset(options=o)
    if face is SB3:
        yield "options that differ", lambda f: f.env.set_options([{"group_size": 2}, {}, {}, {}])


def refused_actions(name):
    """(what it is, action of a face) of every action that a face refuses."""
    for value in (np.nan, np.inf):
        yield f"step({value})", lambda f, v=value: f.action(v)
    yield "a wrong shape", lambda f: f.action()[..., :1]
    if not issubclass(FACES[name], TorchRL):
        yield "words", lambda f: np.full(f.action().shape, "up")
        yield "a list", lambda f: f.action().tolist()
    if FACES[name].shape != (2,):
        yield "booleans", lambda f: f.action() > 0


def make_step(face, action):
    if isinstance(face, TorchRL):
        return face.env.step(face.td.clone().set("action", action))
    return face.env.step(action)


def prepared(name, model, played):
    """A face that was reset and made ``played`` steps; for ``None`` not even reset."""
    face = FACES[name](model)
    if played is not None:
        face.reset(seed=3)
        for _ in range(played):
            face.step()
    return face


def goes_on(face, played):
    """What the next valid calls return: to the end of the episode and through another."""
    torch.manual_seed(0)
    found = [face.reset()] if played is None else [face.step() for _ in range(K - played)]
    return [*found, face.reset(), *(face.step() for _ in range(K)), face.reset(), face.step()]


@pytest.mark.parametrize("played", [None, 0, 1])
@pytest.mark.parametrize("name", FACES)
def test_a_refused_call_changes_nothing(name, played, model):
    face, twin = prepared(name, model, played), prepared(name, model, played)
    before = face.state()
    for what, call in refusals(name):
        with pytest.raises((ValueError, ResetNeeded)):
            call(face)
        assert face.state() == before, what
    for what, action in refused_actions(name) if played is not None else ():
        with pytest.raises(ValueError, match="action"):
            make_step(face, action(face))
        assert face.state() == before, what
    assert goes_on(face, played) == goes_on(twin, played)


KNOWN = {
    "a seed that Gymnasium refuses": ("Single", lambda f: f.env.reset(seed=[1])),
    "group_size=True": ("Vector", lambda f: f.env.reset(seed=7, options={"group_size": True})),
    "set_seed(-1) of TorchRL": ("TorchRL", lambda f: f.env.set_seed(-1)),
    "seed of Stable-Baselines3": ("SB3", lambda f: f.env.seed(-1)),
    "set_options of Stable-Baselines3": ("SB3", lambda f: f.env.set_options({"group_size": True})),
}
"""Calls that once were accepted, or were refused when something had changed already."""


@pytest.mark.parametrize("what", KNOWN)
def test_a_known_call_is_refused_and_changes_nothing(what, model):
    name, call = KNOWN[what]
    face, twin = prepared(name, model, 1), prepared(name, model, 1)
    before = face.state()
    with pytest.raises(ValueError, match=r"seed|group_size"):
        call(face)
    assert face.state() == before
    assert goes_on(face, 1) == goes_on(twin, 1)


@pytest.mark.parametrize(
    "name", [name for name in FACES if name not in ("SameStep", "NextStep", "ControlSameStep", "SB3")]
)
def test_a_step_after_the_end_changes_nothing(name, model):
    face, twin = prepared(name, model, K), prepared(name, model, K)
    before = face.state()
    with pytest.raises((ResetNeeded, ValueError), match=f"after {K} steps"):
        make_step(face, face.action())
    assert face.state() == before
    assert goes_on(face, K) == goes_on(twin, K)


ERRORS = [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError]


class Once:
    """A reward or decoder that raises at its first call."""

    def __init__(self, error, then):
        self.error, self.then = error, then

    def __call__(self, *arguments):
        if self.error:
            error, self.error = self.error, None
            raise error
        return self.then(*arguments)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["decoding", "a reward"])
@pytest.mark.parametrize("name", FACES)
def test_a_step_interrupted_while_scoring_can_be_made_again(name, where, error, model, monkeypatch):
    face, twin = prepared(name, model, K - 1), prepared(name, model, K - 1)
    if where == "decoding":
        monkeypatch.setattr(model, "decode", Once(error, model.decode))
    else:
        face.mdp.rewards["points"] = Once(error, face.mdp.rewards["points"])
    before = {**vars(face.mdp)}, face.state()
    with pytest.raises(error):
        face.step()
    assert ({**vars(face.mdp)}, face.state()) == before
    assert goes_on(face, K - 1) == goes_on(twin, K - 1)


@pytest.mark.parametrize("mode", ["same_step", "next_step"])
@pytest.mark.parametrize("action", [lambda env: env, ControlAction])
def test_a_step_that_restarts_some_rows_and_ends_others_is_whole(mode, action, model, monkeypatch):
    """Rows 2 and 3 end a step before rows 0 and 1; the step in which both kinds of rows change is interrupted."""

    def play(interrupted):
        env = action(DenoiseVectorEnv.from_mdp(own_mdp(model), N, group_size=2, autoreset_mode=mode))
        idle = np.zeros(env.action_space.shape, np.float32)
        env.reset(seed=0)
        env.step(idle)
        env.reset(options={"reset_mask": np.array([True, True, False, False])})
        found = [env.step(idle)]
        if interrupted:
            before = snapshot(env)
            for broken in ("decode", "drawn"):
                with monkeypatch.context() as patch:
                    if broken == "decode":
                        patch.setattr(model, "decode", Once(KeyboardInterrupt, None))
                    else:
                        patch.setattr(env.unwrapped.mdp, "drawn", Interrupted())
                    with pytest.raises(KeyboardInterrupt):
                        env.step(idle)
                assert snapshot(env) == before
        found += [env.step(idle) for _ in range(2 * K)]
        return snapshot(found)

    assert play(True) == play(False)


class Interrupted:
    """Stands for the prompts that a reset draws from, and is asked after the noise has been drawn."""

    def __len__(self):
        raise KeyboardInterrupt


def own_mdp(model):
    return DenoisingMDP(model, {"points": PointsReward()}, ["ring", "line", "grid"], K)


@pytest.mark.parametrize("played", [None, 0])
@pytest.mark.parametrize("name", FACES)
def test_an_interrupted_reset_draws_nothing(name, played, model, monkeypatch):
    face, twin = prepared(name, model, played), prepared(name, model, played)
    before = face.state()
    with monkeypatch.context() as patch:
        patch.setattr(face.mdp, "drawn", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            face.reset()
    assert face.state() == before
    assert goes_on(face, played) == goes_on(twin, played)


def test_a_refused_convention_keeps_no_reference(model):
    mdp = DenoisingMDP.make("points", num_steps=K)
    for make in (lambda: Noise(mdp, bound=0), lambda: Control(mdp, {"drift": (1, 2)}), lambda: Noise(mdp, eta="1")):
        with pytest.raises(ValueError, match=r"bound|range|eta"):
            make()
    assert mdp.model._kept is None


def test_the_noise_of_a_refused_control_is_drawn_once():
    """A latent that is not finite is refused beneath the wrapper, after the noise was drawn."""
    env, twin = (ControlAction(DenoiseVectorEnv("points", N, num_steps=K)) for _ in range(2))
    idle = np.zeros(env.action_space.shape, np.float32)
    for e in (env, twin):
        e.reset(seed=0)
    broken = env.convention.next_latents
    env.convention.next_latents = lambda *a: broken(*a) + torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        env.step(idle)
    env.convention.next_latents = broken
    for _ in range(2):
        assert snapshot(env.step(idle)) == snapshot(twin.step(idle))
    assert snapshot(env.reset()) == snapshot(twin.reset())


# --- What counts as what ---


def test_numpy_numbers_are_numbers():
    plain = DenoiseVectorEnv(
        "points", 4, num_steps=3, group_size=2, shared_noise=True, microbatch=2, rewards={"points": 0.5}
    )
    numpy = DenoiseVectorEnv(
        "points",
        np.int64(4),
        num_steps=np.int32(3),
        group_size=np.uint8(2),
        shared_noise=np.bool_(True),
        microbatch=np.int16(2),
        rewards={"points": np.float32(0.5)},
        check_finite=np.bool_(True),
    )
    options = {"group_size": np.int64(4), "shared_noise": np.bool_(False)}
    for seed, given in ((np.int64(3), options), ([np.int64(i) for i in range(4)], None), (np.arange(4), None)):
        expected = {"group_size": 4, "shared_noise": False} if given else None
        same = [3, 4, 5, 6] if given else [0, 1, 2, 3]
        assert snapshot(numpy.reset(seed=seed, options=given)) == snapshot(plain.reset(seed=same, options=expected))
    idle = np.zeros((4, 2), np.float32)
    for _ in range(3):
        assert snapshot(numpy.step(idle)) == snapshot(plain.step(idle))
    assert type(numpy.num_envs) is type(numpy.mdp.num_steps) is type(numpy.mdp.microbatch) is int
    single = DenoiseEnv("points", num_steps=np.int64(3))
    assert np.array_equal(single.reset(seed=np.uint64(3))[0]["latents"], single.reset(seed=3)[0]["latents"])
    assert single.np_random_seed == 3
    torchrl = DenoiseTorchRLEnv("points", np.int64(2))
    torchrl.set_seed(np.int64(3))
    first = torchrl.reset()["latents"]
    torchrl.set_seed(3)
    assert torch.equal(torchrl.reset()["latents"], first)
    mdp = plain.mdp
    assert Noise(mdp, bound=np.float32(2), eta=np.float64(0.5)).bound == 2
    assert Control(mdp, {"drift": (np.float32(-1), np.int64(2))}).names == ["drift_0", "drift_1"]
    metadata = {"count": np.int64(2), "size": [np.float32(0.5)], "yes": np.bool_(True)}
    assert Prompt("a", metadata=metadata) == Prompt("a", metadata={"count": 2, "size": [0.5], "yes": True})


def reward(images, prompts):
    return images[:, 0]


def build(**options):
    return DenoisingMDP(load_model("points"), **{"rewards": {"x": reward}, "prompts": ["ring"], **options})


@cache
def pipeline():
    return load_model("shapes").pipeline


def shapes(**options):
    return StableDiffusion(pipeline(), StableDiffusionOptions(**{"guidance_scale": 1.0, **options}))


REFUSED = {
    "num_envs": (lambda x: DenoiseVectorEnv("points", x), [True, "2", 2.0, 0]),
    "TorchRL's num_envs": (lambda x: DenoiseTorchRLEnv("points", x), [True, "2", 2.0, 0]),
    "num_steps": (lambda x: DenoiseVectorEnv("points", num_steps=x), [True, "2", 2.0, 0]),
    "a live model's num_steps": (lambda x: build(num_steps=x), [True, "2", 2.0, 0]),
    "group_size": (lambda x: DenoiseVectorEnv("points", 2, group_size=x), [True, "2", 2.0, 0]),
    "shared_noise": (lambda x: DenoiseTorchRLEnv("points", 2, shared_noise=x), ["no", 1, None]),
    "render_x0": (lambda x: DenoiseVectorEnv("points", 2, render_x0=x), ["no", 1, None]),
    "check_finite": (lambda x: build(check_finite=x), ["no", 1, None]),
    "microbatch": (lambda x: build(microbatch=x), [True, "2", 2.0, 0]),
    "autoreset_mode": (lambda x: DenoiseVectorEnv("points", autoreset_mode=x), [True, [], 1]),
    "model": (lambda x: DenoiseVectorEnv(x), [True, 3, ["points"]]),
    "rewards": (lambda x: build(rewards=x), [{}, ["points"], {"x": 3}, {"x": None}, {1: reward}]),
    "a reward's arguments": (lambda x: build(rewards={"x": x}), [PointsReward, lambda images: images, len]),
    "named rewards": (lambda x: DenoiseVectorEnv("points", rewards=x), [3, ["points"], [("points", 1)]]),
    "weights": (
        lambda x: build(reward_weights={"x": x}),
        [float("nan"), float("inf"), -float("inf"), "1", True, None, [1.0], np.nan],
    ),
    "named weights": (lambda x: DenoiseVectorEnv("points", rewards={"points": x}), [float("nan"), "1", True, None]),
    "conditioning_host_gib": (lambda x: DenoiseVectorEnv("points", conditioning_host_gib=x), ["8", True, -1, np.nan]),
    "the model's seed": (lambda x: DenoiseVectorEnv("points", seed=x), ["8", True, -1, 0.5]),
    "shapes' guidance": (lambda x: shapes(guidance_scale=x), ["3", True, np.nan]),
    "shapes' height": (lambda x: shapes(height=x), ["32", True, 0, 32.0]),
    "shapes' rank": (lambda x: shapes(lora_rank=x), ["4", True, -1, 4.0]),
    "shapes' slicing": (lambda x: shapes(vae_slicing=x), ["no", 1]),
    "bound": (lambda x: Noise(build(), bound=x), ["2", True, np.nan, 0]),
    "eta": (lambda x: Noise(build(), eta=x), ["0.5", True, np.nan, -1]),
    "kernel": (lambda x: Noise(build(), kernel=x), ["", 3, True]),
    "last_step": (lambda x: Noise(build(), last_step=x), ["", False, "no"]),
    "controls": (
        lambda x: Control(build(), x),
        [["drift"], "drift", {"drift": 3}, {"drift": (1,)}, {"drift": ("-1", "1")}, {"drift": (True, 1)}],
    ),
    "a control's value": (lambda x: Control(build()).action(noise_scale=x), ["1", True, np.nan, 9]),
    "max_dimensions": (lambda x: Flat(build(), max_dimensions=x), ["99", True, 99.0]),
    "shift": (lambda x: Schedule.flow(3, shift=x), ["3", True, np.nan, 0]),
    "a schedule's steps": (lambda x: Schedule.flow(x), ["3", True, 3.0, 0]),
    "invalid_reward": (
        lambda x: SB3VecEnv(NoiseAction(DenoiseVectorEnv("points")), invalid_reward=x),
        ["0", True, np.nan],
    ),
    "a prompt's metadata": (lambda x: Prompt("a", metadata={"x": x}), [np.float32("nan"), np.inf, 1j, np.array([1])]),
    "a reset of the MDP": (
        lambda x: own_mdp(load_model("points")).reset([torch.Generator()], **x),
        [{"group_size": True}, {"shared_noise": "no"}, {"shared_noise": 1}, {"group_size": 1.0}],
    ),
    "wrap": (lambda x: DenoiseEnv("points", wrap=x), [lambda env: 3, lambda env: DenoiseVectorEnv("points")]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_arguments_of_another_kind_are_refused(what):
    make, values = REFUSED[what]
    taken = []
    for value in values:
        with contextlib.suppress(ValueError):
            make(value)
            taken.append(value)
    assert taken == []


def test_the_single_environment_names_no_autoreset(model):
    env = gymnasium.make("denoise_env/Points-v0", num_steps=1)
    env.reset(seed=0)
    env.step(np.zeros(2, np.float32))
    with pytest.raises(ResetNeeded, match=r"over after 1 steps: call reset\(\)$"):
        env.step(np.zeros(2, np.float32))
    vector = DenoiseVectorEnv("points", num_steps=1)
    vector.reset(seed=0)
    vector.step(np.zeros((1, 2), np.float32))
    with pytest.raises(ResetNeeded, match='autoreset_mode="same_step" or "next_step"'):
        vector.step(np.zeros((1, 2), np.float32))

"""Random calls of the environments, valid and invalid.

Each environment has a twin that never sees a call which was refused. Both answer the other calls alike, or a refused
call has changed something.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from fuzz_chance import STRANGE, Chance, Hang, limit, same
from torchrl.envs import Compose, TransformedEnv

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
from denoise_env.sb3 import SB3VecEnv
from denoise_env.torchrl_transforms import ActionTransform, FlatTransform

REFUSALS = (ValueError, gymnasium.error.Error)
SECONDS = 20.0


class Failure(Exception):
    """One of the four things that must not happen."""


@dataclass
class Twins:
    """An environment and its twin, and what was called so far."""

    tried: Any
    clean: Any
    log: list[str]

    def call(self, what: str, do: Callable[[Any], Any], valid: bool | None = None) -> Any:
        """Call the one; unless it refuses, call the other too and compare.

        Args:
            what: the call, for a person.
            do: makes the call on an environment, and always the same call.
            valid: whether it must be accepted (True) or refused (False); ``None`` leaves it open.

        Returns:
            The result, or ``None`` where the call was refused.
        """
        self.log.append(what)
        before = _global_state()
        try:
            with limit(SECONDS):
                found = do(self.tried)
        except REFUSALS as error:
            if valid:
                raise Failure(f"a valid call was refused: {error}") from error
            if not str(error):
                raise Failure("the refusal says nothing") from error
            if not same(before, _global_state()):
                raise Failure("a refused call has drawn from a global generator") from error
            self.log[-1] += "  # refused"
            return None
        except (Exception, Hang) as error:
            raise Failure(f"{type(error).__name__}: {error}") from error
        if valid is False:
            raise Failure("an invalid call was accepted")
        after = _global_state()
        _set_global_state(before)
        try:
            other = do(self.clean)
        except Exception as error:
            raise Failure(f"the twin, which saw no refused call, raised {type(error).__name__}: {error}") from error
        if not same(found, other) or not same(after, _global_state()):
            raise Failure("the twin, which saw no refused call, answered otherwise")
        return found


def _global_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state()


def _set_global_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])


# --- Values, each with whether it is valid (None: either) ---


def seed(chance: Chance, rows: int) -> tuple[Any, bool | None]:
    """A seed of a Gymnasium reset."""
    good = [0, 7, np.int64(3), np.uint8(9), 2**31 - 1]
    bad = [
        -1,
        "3",
        3.5,
        True,
        False,
        float("nan"),
        np.float32(2),
        [],
        {},
        object(),
        b"1",
        np.bool_(True),
        [True] * rows,
    ]
    open_ = [None, 2**63, 2**64, 2**200, [0] * rows, [0] * (rows + 1), [None] * rows, [-1] * rows, np.arange(rows)]
    return _pick(chance, good, bad, open_)


def _pick(chance: Chance, good: list[Any], bad: list[Any], open_: list[Any]) -> tuple[Any, bool | None]:
    kind = chance.choices([True, False, None], [5, 2, 2])[0]
    return chance.choice({True: good, False: bad, None: open_}[kind]), kind


def options(chance: Chance, rows: int, names: list[str], partial: bool = True) -> tuple[Any, bool | None]:
    """Reset options."""
    if chance.often(0.1):
        return chance.choice([[], "x", 3, {1: 2}, {"promts": ["ring"]}, {None: None}, ["prompts"]]), None
    found: dict[str, Any] = {}
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]
    if chance.often(0.4):
        good = [None, [chance.choice(names) for _ in range(rows)]]
        bad = ["ring", 3, [3], [None], [""], {"ring"}, ["no such prompt"] * rows, [names], b"ring", [True] * rows]
        found["prompts"] = chance.choice(good if chance.often(0.6) else bad)
    if chance.often(0.3):
        bad = [0, -1, 1.0, True, "1", None, rows + 1, [1], float("nan"), 2**70]
        found["group_size"] = chance.choice([*sizes, np.int64(1)] if chance.often(0.6) else bad)
    if chance.often(0.3):
        found["shared_noise"] = chance.choice([True, False] if chance.often(0.6) else ["no", 1, 0, None, [], 0.5])
    if partial and chance.often(0.3):
        mask = np.array([chance.often(0.6) for _ in range(rows)])
        good = [mask, torch.from_numpy(mask), mask.tolist(), None]
        bad = [mask[:-1], mask.astype(int), "x", 3, np.zeros(rows, bool), [[True] * rows], [None] * rows, {}]
        found["reset_mask"] = chance.choice(good if chance.often(0.6) else bad)
    valid = None if found else True
    if found.get("group_size") is True or isinstance(found.get("shared_noise"), str):
        valid = False
    return found, valid


def action(chance: Chance, shape: tuple[int, ...], tensors: bool, dtype: Any = np.float32) -> tuple[Any, bool | None]:
    """An action of this shape."""
    values = np.random.default_rng(chance.getrandbits(32)).standard_normal(shape).astype(np.float32)
    if chance.often(0.6):
        return (torch.from_numpy(values) if tensors else values), True
    spoiled = values.copy()
    spoiled.flat[0] = chance.choice([np.nan, np.inf, -np.inf])
    bad = [
        spoiled,
        values[..., :-1],
        values[None],
        values.astype(np.float64) * np.nan,
        None,
        "x",
        [],
        {},
        object(),
        b"1",
    ]
    value = chance.choice(bad)
    if isinstance(value, np.ndarray) and tensors and chance.often(0.8):
        value = torch.from_numpy(value.copy())
    return value, False


def _show(value: Any) -> str:
    return " ".join(repr(value).split())[:160]


# --- Faces ---


def gymnasium_face(chance: Chance, calls: int, log: list[str]) -> None:
    """Random calls of the single or the batched environment, with or without wrappers."""
    single, tensors, rows, steps = chance.often(0.25), chance.often(0.5), chance.randint(1, 4), chance.randint(2, 4)
    rows = 1 if single else rows
    keywords: dict[str, Any] = {"num_steps": steps, "output": "torch" if tensors else "numpy"}
    if not single:
        keywords |= {"num_envs": rows, "autoreset_mode": chance.choice(["disabled", "same_step", "next_step"])}
    keywords["render_mode"] = chance.choice([None, "rgb_array"])
    wrapper = None if single else chance.choice([None, None, NoiseAction, ControlAction])
    flat = not single and chance.often(0.3)

    def make() -> Any:
        env: Any = (DenoiseEnv if single else DenoiseVectorEnv)("points", **keywords)
        env = wrapper(env) if wrapper else env
        return FlatObservation(env) if flat else env

    log.append(f"{'DenoiseEnv' if single else 'DenoiseVectorEnv'}(points, {keywords}), {wrapper}, flat={flat}")
    twins = Twins(make(), make(), log)
    env = twins.tried
    shape = env.action_space.shape
    names = [str(prompt) for prompt in env.unwrapped.prompts]
    begun = False
    for _ in range(calls):
        kind = chance.choices(["reset", "step", "render"], [3, 6, 1])[0]
        if kind == "reset":
            value, ok = seed(chance, rows)
            wanted, fine = options(chance, rows, names, partial=not single) if chance.often(0.6) else (None, True)
            if not begun and value is None:
                value, ok = 1, True  # the entropy that an unseeded start draws is not the same twice
            if not begun and isinstance(value, list) and None in value:
                continue
            kept = copy.deepcopy(wanted)
            valid = False if False in (ok, fine) else True if ok and fine else None
            if wrapper is None and not flat and keywords.get("autoreset_mode") in ("same_step", "next_step"):
                valid = None if valid else valid
            found = twins.call(
                f"reset(seed={_show(value)}, options={_show(wanted)})",
                lambda e, value=value, wanted=wanted: e.reset(seed=value, options=wanted),
                valid,
            )
            begun = begun or found is not None
            if not same(kept, wanted):
                raise Failure("reset has changed the options that it was given")
        elif kind == "step":
            value, ok = action(chance, shape, tensors)
            before = copy.deepcopy(value) if isinstance(value, (np.ndarray, torch.Tensor)) else None
            twins.call(f"step({_show(value)})", lambda e, value=value: e.step(value), None if ok else ok)
            if before is not None and not same(before, value):
                raise Failure("step has changed the action that it was given")
        elif keywords["render_mode"] is not None:
            twins.call("render()", lambda e: e.render())


def torchrl_face(chance: Chance, calls: int, log: list[str]) -> None:
    """Random calls of the TorchRL environment, with or without its transforms."""
    rows, steps = chance.randint(1, 4), chance.randint(2, 4)
    convention = chance.choice([None, None, Noise, Control])
    flat = chance.often(0.3)

    def make() -> Any:
        env: Any = DenoiseTorchRLEnv("points", num_envs=rows, num_steps=steps)
        parts: list[Any] = [ActionTransform(convention(env.mdp))] if convention else []
        parts += [FlatTransform(Flat(env.mdp))] if flat else []
        return TransformedEnv(env, Compose(*parts)) if parts else env

    log.append(f"DenoiseTorchRLEnv(points, {rows}, num_steps={steps}), {convention}, flat={flat}")
    twins = Twins(make(), make(), log)
    names = [str(prompt) for prompt in twins.tried.mdp.prompts]
    shape = tuple(twins.tried.action_spec.shape)
    state = None
    for _ in range(calls):
        kind = chance.choices(["reset", "step", "seed"], [3, 6, 1])[0]
        if kind == "seed":
            value, ok = _pick(chance, [0, 7, 2**31 - 1], [-1, "3", 3.5, True, [], 2**200], [np.int64(3), 2**63])
            twins.call(f"set_seed({_show(value)})", lambda e, value=value: e.set_seed(value), ok)
        elif kind == "reset":
            wanted, fine = options(chance, rows, names, partial=False)
            if isinstance(wanted, dict) and all(isinstance(name, str) for name in wanted):
                found = twins.call(
                    f"reset({_show(wanted)})", lambda e, wanted=wanted: e.reset(**wanted).to_dict(), fine
                )
                if found is not None:
                    state = {name: found[name] for name in ("latents", "step", "prompt_index")}
        elif state is not None:
            value, ok = action(chance, shape, True)
            if not isinstance(value, torch.Tensor) or value.shape[:1] != (rows,):
                continue  # a tensordict refuses it before any environment sees it

            def step(e: Any, value: Any = value, state: Any = state) -> Any:
                given = e.fake_tensordict().select("latents", "step", "prompt_index").empty()
                for name, tensor in state.items():
                    given[name] = tensor.clone()
                given["action"] = value.clone()
                return e.step(given)["next"].to_dict()

            found = twins.call(f"step({_show(value)})", step, None if ok else ok)
            if found is not None:
                state = {name: found[name] for name in state}


def sb3_face(chance: Chance, calls: int, log: list[str]) -> None:
    """Random calls of the Stable-Baselines3 environment."""
    rows, steps = chance.randint(1, 3), chance.randint(2, 3)
    wrapper = chance.choice([NoiseAction, ControlAction])

    def make() -> Any:
        env = DenoiseVectorEnv("points", num_envs=rows, num_steps=steps, output="torch")
        return SB3VecEnv(FlatObservation(wrapper(env)))

    log.append(f"SB3VecEnv({wrapper.__name__}, {rows} rows, {steps} steps)")
    twins = Twins(make(), make(), log)
    names = [str(prompt) for prompt in twins.tried.env.unwrapped.prompts]
    shape = (rows, *twins.tried.action_space.shape)
    begun = False
    for _ in range(calls):
        kind = chance.choices(["reset", "step", "seed", "options"], [3, 6, 2, 2])[0]
        if kind == "seed":
            value, ok = _pick(chance, [0, 7, 2**31 - 1], [-1, "3", 3.5, True, []], [None, np.int64(3), 2**200])
            found = twins.call(f"seed({_show(value)})", lambda e, value=value: e.seed(value), ok)
            begun = begun or found is not None
        elif kind == "options":
            wanted, _ = options(chance, rows, names, partial=False)
            twins.call(f"set_options({_show(wanted)})", lambda e, wanted=wanted: e.set_options(wanted))
        elif kind == "reset":
            if begun:
                twins.call("reset()", lambda e: e.reset())
        elif begun:
            value, ok = action(chance, shape, False)
            twins.call(f"step({_show(value)})", lambda e, value=value: e.step(value), None if ok else ok)


def constructors(chance: Chance, calls: int, log: list[str]) -> None:
    """Random arguments of every constructor."""
    log.append("constructors")
    twins = Twins(None, None, log)
    strange = [*STRANGE[:20], None, True, False, -1, 0, 1, 2, 3, 1.5, float("nan"), 2**70, [], {}, (), object(), b"x"]
    fields = {
        "num_envs": [1, 2, 3],
        "num_steps": [1, 2, 10],
        "max_episode_steps": [1, 2, 10],
        "rewards": ["points", {"points": 2.0}, {"points": float("nan")}, {"points": "1"}, {"points": None}, "pionts"],
        "prompts": [["ring"], "points", "no file", [3], "ring"],
        "microbatch": [1, 2, None],
        "render_mode": [None, "rgb_array", "human"],
        "autoreset_mode": ["disabled", "same_step", "next_step", "Disabled"],
        "output": ["numpy", "torch", "jax"],
        "group_size": [1, 2],
        "shared_noise": [True, False],
        "seed": [0, 1],
        "width": [1],
    }
    for _ in range(calls):
        names = chance.some(list(fields), 4)
        given = {name: chance.choice(fields[name] if chance.often(0.6) else strange) for name in names}
        for name in ("num_envs", "num_steps", "max_episode_steps"):
            if given.get(name) == 2**70:
                given[name] = 10**6 if name != "num_envs" else 0
        model = "points" if chance.often(0.8) else chance.choice(strange)
        kind = chance.choice([DenoiseVectorEnv, DenoiseEnv, DenoiseTorchRLEnv])
        if kind is not DenoiseVectorEnv:
            for name in ("num_envs",) if kind is DenoiseEnv else ("render_mode", "autoreset_mode", "output"):
                given.pop(name, None)
            if kind is DenoiseEnv:
                given.pop("autoreset_mode", None)
        twins.call(
            f"{kind.__name__}({_show(model)}, {_show(given)})",
            lambda _, kind=kind, model=model, given=given: kind(model, **given) and None,
        )
        mdp = DenoisingMDP.make("points", num_steps=3)
        bound, eta = (chance.choice([*strange, 2.0, 0.5, 10.0]) for _ in range(2))
        twins.call(f"Noise(bound={_show(bound)})", lambda _, mdp=mdp, bound=bound: Noise(mdp, bound=bound) and None)
        twins.call(f"Noise(eta={_show(eta)})", lambda _, mdp=mdp, eta=eta: Noise(mdp, eta=eta) and None)


FACES = (gymnasium_face, gymnasium_face, torchrl_face, sb3_face, constructors)


def fuzz(seed: int, calls: int, per_example: int = 25) -> tuple[int, list[str]]:
    """Make at least ``calls`` calls; returns how many were made, and what went wrong with the calls that led there."""
    made, failures, example = 0, [], 0
    while made < calls:
        face, log = FACES[example % len(FACES)], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                face(Chance(f"{seed}/{example}"), per_example, log)
            except Failure as failure:
                failures.append(
                    "\n    ".join(
                        [f"{face.__name__}, seed {seed}, example {example}: {failure}", *log[:1], *log[1:][-12:]]
                    )
                )
        made, example = made + len(log) - 1, example + 1
    return made, failures

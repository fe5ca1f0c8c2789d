"""The contract test of Gymnasium vector environments, for any `VectorEnv`."""

from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate

from denoise_env.arguments import integer

Env = VectorEnv[Any, Any, Any]
STEPS = 200
"""Steps that `check_vector_env` plays at most where ``num_steps`` is not given."""


def check_vector_env(env: Env, seed: int = 0, num_steps: int | None = None) -> list[str]:
    """Check a vector environment against Gymnasium's contract; it is closed afterwards.

    Gymnasium's own ``check_env`` covers single environments only.

    Args:
        env: the environment, with numpy observations.
        seed: seed of resets and actions.
        num_steps: how long to play; by default until every row has ended once and two steps more, at most
            `STEPS`.

    Returns:
        Findings that are not errors, one sentence each.

    Raises:
        AssertionError: what is wrong and what the contract is.

    >>> from denoise_env import DenoiseVectorEnv
    >>> check_vector_env(DenoiseVectorEnv("points", num_envs=3, num_steps=4))
    []
    """
    seed = integer(seed, "seed", at_least=0)
    num_steps = None if num_steps is None else integer(num_steps, "num_steps", at_least=1)
    findings: list[str] = []
    _check_declarations(env, findings)
    _check_resets(env, seed, findings)
    disabled = env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    partial = disabled and _check_partial_reset(env, seed, findings)
    _check_episodes(env, seed, num_steps, partial, findings)
    if env.render_mode is not None:
        _check_render(env, findings)
    env.close()
    try:
        env.close()
    except Exception as error:
        raise AssertionError(f"a second close() must do nothing; it raised {error!r}") from error
    return findings


def _check_declarations(env: Env, findings: list[str]) -> None:
    require(isinstance(env, VectorEnv), f"the environment must be a gymnasium.vector.VectorEnv, not {type(env)}")
    spaces = [f"{batch}{kind}_space" for batch in ("single_", "") for kind in ("observation", "action")]
    for name in ("num_envs", *spaces):
        require(hasattr(env, name), f"a VectorEnv must have {name}; it is missing")
    n = env.num_envs
    require(
        isinstance(n, Integral) and n is not True and n >= 1, f"num_envs must be an integer of at least 1, not {n!r}"
    )
    mode = env.metadata.get("autoreset_mode")
    require(isinstance(mode, AutoresetMode), f'metadata["autoreset_mode"] must be an AutoresetMode, not {mode!r}')
    own = getattr(env, "autoreset_mode", mode)
    require(own is mode, f'env.autoreset_mode is {own} and metadata["autoreset_mode"] is {mode}: they must agree')
    for kind in ("observation", "action"):
        single, batched = getattr(env, f"single_{kind}_space"), getattr(env, f"{kind}_space")
        require(
            batched == batch_space(single, n),
            f"{kind}_space must be batch_space(single_{kind}_space, {n}), it is {batched} for {single}",
        )
    modes = env.metadata.get("render_modes")
    if modes is None:
        findings.append('metadata has no "render_modes"')
    elif env.render_mode is not None:
        require(env.render_mode in modes, f"render_mode is {env.render_mode!r}, metadata allows {modes}")


def _check_resets(env: Env, seed: int, findings: list[str]) -> None:
    first = deepcopy(_reset(env, seed=seed))
    require(
        same(first, _reset(env, seed=seed)),
        f"reset(seed={seed}) twice must give the same observations and infos; they differ",
    )
    if not same(first[0], _reset(env, seed=seed, options={})[0]):
        findings.append("reset(options={}) gives other observations than reset()")
    if same(first[0], _reset(env, seed=seed + env.num_envs)[0]):
        findings.append(f"seeds {seed} and {seed + env.num_envs} give the same first observations")
    _reset(env, seed=seed)
    if same(first[0], _reset(env)[0]):
        findings.append("a reset() without a seed repeats the seeded one; it should continue the random stream")


def _check_episodes(env: Env, seed: int, num_steps: int | None, partial: bool, findings: list[str]) -> None:
    mode = env.metadata["autoreset_mode"]
    results, actions = _play(env, seed, num_steps, partial)
    ended = np.zeros(env.num_envs, bool)
    before = np.zeros(env.num_envs, bool)
    for result in results:
        if len(result) == 2:
            before[:] = False
            continue
        before = _check_step(env, mode, result, before, findings)
        ended |= before
    if not ended.all():
        findings.append(
            f"{(~ended).sum()} of {env.num_envs} rows never ended in {len(actions)} steps: give more "
            "num_steps to check autoreset in them"
        )
    for (old, *_), (new, *_) in pairwise(results):
        require(
            not any(np.shares_memory(a, b) for a, b in zip(_arrays(old), _arrays(new), strict=False)),
            "an observation shares memory with the one before: every call must return new arrays",
        )
    if env.spec is not None and env.spec.nondeterministic:
        return
    replayed, _ = _play(env, seed, len(actions), partial, actions)
    require(
        same(results, replayed),
        "the same seed and actions must give the same results twice; they differ (or the first results were "
        "changed after they were returned)",
    )
    scribbled, _ = _play(env, seed, len(actions), partial, actions, scribble=True)
    require(
        same(results, scribbled),
        "overwriting returned observations or given actions changes what follows: the environment must keep "
        "copies of its own",
    )


def _play(
    env: Env,
    seed: int,
    num_steps: int | None,
    partial: bool,
    actions: list[Any] | None = None,
    scribble: bool = False,
) -> tuple[list[tuple[Any, ...]], list[Any]]:
    """Results of ``reset`` and ``step`` in order, and the actions.

    Under DISABLED an end resets the rows that ended if ``partial``, else all.
    """
    env.action_space.seed(seed)
    results: list[tuple[Any, ...]] = []
    played: list[Any] = []
    left, ended = num_steps, np.zeros(env.num_envs, bool)

    def keep(result: tuple[Any, ...]) -> None:
        results.append(deepcopy(result) if scribble else result)
        if scribble:
            for array in (*_arrays(result[0]), *(a for part in result[1:4] for a in _arrays(part))):
                array[...] = np.array(1, array.dtype)

    keep(_reset(env, seed=seed))
    while len(played) < (STEPS if left is None else left):
        action = deepcopy(actions[len(played)]) if actions else env.action_space.sample()
        played.append(deepcopy(action))
        result = env.step(action)
        require(
            isinstance(result, tuple) and len(result) == 5,
            "step() must return (observations, rewards, terminations, truncations, infos)",
        )
        _check_flags(result, env.num_envs)
        done = result[2] | result[3]
        keep(result)
        if scribble:
            for array in _arrays(action):
                array[...] = np.array(1, array.dtype)
        ended |= done
        if left is None and ended.all():
            left = len(played) + 2
        if done.any() and env.metadata["autoreset_mode"] is AutoresetMode.DISABLED:
            keep(_reset(env, options={"reset_mask": done}) if partial else _reset(env))
    return results, played


def _check_flags(result: tuple[Any, ...], n: int) -> None:
    _, rewards, terminations, truncations, _ = result
    require(
        isinstance(rewards, np.ndarray) and rewards.shape == (n,) and rewards.dtype.kind in "fiu",
        f"rewards must be a numeric array of shape ({n},), not {_describe(rewards)}",
    )
    for name, flags in (("terminations", terminations), ("truncations", truncations)):
        require(
            isinstance(flags, np.ndarray) and flags.shape == (n,) and flags.dtype == np.bool_,
            f"{name} must be a bool array of shape ({n},), not {_describe(flags)}",
        )


def _check_step(
    env: Env,
    mode: AutoresetMode,
    result: tuple[Any, ...],
    before: np.ndarray,
    findings: list[str],
) -> np.ndarray:
    """Check one step's results; ``before`` and the return are the rows that ended then and now."""
    observations, rewards, terminations, truncations, infos = result
    n = env.num_envs
    _check_observations(env, observations, "step")
    if not np.isfinite(rewards).all():
        _note(findings, "some rewards are NaN or infinite")
    _check_infos(infos, n)
    done = terminations | truncations
    if mode is AutoresetMode.NEXT_STEP:
        require(
            not (rewards[before] != 0).any() and not done[before].any(),
            "NEXT_STEP: in the step after an end a row only resets, with reward 0 and both flags False",
        )
    if mode is AutoresetMode.SAME_STEP:
        marked = infos.get("_final_obs", np.zeros(n, bool))
        require(
            (marked == done).all(),
            f'SAME_STEP: infos["_final_obs"] must mark the rows that ended, {done}, not {marked}',
        )
        rows = list(iterate(env.observation_space, observations))
        for i in np.flatnonzero(done):
            require(
                infos["final_obs"][i] in env.single_observation_space,
                f'SAME_STEP: infos["final_obs"][{i}] must be an observation in single_observation_space',
            )
            if same(infos["final_obs"][i], rows[i]):
                _note(findings, "SAME_STEP: final_obs equals the first observation of the next episode")
        if done.any() and "final_info" not in infos:
            _note(findings, 'SAME_STEP: infos has no "final_info"')
    return done


def _check_infos(infos: Any, n: int, top: bool = True) -> None:
    require(isinstance(infos, dict), f"infos must be a dict, not {type(infos).__name__}")
    for key, value in infos.items():
        if key.startswith("_"):
            continue
        mask = infos.get(f"_{key}")
        if top or mask is not None:
            require(
                isinstance(mask, np.ndarray) and mask.dtype == np.bool_ and mask.shape == (n,),
                f"infos[{key!r}] needs infos['_{key}'], a bool array of shape ({n},), not {_describe(mask)}",
            )
        if isinstance(value, dict):
            _check_infos(value, n, top=False)
        else:
            require(len(value) == n, f"infos[{key!r}] must have one entry per row, {n}, not {len(value)}")


def _check_partial_reset(env: Env, seed: int, findings: list[str]) -> bool:
    """Check partial resets; returns whether the environment has them."""
    _reset(env, seed=seed)
    before = deepcopy(env.step(env.action_space.sample())[0])
    _check_observations(env, before, "step")
    mask = np.arange(env.num_envs) < max(1, env.num_envs // 2)
    options = {"reset_mask": mask.copy()}
    try:
        after = env.reset(options=options)[0]
    except Exception as error:
        findings.append(f'DISABLED: reset(options={{"reset_mask": ...}}) raised {error!r}')
        return False
    if set(options) != {"reset_mask"} or (options["reset_mask"] != mask).any():
        findings.append("reset() changed the caller's options")
    rows = zip(mask, iterate(env.observation_space, before), iterate(env.observation_space, after), strict=True)
    kept = [(chosen, same(old, new)) for chosen, old, new in rows]
    require(
        all(equal for chosen, equal in kept if not chosen),
        "DISABLED: a reset with reset_mask must leave the observations of the other rows as they were",
    )
    if any(equal for chosen, equal in kept if chosen):
        findings.append("DISABLED: a reset with reset_mask left rows in the mask as they were")
        return False
    return True


def _check_render(env: Env, findings: list[str]) -> None:
    _reset(env)
    frames: Any = env.render()
    if env.render_mode != "rgb_array":
        return
    require(
        isinstance(frames, tuple | list) and len(frames) == env.num_envs,
        f"render() must return a tuple of one frame per row, {env.num_envs}, not {_describe(frames)}",
    )
    if isinstance(frames, list):
        findings.append("render() returns a list; the contract says a tuple")
    for frame in frames:
        require(
            isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.shape[2:] == (3,),
            f"a frame must be uint8 of shape (H, W, 3), not {_describe(frame)}",
        )


def require(holds: Any, contract: str) -> None:
    """Raise an ``AssertionError`` that says what the contract is, unless it ``holds``."""
    if not holds:
        raise AssertionError(contract)


def _check_observations(env: Env, observations: Any, call: str) -> None:
    require(
        observations in env.observation_space,
        f"{call}() must return observations in observation_space; values, shapes or dtypes are not",
    )


def _reset(env: Env, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    result = env.reset(**kwargs)
    require(isinstance(result, tuple) and len(result) == 2, "reset() must return (observations, infos)")
    _check_observations(env, result[0], "reset")
    _check_infos(result[1], env.num_envs)
    return result


def _arrays(data: Any) -> Iterator[np.ndarray]:
    """The writable arrays in nested data."""
    if isinstance(data, dict):
        data = tuple(data.values())
    if isinstance(data, tuple | list):
        for part in data:
            yield from _arrays(part)
    elif isinstance(data, np.ndarray) and data.dtype != object and data.flags.writeable:
        yield data


def same(a: Any, b: Any) -> bool:
    """Equality of nested data; NaN equals NaN."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) or (isinstance(a, np.ndarray) and a.dtype == object):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray | np.generic | float):
        return np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")
    return bool(a == b)


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"{type(value).__name__}" if value is not None else "missing"


def _note(findings: list[str], sentence: str) -> None:
    if sentence not in findings:
        findings.append(sentence)

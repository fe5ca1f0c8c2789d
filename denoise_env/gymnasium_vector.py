"""The batched Gymnasium environment: `DenoiseVectorEnv`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import logger, spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from denoise_env.arguments import boolean
from denoise_env.faces import ResetRequest, RowStreams, resolve_mdp
from denoise_env.film import contact_sheet
from denoise_env.kernels import ODE
from denoise_env.mdp import DenoisingMDP, State
from denoise_env.models import DenoisingModel
from denoise_env.prompts import Prompt
from denoise_env.rewards import Reward
from denoise_env.worlds import DEFAULT

AUTORESET = {mode.name.lower(): mode for mode in AutoresetMode}
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class _Rows:
    """All that a reset or a step changes, replaced whole at its very end: a call that raises changes nothing.

    Steps and prompts are kept on the host too, so that deciding what ends needs no device sync.
    """

    state: State
    step: NDArray[np.int64]
    prompt_index: NDArray[np.int64]
    texts: NDArray[np.object_]

    @classmethod
    def none(cls, begun: State) -> "_Rows":
        """As many rows as ``begun``, all of them to be replaced."""
        n = len(begun.step)
        return cls(begun, np.zeros(n, np.int64), np.zeros(n, np.int64), np.full(n, None, object))

    def advance(self, latents: Tensor) -> "_Rows":
        return _Rows(self.state.advance(latents), self.step + 1, self.prompt_index, self.texts)

    def replace(self, mask: Mask, begun: State, prompts: Sequence[Prompt]) -> "_Rows":
        """These rows with those of ``mask`` taken from ``begun``, in their order."""
        rows = torch.from_numpy(np.flatnonzero(mask)).to(begun.latents.device)
        state = begun if mask.all() else self.state.replace_rows(rows, begun)
        index, texts = self.prompt_index.copy(), self.texts.copy()
        index[mask] = begun.prompt_index.cpu().numpy()
        texts[mask] = [prompts[i].text for i in index[mask]]
        return _Rows(state, np.where(mask, 0, self.step), index, texts)


class DenoiseVectorEnv(VectorEnv[dict[str, Any], Any, Any]):
    """``num_envs`` denoising processes side by side.

    | | single row |
    |---|---|
    | observation | ``latents`` Box, ``step`` Discrete(K + 1), ``prompt_index`` into ``env.prompts`` |
    | action | the next latents, Box(−∞, ∞, latent shape, float32) |
    | reward | 0 until step K, then the weighted sum of the rewards; NaN where one that has a weight failed |
    | terminated | at step K; never truncated |

    ``infos["prompt"]`` has the prompts' texts; where an episode ends, ``infos["reward_terms"]`` has each reward by
    name, those of weight 0 included, and ``infos["valid"]`` tells whether the reward is a finite number.

    Row i of a reset with the integer ``seed`` equals a single environment reset with ``seed + i``. Reset
    options: ``prompts`` (one per group), ``images`` (likewise: the image that goes with each prompt, as an array, a
    picture of PIL's or a path), ``group_size``, ``shared_noise``, and ``reset_mask`` (bools; other rows stay as they
    are). Under autoreset "same_step", ``render`` shows the new episode once the old one has
    ended.

    An autoreset begins whole groups of the constructor's ``group_size``, whose rows must therefore end together. A
    reset that would leave such a group's rows at different steps (a ``reset_mask`` with a smaller ``group_size``
    among its options) is refused, except under autoreset "disabled", where every reset is the caller's.

    Args:
        model: a name or a checkpoint, see `denoise_env.models.find_family`; `from_mdp` takes live objects.
        num_envs: the number of rows.
        num_steps: the number K of denoising steps, 10 by default.
        max_episode_steps: Gymnasium's name for ``num_steps``; give one of the two.
        rewards: a reward's name, or name → weight.
        prompts: the prompts that a reset draws from, as in `DenoisingMDP.make`.
        render_mode: ``None`` or "rgb_array", the decoded latents.
        render_x0: whether to render the model's estimate of the clean latents instead of the latents; it takes one
            network call per ``render``.
        autoreset_mode: "disabled", "same_step", "next_step", or Gymnasium's enum.
        output: "numpy" (float32 latents) or "torch" (tensors in the model's dtype and on its device, in and
            out; texts and the ``_key`` masks of infos stay numpy).
        group_size: G, how many neighbouring rows share a prompt, in resets that do not say it, autoresets included.
        shared_noise: whether these rows share their initial latents too, in resets that do not say it.
        options: ``microbatch`` and ``check_finite`` of `DenoisingMDP`, and the options of the model's family.

    Raises:
        ValueError: an argument out of range or unknown.

    >>> env = DenoiseVectorEnv("points", num_envs=3, num_steps=2)
    >>> observation, infos = env.reset(seed=0, options={"prompts": ["ring", "line", "grid"]})
    >>> observation["latents"].shape, infos["prompt"].tolist()
    ((3, 2), ['ring', 'line', 'grid'])
    >>> for _ in range(2):
    ...     observation, rewards, terminated, truncated, infos = env.step(observation["latents"])
    >>> terminated.tolist(), rewards.shape, infos["valid"].tolist()
    ([True, True, True], (3,), [True, True, True])
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": 10,
        "autoreset_mode": AutoresetMode.DISABLED,
    }

    def __init__(
        self,
        model: str | DenoisingMDP = DEFAULT,
        num_envs: int = 1,
        *,
        num_steps: int | None = None,
        max_episode_steps: int | None = None,
        rewards: Mapping[str, float] | str | None = None,
        prompts: Sequence[str | Prompt] | str | None = None,
        render_mode: str | None = None,
        render_x0: bool = False,
        autoreset_mode: AutoresetMode | str = AutoresetMode.DISABLED,
        output: Literal["numpy", "torch"] = "numpy",
        group_size: int = 1,
        shared_noise: bool = False,
        **options: Any,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode must be None or "rgb_array", not {render_mode!r}')
        if output not in ("numpy", "torch"):
            raise ValueError(f'output must be "numpy" or "torch", not {output!r}')
        if not isinstance(autoreset_mode, AutoresetMode) and str(autoreset_mode) not in AUTORESET:
            raise ValueError(f"autoreset_mode must be one of {list(AUTORESET)}, not {autoreset_mode!r}")
        render_x0 = boolean(render_x0, "render_x0")
        self.streams = RowStreams(num_envs)
        num_envs = self.streams.num_envs
        self._defaults: dict[str, Any] = {"group_size": group_size, "shared_noise": shared_noise}
        ResetRequest.parse(None, num_envs, **self._defaults)
        self.mdp = resolve_mdp(model, num_steps, max_episode_steps, rewards=rewards, prompts=prompts, **options)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.autoreset_mode = autoreset_mode if isinstance(autoreset_mode, AutoresetMode) else AUTORESET[autoreset_mode]
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.output = output
        self._ode = ODE(self.mdp.schedule, self.mdp.model.prediction_type) if render_x0 else None
        self._rows: _Rows | None = None

        known = self.mdp.model.vocabulary
        self.single_observation_space: spaces.Dict = spaces.Dict(
            latents=spaces.Box(-np.inf, np.inf, self.mdp.model.latent_shape, np.float32),
            step=spaces.Discrete(self.mdp.num_steps + 1),
            prompt_index=spaces.Discrete(len(known)) if known else spaces.Box(0, 2**31 - 1, (), np.int64),
        )
        self.single_action_space = spaces.Box(-np.inf, np.inf, self.mdp.model.latent_shape, np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @classmethod
    def from_mdp(cls, mdp: DenoisingMDP, num_envs: int = 1, **options: Any) -> "DenoiseVectorEnv":
        """An environment over a live MDP; options are those of ``__init__`` that the MDP does not have."""
        return cls(mdp, num_envs, **options)

    @classmethod
    def from_model(
        cls,
        model: DenoisingModel,
        rewards: Mapping[str, Reward],
        prompts: Sequence[str | Prompt],
        num_envs: int = 1,
        num_steps: int = 10,
        **options: Any,
    ) -> "DenoiseVectorEnv":
        """An environment over a live model and rewards, as in `DenoisingMDP`."""
        return cls(DenoisingMDP(model, rewards, prompts, num_steps), num_envs, **options)

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts that ``prompt_index`` points into."""
        return self.mdp.prompts

    @property
    def state(self) -> State:
        """The rows' states, as tensors on the model's device: read, never write.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self._rows is None:
            raise ResetNeeded("call reset() first")
        return self._rows.state

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin new episodes, of all rows or of those in ``options["reset_mask"]``.

        Args:
            seed: row i gets ``seed + i``, or the i-th of a list; a row without one continues its stream.
            options: reset options by name, as the class describes them.

        Raises:
            ValueError: a bad option or seed, or groups that an autoreset could not begin together; nothing has changed
                then.
            ResetNeeded: a partial reset before the first whole one.
        """
        request = self._read_options(options)
        with self._begin(self._rows, request, seed) as rows:
            result = self._observation(rows), self._prompt_info(rows, request.mask)
        self._rows = rows
        if isinstance(seed, Integral):
            super().reset(seed=int(seed))
        return result

    def check_options(self, options: Mapping[str, Any] | None) -> None:
        """Raise what `reset` would raise for these options, and change nothing."""
        request = self._read_options(options)
        self.mdp.check_reset(int(request.mask.sum()), request.prompts, request.group_size)

    def _read_options(self, options: Mapping[str, Any] | None) -> ResetRequest:
        request = ResetRequest.parse(options, self.num_envs, **self._defaults)
        if self._rows is None and not request.mask.all():
            raise ResetNeeded("the first reset() must be of all rows: leave reset_mask out")
        if self.autoreset_mode is not AutoresetMode.DISABLED:
            self._keep_groups_together(request.mask)
        return request

    def row(self, observation: dict[str, Any], i: int) -> dict[str, Any]:
        """Row ``i`` of a batched observation, in ``single_observation_space``."""
        return {
            name: observation[name][i] if isinstance(space, spaces.Discrete) else observation[name][i, ...]
            for name, space in self.single_observation_space.items()
        }

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """Make ``actions`` ``[num_envs, *latent]`` the latents.

        Under "next_step" the rows whose episode has ended begin a new one instead, with reward 0.

        Raises:
            ResetNeeded: before the first reset, or a row is at its end under "disabled".
            ValueError: an action of the wrong type, shape, dtype or device, or not finite.

        Whatever is raised, nothing has changed: after an interrupt, or when memory ran out while scoring, the same step
        can be made again.
        """
        before = self._rows
        if before is None:
            raise ResetNeeded("call reset() before step()")
        again = before.step == self.mdp.num_steps
        if again.any() and self.autoreset_mode is AutoresetMode.DISABLED:
            raise ResetNeeded(
                f"{again.sum()} of {self.num_envs} rows are at the end after {self.mdp.num_steps} steps: call "
                'reset(), with options={"reset_mask": ...} for some rows only, or build the environment with '
                'autoreset_mode="same_step" or "next_step"'
            )
        rows = before.advance(self._read_actions(actions))
        rewards = torch.zeros(self.num_envs)
        infos: dict[str, Any] = {}
        ended = rows.step == self.mdp.num_steps
        if ended.any():
            rewards, infos = self._score(rows, ended)
            if self.autoreset_mode is AutoresetMode.SAME_STEP:
                infos, again = self._final_info(rows, ended, infos), ended
        begun = self._begin(rows, self._autoreset_request(again)) if again.any() else nullcontext(rows)
        with self.streams.stepped(), begun as rows:
            result = (
                self._observation(rows),
                self._give(rewards),
                self._give(torch.from_numpy(ended)),
                self._give(torch.zeros(self.num_envs, dtype=torch.bool)),
                infos | self._prompt_info(rows, np.ones(self.num_envs, bool)),
            )
        self._rows = rows
        return result

    @torch.no_grad()
    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """One uint8 ``[H, W, 3]`` picture per row, of a clip its frames side by side (`contact_sheet`).

        ``None`` where there is no ``render_mode``.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self.render_mode is None:
            logger.warn('render() shows nothing: build the environment with render_mode="rgb_array"')
            return None
        if self._rows is None:
            raise ResetNeeded("call reset() before render()")
        latents = self._rows.state.latents if self._ode is None else self._pred_x0(self._ode, self._rows)
        shown = self.mdp.render(latents)
        return tuple((contact_sheet(shown) if shown.ndim == 5 else shown).numpy())

    def _autoreset_request(self, mask: Mask) -> ResetRequest:
        return ResetRequest.parse({"reset_mask": mask}, self.num_envs, **self._defaults)

    def _keep_groups_together(self, mask: Mask) -> None:
        """Raise a ``ValueError`` for a reset after which rows that autoresets begin as one group would end apart."""
        size = self._defaults["group_size"]
        step = np.zeros(self.num_envs) if self._rows is None else self._rows.step
        steps = np.where(mask, 0, step).reshape(-1, size)
        apart = (steps != steps[:, :1]).any(1)
        if apart.any():
            first = int(apart.argmax()) * size
            raise ValueError(
                f"rows {first} to {first + size - 1} are a group of group_size={size} that autoresets begin together, "
                "and this reset_mask would leave them at different steps: reset all of them, or build the environment "
                'with group_size=1 or autoreset_mode="disabled"'
            )

    @contextmanager
    def _begin(
        self, rows: _Rows | None, request: ResetRequest, seed: int | Sequence[int | None] | None = None
    ) -> Iterator[_Rows]:
        """A context with the rows as a reset leaves them; unless its block succeeds, nothing has been drawn."""
        with self.streams.begin(self.mdp, request, seed, self._draw_seed) as begun:
            yield (rows or _Rows.none(begun)).replace(request.mask, begun, self.prompts)

    def _draw_seed(self) -> tuple[int, Callable[[], None]]:
        """A seed from ``np_random``, and what undoes the draw."""
        generator = self.np_random.bit_generator
        before = generator.state
        return int(self.np_random.integers(2**31)), lambda: setattr(generator, "state", before)

    def _read_actions(self, actions: Any) -> Tensor:
        """A private copy of the actions as latents."""
        model = self.mdp.model
        if self.output == "numpy":
            if not isinstance(actions, np.ndarray) or actions.dtype != np.float32:
                what = f"dtype {actions.dtype}" if isinstance(actions, np.ndarray) else type(actions).__name__
                raise ValueError(f'the action must be a float32 numpy array, not {what}; for tensors, output="torch"')
            latents = torch.from_numpy(np.array(actions, order="C")).to(model.device, model.dtype)
            self.mdp.check_action(latents, self.num_envs)
            return latents
        self.mdp.check_action(actions, self.num_envs)
        return actions.detach().clone()

    def _observation(self, rows: _Rows) -> dict[str, Any]:
        state = rows.state
        if self.output == "numpy":
            return {
                "latents": state.latents.to("cpu", torch.float32, copy=True).numpy(),
                "step": rows.step.copy(),
                "prompt_index": rows.prompt_index.copy(),
            }
        return {
            "latents": state.latents.clone(),
            "step": state.step.clone(),
            "prompt_index": state.prompt_index.clone(),
        }

    def _give(self, tensor: Tensor) -> Any:
        return tensor.cpu().numpy() if self.output == "numpy" else tensor.to(self.mdp.model.device, non_blocking=True)

    def _prompt_info(self, rows: _Rows, mask: Mask) -> dict[str, Any]:
        texts = np.full(self.num_envs, None, object)
        texts[mask] = rows.texts[mask]
        return {"prompt": texts, "_prompt": mask.copy()}

    def _score(self, all_rows: _Rows, ended: Mask) -> tuple[Tensor, dict[str, Any]]:
        """Rewards ``[num_envs]``, 0 where the episode goes on, and the ended rows' infos."""
        latents, index = all_rows.state.latents, torch.from_numpy(all_rows.prompt_index)
        rows = None if ended.all() else torch.from_numpy(np.flatnonzero(ended))
        if rows is not None:
            latents, index = latents[rows.to(latents.device)], index[rows]
        scores = self.mdp.score(latents, index)

        def spread(values: Tensor) -> Tensor:
            if rows is None:
                return values
            return values.new_zeros(self.num_envs).index_copy(0, rows.to(values.device), values)

        terms: dict[str, Any] = {}
        for name, values in scores.values.items():
            terms |= {name: self._give(spread(values)), f"_{name}": ended.copy()}
        return spread(scores.total), {
            "reward_terms": terms,
            "_reward_terms": ended.copy(),
            "valid": self._give(spread(scores.valid)),
            "_valid": ended.copy(),
        }

    def _final_info(self, rows: _Rows, ended: Mask, infos: dict[str, Any]) -> dict[str, Any]:
        """What "same_step" tells about episodes that are gone when ``step`` returns."""
        last = self._observation(rows)
        final = np.full(self.num_envs, None, object)
        for i in np.flatnonzero(ended).tolist():
            final[i] = self.row(last, i)
        return {
            "final_obs": final,
            "_final_obs": ended.copy(),
            "final_info": infos | self._prompt_info(rows, ended),
            "_final_info": ended.copy(),
        }

    def _pred_x0(self, ode: ODE, rows: _Rows) -> Tensor:
        """x̂0 of rows on their way, the latents of rows at their end."""
        latents, over = rows.state.latents, torch.from_numpy(rows.step == self.mdp.num_steps)
        if over.all():
            return latents
        step = torch.from_numpy(rows.step).clamp(max=self.mdp.num_steps - 1)
        timestep = self.mdp.schedule.timesteps[step].to(latents.device)
        conditioning = self.mdp.conditioning.rows(rows.state.prompt_index)
        output = self.mdp.model.predict(latents, timestep, conditioning)
        x0 = ode.pred_x0(latents, output, step).to(latents.dtype)
        x0[over.to(x0.device)] = latents[over.to(x0.device)]
        return x0

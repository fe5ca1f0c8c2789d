"""The batched Gymnasium environment: `DenoiseVectorEnv`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import logger, spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from denoise_env.faces import ResetRequest, RowStreams, resolve_mdp
from denoise_env.kernels import ODE
from denoise_env.mdp import DenoisingMDP, State
from denoise_env.models import DenoisingModel
from denoise_env.prompts import Prompt
from denoise_env.rewards import Reward
from denoise_env.worlds import DEFAULT

AUTORESET = {mode.name.lower(): mode for mode in AutoresetMode}
Mask = NDArray[np.bool_]


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
    options: ``prompts`` (one per group), ``group_size``, ``shared_noise``, and ``reset_mask`` (bools; other
    rows stay as they are). Under autoreset "same_step", ``render`` shows the new episode once the old one has
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
        if not isinstance(autoreset_mode, AutoresetMode) and autoreset_mode not in AUTORESET:
            raise ValueError(f"autoreset_mode must be one of {list(AUTORESET)}, not {autoreset_mode!r}")
        self.streams = RowStreams(num_envs)
        self._defaults: dict[str, Any] = {"group_size": group_size, "shared_noise": shared_noise}
        ResetRequest.parse(None, num_envs, **self._defaults)
        self.mdp = resolve_mdp(model, num_steps, max_episode_steps, rewards=rewards, prompts=prompts, **options)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.autoreset_mode = autoreset_mode if isinstance(autoreset_mode, AutoresetMode) else AUTORESET[autoreset_mode]
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.output = output
        self._ode = ODE(self.mdp.schedule, self.mdp.model.prediction_type) if render_x0 else None
        self._state: State | None = None
        # On the host, so that deciding what ends needs no device sync.
        self._steps = np.zeros(num_envs, np.int64)
        self._prompt_index = np.zeros(num_envs, np.int64)
        self._texts = np.full(num_envs, None, object)

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
        if self._state is None:
            raise ResetNeeded("call reset() first")
        return self._state

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
        request = ResetRequest.parse(options, self.num_envs, **self._defaults)
        if self._state is None and not request.mask.all():
            raise ResetNeeded("the first reset() must be of all rows: leave reset_mask out")
        if self.autoreset_mode is not AutoresetMode.DISABLED:
            self._keep_groups_together(request.mask)
        self._begin(request, seed)
        if isinstance(seed, int | np.integer):
            super().reset(seed=int(seed))
        return self._observation(), self._prompt_info(request.mask)

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
            ValueError: an action of the wrong type, shape, dtype or device, or not finite; nothing has
                changed.
        """
        if self._state is None:
            raise ResetNeeded("call reset() before step()")
        over = self._steps == self.mdp.num_steps
        if over.any() and self.autoreset_mode is AutoresetMode.DISABLED:
            raise ResetNeeded(
                f"{over.sum()} of {self.num_envs} rows are at the end after {self.mdp.num_steps} steps: call "
                'reset(), with options={"reset_mask": ...} for some rows only'
            )
        restart = self._autoreset_request(over) if over.any() else None
        self._state = self._state.advance(self._read_actions(actions))
        self._steps = self._steps + 1
        if restart is not None:
            self._begin(restart, None)
        rewards = torch.zeros(self.num_envs)
        infos: dict[str, Any] = {}
        ended = self._steps == self.mdp.num_steps
        if ended.any():
            rewards, infos = self._score(ended)
            if self.autoreset_mode is AutoresetMode.SAME_STEP:
                infos = self._final_info(ended, infos)
                self._begin(self._autoreset_request(ended), None)
        infos |= self._prompt_info(np.ones(self.num_envs, bool))
        return (
            self._observation(),
            self._give(rewards),
            self._give(torch.from_numpy(ended)),
            self._give(torch.zeros(self.num_envs, dtype=torch.bool)),
            infos,
        )

    @torch.no_grad()
    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """One uint8 ``[H, W, 3]`` picture per row; ``None`` where there is no ``render_mode``.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self.render_mode is None:
            logger.warn('render() shows nothing: build the environment with render_mode="rgb_array"')
            return None
        if self._state is None:
            raise ResetNeeded("call reset() before render()")
        latents = self._state.latents if self._ode is None else self._pred_x0(self._ode, self._state)
        return tuple(self.mdp.render(latents).numpy())

    def _autoreset_request(self, mask: Mask) -> ResetRequest:
        return ResetRequest.parse({"reset_mask": mask}, self.num_envs, **self._defaults)

    def _keep_groups_together(self, mask: Mask) -> None:
        """Raise a ``ValueError`` for a reset after which rows that autoresets begin as one group would end apart."""
        size = self._defaults["group_size"]
        steps = np.where(mask, 0, self._steps).reshape(-1, size)
        apart = (steps != steps[:, :1]).any(1)
        if apart.any():
            first = int(apart.argmax()) * size
            raise ValueError(
                f"rows {first} to {first + size - 1} are a group of group_size={size} that autoresets begin together, "
                "and this reset_mask would leave them at different steps: reset all of them, or build the environment "
                'with group_size=1 or autoreset_mode="disabled"'
            )

    def _begin(self, request: ResetRequest, seed: int | Sequence[int | None] | None) -> None:
        begun = self.streams.begin(self.mdp, request, seed, lambda: int(self.np_random.integers(2**31)))
        rows = torch.from_numpy(np.flatnonzero(request.mask)).to(begun.latents.device)
        whole = self._state is None or len(rows) == self.num_envs
        self._state = begun if self._state is None or whole else self._state.replace_rows(rows, begun)
        self._steps[request.mask] = 0
        self._prompt_index[request.mask] = begun.prompt_index.cpu().numpy()
        self._texts[request.mask] = [self.prompts[i].text for i in self._prompt_index[request.mask]]

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

    def _observation(self) -> dict[str, Any]:
        assert self._state is not None
        state = self._state
        if self.output == "numpy":
            return {
                "latents": state.latents.to("cpu", torch.float32, copy=True).numpy(),
                "step": self._steps.copy(),
                "prompt_index": self._prompt_index.copy(),
            }
        return {
            "latents": state.latents.clone(),
            "step": state.step.clone(),
            "prompt_index": state.prompt_index.clone(),
        }

    def _give(self, tensor: Tensor) -> Any:
        return tensor.cpu().numpy() if self.output == "numpy" else tensor.to(self.mdp.model.device, non_blocking=True)

    def _prompt_info(self, mask: Mask) -> dict[str, Any]:
        texts = np.full(self.num_envs, None, object)
        texts[mask] = self._texts[mask]
        return {"prompt": texts, "_prompt": mask.copy()}

    def _score(self, ended: Mask) -> tuple[Tensor, dict[str, Any]]:
        """Rewards ``[num_envs]``, 0 where the episode goes on, and the ended rows' infos."""
        assert self._state is not None
        latents, index = self._state.latents, torch.from_numpy(self._prompt_index)
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

    def _final_info(self, ended: Mask, infos: dict[str, Any]) -> dict[str, Any]:
        """What "same_step" tells about episodes that are gone when ``step`` returns."""
        last = self._observation()
        final = np.full(self.num_envs, None, object)
        for i in np.flatnonzero(ended).tolist():
            final[i] = self.row(last, i)
        return {
            "final_obs": final,
            "_final_obs": ended.copy(),
            "final_info": infos | self._prompt_info(ended),
            "_final_info": ended.copy(),
        }

    def _pred_x0(self, ode: ODE, state: State) -> Tensor:
        """x̂0 of rows on their way, the latents of rows at their end."""
        over = torch.from_numpy(self._steps == self.mdp.num_steps)
        if over.all():
            return state.latents
        step = torch.from_numpy(self._steps).clamp(max=self.mdp.num_steps - 1)
        timestep = self.mdp.schedule.timesteps[step].to(state.latents.device)
        conditioning = self.mdp.conditioning.rows(state.prompt_index)
        output = self.mdp.model.predict(state.latents, timestep, conditioning)
        x0 = ode.pred_x0(state.latents, output, step).to(state.latents.dtype)
        x0[over.to(x0.device)] = state.latents[over.to(x0.device)]
        return x0

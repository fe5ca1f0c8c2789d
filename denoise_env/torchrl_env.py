"""The TorchRL environment: `DenoiseTorchRLEnv`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from denoise_env.faces import ResetRequest, RowStreams, resolve_mdp
from denoise_env.mdp import DenoisingMDP, State
from denoise_env.prompts import Prompt
from denoise_env.worlds import DEFAULT


class DenoiseTorchRLEnv(EnvBase):
    """``num_envs`` denoising processes as a TorchRL environment of batch size ``[num_envs]``.

    The state is in the tensordict: ``latents [n, *latent]``, ``step [n]`` and ``prompt_index [n]`` into
    ``env.prompts``; the environment keeps random streams only. ``action`` is the next latents. At step K
    ``terminated`` and ``done`` ``[n, 1]`` are set and ``reward [n, 1]`` is the weighted sum of the rewards,
    NaN where one could not be computed; ``("reward_terms", name) [n, 1]`` has each of them, 0 before the end.
    The reward terms are reward keys too: ``env.reward_keys`` lists them, ``env.reward_key`` does not exist.
    The observation ``valid [n, 1]`` is true where an episode has just ended and its reward is a finite number.

    After ``set_seed(s)`` row i begins like row i of `DenoiseVectorEnv` after ``reset(seed=s)``; streams
    without a seed are drawn from torch's global generator. ``reset`` takes ``prompts``, ``images``,
    ``group_size`` and ``shared_noise`` as keywords, as `DenoiseVectorEnv` takes them as options.

    Args:
        model: a name or a checkpoint, see `denoise_env.models.find_family`; `from_mdp` takes a live one.
        num_envs: the number of rows n.
        num_steps: the number K of denoising steps, 10 by default.
        max_episode_steps: Gymnasium's name for ``num_steps``; give one of the two.
        rewards: a reward's name, or name → weight.
        prompts: the prompts that a reset draws from, as in `DenoisingMDP.make`.
        group_size: G, how many neighbouring rows share a prompt, in resets that do not say it, a collector's included.
        shared_noise: whether these rows share their initial latents too, in resets that do not say it.
        options: ``microbatch`` and ``check_finite`` of `DenoisingMDP`, and the options of the model's family.

    Raises:
        ValueError: an argument out of range or unknown.

    >>> env = DenoiseTorchRLEnv("points", num_envs=4, num_steps=3)
    >>> _ = env.set_seed(0)
    >>> rollout = env.rollout(3)
    >>> rollout.batch_size, rollout["next", "done"][:, -1].all().item()
    (torch.Size([4, 3]), True)
    """

    def __init__(
        self,
        model: str | DenoisingMDP = DEFAULT,
        num_envs: int = 1,
        *,
        num_steps: int | None = None,
        max_episode_steps: int | None = None,
        rewards: Mapping[str, float] | str | None = None,
        prompts: Sequence[str | Prompt] | str | None = None,
        group_size: int = 1,
        shared_noise: bool = False,
        **options: Any,
    ) -> None:
        streams = RowStreams(num_envs)
        defaults: dict[str, Any] = {"group_size": group_size, "shared_noise": shared_noise}
        ResetRequest.parse(None, streams.num_envs, **defaults)
        mdp = resolve_mdp(model, num_steps, max_episode_steps, rewards=rewards, prompts=prompts, **options)
        super().__init__(device=mdp.model.device, batch_size=[streams.num_envs])
        self.mdp = mdp
        self.num_envs = streams.num_envs
        self.streams = streams
        self._defaults = defaults
        self._make_specs()

    @classmethod
    def from_mdp(cls, mdp: DenoisingMDP, num_envs: int = 1, **options: Any) -> "DenoiseTorchRLEnv":
        """An environment over a live MDP; options are those of ``__init__`` that the MDP does not have."""
        return cls(mdp, num_envs, **options)

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts that ``prompt_index`` points into."""
        return self.mdp.prompts

    def _make_specs(self) -> None:
        n, model, device = self.num_envs, self.mdp.model, self.device
        column = {"shape": (n, 1), "device": device}
        latents = Unbounded(shape=(n, *model.latent_shape), dtype=model.dtype, device=device)
        if model.vocabulary:
            index = Categorical(len(model.vocabulary), shape=(n,), device=device)
        else:
            index = Bounded(0, 2**31 - 1, shape=(n,), dtype=torch.long, device=device)
        step = Categorical(self.mdp.num_steps + 1, shape=(n,), device=device)
        flag = Categorical(2, dtype=torch.bool, **column)
        state = {"latents": latents, "step": step, "prompt_index": index}
        self.state_spec = Composite(state, shape=(n,))
        self.observation_spec = Composite({**state, "valid": flag}, shape=(n,)).clone()
        self.action_spec = latents.clone()
        terms = {name: Unbounded(**column) for name in self.mdp.rewards}
        self.reward_spec = Composite(reward=Unbounded(**column), reward_terms=Composite(terms, shape=(n,)), shape=(n,))
        self.done_spec = Composite(done=flag.clone(), terminated=flag.clone(), shape=(n,))

    def _reset(self, tensordict: TensorDictBase | None = None, **options: Any) -> TensorDict:
        if "reset_mask" in options:
            raise ValueError("a partial reset has its mask in the tensordict's '_reset', not in reset_mask")
        if tensordict is not None and "_reset" in tensordict.keys():  # noqa: SIM118
            options["reset_mask"] = tensordict["_reset"].reshape(self.num_envs)
        request = ResetRequest.parse(options, self.num_envs, **self._defaults)
        with self.streams.begin(self.mdp, request, None, _draw_seed) as state:
            if not request.mask.all():
                rows = torch.from_numpy(request.mask).nonzero()[:, 0].to(self.device)
                blank = self.state_spec.zero()  # TorchRL keeps the rows that were not to be reset.
                state = State(**blank).replace_rows(rows, state)
            return self._pack(state, valid=torch.zeros(self.num_envs, 1, dtype=torch.bool))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict["action"]
        self.mdp.check_action(action, self.num_envs)
        state = State(*(tensordict[name] for name in ("latents", "step", "prompt_index")))
        moving = torch.ones(self.num_envs, dtype=torch.bool)
        if "_step" in tensordict.keys():  # noqa: SIM118
            moving = tensordict["_step"].reshape(self.num_envs).cpu()
        steps = state.step.cpu() + moving
        if (steps > self.mdp.num_steps).any():
            raise ValueError(f"the episode is over after {self.mdp.num_steps} steps: reset first")
        if moving.all():
            state = state.advance(action.clone())
        else:
            rows = moving.nonzero()[:, 0].to(self.device)
            state = state.replace_rows(rows, State(*(v[rows] for v in vars(state.advance(action)).values())))
        reward = torch.zeros(self.num_envs, 1, device=self.device)
        valid = torch.zeros_like(reward, dtype=torch.bool)
        terms = {name: torch.zeros_like(reward) for name in self.mdp.rewards}
        ended = steps == self.mdp.num_steps
        if (ended & moving).any():
            rows = (ended & moving).to(self.device)
            scores = self.mdp.score(state.latents[rows], state.prompt_index[rows])
            reward[rows, 0], valid[rows, 0] = scores.total, scores.valid
            for name, values in scores.values.items():
                terms[name][rows, 0] = values
        done = ended[:, None].to(self.device)
        with self.streams.stepped(moving.numpy()):
            return self._pack(state, valid=valid, reward=reward, reward_terms=terms, done=done, terminated=done.clone())

    def _set_seed(self, seed: int | None) -> None:
        self.streams.seed(seed)

    def _pack(self, state: State, **more: Any) -> TensorDict:
        return TensorDict({**vars(state), **more}, batch_size=self.batch_size, device=self.device)


def _draw_seed() -> tuple[int, Callable[[], None]]:
    """A seed from torch's global generator, and what undoes the draw."""
    before = torch.get_rng_state()
    return int(torch.randint(2**31, ())), lambda: torch.set_rng_state(before)

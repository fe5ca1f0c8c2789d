"""What an agent is, and the update that all agents share; an algorithm adds what it learns from and its loss."""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from agents.advantages import Aggregation, aggregate
from agents.policy import DenoisingPolicy
from agents.ranks import Ranks
from agents.rollout import Rollout
from denoise_env.kernels import Kernel
from denoise_env.seeding import generator
from denoise_env.weights import copies, divided, fill, follow, is_sharded, swapped, whole

SharedNoise = Literal["none", "group", "rollout"]


@dataclass
class AgentConfig:
    """The settings of every agent: how it collects rollouts."""

    group_size: int = 16
    """Neighbouring samples of one prompt, G. They form a group."""
    shared_noise: SharedNoise = "none"
    """Which samples start from the same initial noise: none ("none"), those of a group ("group"), or all of a rollout
    ("rollout")."""
    share_prefix: bool = False
    """Make the network calls that a group with shared noise has in common once. The results stay the same except for
    rounding, so that the first ratio is 1 only to about 1e-6; leave it off in bf16."""


@dataclass
class LearningConfig(AgentConfig):
    """The settings of every agent that learns."""

    reward_aggregation: Aggregation = "rewards"
    """How several rewards become one loss: add up their advantages ("advantages": every reward is normalised by
    itself), their losses ("losses": every reward has a clipped loss), or the rewards themselves ("rewards": the
    advantages are those of the sum). Each reward counts times its weight; with one reward of weight 1 all three are the
    same."""
    best_and_worst: int = 0
    """Train only so many samples of each group, half of them those with the highest and half those with the lowest
    total reward (DanceGRPO's best-of-N); an odd one is among the highest. The group's others count in the advantages
    and cost no update. 0 trains all."""
    lr: float = 1e-4
    """AdamW's learning rate, constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """A gradient with a larger norm than this is scaled down to it."""
    updates_per_rollout: int = 1
    """Optimizer steps per pass over a rollout. Each step trains its own equal part of the episodes, in whole groups."""
    epochs: int = 1
    """Passes over every rollout."""
    ema_decay: float = 0.0
    """Evaluate, sample and export an exponential moving average of the weights with this decay; 0 turns it off."""
    ema_warmup: bool = False
    """Average over fewer weights at the beginning: the decay is at most (1 + n) / (10 + n) after n optimizer steps."""
    ema_every: int = 1
    """The average follows the weights after each so many optimizer steps."""
    max_skipped_updates: int = 3
    """An optimizer step whose gradient is not finite is skipped; the run stops after more than this many in a row."""


class Agent(ABC):
    """An algorithm: a policy, how it collects rollouts, and how it learns from them (``update``).

    Args:
        policy: the policy that acts and is trained.
        config: the algorithm's settings, a ``config_type``; default: those of its published terms. What belongs to a
            published run, such as kernel, averaging and updates per rollout, is in that run's preset.
        seed: seed of the agent's own random draws.
        microbatch: episodes per network call of an update; give the same as to the rollout. It bounds the memory and
            does not change the result. Default: all episodes of an update.
        ranks: the processes that train together, each on its own episodes; default: this process alone.

    Class attributes declare what the algorithm needs: ``smallest_group``, ``needs_density`` (a stochastic kernel),
    ``needs_means`` (of the rollout's Gaussians), ``needs_reference`` (the model before training), ``on_policy`` (one
    optimizer step per rollout), ``aggregations`` (the ways in which it can add up several rewards), ``joins_rewards``
    (why it cannot do so in the other ways), ``own_settings`` (the settings that a preset made for another agent leaves
    as they are), ``rows_per_example`` (how many episodes one example compares), and ``whole_groups`` (its loss compares
    the samples of a group, so that none may be left out).

    Attributes:
        trained: the policy's parameters that training changes, by name.
        modules: what the agent trains or remembers beside the policy (such as a critic); checkpoints hold it.
        kept: copies of the trained weights that checkpoints hold too: what they are → parameter's name → weights.

    Raises:
        ValueError: the policy lacks what the algorithm needs.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[AgentConfig]] = LearningConfig
    smallest_group: ClassVar[int] = 1
    needs_density: ClassVar[bool] = True
    needs_means: bool = False
    needs_reference: bool = False
    on_policy: ClassVar[bool] = False
    aggregations: ClassVar[tuple[Aggregation, ...]] = ("rewards",)
    joins_rewards: ClassVar[str] = "it learns from the rewards' weighted sum"
    own_settings: ClassVar[tuple[str, ...]] = ()
    rows_per_example: ClassVar[int] = 1
    whole_groups: ClassVar[bool] = False
    config: Any

    def __init__(
        self,
        policy: DenoisingPolicy,
        config: Any = None,
        seed: int = 0,
        microbatch: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config or self.config_type()
        self.policy = policy
        self.seed = seed
        self.microbatch = microbatch
        self.ranks = ranks or Ranks()
        self.group_size: int = self.config.group_size
        self.trained = policy.model.trainable()
        self._validate()
        self.modules = nn.ModuleDict(self.make_modules()).to(policy.model.device)
        if self.needs_reference:
            policy.model.keep_reference()
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        config = self.config
        groups = [{**group, "params": ps} for group in self.parameter_groups() for ps in apart(group["params"])]
        self.optimizer = torch.optim.AdamW(
            groups, config.lr, config.betas, weight_decay=config.weight_decay, fused=fused
        )
        self.skipped = 0  # optimizer steps in a row
        self.average = copies(self.trained) if config.ema_decay else {}
        self.kept: dict[str, dict[str, Tensor]] = {"average": self.average}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The policy's parameters that training changes."""
        return list(self.trained.values())

    def _validate(self) -> None:
        config, kernel = self.config, self.policy.kernel
        if self.needs_density and not kernel.stochastic.any():
            raise ValueError(
                f"{self.name} needs log-probs, and the kernel {kernel!r} is deterministic: use a stochastic one "
                'with eta > 0 ("ddim" on a diffusion; "dance_sde", "flow_sde" or "cps" on a flow), or an agent that '
                "learns from final samples (nft, awm, rwr, dpo)"
            )
        if self.group_size < self.smallest_group:
            raise ValueError(
                f"{self.name} compares samples of one prompt: group_size must be at least {self.smallest_group}, "
                f"not {self.group_size}"
            )
        if not 0 <= config.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), not {config.ema_decay}")
        hints = get_type_hints(self.config_type)
        for name, value in vars(config).items():
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number ≥ 0, not {value}")
            if get_origin(hint := hints.get(name)) is Literal and value not in get_args(hint):
                raise ValueError(f"{name} must be one of {list(get_args(hint))}, not {value!r}")
        if self.on_policy and config.updates_per_rollout * config.epochs > 1:
            raise ValueError(
                f"{self.name} is on-policy, one optimizer step per rollout: updates_per_rollout and epochs must be 1 "
                "(agents with a ratio take more: grpo, ppo, ddpo-is)"
            )
        if (how := config.reward_aggregation) not in self.aggregations:
            allowed = " or ".join(f'"{name}"' for name in self.aggregations)
            raise ValueError(
                f"{self.name} cannot add up the rewards' {how}, because {self.joins_rewards}: set reward_aggregation "
                f"to {allowed}"
            )
        if not any(self.policy.mdp.reward_weights.values()):
            raise ValueError("every reward has weight 0: give one that counts another weight")
        if not 0 <= (kept := config.best_and_worst) <= self.group_size:
            raise ValueError(f"best_and_worst must lie in [0, group_size={self.group_size}], not {kept}")
        if kept and self.whole_groups:
            raise ValueError(f"{self.name} compares whole groups in its loss: set best_and_worst to 0")
        self.require_positive("max_grad_norm", "updates_per_rollout", "epochs", "group_size", "ema_every")
        if config.max_skipped_updates < 0:
            raise ValueError(f"max_skipped_updates must be at least 0, not {config.max_skipped_updates}")

    def require_positive(self, *names: str) -> None:
        """Raise a ``ValueError`` for any of these settings that is not above 0."""
        for name in names:
            if not getattr(self.config, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self.config, name)}")

    def check_rows(self, rows: int) -> None:
        """Raise a ``ValueError`` for a number of episodes per iteration that cannot be divided.

        Ranks, updates, groups and microbatches must divide it without remainder.

        Args:
            rows: the episodes of one iteration, of all ranks together.
        """
        updates, ranks = self.config.updates_per_rollout, self.ranks.size
        if rows % (updates * ranks * self.group_size):
            among = f", each in equal shares for {ranks} processes" if ranks > 1 else ""
            raise ValueError(
                f"{rows} episodes per rollout cannot be divided into updates_per_rollout={updates} parts of whole "
                f"groups of {self.group_size}{among}"
            )
        collected = rows // updates // ranks
        trained = collected // self.group_size * (self.config.best_and_worst or self.group_size)
        size = self.microbatch or collected
        if remainder := collected % size or (trained % size if trained > size else 0):
            whose = "one process in one update" if ranks > 1 else "one update"
            episodes = trained if collected % size == 0 else collected
            raise ValueError(
                f"the {episodes} episodes of {whose} cannot be divided into microbatches of {size}: {remainder} remain"
            )

    # --- Rows that are divided among ranks ---

    def mine(self, rows: Sequence[Any]) -> list[Any]:
        """This rank's share of a list with one entry per episode of an iteration, or one per group."""
        return self.ranks.mine(rows, self.config.updates_per_rollout)

    def all_rows(self, rows: Tensor) -> Tensor:
        """The entries ``[B, ...]`` of all ranks' episodes, in the order of the iteration."""
        return self.ranks.gather(rows, self.config.updates_per_rollout)

    def over_all_rows(self, function: Callable[..., Tensor], *rows: Tensor, **options: Any) -> Tensor:
        """This rank's part of ``function(*rows, **options)``, computed on the episodes of all ranks.

        This is for whatever compares episodes: a mean, a std, a permutation over the whole rollout.

        Args:
            function: from tensors ``[B, ...]`` with one entry per episode of all ranks to one such tensor.
            rows: tensors with one entry per episode of this rank.
            options: keywords that are handed to ``function``.
        """
        found = function(*(self.all_rows(r) for r in rows), **options)
        return found if self.ranks.size == 1 else found[self.mine(range(len(found)))]

    def idle_settings(self) -> dict[str, str]:
        """The settings that have no effect in this run: name → why, half a sentence.

        A choice is listed only where it is not its default.
        """
        config, found = self.config, {}
        if config.share_prefix and config.shared_noise == "none":
            found["share_prefix"] = 'samples have no network call in common with shared_noise "none"'
        if self.chosen("reward_aggregation") and sum(map(bool, self.policy.mdp.reward_weights.values())) == 1:
            found["reward_aggregation"] = "there is one reward"
        if not config.ema_decay:
            averaging = [name for name in ("ema_warmup", "ema_every") if self.chosen(name)]
            found |= dict.fromkeys(averaging, "ema_decay is 0, and no weights are averaged")
        return found

    def idle_clip(self) -> dict[str, str]:
        """The entry of ``clip_range`` in `idle_settings`, for agents that clip a ratio."""
        if self.config.updates_per_rollout * self.config.epochs > 1 or self.collects_ahead:
            return {}
        return {
            "clip_range": "with one optimizer step per rollout (updates_per_rollout and epochs are 1) every ratio is 1"
        }

    def chosen(self, name: str) -> bool:
        """Whether a setting differs from its default."""
        return bool(getattr(self.config, name) != getattr(self.config_type(), name))

    # --- What an algorithm may say about its rollouts ---

    @property
    def collects_ahead(self) -> bool:
        """Whether the next rollout is collected before the update on this one, while this one is scored."""
        return False

    @property
    def best_of(self) -> int:
        """Samples that evaluation draws for each one it keeps."""
        return 1

    def kernel(self, iteration: int) -> Kernel:
        """The kernel of an iteration's rollout."""
        return self.policy.kernel

    def rollout_options(self, iteration: int) -> dict[str, Any]:
        """The keywords with which `agents.rollout.collect` is to be called."""
        initial = None
        if self.config.shared_noise == "rollout":
            random = generator(self.seed, "initial noise", iteration)
            initial = torch.randn(self.policy.model.latent_shape, generator=random)
        return {
            "group_size": self.group_size,
            "shared_noise": self.config.shared_noise == "group",
            "initial": initial,
            "share_prefix": self.config.share_prefix,
            "keep_means": self.needs_means,
            "kernel": self.kernel(iteration),
            "microbatch": self.microbatch,
        }

    def rollout_weights(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the policy has the weights that collect the rollout."""
        return contextlib.nullcontext()

    # --- What an algorithm must say about its updates ---

    def make_modules(self) -> dict[str, nn.Module]:
        """The networks that the agent trains or remembers beside the policy, by name: its ``modules``."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer trains, as PyTorch's parameter groups."""
        return [{"params": self.parameters}]

    def reward_advantages(self, name: str, rewards: Tensor, rollout: Rollout) -> Tensor:
        """One reward's own advantages ``[B]`` float32, 0 for episodes that could not be scored.

        Args:
            name: the reward's name, or "total" for the weighted sum of all.
            rewards: ``[B]``, the reward's values; NaN where there is none.
            rollout: the B episodes.
        """
        raise NotImplementedError(f"{self.name} has no advantages")

    def advantages(self, rollout: Rollout) -> dict[str, Tensor]:
        """The ``advantage [B]`` that `aggregate` makes of `reward_advantages`, as ``reward_aggregation`` says.

        Where the config has an ``advantage_clip``, advantages are clipped to ± this.
        """
        config, weights = self.config, self.policy.mdp.reward_weights
        clip = getattr(config, "advantage_clip", math.inf)

        def own(name: str, rewards: Tensor) -> Tensor:
            return self.reward_advantages(name, rewards, rollout)

        return aggregate(config.reward_aggregation, rollout.scores, weights, own, clip)

    @abstractmethod
    def examples(self, rollout: Rollout, iteration: int) -> TensorDict:
        """What an update learns from, ``[N, T]``: T forward passes for each of N examples.

        ``episode [N, T]`` is the place of the example's episode in the rollout; an algorithm adds what else it needs.
        Examples are in the order of their episodes, so that the equal parts of an update hold whole groups.
        """

    @abstractmethod
    def example_loss(
        self, rollout: Rollout, examples: TensorDict, conditioning: TensorDict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss ``[n]`` of a microbatch of examples ``[n]``, with gradient, and figures ``[n]`` to log."""

    def conditioning(self, rollout: Rollout, examples: TensorDict) -> TensorDict:
        """The conditioning of a microbatch of examples ``[n, T]``."""
        return rollout.conditioning(examples["episode"][:, 0])

    def complete(self, rollout: Rollout, examples: TensorDict, conditioning: TensorDict) -> TensorDict:
        """A microbatch of examples ``[n, T]`` with all that `example_loss` needs for each column ``[n]``.

        It is called before any pass with gradient, and is the place for the outputs of other weights, which must not
        be swapped in between a pass with gradient and its backward pass.
        """
        return examples

    def auxiliary_loss(
        self, rollout: Rollout, examples: TensorDict, conditioning: TensorDict
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """A loss ``[n]`` beside those of the columns, such as a critic's, and figures ``[n]`` to log.

        Args:
            rollout: the episodes.
            examples: a microbatch ``[n, T]``, complete.
            conditioning: that of the microbatch.
        """
        return None

    def visit(self, examples: TensorDict, epoch: int) -> TensorDict:
        """What an epoch, counted from 0, trains of the examples: here all."""
        return examples

    def update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """Train on a rollout. An optimizer step none of whose episodes was scored is left out.

        Args:
            rollout: this rank's episodes, collected under `rollout_weights` as they are now, or where the agent
                `collects_ahead` as they were before the last update.
            iteration: the iteration's number, from which the agent's random draws follow.

        Returns:
            Figures to log, averaged over the rollout's optimizer steps and the ranks.

        Raises:
            FloatingPointError: the gradient was not finite in more than ``max_skipped_updates`` optimizer steps in a
                row; the weights are as before those steps.
        """
        self.check_rows(len(rollout) * self.ranks.size)
        examples = self.examples(rollout, iteration)
        if self.config.best_and_worst:
            examples = examples[extremes(rollout.scores.total, self.group_size, self.config.best_and_worst)]
        part = len(examples) // self.config.updates_per_rollout
        visits = [self.visit(examples, epoch) for epoch in range(self.config.epochs)]
        parts = [visit[start : start + part] for visit in visits for start in range(0, len(examples), part)]
        results = [self._optimize(rollout, examples) for examples in parts]
        made = [result for result in results if not result["skipped_updates"]] or results
        figures = {name: sum(result[name] for result in made) / len(made) for name in made[0]}
        figures["skipped_updates"] = sum(result["skipped_updates"] for result in results)
        if "ratio" in figures:
            figures["ratio_deviation"] = max(result["ratio_deviation"] for result in made)
        if self.ranks.size == 1:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=self.policy.model.device)
        each = self.ranks.each(values)
        both = zip(figures, each.mean(0).tolist(), each.amax(0).tolist(), strict=True)
        return {name: most if name == "ratio_deviation" else mean for name, mean, most in both}

    def _optimize(self, rollout: Rollout, examples: TensorDict) -> dict[str, float]:
        """One optimizer step."""
        rows, times = examples.batch_size
        size = max(1, self.microbatch // self.rows_per_example) if self.microbatch else rows
        sums: dict[str, Tensor] = {}
        deviation = torch.zeros((), device=self.policy.model.device)
        for first in range(0, rows, size):
            chunk = examples[first : first + size]
            conditioning = self.conditioning(rollout, chunk)
            chunk = self.complete(rollout, chunk, conditioning)
            for j in range(times):
                loss, figures = self.example_loss(rollout, chunk[:, j], conditioning)
                (loss.sum() / (rows * times)).backward()
                if "ratio" in figures:
                    deviation = torch.maximum(deviation, (figures["ratio"] - 1).abs().max())
                for name, value in {**figures, "loss": loss}.items():
                    sums[name] = sums.get(name, 0) + value.detach().sum()
            if (more := self.auxiliary_loss(rollout, chunk, conditioning)) is not None:
                (more[0].sum() / rows).backward()
                for name, value in {**more[1], "loss": more[0]}.items():
                    sums[name] = sums.get(name, 0) + times * value.detach().sum()
        self._average_gradients()
        norm = clip(self.parameters, self.config.max_grad_norm)
        finite = norm.isfinite()
        if others := [p for p in self.modules.parameters() if p.grad is not None]:
            finite = finite & clip(others, self.config.max_grad_norm).isfinite()
        scored = rollout.scores.valid[examples["episode"]].any().to(finite.device)
        finites, scores = self.ranks.each(torch.stack([finite, scored])).T.tolist()  # one sync
        made = all(finites) and any(scores)  # without a score only the optimizer's momentum would move weights
        if made:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.skipped = 0 if all(finites) else self.skipped + 1
        if self.skipped > self.config.max_skipped_updates:
            raise FloatingPointError(
                f"the gradient is not finite, {self.skipped} optimizer steps in a row: lower the learning rate, use "
                "dtype fp32, or look for a reward that explodes"
            )
        if made and self.average:
            self._follow()
        result = {name: value.item() / (rows * times) for name, value in sums.items()}
        result |= {"ratio_deviation": deviation.item(), "grad_norm": norm.item(), "skipped_updates": float(not made)}
        return result

    def _follow(self) -> None:
        """Bring the averaged weights forward after an optimizer step."""
        config = self.config
        made = [state["step"] for state in self.optimizer.state.values()]  # which checkpoints hold
        steps = int(torch.stack(made).max())
        if steps % config.ema_every == 0:
            most = (1 + steps) / (10 + steps) if config.ema_warmup else 1.0
            follow(self.average, self.trained, min(config.ema_decay, most))

    def _average_gradients(self) -> None:
        """Average over the ranks what neither ``DistributedDataParallel`` nor ``fully_shard`` averages."""
        averaged = isinstance(self.policy.model.called, DistributedDataParallel)
        plain = [] if averaged else [p for p in self.parameters if not is_sharded(p)]
        self.ranks.average(p.grad for p in [*plain, *self.modules.parameters()] if p.grad is not None)

    # --- Weights and state ---

    def weights(self, other: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """A context in which the policy has ``other`` weights, given by name; an empty mapping leaves it as it is."""
        return swapped(self.policy.model.network, self.trained, other) if other else contextlib.nullcontext()

    def evaluation_weights(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the policy has the averaged weights, where there are any."""
        return self.weights(self.average)

    def _learned(self) -> dict[str, Tensor]:
        """The parameters that the optimizer trains, by name."""
        trained = {p for group in self.optimizer.param_groups for p in group["params"]}
        named = {**self.trained, **{f"modules.{name}": p for name, p in self.modules.named_parameters()}}
        return {name: p for name, p in named.items() if p in trained}

    def _adam(self, parameter: Tensor) -> dict[str, Tensor]:
        """The optimizer's state of a parameter; all zeros before its first step, as AdamW itself begins."""
        if state := self.optimizer.state.get(parameter):
            return state
        return {"step": torch.zeros(()), **{key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}}

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs to continue, by name: whole tensors, even where the policy's are sharded."""
        tensors: dict[str, Tensor] = {f"weights.{name}": p for name, p in self.trained.items()}
        tensors |= {f"modules.{name}": t for name, t in self.modules.state_dict().items()}
        for word, kept in self.kept.items():
            tensors |= {f"{word}.{name}": t for name, t in kept.items()}
        for name, p in self._learned().items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self._adam(p).items()}
        return {name: whole(tensor) for name, tensor in tensors.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the tensors of `state`, whether or not the weights are sharded here.

        The learning rates and the other settings of the optimizer stay those of the configuration.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape or dtype, or no state that training leaves;
                nothing has changed.
        """
        if bool(self.average) != any(name.startswith("average.") for name in tensors):
            raise ValueError("the checkpoint and ema_decay disagree on whether weights are averaged")
        learned = self._learned()
        states: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
                states.setdefault(parameter, {})[key] = tensor
        sets: dict[str, Mapping[str, Tensor]] = {"weights": self.trained, **self.kept}
        expected = {f"{word}.{name}": _form(t) for word, kept in sets.items() for name, t in kept.items()}
        expected |= {f"modules.{name}": _form(t) for name, t in self.modules.state_dict().items()}
        for name, p in learned.items():
            like = _form(p)
            forms = {"step": (torch.Size(), torch.float32), "exp_avg": like, "exp_avg_sq": like}
            expected |= {f"optimizer.{name}.{key}": form for key, form in forms.items()}
        found = {name: _form(t) for name, t in tensors.items()}
        if found != expected:
            odd = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            raise ValueError(
                f"the checkpoint holds another architecture: {odd} is {_told(found, odd, 'missing')} in it and "
                f"{_told(expected, odd, 'absent')} in the model"
            )
        for name, t in tensors.items():
            if not name.startswith("modules.") and not t.isfinite().all():
                raise ValueError(f"{name} has entries that are not finite numbers")
            if name.startswith("optimizer.") and name.endswith((".step", ".exp_avg_sq")) and (t < 0).any():
                raise ValueError(f"{name} is negative")
        for word, kept in sets.items():
            values = {name: divided(tensors[f"{word}.{name}"], p) for name, p in kept.items()}
            fill(self.policy.model.network, kept, values)
        modules = {n.removeprefix("modules."): t for n, t in tensors.items() if n.startswith("modules.")}
        self.modules.load_state_dict(modules)
        numbers = {p: i for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}
        state = {
            numbers[learned[name]]: {key: divided(t, learned[name]) if t.ndim else t for key, t in state.items()}
            for name, state in states.items()
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def extremes(rewards: Tensor, group_size: int, count: int) -> Tensor:
    """The places, in order, of the ``count`` most extreme rewards ``[B]`` of each group, as ``best_and_worst`` says.

    A reward that is NaN counts as its group's mean.
    """
    groups = rewards.view(-1, group_size).cpu()
    order = groups.where(~groups.isnan(), groups.nanmean(1, keepdim=True)).argsort(dim=1, stable=True)
    low = count // 2
    chosen = torch.cat([order[:, :low], order[:, group_size - (count - low) :]], 1).sort(1).values
    return (chosen + torch.arange(0, len(rewards), group_size)[:, None]).flatten()


def apart(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Plain and sharded parameters in separate lists, as PyTorch's operations on lists need them; no list is empty."""
    split = [[p for p in parameters if is_sharded(p) == sharded] for sharded in (False, True)]
    return [ps for ps in split if ps]


def clip(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale gradients to a norm of at most ``most``; returns the norm before, over the shards of all processes."""
    groups = apart([p for p in parameters if p.grad is not None])
    norms = [whole(get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        clip_grads_with_norm_(group, most, norm)
    return norm


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _told(forms: Mapping[str, tuple[torch.Size, torch.dtype]], name: str, none: str) -> str:
    if name not in forms:
        return none
    shape, dtype = forms[name]
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"

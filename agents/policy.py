"""A denoiser and a transition kernel as a stochastic policy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from denoise_env.kernels import Kernel, Reduction, Transition
from denoise_env.mdp import DenoisingMDP


def nothing() -> None:
    """Do nothing."""


class DenoisingPolicy(TensorDictModuleBase):
    """π(x_{k+1} | x_k, k, c): the network's output through a Gaussian kernel.

    As a TensorDict module it reads ``latents``, ``step`` and ``prompt_index`` and writes ``action`` and
    ``action_log_prob`` (0 at steps that are deterministic), so it acts in the TorchRL environment as it is.

    Args:
        mdp: the environment; the policy uses its model, schedule and prompts.
        kernel: a name in `denoise_env.kernels.KERNELS`; default: "ddim" on a diffusion, "dance_sde" on a flow.
        eta: the kernel's noise level; default: the kernel's own.
        last_step: "sde" or "ode", as in `denoise_env.kernels.Kernel`; default: the kernel's own.
        reduction: how log-probs are reduced over latent dimensions, "mean" or "sum". "squared_error" is −mean (x' −
            μ)², with x' the action and μ the step's mean. That is no log-density, as 1/(2 std²) is missing; it is for
            parity with published code for CPS.
        seed: seed of the noise that ``forward`` draws.

    Attributes:
        network_calls: what the policy has cost so far, in rows given to the network: 1 for a forward pass, 3 with
            the backward pass that follows where gradients are on.
        before_call: called before every call of the network; by default it does nothing. It may raise, to give up what
            the policy is in the middle of.

    Raises:
        ValueError: an unknown kernel, or one that does not fit the model's path.
    """

    in_keys = ("latents", "step", "prompt_index")
    out_keys = ("action", "action_log_prob")

    def __init__(
        self,
        mdp: DenoisingMDP,
        kernel: str | None = None,
        eta: float | None = None,
        last_step: Literal["sde", "ode"] | None = None,
        reduction: Reduction | Literal["squared_error"] = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.mdp = mdp
        self.model = mdp.model
        self.network = mdp.model.network
        self.kernel: Kernel = mdp.kernel(kernel, eta, last_step)
        self.squared_error = reduction == "squared_error"
        self.reduction: Reduction = "mean" if reduction == "squared_error" else reduction
        self.register_buffer("timesteps", mdp.schedule.timesteps.to(mdp.model.device), persistent=False)
        self.generator = torch.Generator(mdp.model.device).manual_seed(seed)
        self.network_calls = 0
        self.before_call: Callable[[], object] = nothing

    def predict(
        self, latents: Tensor, step: int | Tensor, conditioning: TensorDict, guidance: float | None = None
    ) -> Tensor:
        """The network's output ``[B, *latent]``.

        Args:
            latents: ``[B, *latent]``, x_k.
            step: k, one for the batch or ``[B]``.
            conditioning: ``[B]``, of the latents' prompts.
            guidance: the scale of classifier-free guidance, instead of the model's own.
        """
        self.before_call()
        rows = self.model.rows_per_sample if guidance is None else self.model.rows_guided
        self.network_calls += len(latents) * rows * (3 if torch.is_grad_enabled() else 1)
        timestep = self.timesteps[step if isinstance(step, int) else step.to(self.timesteps.device)]
        if self.model.compiled:  # a stride is part of a shape: one compiled form serves every step
            latents, timestep = latents.contiguous(), timestep.expand(len(latents)).contiguous()
        if guidance is None:
            return self.model.predict(latents, timestep, conditioning)
        scale = torch.full((len(latents),), guidance, device=latents.device)
        return self.model.predict(latents, timestep, conditioning, scale)

    def transition(
        self, latents: Tensor, step: int | Tensor, conditioning: TensorDict, kernel: Kernel | None = None
    ) -> Transition:
        """The Gaussian of the next latents: one network call, one kernel evaluation.

        Args:
            latents: ``[B, *latent]``, x_k.
            step: k, one for the batch or ``[B]`` (best on the CPU, see `Kernel.transition`).
            conditioning: ``[B]``, of the latents' prompts.
            kernel: the kernel to use instead of the policy's.
        """
        output = self.predict(latents, step, conditioning)
        return (kernel or self.kernel).transition(latents, output, step)

    def log_prob(self, transition: Transition, action: Tensor) -> Tensor:
        """Log-prob ``[B]`` of ``action [B, *latent]``, in the policy's reduction."""
        if self.squared_error:
            return -transition.reduce((action.to(transition.mean.dtype) - transition.mean).square())
        return transition.log_prob(action, self.reduction)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act on a batch of observations, sampling with the policy's own generator."""
        latents = tensordict["latents"].to(self.model.dtype)
        step = tensordict["step"].long()
        flat = latents.reshape(-1, *self.model.latent_shape)
        conditioning = self.mdp.conditioning.rows(tensordict["prompt_index"].reshape(-1))
        transition = self.transition(flat, step.reshape(-1), conditioning)
        noise = torch.empty_like(flat).normal_(generator=self.generator)
        action = transition.sample(noise)
        random = transition.std.flatten() > 0
        std = torch.where(random.view_as(transition.std), transition.std, 1.0)
        density = replace(transition, std=std, stochastic=True)
        log_prob = torch.where(random, self.log_prob(density, action), 0.0)
        tensordict["action"] = action.view_as(latents)
        tensordict["action_log_prob"] = log_prob.reshape(latents.shape[: latents.ndim - len(self.model.latent_shape)])
        return tensordict

"""What the action conventions and the flat observation mean."""

import pytest
import torch

from agents.policy import DenoisingPolicy
from agents.rollout import collect
from denoise_env.conventions import Control, Flat, Noise, RowNoise
from denoise_env.faces import ResetRequest, RowStreams
from denoise_env.mdp import DenoisingMDP, row_generators

SAMPLERS = [
    ("points", "ddim", 1.0, None),
    ("points", "ddim", 0.3, "ode"),
    ("points-flow", "dance_sde", None, None),
    ("points-flow", "flow_sde", None, "sde"),
    ("points-flow", "cps", None, None),
    ("shapes", None, None, None),
]


def play(mdp, convention, actions, seed=0, rows=3):
    """Final latents under actions ``[K, rows, …]``."""
    streams = RowStreams(rows)
    with streams.begin(mdp, ResetRequest.parse(None, rows), seed, lambda: (0, lambda: None)) as state:
        pass
    noise = RowNoise(mdp, streams)
    for action in actions:
        state = mdp.step(state, convention.next_latents(state, action, noise(state.step)))
    return state.latents


@pytest.mark.parametrize(("model", "kernel", "eta", "last_step"), SAMPLERS)
def test_normal_noise_is_the_base_sampler(model, kernel, eta, last_step):
    mdp = DenoisingMDP.make(model, num_steps=4)
    policy = DenoisingPolicy(mdp, kernel, eta, last_step, seed=7)
    state = mdp.reset(row_generators(range(3)))
    convention = Noise(mdp, kernel=kernel, eta=eta, last_step=last_step)
    generator = torch.Generator().manual_seed(7)
    for _ in range(4):
        with torch.no_grad():
            expected = policy(mdp_td(state))["action"]
        noise = torch.empty_like(state.latents).normal_(generator=generator)
        state = mdp.step(state, convention.next_latents(state, noise))
        assert torch.equal(state.latents, expected)


def mdp_td(state):
    from tensordict import TensorDict

    return TensorDict(vars(state), batch_size=len(state.step))


@pytest.mark.parametrize(("model", "kernel", "eta", "last_step"), SAMPLERS)
def test_neutral_control_is_the_base_sampler(model, kernel, eta, last_step):
    mdp = DenoisingMDP.make(model, num_steps=4)
    expected = collect(mdp, DenoisingPolicy(mdp, kernel, eta, last_step), row_generators(range(3))).final_latents
    control = Control(mdp, kernel=kernel, eta=eta, last_step=last_step)
    final = play(mdp, control, torch.zeros(4, 3, *control.shape))
    if "guidance_scale" in control.names:
        torch.testing.assert_close(final, expected, rtol=0, atol=1e-4)
        control = Control(mdp, {"noise_scale": (0, 2), "drift": (-1, 1)}, kernel=kernel)
        final = play(mdp, control, torch.zeros(4, 3, *control.shape))
    assert torch.equal(final, expected)


def test_bfloat16():
    mdp = DenoisingMDP.make("points", num_steps=4)
    mdp.model.dtype = torch.bfloat16
    expected = collect(mdp, DenoisingPolicy(mdp), row_generators(range(3))).final_latents
    final = play(mdp, Control(mdp), torch.zeros(4, 3, 3))
    assert final.dtype == torch.bfloat16
    assert torch.equal(final, expected)
    assert Flat(mdp)(mdp.reset(row_generators([0]))).dtype == torch.float32


def test_deterministic_steps_ignore_the_noise():
    mdp = DenoisingMDP.make("points-flow", num_steps=2)
    convention = Noise(mdp)
    state = mdp.reset(row_generators(range(3)))
    assert not torch.equal(
        convention.next_latents(state, torch.ones(3, 2)), convention.next_latents(state, torch.zeros(3, 2))
    )
    state = state.advance(state.latents)
    assert torch.equal(
        convention.next_latents(state, torch.ones(3, 2)), convention.next_latents(state, torch.zeros(3, 2))
    )


def test_actions_are_clipped():
    mdp = DenoisingMDP.make("points", num_steps=2)
    state = mdp.reset(row_generators(range(3)))
    noise, control = Noise(mdp, bound=2.0), Control(mdp)
    for convention, bound in ((noise, 2.0), (control, 1.0)):
        far, edge = (torch.full((3, *convention.shape), x) for x in (50.0, bound))
        draws = torch.ones(3, 2)
        assert torch.equal(convention.next_latents(state, far, draws), convention.next_latents(state, edge, draws))


def test_the_reference_stays_frozen():
    mdp = DenoisingMDP.make("points", num_steps=4)
    convention = Noise(mdp)
    state = mdp.reset(row_generators(range(3)))
    before = convention.next_latents(state, torch.ones(3, 2))
    with torch.no_grad():
        for p in mdp.model.network.parameters():
            p.add_(1.0)
    assert torch.equal(convention.next_latents(state, torch.ones(3, 2)), before)


def test_control_values():
    control = Control(DenoisingMDP.make("shapes", num_steps=2), {"guidance_scale": (0.5, 4), "noise_scale": (0, 1)})
    assert control.names == ["guidance_scale", "noise_scale"]
    ends = torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    assert control.values(ends).tolist() == [[0.5, 0.0], [1.0, 1.0], [4.0, 1.0], [4.0, 1.0]]
    assert control.action().tolist() == [0.0, 0.0]
    action = control.action(guidance_scale=2.5, noise_scale=0.25)
    torch.testing.assert_close(control.values(action), torch.tensor([2.5, 0.25]))


def test_guidance_control_is_guidance(make_shapes):
    expected = collect(guided := make_shapes(guidance_scale=3.0), DenoisingPolicy(guided), row_generators(range(2)))
    for mdp in (guided, make_shapes()):
        control = Control(mdp, {"guidance_scale": (0.0, 4.0)})
        actions = control.action(guidance_scale=3.0).expand(4, 2, 1)
        final = play(mdp, control, actions, rows=2)
        torch.testing.assert_close(final, expected.final_latents, rtol=0, atol=1e-3)
    one = Control(mdp, {"guidance_scale": (0.0, 4.0)})
    rows = torch.stack([one.action(guidance_scale=w) for w in (3.0, 0.5)]).expand(4, 2, 1)
    final = play(mdp, one, rows, rows=2)  # every row has its own
    torch.testing.assert_close(final[0], expected.final_latents[0], rtol=0, atol=1e-3)
    assert (final[1] - expected.final_latents[1]).abs().max() > 0.1


def test_noise_scale_and_drift_act_on_the_standardised_noise(make_shapes):
    mdp = make_shapes()
    control = Control(mdp, {"noise_scale": (0, 2), "drift": (-4, 4)})
    state = mdp.reset(row_generators(range(2)))
    gaussian = control.transition(state)
    draws = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def z(**values):
        moved = control.next_latents(state, control.action(**values).expand(2, -1), draws)
        return (moved - gaussian.mean) / gaussian.std

    assert z(noise_scale=0.0).abs().max() == 0
    torch.testing.assert_close(z(noise_scale=1.5), 1.5 * draws, rtol=1e-3, atol=1e-3)
    shift = z(drift_2=3.0) - draws
    # three standard deviations of the mean of 64 draws, in one channel
    torch.testing.assert_close(shift[:, 2], torch.full((2, 8, 8), 3 / 8), rtol=1e-3, atol=1e-3)
    assert shift[:, [0, 1, 3]].abs().max() < 1e-4


def test_a_row_does_not_depend_on_its_batch():
    mdp = DenoisingMDP.make("points", num_steps=3)
    control = Control(mdp)
    together = play(mdp, control, torch.zeros(3, 4, 3), seed=5, rows=4)
    for i in range(4):
        assert torch.equal(play(mdp, control, torch.zeros(3, 1, 3), seed=5 + i, rows=1)[0], together[i])


def test_flat():
    mdp = DenoisingMDP.make("points", num_steps=4, prompts=["ring", "line"])
    state = mdp.reset(row_generators(range(2)), prompts=["line", "ring"])
    flat = Flat(mdp)
    vector = flat(state.advance(state.latents))
    assert vector.shape == (2, flat.size) == (2, 9)
    assert torch.equal(vector[:, :2], state.latents)
    assert vector[:, 2].tolist() == [0.25, 0.25]
    assert vector[:, 3:].tolist() == [[0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert torch.equal(Flat(mdp, ("step",))(state), torch.zeros(2, 1))
    late = mdp.reset(row_generators(range(1)), prompts=["spiral"])  # a prompt that joins later
    assert flat(late)[0, 3:].tolist() == [0, 0, 0, 0, 0, 1]


def test_refusals(make_shapes):
    points, flow = DenoisingMDP.make("points"), DenoisingMDP.make("points-flow")
    with pytest.raises(ValueError, match="bound must be a positive, finite number, not 0"):
        Noise(points, bound=0)
    with pytest.raises(ValueError, match=r"no step of ODE.* has noise for the action to be: use a stochastic kernel"):
        Noise(flow, kernel="ode")
    with pytest.raises(ValueError, match="has noise for noise_scale"):
        Control(flow, kernel="ode")
    with pytest.raises(ValueError, match="did you mean 'ddim'"):
        Noise(points, kernel="dim")
    with pytest.raises(ValueError, match="Points has no control 'guidance_scale'"):
        Control(points, {"guidance_scale": (0, 4)})
    with pytest.raises(ValueError, match="range of noise_scale must have its neutral value 1 inside"):
        Control(points, {"noise_scale": (0, 0.5)})
    with pytest.raises(ValueError, match="controls must name at least one"):
        Control(points, {})
    with pytest.raises(ValueError, match="unknown control 'drift'; did you mean 'drift_"):
        Control(points).action(drift=1.0)
    with pytest.raises(ValueError, match=r"noise_scale must lie in \[0, 1.5\], not 7"):
        Control(points).action(noise_scale=7)
    with pytest.raises(ValueError, match="no part 'latent'; did you mean 'latents'"):
        Flat(points, ("latent",))
    with pytest.raises(ValueError, match="parts must name at least one"):
        Flat(points, ())
    with pytest.raises(
        ValueError, match=r'256 of them latents, more than max_dimensions=100: .*parts=\("step", "prompt"'
    ):
        Flat(make_shapes(), max_dimensions=100)
    rows = points.conditioning.rows(torch.arange(1))
    with pytest.raises(ValueError, match="no guidance"):
        points.model.predict(torch.zeros(1, 2), torch.tensor(1), rows, torch.ones(1))

"""DPM-Solver++ against diffusers' and against what it solves exactly."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from denoise_env.kernels import ODE
from denoise_env.schedules import Schedule
from denoise_env.solvers import DPMSolver, spread_steps


def field(x, sigma):
    """A velocity that is linear in neither x nor σ."""
    return torch.sin(2 * x + sigma) - 0.3 * x * sigma


@pytest.mark.parametrize("steps", [[0, 1, 2, 3, 4, 5, 6, 7], [3, 5, 6], [2], [6, 7], [0, 4]])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_it_is_diffusers_on_a_flow_grid(steps, shift):
    schedule = Schedule.flow(8, shift)
    kernel, solver = ODE(schedule, "flow_prediction"), DPMSolver(schedule, steps)
    theirs = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    theirs.set_timesteps(len(steps))
    theirs.sigmas = schedule.sigmas[[*steps, 8]]
    theirs.timesteps = torch.arange(len(steps))
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(4, 3)
    y, before = x.clone(), None
    for place, k in enumerate(steps):
        pred_x0 = kernel.pred_x0(x, field(x, schedule.sigmas[k]), k)
        x, before = solver.step(place, x, pred_x0, before), pred_x0
        y = theirs.step(field(y, schedule.sigmas[k]), theirs.timesteps[place], y).prev_sample
    assert solver.steps == steps
    torch.testing.assert_close(x, y.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flow", [True, False])
def test_its_error_falls_with_the_square_of_the_steps(flow):
    """Gaussian data of std 0.5, whose trajectories are known: x(σ) = x₀ √(0.25 α² + σ²), scaled."""
    errors = []
    for num_steps in (20, 40, 80):
        if flow:
            schedule = Schedule.from_sigmas([*torch.linspace(0.9, 0.3, num_steps).tolist(), 0.0])
        else:
            products = [*torch.linspace(0.1, 0.9, num_steps).tolist(), 1.0]
            schedule = Schedule.from_alphas_cumprod(products, torch.arange(num_steps))
        a, s = schedule.alphas, schedule.sigmas
        spread = (0.25 * a**2 + s**2).sqrt()
        x, before, solver = spread[:1].clone(), None, DPMSolver(schedule, range(num_steps))
        for k in range(num_steps - 1):
            pred_x0 = 0.25 * a[k] / spread[k] ** 2 * x
            x, before = solver.step(k, x, pred_x0, before), pred_x0
        errors.append(float((x - spread[-2]).abs()))
    assert errors[0] / errors[1] > 3.3
    assert errors[1] / errors[2] > 3.3


@pytest.mark.parametrize("steps", [[], [-1, 2], [2, 2], [3, 1], [0, 8]])
def test_steps_that_do_not_increase_are_refused(steps):
    with pytest.raises(ValueError, match="steps must increase from 0 or more to below 8"):
        DPMSolver(Schedule.flow(8), steps)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4, 0.77, 1.0])
def test_so_many_steps_are_left(share):
    for first in range(9):
        left = 10 - first
        steps = spread_steps(first, 10, share)
        assert len(steps) == max(int(left * share + 1e-9), 1)
        assert steps[0] == first
        assert sorted(set(steps)) == steps
        assert steps[-1] < 10

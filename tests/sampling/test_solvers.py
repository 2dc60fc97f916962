"""The sampler is diffusers' schedulers, trajectory for trajectory."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, UniPCMultistepScheduler

from conftest import MS_SCHEDULER
from t2v.sampling.denoiser import guided
from t2v.sampling.distilled import MCM, TURBO, DistilledSampling
from t2v.sampling.schedule import Schedule
from t2v.sampling.solvers import SolverStep, sample, solver_step, solver_steps

STEPS = (1, 2, 4, 20, 25, 30, 50, 1000)
TOLERANCE = 1e-5  # relative, at every step; measured at most 7e-6

CONFIGS = {
    "as published": {},
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "velocity": {"prediction_type": "v_prediction", "timestep_spacing": "linspace"},
    "zero terminal SNR": {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    },
}


def denoiser(schedule: Schedule):
    """The exact denoiser of data that is 1 (with odds e) or -1 in every coordinate: E[x_0 | x_t] in closed form."""

    def network(x: torch.Tensor, t: int) -> torch.Tensor:
        ab = max(float(schedule.alpha_bar[t]), 2.0**-24)
        alpha, sigma = ab**0.5, (1 - ab) ** 0.5
        x_0 = torch.tanh(alpha * x / sigma**2 + 0.5)
        eps = (x - alpha * x_0) / sigma
        return eps if schedule.prediction_type == "epsilon" else alpha * eps - sigma * x_0

    return network


def run(predict, x: torch.Tensor, steps: list[SolverStep]) -> torch.Tensor:
    """A trajectory of a network (x_t, t) -> prediction."""
    return sample(
        lambda i, x, history: solver_step(x, history, predict(x, steps[i].t), steps[i].coefficients), x, len(steps)
    )


def reference_trajectory(kind, config: dict, n: int, network, x: torch.Tensor) -> list[torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = kind.from_config(config)
        if kind is DDIMScheduler:
            # Its table stays as it is, rounded to float32, but is computed with in float64: as float32 roots, alpha and
            # sigma miss alpha^2 + sigma^2 = 1 by up to 1e-7, which 1000 steps of velocity add up to 1.0e-5.
            scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
            scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
        scheduler.set_timesteps(n)
        xs = []
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, int(t)), t, x).prev_sample
            xs.append(x)
    return xs


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "solver, kind",
    [("ddim", DDIMScheduler), ("dpm++", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)],
)
def test_trajectory_equals_the_reference(solver, kind, name: str, n: int):
    config = MS_SCHEDULER | CONFIGS[name]
    if n == 1000 and config.get("timestep_spacing", "leading") == "leading":
        if solver != "ddim" and "timestep_spacing" in config:
            pytest.skip("the reference repeats one timestep 1000 times here and fails")
        config = config | {"steps_offset": 0}  # with 1 the reference runs past its own table
    schedule = Schedule.from_config(config)
    network = denoiser(schedule)
    x = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = reference_trajectory(kind, config, n, network, x)
    visited: list[torch.Tensor] = []

    def watched(x: torch.Tensor, t: int) -> torch.Tensor:
        visited.append(x)
        return network(x, t)

    steps = solver_steps(schedule, solver, n)
    last = run(watched, x, steps)
    ours = [*visited[1:], last]
    assert len(ours) == len(expected) == n
    if n == 1000 and solver != "ddim" and "trailing" not in config.values():
        # Rounding 0.999 i repeats timestep 500; the reference divides 0 by 0 there and is NaN from then on.
        assert torch.isfinite(last).all() and not torch.isfinite(expected[-1]).all()
        ours, expected = ours[:500], expected[:500]
    for x_ours, x_reference in zip(ours, expected):
        assert float((x_ours - x_reference).norm() / x_reference.norm()) < TOLERANCE


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 50])
def test_few_steps_equal_the_reference(n: int):
    """diffusers' LCMScheduler, with the noise it draws."""
    schedule = Schedule.from_config(MS_SCHEDULER)
    network = denoiser(schedule)
    x = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler = LCMScheduler.from_config(
        MS_SCHEDULER, timestep_scaling=MCM.timestep_scaling, original_inference_steps=50
    )
    scheduler.set_timesteps(n)
    expected, generator = x, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        expected = scheduler.step(network(expected, int(t)), t, expected, generator).prev_sample
    steps = solver_steps(schedule, "lcm", n, distilled=MCM)
    assert [step.t for step in steps] == scheduler.timesteps.tolist()
    ours, generator = x, torch.Generator().manual_seed(1)
    for step in steps:
        assert step.fresh_noise
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        ours, _ = solver_step(ours, torch.stack([noise, noise]), network(ours, step.t), step.coefficients)
    assert float((ours - expected).norm() / expected.norm()) < TOLERANCE


def test_timesteps_of_the_few_step_models():
    schedule = Schedule.from_config(MS_SCHEDULER)
    assert [s.t for s in solver_steps(schedule, "lcm", 4, distilled=MCM)] == [999, 759, 499, 259]
    assert [s.t for s in solver_steps(schedule, "lcm", 4, distilled=TURBO)] == [999, 759, 519, 279]
    assert [s.t for s in solver_steps(schedule, "lcm", 8, distilled=TURBO)] == [999, 879, 759, 639, 519, 399, 279, 159]
    with pytest.raises(ValueError, match="at most 50"):
        solver_steps(schedule, "lcm", 51, distilled=TURBO)


def test_timesteps_of_the_original():
    """DDIM, 50 steps: 981, 961 ... 1, and the last step ends at alpha_bar[0]."""
    steps = solver_steps(Schedule.from_config(MS_SCHEDULER), "ddim", 50)
    assert [s.t for s in steps] == list(range(981, 0, -20))
    assert [s.t for s in solver_steps(Schedule.from_config(MS_SCHEDULER), "dpm++", 50)][:3] == [999, 979, 959]
    assert max(s.t for s in solver_steps(Schedule.from_config(MS_SCHEDULER), "ddim", 1000)) == 999


@pytest.mark.parametrize("solver", ["ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("name", ["as published", "zero terminal SNR"])
def test_a_perfect_network_returns_the_clean_sample(solver, name: str):
    """Told the true noise (or velocity) at every step, the sampler ends at x_0: a check against no library."""
    schedule = Schedule.from_config(MS_SCHEDULER | CONFIGS[name])
    x_0, eps = torch.randn(2, 4, 8, dtype=torch.float64)
    first = solver_steps(schedule, solver, 20)[0].t
    floor = 2.0**-24 if solver != "ddim" else 0.0  # the least signal share the solver knows
    ab = max(float(schedule.alpha_bar[first]), floor)

    def perfect(x: torch.Tensor, t: int) -> torch.Tensor:
        a = max(float(schedule.alpha_bar[t]), floor)
        return eps if schedule.prediction_type == "epsilon" else a**0.5 * eps - (1 - a) ** 0.5 * x_0

    x = run(perfect, ab**0.5 * x_0 + (1 - ab) ** 0.5 * eps, solver_steps(schedule, solver, 20))
    final = float(schedule.alpha_bar[0]) if solver == "ddim" else 1.0
    np.testing.assert_allclose(x, final**0.5 * x_0 + (1 - final) ** 0.5 * eps, atol=1e-6)


def test_guidance_acts_on_all_channels_from_the_unconditional_row():
    uncond, cond = torch.randn(2, 1, 4, 2, 2, 2)
    for scale in (9.0, torch.tensor(9.0)):
        assert torch.allclose(guided(torch.cat([uncond, cond]), scale), uncond + 9 * (cond - uncond))


def test_coefficients_may_be_a_tensor():
    """As a recorded step needs them; rounded to the sample's dtype either way."""
    x, previous, before, prediction = torch.randn(4, 1, 4, 2, 2, 2)
    numbers = solver_steps(Schedule.from_config(MS_SCHEDULER), "unipc", 20)[5].coefficients
    assert 0 not in numbers
    history = torch.stack([previous, before])
    for a, b in zip(
        solver_step(x, history, prediction, numbers),
        solver_step(x, history, prediction, torch.tensor(numbers, dtype=torch.float64)),
    ):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


def test_progress_is_told_after_every_step():
    told = []
    sample(lambda i, x, history: (x, history), torch.zeros(1), 3, lambda *a: told.append(a))
    assert [event[:2] for event in told] == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_step_counts_outside_the_schedule_are_refused(n: int):
    with pytest.raises(ValueError, match="allows 1 to 1000"):
        solver_steps(Schedule.from_config(MS_SCHEDULER), "ddim", n)


@pytest.mark.parametrize("solver", ["ddim", "dpm++", "unipc"])
def test_a_trajectory_begun_later_needs_nothing_from_before(solver):
    schedule = Schedule.from_config(MS_SCHEDULER)
    whole, later = solver_steps(schedule, solver, 20), solver_steps(schedule, solver, 20, first_step=8)
    assert [step.t for step in later] == [step.t for step in whole[8:]] and later[0].coefficients[4:] == (0, 0)
    if solver == "unipc":  # which also looks back two steps, and is of first order in the first correction
        assert later[1].coefficients[5] == 0 and later[3:] == whole[11:]
    else:
        assert later[1:] == whole[9:]


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_distilled_ddim_ends_where_the_constant_prediction_says(n: int):
    """With a network that always predicts the same clean sample, each step mixes it with the same noise."""
    schedule = Schedule.from_config(MS_SCHEDULER)
    steps = solver_steps(schedule, "ddim", n, distilled=DistilledSampling("quick", solver="ddim"))
    assert [step.t for step in steps] == [round(1000 - i * 1000 / n) - 1 for i in range(n)]
    x_0, eps = torch.randn(2, 5, dtype=torch.float64)
    x, history = schedule.add_noise(x_0, eps, steps[0].t), torch.zeros(2, 5, dtype=torch.float64)
    for i, step in enumerate(steps):
        x, history = solver_step(x, history, eps, step.coefficients)
        expected = schedule.add_noise(x_0, eps, steps[i + 1].t) if i + 1 < n else x_0
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)

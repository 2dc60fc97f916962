"""Solvers: a trajectory from noise to a clean sample as a list of steps, and the loop over them.

All solvers are linear in their inputs. A trajectory is therefore plain data: a timestep and six float64 coefficients
for each step, computed once per request. One expression, `solver_step`, makes a step of any solver.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from t2v.sampling.distilled import DistilledSampling, Solver
from t2v.sampling.schedule import Schedule

DISTILLED_TIMESTEPS = 50  # timesteps that the distilled models were trained on
SIGMA_DATA = 0.5  # of the consistency models' boundary condition

# (index of the step, x_t, history) -> (x at the next timestep, history after the step); see `solver_step`
StepFunction = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
# (steps done, steps in total, x_0 as it is predicted then)
OnStep = Callable[[int, int, Tensor], None]


class SolverStep(NamedTuple):
    """One step of a trajectory.

    x_0 = x0_from_x * x + x0_from_prediction * prediction, and
    next x = next_from_x * x + next_from_x0 * x_0 + next_from_previous * previous + next_from_before * before,
    where `previous` and `before` are the x_0 of the last two steps.

    Attributes:
        t: diffusion timestep that the network is asked at.
        fresh_noise: whether `next_from_previous` is the factor of new unit noise instead of the previous x_0.
    """

    t: int
    x0_from_x: float
    x0_from_prediction: float
    next_from_x: float
    next_from_x0: float
    next_from_previous: float = 0.0
    next_from_before: float = 0.0
    fresh_noise: bool = False

    @property
    def coefficients(self) -> tuple[float, float, float, float, float, float]:
        """The six factors in the order above, as `solver_step` takes them."""
        return self[1:7]


def solver_steps(
    schedule: Schedule, solver: Solver, n: int, first_step: int = 0, distilled: DistilledSampling | None = None
) -> list[SolverStep]:
    """The steps from pure noise to a clean sample, in the order in which they are made.

    Args:
        n: number of steps, 1 to T.
        first_step: number of steps to skip (for strength < 1). The first remaining step is first order, since it has
            no history.
        distilled: recipe of the distilled model; None for the others.
    """
    if not 1 <= n <= len(schedule):
        raise ValueError(f"{n} steps: a schedule of {len(schedule)} timesteps allows 1 to {len(schedule)}")
    match solver:
        case "ddim":
            steps = distilled_ddim_steps(schedule, n) if distilled else ddim_steps(schedule, n)
        case "dpm++":
            steps = dpm_solver_steps(schedule, n, first_step)
        case "unipc":
            steps = unipc_steps(schedule, n, first_step)
        case "lcm":
            assert distilled is not None, "lcm needs the recipe of a distilled model"
            steps = lcm_steps(schedule, n, distilled)
    return steps[first_step:]


def solver_step(
    x_t: Tensor, history: Tensor, prediction: Tensor, coefficients: Sequence[float] | Tensor
) -> tuple[Tensor, Tensor]:
    """One step of a trajectory.

    Args:
        x_t: float32 (or float64), any shape.
        history: (2, *x_t.shape), x_0 of the previous step and of the one before; any finite values where there was
            none. Fresh noise takes the place of the first for a step that needs it.
        prediction: the network's, of the shape of x_t.
        coefficients: those of a `SolverStep`; plain numbers, or a (6,) tensor on the device of x_t.

    Returns:
        x at the next timestep, and the history after the step. Both in the dtype of x_t.
    """
    x0_from_x, x0_from_prediction, next_from_x, next_from_x0, next_from_previous, next_from_before = coefficients
    x_0 = x0_from_x * x_t + x0_from_prediction * prediction
    x = next_from_x * x_t + next_from_x0 * x_0 + next_from_previous * history[0] + next_from_before * history[1]
    return x, torch.stack([x_0, history[0]])


def sample(step: StepFunction, x_T: Tensor, n: int, on_step: OnStep = lambda done, total, x_0: None) -> Tensor:
    """Make n steps from noise x_T to a clean sample of the same shape and dtype.

    Args:
        step: makes one step.
        on_step: called after every step.
    """
    x = x_T
    history = torch.zeros((2, *x.shape), dtype=x.dtype, device=x.device)
    for i in range(n):
        x, history = step(i, x, history)
        on_step(i + 1, n, history[0])
    return x


def ddim_steps(schedule: Schedule, n: int) -> list[SolverStep]:
    """Deterministic DDIM (Song et al., arXiv 2010.02502, equation 12 with eta 0)."""
    T = len(schedule)
    stride = T // n
    grid: np.ndarray
    match schedule.spacing or "leading":
        case "leading":
            grid = np.arange(n)[::-1] * stride + schedule.steps_offset
        case "linspace":
            grid = np.linspace(0, T - 1, n).round()[::-1]
        case _:
            grid = np.round(np.arange(T, 0, -T / n)) - 1
    final = 1.0 if schedule.set_alpha_to_one else float(schedule.alpha_bar[0])
    steps = []
    for t in np.minimum(grid, T - 1).astype(int).tolist():
        # The step's length is T // n whatever the spacing, as in the reference.
        ab, ab_next = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[t - stride]) if t >= stride else final
        alpha, sigma = math.sqrt(ab), math.sqrt(1 - ab)
        alpha_next, ratio = math.sqrt(ab_next), math.sqrt(1 - ab_next) / sigma
        steps.append(_step(schedule, t, alpha, sigma, next_from_x=ratio, next_from_x0=alpha_next - ratio * alpha))
    return steps


def distilled_ddim_steps(schedule: Schedule, n: int) -> list[SolverStep]:
    """DDIM from each of n evenly spread timesteps to the next, beginning at the noisiest, and at last to alpha 1."""
    T = len(schedule)
    ts = [round(T - i * T / n) - 1 for i in range(n)]
    alpha_bar = [float(schedule.alpha_bar[t]) for t in ts] + [1.0]
    steps = []
    for t, ab, ab_next in zip(ts, alpha_bar, alpha_bar[1:]):
        alpha, sigma, ratio = math.sqrt(ab), math.sqrt(1 - ab), math.sqrt((1 - ab_next) / (1 - ab))
        steps.append(_step(schedule, t, alpha, sigma, ratio, math.sqrt(ab_next) - ratio * alpha))
    return steps


def dpm_solver_steps(schedule: Schedule, n: int, first_step: int = 0) -> list[SolverStep]:
    """DPM-Solver++(2M), midpoint form (Lu et al., arXiv 2211.01095, algorithm 2), ending at sigma 0.

    The first and the last step are of first order. With fewer than 15 steps that is how the reference keeps them
    stable; with more it follows from sigma 0.
    """
    ts, alpha, sigma, lam = _levels(schedule, n)
    steps = []
    for i, t in enumerate(ts):
        h = lam[i + 1] - lam[i]
        weight = -alpha[i + 1] * math.expm1(-h)  # of x_0
        from_previous = 0.0  # of the previous x_0, through the difference D1 = (x_0 - previous) / r
        if first_step < i < n - 1 and lam[i] > lam[i - 1]:
            r = (lam[i] - lam[i - 1]) / h if h else math.inf
            from_previous = -weight / (2 * r)
        ratio = sigma[i + 1] / sigma[i]
        steps.append(_step(schedule, t, alpha[i], sigma[i], ratio, weight - from_previous, from_previous))
    return steps


def unipc_steps(schedule: Schedule, n: int, first_step: int = 0) -> list[SolverStep]:
    """UniPC of order 2 with B_2(h), for predictions of x_0 (Zhao et al., arXiv 2302.04867), ending at sigma 0.

    Each prediction corrects the sample it was made at, by a combination of this x_0 and the two before it. That is
    folded into the step that follows. The first and the last step are of first order.
    """
    ts, alpha, sigma, lam = _levels(schedule, n)
    steps = []
    correction = (0.0, 0.0, 0.0)  # of the sample, by its own x_0, the previous and the one before that
    for i, t in enumerate(ts):
        if i <= first_step:
            correction = (0.0, 0.0, 0.0)
        h = lam[i + 1] - lam[i]
        weight = -alpha[i + 1] * math.expm1(-h)
        second = first_step < i < n - 1 and lam[i] > lam[i - 1] and h > 0
        r = (lam[i] - lam[i - 1]) / h if second else math.inf
        from_previous = -weight / (2 * r)
        ratio = sigma[i + 1] / sigma[i]
        step = _step(
            schedule,
            t,
            alpha[i],
            sigma[i],
            next_from_x=ratio,
            next_from_x0=ratio * correction[0] + weight - from_previous,
            next_from_previous=ratio * correction[1] + from_previous,
            next_from_before=ratio * correction[2],
        )
        steps.append(step)
        rho, rho_next = 0.5, 0.5
        if second:
            # What makes differences to the previous and to the next x_0 exact for polynomials of second degree.
            phi_1 = math.expm1(-h)
            phi_2 = -phi_1 / h - 1
            b_1, b_2 = phi_2 / phi_1, -(2 * phi_2 / h + 1) / phi_1
            rho = (b_1 - b_2) / (1 + r)
            rho_next = b_1 - rho
        own, far = weight * rho_next, weight * (0.5 - rho) / r
        correction = (own, -own - far, far)
    return steps


def lcm_steps(schedule: Schedule, n: int, model: DistilledSampling) -> list[SolverStep]:
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3): to x_0, then back to the next noise level."""
    if n > DISTILLED_TIMESTEPS:
        raise ValueError(f"{n} steps: {model.name} allows at most {DISTILLED_TIMESTEPS}")
    stride = len(schedule) // DISTILLED_TIMESTEPS
    grid = [stride * (i + 1) - 1 for i in reversed(range(DISTILLED_TIMESTEPS))]
    spread = [grid[i * DISTILLED_TIMESTEPS // n] for i in range(n)]
    ts = grid[:: DISTILLED_TIMESTEPS // n][:n] if model.evenly_strided else spread
    steps = []
    for t, t_next in zip(ts, [*ts[1:], None]):
        ab = float(schedule.alpha_bar[t])
        ab_next = 1.0 if t_next is None else float(schedule.alpha_bar[t_next])
        scaled = t * model.timestep_scaling
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / math.sqrt(scaled**2 + SIGMA_DATA**2)
        alpha_next, sigma_next = math.sqrt(ab_next), math.sqrt(1 - ab_next)
        alpha, sigma = math.sqrt(ab), math.sqrt(1 - ab)
        step = _step(schedule, t, alpha, sigma, alpha_next * skip, alpha_next * out, next_from_previous=sigma_next)
        steps.append(step._replace(fresh_noise=True))
    return steps


def _levels(schedule: Schedule, n: int) -> tuple[list[int], list[float], list[float], list[float]]:
    """n timesteps, and alpha, sigma and half the logarithm of the signal-to-noise ratio at them and at the end."""
    T = len(schedule)
    grid: np.ndarray
    match schedule.spacing or "linspace":
        case "leading":
            grid = np.arange(n + 1)[::-1][:-1] * max(1, T // (n + 1)) + schedule.steps_offset
        case "linspace":
            grid = np.linspace(0, T - 1, n + 1).round()[::-1][:-1]
        case _:
            grid = np.arange(T, 0, -T / n).round() - 1
    ts = np.clip(grid, 0, T - 1).astype(int).tolist()
    # A signal share of exactly 0 has no logarithm; the reference puts 2^-24 in its place.
    ab = [max(float(schedule.alpha_bar[t]), 2.0**-24) for t in ts]
    alpha = [math.sqrt(a) for a in ab] + [1.0]
    sigma = [math.sqrt(1 - a) for a in ab] + [0.0]
    return ts, alpha, sigma, [math.log(a / s) if s else math.inf for a, s in zip(alpha, sigma)]


def _step(
    schedule: Schedule,
    t: int,
    alpha: float,
    sigma: float,
    next_from_x: float,
    next_from_x0: float,
    next_from_previous: float = 0.0,
    next_from_before: float = 0.0,
) -> SolverStep:
    """A step at a timestep of these alpha and sigma; x_0 follows from what the network predicts."""
    x0 = (1 / alpha, -sigma / alpha) if schedule.prediction_type == "epsilon" else (alpha, -sigma)
    return SolverStep(t, *x0, next_from_x, next_from_x0, next_from_previous, next_from_before)

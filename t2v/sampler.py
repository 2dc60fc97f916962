"""Sampling as plain data and one loop: schedules, update rules, guidance. Knows functions, not models.

All solvers are linear in what they are given, so a whole trajectory is a list of `Step`s: six float64 numbers each,
computed once per request; and one step is one expression (`update`), whatever the solver. With alpha_bar the cumulative
signal share, alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar), a noisy sample is x_t = alpha x_0 + sigma eps.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from t2v.distilled import DistilledSampling
from t2v.errors import WeightsError

# Timesteps the few-step models were distilled on.
DISTILLED_STEPS = 50
SIGMA_DATA = 0.5  # of the consistency models' boundary condition


Solver = Literal["dpm++", "ddim", "unipc", "lcm"]
# (index of the step, x_t, x_0 of the two steps before) -> (x at the next timestep, x_0 of this step and the one before)
OnStep = Callable[[int, int, Tensor], None]
Advance = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """How the model was trained to be noised, read from its `scheduler_config.json`.

    Attributes:
        alpha_bar: (T,) float64, cumulative product of 1 - beta, falling from nearly 1; T is 1000.
        prediction_type: what the network predicts, "epsilon" (noise) or "v_prediction" (velocity,
            alpha eps - sigma x_0; Salimans and Ho, arXiv 2202.00512).
        spacing: "leading", "linspace" or "trailing" (Lin et al., arXiv 2305.08891, table 2); None where the config is
            silent, and each solver then takes its own: DDIM leading, the others linspace.
        steps_offset: added to the timesteps of leading spacing.
        set_alpha_to_one: whether DDIM's last step ends at alpha_bar 1 rather than at alpha_bar[0].
    """

    alpha_bar: Tensor
    prediction_type: str
    spacing: str | None
    steps_offset: int
    set_alpha_to_one: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """Read a diffusers scheduler config (any class of this family).

        Raises:
            WeightsError: the config asks for something this sampler does not do.
        """
        prediction_type = config.get("prediction_type", "epsilon")
        spacing = config.get("timestep_spacing")
        for key, value, allowed in (
            ("beta_schedule", config.get("beta_schedule"), ("scaled_linear",)),
            ("prediction_type", prediction_type, ("epsilon", "v_prediction")),
            ("timestep_spacing", spacing, (None, "leading", "linspace", "trailing")),
            ("trained_betas", config.get("trained_betas"), (None,)),
            ("clip_sample", config.get("clip_sample", False), (False,)),
            ("thresholding", config.get("thresholding", False), (False,)),
        ):
            if value not in allowed:
                raise WeightsError(f"scheduler_config.json: {key} = {value!r} is not supported, only {allowed}")
        rescale = config.get("rescale_betas_zero_snr", False)
        if rescale and prediction_type == "epsilon":
            raise WeightsError("scheduler_config.json: rescale_betas_zero_snr needs prediction_type v_prediction")
        return cls(
            alpha_bar=_alpha_bar(config["beta_start"], config["beta_end"], config["num_train_timesteps"], rescale),
            prediction_type=prediction_type,
            spacing=spacing,
            steps_offset=config.get("steps_offset", 0),
            set_alpha_to_one=config.get("set_alpha_to_one", True),
        )

    def steps(self, solver: Solver, n: int, begin: int = 0, distilled: DistilledSampling | None = None) -> list["Step"]:
        """The n updates from pure noise to a clean sample, in the order they are made. 1 <= n <= T.

        Args:
            begin: the first so many are left out; the one that is then first does without what was before it.
            distilled: recipe for the solver "lcm".
        """
        if not 1 <= n <= len(self.alpha_bar):
            raise ValueError(f"{n} steps: a schedule of {len(self.alpha_bar)} timesteps allows 1 to that many")
        if solver == "lcm":
            assert distilled is not None, "lcm needs the recipe of a distilled model"
            return self._consistency(distilled, n)[begin:]
        if solver == "ddim":
            return self._ddim(n)[begin:]
        return (self._unipc if solver == "unipc" else self._dpm_solver_2m)(n, begin)[begin:]

    def noised(self, x_0: Tensor, noise: Tensor, t: int) -> Tensor:
        """x_t of a clean sample: alpha x_0 + sigma eps."""
        alpha_bar = float(self.alpha_bar[t])
        return math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * noise

    def _ddim(self, n: int) -> list["Step"]:
        """Deterministic DDIM (Song et al., arXiv 2010.02502, equation 12 with eta 0)."""
        T = len(self.alpha_bar)
        stride = T // n
        grid: np.ndarray
        match self.spacing or "leading":
            case "leading":
                grid = np.arange(n)[::-1] * stride + self.steps_offset
            case "linspace":
                grid = np.linspace(0, T - 1, n).round()[::-1]
            case _:
                grid = np.round(np.arange(T, 0, -T / n)) - 1
        final = 1.0 if self.set_alpha_to_one else float(self.alpha_bar[0])
        steps = []
        for t in np.minimum(grid, T - 1).astype(int).tolist():
            # The step's length is T // n whatever the spacing, as in the reference.
            ab, ab_next = float(self.alpha_bar[t]), float(self.alpha_bar[t - stride]) if t >= stride else final
            alpha, sigma = math.sqrt(ab), math.sqrt(1 - ab)
            alpha_next, ratio = math.sqrt(ab_next), math.sqrt(1 - ab_next) / sigma
            steps.append(self._step(t, alpha, sigma, from_x=ratio, from_x_0=alpha_next - ratio * alpha))
        return steps

    def _dpm_solver_2m(self, n: int, begin: int) -> list["Step"]:
        """DPM-Solver++(2M), midpoint form (Lu et al., arXiv 2211.01095, algorithm 2), ending at sigma 0.

        The first and the last step are of first order. With fewer than 15 steps that is how the reference keeps them
        stable; with more it follows from sigma 0.
        """
        ts, alpha, sigma, lam = self._levels(n)
        steps = []
        for i, t in enumerate(ts):
            h = lam[i + 1] - lam[i]
            weight = -alpha[i + 1] * math.expm1(-h)  # of x_0
            before = 0.0  # of the previous x_0, through the difference D1 = (x_0 - previous) / r
            if begin < i < n - 1 and lam[i] > lam[i - 1]:
                r = (lam[i] - lam[i - 1]) / h if h else math.inf
                before = -weight / (2 * r)
            ratio = sigma[i + 1] / sigma[i]
            steps.append(self._step(t, alpha[i], sigma[i], ratio, weight - before, (before, 0.0)))
        return steps

    def _unipc(self, n: int, begin: int) -> list["Step"]:
        """UniPC of order 2 with B_2(h), for predictions of x_0 (Zhao et al., arXiv 2302.04867), ending at sigma 0.

        Each prediction corrects the sample it was made at, by a combination of this x_0 and the two before it. That is
        folded into the step that follows. The first and the last step are of first order.
        """
        ts, alpha, sigma, lam = self._levels(n)
        steps = []
        correction = (0.0, 0.0, 0.0)  # of the sample, by its own x_0, the previous and the one before that
        for i, t in enumerate(ts):
            if i <= begin:
                correction = (0.0, 0.0, 0.0)
            h = lam[i + 1] - lam[i]
            weight = -alpha[i + 1] * math.expm1(-h)
            second = begin < i < n - 1 and lam[i] > lam[i - 1] and h > 0
            r = (lam[i] - lam[i - 1]) / h if second else math.inf
            before = -weight / (2 * r)
            ratio = sigma[i + 1] / sigma[i]
            others = (ratio * correction[1] + before, ratio * correction[2])
            steps.append(self._step(t, alpha[i], sigma[i], ratio, ratio * correction[0] + weight - before, others))
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

    def _levels(self, n: int) -> tuple[list[int], list[float], list[float], list[float]]:
        """n timesteps, and alpha, sigma and half the logarithm of the signal-to-noise ratio at them and at the end."""
        T = len(self.alpha_bar)
        grid: np.ndarray
        match self.spacing or "linspace":
            case "leading":
                grid = np.arange(n + 1)[::-1][:-1] * max(1, T // (n + 1)) + self.steps_offset
            case "linspace":
                grid = np.linspace(0, T - 1, n + 1).round()[::-1][:-1]
            case _:
                grid = np.arange(T, 0, -T / n).round() - 1
        ts = np.clip(grid, 0, T - 1).astype(int).tolist()
        # A signal share of exactly 0 has no logarithm; the reference puts 2^-24 in its place.
        ab = [max(float(self.alpha_bar[t]), 2.0**-24) for t in ts]
        alpha = [math.sqrt(a) for a in ab] + [1.0]
        sigma = [math.sqrt(1 - a) for a in ab] + [0.0]
        return ts, alpha, sigma, [math.log(a / s) if s else math.inf for a, s in zip(alpha, sigma)]

    def _consistency(self, model: DistilledSampling, n: int) -> list["Step"]:
        """Multistep consistency sampling (arXiv 2310.04378, algorithm 3): to x_0, then back to the next noise level."""
        if n > DISTILLED_STEPS:
            raise ValueError(f"{n} steps: {model.name} allows at most {DISTILLED_STEPS}")
        stride = len(self.alpha_bar) // DISTILLED_STEPS
        grid = [stride * (i + 1) - 1 for i in reversed(range(DISTILLED_STEPS))]
        spread = [grid[i * DISTILLED_STEPS // n] for i in range(n)]
        ts = grid[:: DISTILLED_STEPS // n][:n] if model.evenly_strided else spread
        steps = []
        for t, t_next in zip(ts, [*ts[1:], None]):
            ab = float(self.alpha_bar[t])
            ab_next = 1.0 if t_next is None else float(self.alpha_bar[t_next])
            scaled = t * model.timestep_scaling
            skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
            out = scaled / math.sqrt(scaled**2 + SIGMA_DATA**2)
            alpha_next, sigma_next = math.sqrt(ab_next), math.sqrt(1 - ab_next)
            noise = (sigma_next, 0.0)
            step = self._step(t, math.sqrt(ab), math.sqrt(1 - ab), alpha_next * skip, alpha_next * out, noise)
            steps.append(dataclasses.replace(step, fresh=True))
        return steps

    def _step(
        self,
        t: int,
        alpha: float,
        sigma: float,
        from_x: float,
        from_x_0: float,
        from_others: tuple[float, float] = (0.0, 0.0),
    ) -> "Step":
        to_x_0 = (1 / alpha, -sigma / alpha) if self.prediction_type == "epsilon" else (alpha, -sigma)
        return Step(t, (*to_x_0, from_x, from_x_0, *from_others))


@dataclass(frozen=True)
class Step:
    """One update of a trajectory.

    Attributes:
        t: diffusion timestep the network is asked at.
        coefficients: what `update` multiplies with.
        fresh: whether the last but one is for new unit noise instead of the x_0 of the step before.
    """

    t: int
    coefficients: tuple[float, float, float, float, float, float]
    fresh: bool = False


def update(
    x: Tensor, others: Tensor, prediction: Tensor, coefficients: Sequence[float] | Tensor
) -> tuple[Tensor, Tensor]:
    """One step of a trajectory.

    Args:
        x: x_t, float32 (or float64), any shape.
        others: (2, *x.shape), x_0 of the step before and of the one before that, anything finite where there was none;
            for a step that is `fresh`, new noise first.
        prediction: the network's, shape of x.
        coefficients: of a `Step`; plain numbers, or a (6,) tensor on the device of x.

    Returns:
        x at the next timestep, and what are the others then: x_0 and the one before. Both in the dtype of x.
    """
    x_0 = coefficients[0] * x + coefficients[1] * prediction
    x = coefficients[2] * x + coefficients[3] * x_0 + coefficients[4] * others[0] + coefficients[5] * others[1]
    return x, torch.stack([x_0, others[0]])


def denoise(advance: Advance, x: Tensor, n: int, progress: OnStep = lambda done, total, x_0: None) -> Tensor:
    """Run n steps from noise x to a clean sample of the same shape and dtype.

    Args:
        advance: makes one step.
        progress: called with (steps done, steps in all, x_0 as it is then foreseen) after every step.
    """
    others = torch.zeros((2, *x.shape), dtype=x.dtype, device=x.device)
    for i in range(n):
        x, others = advance(i, x, others)
        progress(i + 1, n, others[0])
    return x


def guided(predictions: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): uncond + scale * (cond - uncond).

    Args:
        predictions: (2, ...), row 0 unconditional, row 1 conditional.
        scale: a number or a tensor of shape (); 1 would be the conditional row alone, for which no guidance is needed.

    Returns:
        (1, ...)
    """
    uncond, cond = predictions.chunk(2)
    return uncond + scale * (cond - uncond)


def _alpha_bar(beta_start: float, beta_end: float, T: int, rescale_zero_snr: bool) -> Tensor:
    """(T,) float64 for scaled-linear betas, shifted and stretched to end at exactly 0 if asked (arXiv 2305.08891,
    algorithm 1)."""
    betas = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T, dtype=torch.float64).square()
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    if rescale_zero_snr:
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return alpha_bar

"""One denoising step: the network, classifier-free guidance, overlapping windows. Takes callables, knows no model."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from t2v.sampling.solvers import SolverStep, solver_step
from t2v.sampling.timeline import Timeline

# (latents (1, C, F, h, w), timestep terms (1, d), text_kv (rows, n, d)) -> predictions (rows, C, F, h, w)
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
Function = Callable[..., tuple[Tensor, ...]]


class GuidedNetwork:
    """The network with guidance, and with a solver's step after it: functions of tensors alone, fit for recording.

    They compute in float32 around the network.

    Args:
        rows_at_once: number of rows of the guided pair that the network computes together, 1 or 2.
    """

    def __init__(self, network: Network, rows_at_once: int = 2):
        self.network = network
        self.rows_at_once = rows_at_once

    def predict(self, x: Tensor, terms: Tensor, text_kv: Tensor, guidance_scale: Tensor) -> tuple[Tensor]:
        """The guided prediction, (1, C, F, h, w) float32.

        Args:
            x: (1, C, F, h, w) float32 noisy latents.
            terms: (1, d) timestep terms.
            text_kv: (2, n, d), row 0 unconditional, row 1 conditional; or (1, n, d) without guidance.
            guidance_scale: ().
        """
        latents = x.to(terms.dtype)
        rows = [self.network(latents, terms, part).float() for part in text_kv.split(self.rows_at_once)]
        prediction = torch.cat(rows)
        return (guided(prediction, guidance_scale) if len(text_kv) == 2 else prediction,)

    def step(
        self, x: Tensor, history: Tensor, terms: Tensor, text_kv: Tensor, guidance_scale: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, ...]:
        """x at the next timestep and the new history, see `solver_step`."""
        (prediction,) = self.predict(x, terms, text_kv, guidance_scale)
        return solver_step(x, history, prediction, coefficients)


def guided(predictions: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): uncond + scale * (cond - uncond).

    Args:
        predictions: (2, ...), row 0 unconditional, row 1 conditional.
        scale: a number or a tensor of shape (). 1 would be the conditional row alone, which needs no guidance.

    Returns:
        (1, ...)
    """
    uncond, cond = predictions.chunk(2)
    return uncond + scale * (cond - uncond)


class WindowTensors(NamedTuple):
    frames: Tensor  # (n,) int64
    weights: Tensor  # (n, 1, 1) float32
    prompt_shares: list[float]


class Denoiser:
    """The denoising steps of one request: the step function of `sample`.

    Everything that differs between steps is on the device before the first step; inside the loop the host never waits.

    Args:
        predict, step: `GuidedNetwork.predict` and `.step`, or recordings of them.
        text_kv: (prompts, rows, n, d).
        terms: (steps, d) timestep terms.
        noise: fresh noise (1, C, F, h, w) for the steps that take it.
    """

    def __init__(
        self,
        predict: Function,
        step: Function,
        text_kv: Tensor,
        terms: Tensor,
        guidance_scale: float,
        steps: Sequence[SolverStep],
        timeline: Timeline,
        noise: Iterator[Tensor],
    ):
        self.predict, self.step = predict, step
        self.text_kv = text_kv
        self.terms = terms
        self.steps = steps
        self.noise = noise
        device = terms.device
        self.guidance_scale = torch.tensor(guidance_scale, device=device)
        self.coefficients = torch.tensor([s.coefficients for s in steps], dtype=torch.float64, device=device)
        self.is_single_window = timeline.is_single_window
        self.windows: list[list[WindowTensors]] = []
        if not timeline.is_single_window:
            self.windows = [self._windows(timeline, i) for i in range(len(steps))]

    @property
    def num_network_calls(self) -> int:
        """Number of calls of `predict` or `step` in all steps together."""
        return sum(map(len, self.windows)) or len(self.steps)

    def __call__(self, i: int, x: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        """Step `i`: x and the history after it."""
        if self.steps[i].fresh_noise:
            history = torch.stack([next(self.noise), history[1]])
        if self.is_single_window:
            terms, text_kv = self.terms[i : i + 1], self.text_kv[0]
            x, history = self.step(x, history, terms, text_kv, self.guidance_scale, self.coefficients[i])
            return x, history
        return solver_step(x, history, self.averaged(i, x), self.coefficients[i])

    def averaged(self, i: int, x: Tensor) -> Tensor:
        """The guided predictions of all windows of a step, averaged where the windows overlap."""
        prediction = torch.zeros_like(x)
        for window in self.windows[i]:
            text_kv = self._mixed(window.prompt_shares)
            (part,) = self.predict(x[:, :, window.frames], self.terms[i : i + 1], text_kv, self.guidance_scale)
            prediction.index_add_(2, window.frames, window.weights * part)
        return prediction

    def _windows(self, timeline: Timeline, i: int) -> list[WindowTensors]:
        device = self.terms.device
        return [
            WindowTensors(
                torch.tensor(window.frames, device=device),
                torch.tensor(window.weights, dtype=torch.float32, device=device)[:, None, None],
                timeline.prompt_shares(window.start, len(self.text_kv)),
            )
            for window in timeline.windows(i)
        ]

    def _mixed(self, shares: list[float]) -> Tensor:
        """(rows, n, d), the prompts weighted by their shares; made per window, as all together would take gigabytes."""
        parts = [share * text_kv for share, text_kv in zip(shares, self.text_kv) if share]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

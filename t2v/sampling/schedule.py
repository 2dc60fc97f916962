"""The noise schedule that a model was trained with, as plain data.

With alpha_bar the cumulative signal share, alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar), a noisy sample is
x_t = alpha x_0 + sigma eps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2v.errors import WeightsError


@dataclass(frozen=True)
class Schedule:
    """The content of `scheduler_config.json`.

    Attributes:
        alpha_bar: (T,) float64, cumulative product of 1 - beta, falling from nearly 1; T is 1000.
        prediction_type: what the network predicts, "epsilon" (noise) or "v_prediction" (velocity,
            alpha eps - sigma x_0; Salimans and Ho, arXiv 2202.00512).
        spacing: "leading", "linspace" or "trailing" (Lin et al., arXiv 2305.08891, table 2); None if the config has
            none. Each solver then uses its own: DDIM leading, the others linspace.
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
            WeightsError: the config asks for something that is not implemented.
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

    def __len__(self) -> int:
        """Number of timesteps, T."""
        return len(self.alpha_bar)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: int) -> Tensor:
        """x_t of a clean sample: alpha x_0 + sigma eps."""
        alpha_bar = float(self.alpha_bar[t])
        return math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * noise


def _alpha_bar(beta_start: float, beta_end: float, T: int, rescale_zero_snr: bool) -> Tensor:
    """(T,) float64 for scaled-linear betas, shifted and stretched to end at exactly 0 if asked (arXiv 2305.08891,
    algorithm 1)."""
    betas = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T, dtype=torch.float64).square()
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    if rescale_zero_snr:
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return alpha_bar

"""Models distilled to few steps: how each one is sampled. Plain data, no torch."""

from dataclasses import dataclass
from typing import Literal

Solver = Literal["dpm++", "ddim", "unipc", "lcm"]


@dataclass(frozen=True)
class GuidanceRange:
    """Guidance scales that a distilled network accepts as an input."""

    minimum: float
    default: float
    maximum: float


@dataclass(frozen=True)
class DistilledSampling:
    """How a distilled model is sampled.

    Guidance was distilled into the network, so every step computes one row.

    Attributes:
        name: name of the model.
        solver: "lcm" for a latent consistency model (Luo et al., arXiv 2310.04378); "ddim" for a model that was trained
            to make each long DDIM step end where many short ones would.
        timestep_scaling: with "lcm", scale of the timestep in the boundary condition.
        evenly_strided: with "lcm", True takes every (50 // n)-th training timestep and keeps the first n of them; False
            spreads n timesteps evenly over all 50.
        embedded_guidance: range of the guidance scale that the network takes as an input; None if it takes none.
        default_steps: number of steps when the request asks for more than `max_steps`.
        max_steps: largest number of steps.
    """

    name: str
    solver: Solver = "lcm"
    timestep_scaling: float = 10
    evenly_strided: bool = False
    embedded_guidance: GuidanceRange | None = None
    default_steps: int = 4
    max_steps: int = 8


TURBO = DistilledSampling(
    "T2V-Turbo-MS", timestep_scaling=10, evenly_strided=True, embedded_guidance=GuidanceRange(2, 7.5, 14)
)
MCM = DistilledSampling("MCM", timestep_scaling=4, evenly_strided=False, embedded_guidance=None)
RECIPES = {recipe.name: recipe for recipe in (TURBO, MCM)}

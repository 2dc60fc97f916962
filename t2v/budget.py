"""Memory: how much a pass takes, which plan fits, and one more attempt if memory runs out in spite of the plan."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from t2v.device import free_memory, release_memory
from t2v.errors import OutOfMemory, is_out_of_memory
from t2v.job import Job, Pass
from t2v.model import Model

S = TypeVar("S")
R = TypeVar("R")

MARGIN = 1.1  # factor on the estimate, for the libraries' own allocations

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryPlan:
    """How a pass is fitted into memory.

    Attributes:
        guidance_rows_at_once: number of rows of the guided pair that the denoiser computes together.
        chunk_pixels: maximum number of pixels that the autoencoder computes together. It computes at least one frame.
    """

    guidance_rows_at_once: int
    chunk_pixels: int

    def __str__(self) -> str:
        name = "default" if self == DEFAULT else "low memory"
        return f"{name}, {self.guidance_rows_at_once} guidance rows and {self.chunk_pixels} pixels at once"


DEFAULT, LOW_MEMORY = MemoryPlan(2, 2**19), MemoryPlan(1, 2**16)


def denoising_bytes(model: Model, pass_: Pass, plan: MemoryPlan) -> float:
    """Bytes that a denoising step takes at its peak."""
    rows = min(pass_.num_guidance_rows, plan.guidance_rows_at_once)
    batch, channels, _, h, w = pass_.latent_shape
    return MARGIN * model.unet.peak_bytes(rows, (batch, channels, pass_.timeline.window_size, h, w))


def decoding_bytes(model: Model, pass_: Pass, plan: MemoryPlan) -> float:
    """Bytes that decoding a chunk takes at its peak."""
    frames = min(pass_.num_frames, model.vae.frames_per_chunk(*pass_.size, plan.chunk_pixels))
    return MARGIN * model.vae.peak_bytes(frames, *pass_.size)


def fits(model: Model, pass_: Pass, plan: MemoryPlan, free: int | None) -> bool:
    """Whether the pass fits into this number of free bytes; True if the number is unknown."""
    denoising, decoding = denoising_bytes(model, pass_, plan), decoding_bytes(model, pass_, plan)
    # A CUDA graph keeps the memory that it ran in. The low-memory plan runs without recordings.
    both = model.profile.recordings_hold_memory and plan == DEFAULT
    return free is None or (denoising + decoding if both else max(denoising, decoding)) <= free


def check(job: Job, models: Iterable[Model]) -> None:
    """Make sure that every pass fits into the free memory with one of the plans.

    Recordings are kept: a trace holds little memory, and the memory of a CUDA graph counts as free.

    Args:
        models: the model of each pass.

    Raises:
        OutOfMemory: the message says how many frames would fit.
    """
    for i, (pass_, model) in enumerate(zip(job.passes, models)):
        if fits(model, pass_, LOW_MEMORY, free_memory(model.device)):
            continue
        release_memory(model.device)  # memory that is no longer in use
        free = free_memory(model.device)
        if free is None or fits(model, pass_, LOW_MEMORY, free):
            continue
        denoising, decoding = denoising_bytes(model, pass_, LOW_MEMORY), decoding_bytes(model, pass_, LOW_MEMORY)
        frames = 0 if decoding > free else int(pass_.timeline.window_size * free / denoising)
        advice = f"ask for at most {frames} frames of that size" if frames else "ask for a smaller size"
        if frames >= model.info.native_frames:
            advice += f", or for window {model.info.native_frames}"
        if i > 0:
            advice += ", or leave upscale out"
        raise OutOfMemory(
            f"{pass_} need {max(denoising, decoding) / 1e9:.1f} GB of the device's memory and {free / 1e9:.1f} GB are "
            f"free; {advice}."
        )


def choose_plan(model: Model, pass_: Pass) -> MemoryPlan:
    """The plan for the memory that is free now. Recordings are dropped if the pass does not fit beside them."""
    if not fits(model, pass_, DEFAULT, free_memory(model.device)):
        release(model)
        if not fits(model, pass_, DEFAULT, free_memory(model.device)):
            return LOW_MEMORY
    return DEFAULT


def plans(model: Model, first: MemoryPlan) -> list[MemoryPlan]:
    """The plans to try in turn. If recordings hold memory, the first plan is tried again after they are dropped."""
    held = model.profile.recordings_hold_memory and model.has_recordings
    return [first] * (2 if held else 1) + [LOW_MEMORY] * (first == DEFAULT)


def release(*models: Model) -> None:
    """Return all memory that no request needs."""
    for model in models:
        model.drop_recordings()
        release_memory(model.device)


def retry(attempt: Callable[[S], R], settings: Iterable[S], release: Callable[[], None], advice: str) -> R:
    """Call `attempt` with the settings in turn until memory suffices; returns its result.

    Args:
        release: returns memory after an attempt that ran out of it.
        advice: message of the error if memory suffices for no setting.

    Raises:
        OutOfMemory: memory ran out with every setting.
    """
    for setting in settings:
        try:
            return attempt(setting)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("Memory ran out (%s): %s", setting, str(error).split("\n", 1)[0])
        release()  # outside the handler, where the error no longer refers to tensors
    raise OutOfMemory(advice)

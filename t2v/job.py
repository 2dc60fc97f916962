"""A request resolved against a model: all decisions that precede the work. Plain data, no torch.

Only `resolve` interprets a `Request`. Later code reads the `Job`. All rules about presets, distilled models, sizes,
windows, prompts and the amount of work are in this file.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from t2v.errors import InvalidRequest
from t2v.request import Request
from t2v.sampling.distilled import DistilledSampling, Solver
from t2v.sampling.timeline import Timeline

MAX_WORK = 2**34  # frames x pixels x steps of a request: 256 frames of 256x256 in 500 steps, in windows, just fit
DEFAULT_STRENGTH = 0.6  # of a video made from init_video, unless the request says otherwise, and of a second pass
FAST_STEPS = 20  # of preset fast; the solver's authors recommend 15 to 20 for guided sampling (arXiv 2211.01095)
MAX_FRAMES_AT_ONCE = 128  # frames that are denoised together unless the request gives a window


@dataclass(frozen=True)
class ModelInfo:
    """What the rules need to know about a loaded model.

    Attributes:
        name: name of the model, for logs and files.
        about: one sentence on what the model can show; "" if its index has none.
        native_size: (height, width) in pixels that the model was trained at.
        native_frames: number of frames that the model was trained on.
        guidance_scale: used where the request gives none.
        latent_channels: number of channels of a latent.
        scale_factor: pixels per latent, along each side.
        lora: "name:scale" of the installed LoRA; None if there is none.
        distilled: how to sample with the LoRA, if it makes a model of few steps.
        prefers_distilled: whether preset auto is turbo. It is with a LoRA that the operator installed, and not with one
            that came with the model.
    """

    name: str
    about: str = ""
    native_size: tuple[int, int] = (256, 256)
    native_frames: int = 16
    guidance_scale: float = 9.0
    latent_channels: int = 4
    scale_factor: int = 8
    lora: str | None = None
    distilled: DistilledSampling | None = None
    prefers_distilled: bool = True


@dataclass(frozen=True)
class Sampling:
    """How a pass is sampled.

    Attributes:
        preset: "quality", "fast" or "turbo".
        num_steps: number of steps from pure noise to a clean sample.
        guidance_scale: of classifier-free guidance; 1 computes one row only.
        embedded_guidance: guidance scale that a distilled network takes as an input; None if it takes none.
        distilled: recipe of a distilled model; None for the others.
    """

    preset: str
    solver: Solver
    num_steps: int
    guidance_scale: float
    embedded_guidance: float | None = None
    distilled: DistilledSampling | None = None


@dataclass(frozen=True)
class Pass:
    """One denoising by one model: from noise, or from the frames of the pass before, to clean latents.

    Attributes:
        size: (height, width) in pixels.
        seed: 0 to 2^32 - 1.
        prompts: in the order in which they are shown.
        negative_prompt: the text that guidance leads away from, "" for the empty prompt; None without guidance.
        first_step: number of steps that are skipped; 0 without init frames.
        with_lora: whether the model's LoRA is in the weights.
        on_upscaler: whether the upscaler makes this pass.
        latent_shape: (1, channels, F, h, w).
    """

    size: tuple[int, int]
    seed: int
    prompts: tuple[str, ...]
    negative_prompt: str | None
    sampling: Sampling
    first_step: int
    timeline: Timeline
    with_lora: bool
    on_upscaler: bool
    latent_shape: tuple[int, int, int, int, int]

    @property
    def num_frames(self) -> int:
        return self.timeline.num_frames

    @property
    def num_steps(self) -> int:
        """Number of steps that are made."""
        return self.sampling.num_steps - self.first_step

    @property
    def num_guidance_rows(self) -> int:
        """2 with classifier-free guidance, else 1."""
        return 1 if self.negative_prompt is None else 2

    @property
    def work(self) -> int:
        """Frames x pixels x steps."""
        frames = len(self.timeline.starts(0)) * self.timeline.window_size
        return frames * math.prod(self.size) * self.num_steps

    def __str__(self) -> str:
        return f"{self.num_frames} frames of {self.size[1]}x{self.size[0]}"


@dataclass(frozen=True)
class Job:
    """Everything that is decided about a request.

    Attributes:
        passes: one, or two if the video is upscaled.
        metadata: JSON values for the metadata of the file.
    """

    passes: tuple[Pass, ...]
    metadata: Mapping[str, Any]


def resolve(
    request: Request, model: ModelInfo, upscaler: ModelInfo | None = None, *, has_init_video: bool = False
) -> Job:
    """Decide everything about a request.

    Args:
        upscaler: another model for second passes; None uses the same model.
        has_init_video: whether the video starts from other frames.

    Raises:
        InvalidRequest: the model cannot do it, or it takes more work than one request may.
    """
    if request.strength is not None and not has_init_video:
        raise InvalidRequest("strength needs an init_video to start from; send one or leave strength out.")
    strength = 1.0
    if has_init_video:
        strength = DEFAULT_STRENGTH if request.strength is None else request.strength
    height, width = request.height or model.native_size[0], request.width or model.native_size[1]
    first = _pass(request, model, (height, width), strength)
    passes = [first]
    if request.upscale > 1:
        size = (request.upscale * height, request.upscale * width)
        if upscaler and first.sampling.distilled:  # the distilled LoRA belongs to the other model
            request_2 = replace(request, preset="fast", num_inference_steps=FAST_STEPS, guidance_scale=None)
        else:
            request_2 = request
        passes.append(_pass(request_2, upscaler or model, size, DEFAULT_STRENGTH, on_upscaler=upscaler is not None))
    work = sum(pass_.work for pass_ in passes)
    if work > MAX_WORK:
        raise InvalidRequest(
            f"{passes[-1]} in {request.num_inference_steps} steps is {work / MAX_WORK:.1f} times the work allowed in "
            "one request; ask for fewer frames, pixels or steps."
        )
    return Job(tuple(passes), _metadata(request, model, upscaler, passes))


def _pass(
    request: Request, model: ModelInfo, size: tuple[int, int], strength: float, on_upscaler: bool = False
) -> Pass:
    sampling = _sampling(request, model)
    return Pass(
        size=size,
        seed=cast(int, request.seed),
        prompts=tuple(request.prompts),
        negative_prompt=None if sampling.guidance_scale == 1 else request.negative_prompt.strip(),
        sampling=sampling,
        first_step=sampling.num_steps - math.ceil(sampling.num_steps * strength),
        timeline=_timeline(request, model),
        with_lora=model.lora is not None and (sampling.distilled is not None or model.distilled is None),
        on_upscaler=on_upscaler,
        latent_shape=_latent_shape(request.num_frames, size, model),
    )


def _sampling(request: Request, model: ModelInfo) -> Sampling:
    distilled = model.distilled
    preset, num_steps = request.preset, request.num_inference_steps
    if preset == "auto":
        preset = "turbo" if distilled and model.prefers_distilled else "quality"
    if preset != "turbo":
        scale = model.guidance_scale if request.guidance_scale is None else request.guidance_scale
        if request.negative_prompt.strip() and scale == 1:
            raise InvalidRequest(
                "negative_prompt has no effect at guidance_scale 1; raise guidance_scale, or leave negative_prompt out."
            )
        num_steps = min(num_steps, FAST_STEPS) if preset == "fast" else num_steps
        return Sampling(preset, cast(Solver, request.scheduler), num_steps, scale)
    if distilled is None:
        raise InvalidRequest(
            f"preset turbo needs a few-step LoRA, and {model.lora} is not one; start without T2V_LORA or with another, "
            "or ask for fast."
            if model.lora
            else "preset turbo needs a few-step LoRA. This model has none, and T2V_LORA is not set: start with "
            "T2V_LORA=path, or ask for fast."
        )
    if request.negative_prompt.strip() or request.scheduler != "dpm++":
        raise InvalidRequest(
            "preset turbo takes no negative_prompt and has its own scheduler; leave both out, or ask for quality."
        )
    num_steps = num_steps if num_steps <= distilled.max_steps else distilled.default_steps
    scales = distilled.embedded_guidance
    if scales is None:
        if request.guidance_scale not in (None, 1):
            raise InvalidRequest(f"preset turbo takes no guidance_scale with {distilled.name}; leave it out.")
        return Sampling(preset, distilled.solver, num_steps, 1.0, distilled=distilled)
    embedded = scales.default if request.guidance_scale is None else request.guidance_scale
    if not scales.minimum <= embedded <= scales.maximum:
        raise InvalidRequest(
            f"guidance_scale must be {scales.minimum} to {scales.maximum} with preset turbo ({distilled.name})."
        )
    return Sampling(preset, distilled.solver, num_steps, 1.0, embedded, distilled)


def _timeline(request: Request, model: ModelInfo) -> Timeline:
    several = len(request.prompts) > 1
    window = request.window
    if window is None:
        window = model.native_frames if several or request.num_frames > MAX_FRAMES_AT_ONCE else MAX_FRAMES_AT_ONCE
    if several and request.num_frames <= window:
        raise InvalidRequest(
            f"next_prompts needs num_frames to be larger than window ({window}). "
            "Ask for more frames or a smaller window."
        )
    return Timeline(request.num_frames, window, request.loop)


def _latent_shape(num_frames: int, size: tuple[int, int], model: ModelInfo) -> tuple[int, int, int, int, int]:
    (height, width), factor = size, model.scale_factor
    if height % factor or width % factor:
        raise InvalidRequest(f"width and height must be multiples of {factor}, not {width}x{height}.")
    return 1, model.latent_channels, num_frames, height // factor, width // factor


def _metadata(request: Request, model: ModelInfo, upscaler: ModelInfo | None, passes: list[Pass]) -> dict[str, Any]:
    first, sampling = passes[0], passes[0].sampling
    height, width = passes[-1].size
    resolved: dict[str, Any] = {
        "width": width,
        "height": height,
        "model": model.name,
        "preset": sampling.preset,
        "num_inference_steps": sampling.num_steps,
        "window": first.timeline.window_size,
        "guidance_scale": sampling.embedded_guidance or sampling.guidance_scale,
    }
    if passes[-1].on_upscaler and upscaler:
        resolved["upscaler"] = upscaler.name
    if first.with_lora:
        resolved["lora"] = model.lora
    return asdict(request) | resolved

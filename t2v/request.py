"""What the caller asked for, in the caller's units. A `Request` that exists is valid; this module knows no tensors."""

import math
import random
from dataclasses import dataclass, fields
from typing import Any

from t2v.errors import InvalidRequest

MAX_SEED = 2**32 - 1
MAX_PROMPT = 10_000  # characters; the text encoder reads 77 tokens, some 300 characters
MAX_PROMPTS = 16  # one after the other; each is a row of the text encoder and some megabytes of keys and values
BOUNDS = {
    "num_frames": (1, 256),
    "num_inference_steps": (1, 500),
    "fps": (1, 60),
    "seed": (0, MAX_SEED),
    "guidance_scale": (1, 30),
    "quality": (1, 51),
    "strength": (0, 1),
    "window": (4, 128),
    "width": (16, 1024),
    "height": (16, 1024),
    "upscale": (1, 2),
}
MODELS_OWN = ("guidance_scale", "width", "height", "window", "strength")  # None stands for what suits the model
FRACTIONS = ("guidance_scale", "strength")
UNITS = {"width": "pixels", "height": "pixels"}
CHOICES = {
    "preset": ("auto", "quality", "fast", "turbo"),
    "scheduler": ("dpm++", "ddim", "unipc"),
    "output_format": ("mp4", "webm", "gif"),
}
TEXTS = ("prompt", "negative_prompt", "next_prompts")
DEFAULT_QUALITY = 18
MAX_GIF_FPS = 50  # browsers show what is shorter than two hundredths of a second at ten frames per second
SIZE_MULTIPLE = 8  # pixels to one latent


@dataclass(frozen=True)
class Request:
    """One video to make.

    Attributes:
        prompt: English text, 1 to 10,000 characters, not blank.
        num_frames: 1 to 256.
        num_inference_steps: denoising steps, 1 to 500.
        fps: frames per second of the written file, 1 to 60.
        seed: 0 to 2^32 - 1; None draws one, and the attribute then holds it.
        negative_prompt: what the video is led away from, at most 10,000 characters; needs guidance.
        guidance_scale: weight of the prompt against the empty prompt, 1 to 30; 1 is no guidance; None is the model's
            own, which for the 1.7B model is 9.
        preset: "quality" takes the steps asked for; "fast" at most 20; "turbo", with a few-step model, at most 8, and 4
            where more are asked for; "auto" is turbo where a few-step model is installed, else quality.
        scheduler: "dpm++", DPM-Solver++ 2M; "unipc", nearer to the end of many steps with 10 to 20 of them; or "ddim",
            which wants more; not for turbo, which has its own.
        width, height: pixels, multiples of 8, 16 to 1024; None is the model's native size.
        output_format: "mp4" (H.264), "webm" (VP9) or "gif".
        quality: constant rate factor of H.264 or VP9, 1 (nearly lossless) to 51 (worst); 18 looks lossless. A GIF has
            none.
        window: frames that are denoised together, 4 to 128; None is all of them where they are at most 128 and there is
            one prompt, else as many as the model was trained on. See `t2v.sampling.timeline`.
        loop: whether the first frame shall follow the last.
        next_prompts: what the video shows later, at most 15 prompts separated by `|`, spread evenly along it after
            `prompt`.
        strength: how far the video leaves the one it starts from: 0 is that one, 1 has nothing of it; None is 0.6.
        upscale: 2 makes the video twice as wide and high as `width` and `height` say, in a second pass that starts from
            the frames of the first; 1 is without.

    Raises:
        InvalidRequest: with a sentence that names the field, what came, and what is allowed.
    """

    prompt: str = "An astronaut riding a horse"
    num_frames: int = 16
    num_inference_steps: int = 50
    fps: int = 8
    seed: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    preset: str = "auto"
    negative_prompt: str = ""
    scheduler: str = "dpm++"
    output_format: str = "mp4"
    quality: int = DEFAULT_QUALITY
    window: int | None = None
    loop: bool = False
    next_prompts: str = ""
    strength: float | None = None
    upscale: int = 1

    def __post_init__(self) -> None:
        for name in TEXTS:
            text = getattr(self, name)
            if not isinstance(text, str):
                raise InvalidRequest(f"{name} must be text, not {_shown(text)}.")
            if len(text) > MAX_PROMPT:
                raise InvalidRequest(f"{name} has {len(text)} characters; at most {MAX_PROMPT} are allowed.")
        if len(self.prompts) > MAX_PROMPTS:
            raise InvalidRequest(
                f"next_prompts holds {len(self.prompts) - 1} prompts; at most {MAX_PROMPTS - 1} are allowed."
            )
        if not self.prompt.strip():
            raise InvalidRequest("prompt is blank; describe the video in a few English words.")
        if not isinstance(self.loop, bool):
            raise InvalidRequest(f"loop must be true or false, not {_shown(self.loop)}.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InvalidRequest(f"{name} must be one of {', '.join(choices)}, not {_shown(getattr(self, name))}.")
        if self.seed is None:
            object.__setattr__(self, "seed", random.SystemRandom().randint(0, MAX_SEED))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in BOUNDS or (value is None and field.name in MODELS_OWN):
                continue
            number = _number(field.name, value, whole=field.name not in FRACTIONS)
            object.__setattr__(self, field.name, number)
            if field.name in ("width", "height") and number % SIZE_MULTIPLE:
                near = max(16, round(number / SIZE_MULTIPLE) * SIZE_MULTIPLE)
                raise InvalidRequest(f"{field.name} must be a multiple of {SIZE_MULTIPLE}; {number} is not, {near} is.")
        if self.output_format == "gif" and self.fps > MAX_GIF_FPS:
            raise InvalidRequest(f"A gif shows at most {MAX_GIF_FPS} fps, not {self.fps}; ask for mp4 or webm.")
        if self.output_format == "gif" and self.quality != DEFAULT_QUALITY:
            raise InvalidRequest("A gif has no quality; leave it out, or ask for mp4 or webm.")

    @property
    def prompts(self) -> list[str]:
        """In the order they are shown."""
        return [self.prompt, *(part for part in self.next_prompts.split("|") if part.strip())]


def _number(name: str, value: Any, whole: bool) -> Any:
    """The value as an int (or float), if it is one within the field's bounds. JSON may bring 16.0 for 16."""
    low, high = BOUNDS[name]
    allowed = f"{'a whole' if whole else 'a'} number from {low} to {high}"
    if name in UNITS:
        allowed += f" ({UNITS[name]})"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (whole and value != int(value)) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be {allowed}, not {_shown(value)}.")
    return int(value) if whole else float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""What the caller asked for, in the caller's units. A `Request` that exists is valid; this module knows no tensors."""

import math
import random
from dataclasses import dataclass, fields
from typing import Any

from t2v.errors import InvalidRequest

MAX_SEED = 2**32 - 1
MAX_PROMPT = 10_000  # characters; the text encoder reads 77 tokens, some 300 characters
BOUNDS = {
    "num_frames": (1, 128),
    "num_inference_steps": (1, 500),
    "fps": (1, 60),
    "seed": (0, MAX_SEED),
    "guidance_scale": (1, 30),
    "width": (16, 1024),
    "height": (16, 1024),
}
MODELS_OWN = ("guidance_scale", "width", "height")  # None stands for what suits the model
UNITS = {"width": "pixels", "height": "pixels"}
PRESETS = ("auto", "quality", "fast", "turbo")
SIZE_MULTIPLE = 8  # pixels to one latent


@dataclass(frozen=True)
class Request:
    """One video to make.

    Attributes:
        prompt: English text, 1 to 10,000 characters, not blank.
        num_frames: 1 to 128.
        num_inference_steps: denoising steps, 1 to 500.
        fps: frames per second of the written file, 1 to 60.
        seed: 0 to 2^32 - 1; None draws one, and the attribute then holds it.
        guidance_scale: weight of the prompt against the empty prompt, 1 to 30; 1 is no guidance; None is the model's
            own, which for the 1.7B model is 9.
        preset: "quality" takes the steps asked for; "fast" at most 20; "turbo", with a few-step model, at most 8, and 4
            where more are asked for; "auto" is turbo where a few-step model is installed, else quality.
        width, height: pixels, multiples of 8, 16 to 1024; None is the model's native size.

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

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise InvalidRequest(f"prompt must be text, not {_shown(self.prompt)}.")
        if not self.prompt.strip() or self.prompt.isspace():
            raise InvalidRequest("prompt is blank; describe the video in a few English words.")
        if len(self.prompt) > MAX_PROMPT:
            raise InvalidRequest(f"prompt has {len(self.prompt)} characters; at most {MAX_PROMPT} are allowed.")
        if self.seed is None:
            object.__setattr__(self, "seed", random.SystemRandom().randint(0, MAX_SEED))
        if self.preset not in PRESETS:
            raise InvalidRequest(f"preset must be one of {', '.join(PRESETS)}, not {_shown(self.preset)}.")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("prompt", "preset") or (value is None and field.name in MODELS_OWN):
                continue
            number = _number(field.name, value, whole=field.name != "guidance_scale")
            object.__setattr__(self, field.name, number)
            if field.name in ("width", "height") and number % SIZE_MULTIPLE:
                near = max(16, round(number / SIZE_MULTIPLE) * SIZE_MULTIPLE)
                raise InvalidRequest(f"{field.name} must be a multiple of {SIZE_MULTIPLE}; {number} is not, {near} is.")


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

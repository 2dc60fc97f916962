"""What the caller asked for, in the caller's units. Every `Request` is valid: making an invalid one is an error.

Each input is declared once, as a field of `Request`: its default, its limits and the sentence that customers read.
Validation, the options of the command line and the tables in the documents derive from the fields. `class Inputs` in
predict.py repeats the limits as literals, because Cog reads that file without running it; a test compares the two.
"""

import dataclasses
import math
import random
from dataclasses import dataclass
from typing import Any, Literal

from t2v.errors import InvalidRequest

MAX_SEED = 2**32 - 1
MAX_PROMPT = 10_000  # characters; the text encoder reads 77 tokens, some 300 characters
MAX_PROMPTS = 16  # each is a row of the text encoder's batch and some megabytes of keys and values
DEFAULT_QUALITY = 18
MAX_GIF_FPS = 50  # browsers show a frame of less than 0.02 s for 0.1 s
SIZE_MULTIPLE = 8  # pixels per latent


@dataclass(frozen=True)
class InputSpec:
    """One input of the model.

    Attributes:
        kind: of its values; a "file" is not a field of `Request`, since it is not plain data.
        description: what the input does, for customers, in one line.
        low, high: inclusive limits of a number.
        choices: the allowed values, if they are listed.
        multiple_of: the number must be divisible by this.
        unit: of a number, for messages.
        optional: whether None is allowed; None stands for the model's own value.
    """

    kind: Literal["text", "integer", "number", "boolean", "file"]
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    multiple_of: int = 1
    unit: str = ""
    optional: bool = False

    @property
    def allowed(self) -> str:
        """The allowed values in a few words; empty if any value of the kind is allowed."""
        if self.choices:
            return ", ".join(self.choices)
        if self.low is None or self.high is None:
            return ""
        multiples = f", multiples of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{self.low} to {self.high}{multiples}"

    def checked(self, name: str, value: Any) -> Any:
        """The value in the type that the engine expects. JSON may contain 16.0 for 16.

        Raises:
            InvalidRequest: names the input, the value and the allowed values.
        """
        if value is None and self.optional:
            return None
        if self.choices:
            if value not in self.choices:
                raise InvalidRequest(f"{name} must be one of {self.allowed}, not {_shown(value)}.")
        elif self.kind == "text":
            if not isinstance(value, str):
                raise InvalidRequest(f"{name} must be text, not {_shown(value)}.")
            if len(value) > MAX_PROMPT:
                raise InvalidRequest(f"{name} has {len(value)} characters; at most {MAX_PROMPT} are allowed.")
        elif self.kind == "boolean":
            if not isinstance(value, bool):
                raise InvalidRequest(f"{name} must be true or false, not {_shown(value)}.")
        else:
            return self._checked_number(name, value)
        return value

    def _checked_number(self, name: str, value: Any) -> int | float:
        whole = self.kind == "integer"
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or (whole and value != int(value)) or not self.low <= value <= self.high:
            unit = f" ({self.unit})" if self.unit else ""
            wanted = f"{'a whole' if whole else 'a'} number from {self.low} to {self.high}{unit}"
            raise InvalidRequest(f"{name} must be {wanted}, not {_shown(value)}.")
        if whole and value % self.multiple_of:
            nearest = max(self.low, round(value / self.multiple_of) * self.multiple_of)
            raise InvalidRequest(f"{name} must be a multiple of {self.multiple_of}; {value} is not, {nearest} is.")
        return int(value) if whole else float(value)


def _text(default: str, description: str) -> Any:
    return _field(default, InputSpec("text", description))


def _choice(default: str, choices: tuple[str, ...], description: str) -> Any:
    return _field(default, InputSpec("text", description, choices=choices))


def _integer(default: int | None, low: int, high: int, description: str) -> Any:
    return _field(default, InputSpec("integer", description, low, high, optional=default is None))


def _pixels(description: str) -> Any:
    spec = InputSpec("integer", description, 16, 1024, multiple_of=SIZE_MULTIPLE, unit="pixels", optional=True)
    return _field(None, spec)


def _number(default: float | None, low: float, high: float, description: str) -> Any:
    return _field(default, InputSpec("number", description, low, high, optional=default is None))


def _boolean(default: bool, description: str) -> Any:
    return _field(default, InputSpec("boolean", description))


def _field(default: Any, spec: InputSpec) -> Any:
    return dataclasses.field(default=default, metadata={"input": spec})


@dataclass(frozen=True)
class Request:
    """One video to make. The fields' own descriptions say what each one does; `INPUTS` lists them.

    Attributes:
        seed: never None in an instance. If it is left out, it is drawn at random.
        guidance_scale, width, height, window, strength: None stands for the model's own value.

    Raises:
        InvalidRequest: the sentence names the input, the value and the allowed values.
    """

    prompt: str = _text(
        "An astronaut riding a horse",
        "What the video shows, in English. Example: a red circle moving right on a black background",
    )
    num_frames: int = _integer(16, 1, 256, "Number of frames. 16 frames at 8 fps are a video of 2 seconds")
    num_inference_steps: int = _integer(
        50, 1, 500, "Number of denoising steps. More steps take longer; 20 to 25 are often enough"
    )
    fps: int = _integer(8, 1, 60, "Frames per second of the video file")
    seed: int | None = _integer(
        None, 0, MAX_SEED, "Random seed. The same seed and inputs give the same frames. Default: random"
    )
    guidance_scale: float | None = _number(
        None, 1, 30, "Classifier-free guidance scale. 1 turns guidance off. Default: the model's own"
    )
    width: int | None = _pixels("Width in pixels, a multiple of 8. Default: the model's own")
    height: int | None = _pixels("Height in pixels, a multiple of 8. Default: the model's own")
    preset: str = _choice(
        "auto",
        ("auto", "quality", "fast", "turbo"),
        "auto: turbo with an installed few-step LoRA, else quality. fast: up to 20 steps. turbo: up to 8",
    )
    negative_prompt: str = _text("", "What to avoid in the video. Requires guidance. Example: blurry, text")
    scheduler: str = _choice(
        "dpm++",
        ("dpm++", "ddim", "unipc"),
        "Solver: DPM-Solver++ 2M, DDIM as in the original, or UniPC for few steps. turbo uses its own",
    )
    output_format: str = _choice("mp4", ("mp4", "webm", "gif"), "File format: mp4 (H.264), webm (VP9) or a looping gif")
    quality: int = _integer(
        DEFAULT_QUALITY,
        1,
        51,
        "Constant rate factor of mp4 and webm. 1 is nearly lossless, 18 looks lossless, 51 is the worst",
    )
    window: int | None = _integer(
        None,
        4,
        128,
        "Number of frames denoised together. Default: all; 16 for over 128 frames or several prompts",
    )
    loop: bool = _boolean(False, "Make the video loop seamlessly")
    next_prompts: str = _text(
        "",
        "Prompts for later parts of the video, up to 15, separated by |. Example: a red star | a square",
    )
    strength: float | None = _number(
        None, 0, 1, "How much to change init_video: 0 returns it, 1 ignores it. Default: 0.6"
    )
    upscale: int = _integer(1, 1, 2, "2 doubles the width and height in a second pass")

    def __post_init__(self) -> None:
        if self.seed is None:
            object.__setattr__(self, "seed", random.SystemRandom().randint(0, MAX_SEED))
        for name, spec in INPUTS.items():
            object.__setattr__(self, name, spec.checked(name, getattr(self, name)))
        if not self.prompt.strip():
            raise InvalidRequest("prompt is blank; describe the video in a few English words.")
        if len(self.prompts) > MAX_PROMPTS:
            raise InvalidRequest(
                f"next_prompts holds {len(self.prompts) - 1} prompts; at most {MAX_PROMPTS - 1} are allowed."
            )
        if self.output_format == "gif" and self.fps > MAX_GIF_FPS:
            raise InvalidRequest(f"A gif shows at most {MAX_GIF_FPS} fps, not {self.fps}; ask for mp4 or webm.")
        if self.output_format == "gif" and self.quality != DEFAULT_QUALITY:
            raise InvalidRequest("A gif has no quality; leave it out, or ask for mp4 or webm.")

    @property
    def prompts(self) -> list[str]:
        """The prompts in the order in which they are shown."""
        return [self.prompt, *(part for part in self.next_prompts.split("|") if part.strip())]


INPUTS: dict[str, InputSpec] = {field.name: field.metadata["input"] for field in dataclasses.fields(Request)}
INIT_VIDEO = InputSpec(
    "file", "Video or picture to start from, scaled and cropped to the requested size", optional=True
)


def inputs_table() -> str:
    """The inputs as a Markdown table, for the documents."""
    rows = ["| input | type | default | allowed | description |", "|---|---|---|---|---|"]
    defaults = {field.name: field.default for field in dataclasses.fields(Request)}
    inputs = list(INPUTS.items())
    inputs.insert(list(INPUTS).index("strength"), ("init_video", INIT_VIDEO))
    for name, spec in inputs:
        default = defaults.get(name)
        shown = "" if default is None else "empty" if default == "" else f"`{str(default).lower()}`"
        if spec.kind == "text" and default:
            shown = f"`{default}`"
        cells = (f"`{name}`", spec.kind, shown, spec.allowed, spec.description)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

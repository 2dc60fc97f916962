"""The demo model's world: short clips of one coloured shape on a plain background, and sentences that describe them.

Used to train the demo model and to score it. weights/README.md describes the world for people.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64  # pixels, width and height
FRAMES = 16

COLOURS = {
    "red": (225, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 20),
    "green": (20, 165, 40),
    "blue": (30, 80, 235),
    "purple": (140, 40, 180),
}
# Regular polygons and stars, as (points, inner radius / outer radius, rotation in degrees, outer radius per unit of
# half width); None is the circle.
SHAPES = {
    "circle": None,
    "square": (4, math.sqrt(0.5), 45, 1.27),
    "triangle": (3, 0.5, 0, 1.22),
    "star": (5, 0.45, 0, 1.28),
}
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking")
BACKGROUNDS = {"black": (0, 0, 0), "gray": (128, 128, 128), "pink": (245, 180, 200), "teal": (0, 120, 125)}

ATTRIBUTES = {
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "motion": MOTIONS,
    "background": tuple(BACKGROUNDS),
}
# The motion a clip shows when it is played backwards.
REVERSED = {0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4}
SLOW_TO_LEARN = (4, 5)


@dataclass(frozen=True)
class Clip:
    """One description, as indices into `ATTRIBUTES`; None where the sentence does not say."""

    colour: int | None
    shape: int | None
    motion: int | None
    background: int | None

    def sentence(self) -> str:
        """The standard sentence of a fully described clip."""
        colour, shape, motion, background = self.words()
        return f"a {colour} {shape} {motion} on a {background} background"

    def words(self) -> tuple[str, str, str, str]:
        """Colour, shape, motion and background of a fully described clip."""
        indices = (self.colour, self.shape, self.motion, self.background)
        colour, shape, motion, background = (v[i] for v, i in zip(ATTRIBUTES.values(), indices) if i is not None)
        return colour, shape, motion, background

    def paraphrase(self, generator: torch.Generator) -> str:
        """A looser wording that says the same, leaving out what is None."""

        def pick(*options: str) -> str:
            return options[int(torch.randint(len(options), (), generator=generator))]

        colour = "" if self.colour is None else ATTRIBUTES["colour"][self.colour] + " "
        shape = pick("shape", "object") if self.shape is None else ATTRIBUTES["shape"][self.shape]
        words = pick("a ", "a ", "the ", "one ", "") + colour + shape
        if self.motion is not None:
            motion = MOTIONS[self.motion]
            if motion.startswith("moving"):
                way = motion.split()[1]
                motion = pick(motion, motion, f"moves {way}", f"is {motion}", f"going {way}", f"moving to the {way}")
            else:
                motion = pick(motion, motion, f"{motion.removesuffix('ing')}s", f"is {motion}", f"{motion} in size")
            words += " " + motion
        if self.background is not None:
            name = ATTRIBUTES["background"][self.background]
            name = pick("gray", "grey") if name == "gray" else name
            words += pick(
                f" on a {name} background", f" on a {name} background", f" on {name}", f", {name} background",
                f" over a {name} background", f" in front of a {name} background",
            )  # fmt: skip
        return words


def random_clip(generator: torch.Generator) -> Clip:
    return Clip(*(int(torch.randint(len(v), (), generator=generator)) for v in ATTRIBUTES.values()))


def render(clips: list[Clip], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw each clip once, with random size, place and speed.

    Returns:
        pixels (n, FRAMES, 3, SIZE, SIZE) float32 in [-1, 1] and mask (n, FRAMES, 1, SIZE, SIZE) in [0, 1], the share of
        each pixel that the shape covers.
    """
    pixels, masks = [], []
    for clip in clips:
        colour, shape, motion, background = clip.words()
        mask = _coverage(shape, motion, generator)[:, None]
        fore = torch.tensor(COLOURS[colour]).view(1, 3, 1, 1) / 127.5 - 1
        back = torch.tensor(BACKGROUNDS[background]).view(1, 3, 1, 1) / 127.5 - 1
        pixels.append(back + (fore - back) * mask)
        masks.append(mask)
    return torch.stack(pixels), torch.stack(masks)


def _coverage(shape: str, motion: str, generator: torch.Generator) -> Tensor:
    """(FRAMES, SIZE, SIZE) coverage of the shape along its motion."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    s = torch.linspace(-0.5, 0.5, FRAMES)
    x = torch.full_like(s, SIZE / 2)
    y = torch.full_like(s, SIZE / 2)
    if motion.startswith("moving"):
        radius = torch.full_like(s, uniform(10.5, 13))
        travel, along, across = uniform(24, 30), uniform(-2, 2), uniform(-7, 7)
        dx, dy = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion.split()[1]]
        x = x + dx * (s * travel + along) + abs(dy) * across
        y = y + dy * (s * travel + along) + abs(dx) * across
    else:
        small = uniform(6, 7)
        large = small * uniform(2.8, 3.2)
        ramp = s + 0.5 if motion == "growing" else 0.5 - s
        radius = small + (large - small) * ramp
        x = x + uniform(-4, 4)
        y = y + uniform(-4, 4)

    grid = torch.arange(SIZE) + 0.5
    px = grid.view(1, 1, SIZE) - x.view(-1, 1, 1)
    py = y.view(-1, 1, 1) - grid.view(1, SIZE, 1)  # up is positive
    return (0.5 - signed_distance(shape, px, py, radius.view(-1, 1, 1))).clamp(0, 1)


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance in pixels to the outline of a shape of half width `radius` centred on 0, negative inside.

    A star of n points is a half plane folded n times: turn every point into the sector of the nearest tip, mirror it
    on the tip's axis, and measure against the line from the tip to the notch beside it.
    """
    spec = SHAPES[shape]
    distance = torch.hypot(x, y)
    if spec is None:
        return distance - radius
    points, inner, degrees, outer = spec
    sector = 2 * math.pi / points
    angle = torch.atan2(x, y) - math.radians(degrees)  # from straight up
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    px, py = distance * folded.cos(), distance * folded.sin()
    tip = radius * outer
    notch_x, notch_y = tip * inner * math.cos(sector / 2), tip * inner * math.sin(sector / 2)
    nx, ny = notch_y, tip - notch_x
    length = torch.hypot(nx, ny)
    return ((px - tip) * nx + py * ny) / length

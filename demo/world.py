"""The demo model's world: short clips of one coloured shape on a plain background, and sentences that describe them.

Used to train the demo model and to score it. weights/README.md describes the world for people.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

SIZE = 96  # pixels, width and height
FRAMES = 16

COLOURS = {
    "red": (225, 20, 35),
    "orange": (255, 120, 0),
    "yellow": (255, 235, 20),
    "green": (20, 165, 40),
    "blue": (30, 80, 235),
    "purple": (145, 40, 190),
}
# Regular polygons and stars, as (points, inner radius / outer radius, rotation in degrees, outer radius per unit of
# half width); None is the circle.
SHAPES = {
    "circle": None,
    "square": (4, math.sqrt(0.5), 45, 1.27),
    "triangle": (3, 0.5, 0, 1.22),
    "star": (5, 0.45, 0, 1.28),
}
MOTIONS = (
    "moving left", "moving right", "moving up", "moving down", "growing", "shrinking", "circling", "bouncing",
)  # fmt: skip
BACKGROUNDS = {"black": (0, 0, 0), "gray": (128, 128, 128), "pink": (245, 180, 200), "teal": (0, 120, 125)}

ATTRIBUTES = {
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "motion": MOTIONS,
    "background": tuple(BACKGROUNDS),
}
# Words a sentence may add. A place is across the direction of motion.
SIZES = ("small", "large")
PLACES = ("near the top", "near the bottom", "on the left", "on the right")

# (colour, shape) that no training clip shows: whether the model combines what it has learned apart.
HELD_OUT = (("blue", "triangle"), ("yellow", "square"))

HORIZONTAL, VERTICAL, RESIZING = (0, 1), (2, 3, 7), (4, 5)  # motions


@dataclass(frozen=True)
class Clips:
    """A batch of n clips: what a sentence says about each, and how it is drawn.

    Attributes:
        colour, shape, motion, background: (n,) int64, indices into `ATTRIBUTES`.
        size: (n,) in [0, 1], from the smallest to the largest.
        speed: (n,) in [0, 1]: of travel, of growth, of the radius of the circle, of the height of the bounce.
        along, across: (n,) in [-1, 1], the offset of the path's centre along and across the direction of motion.
        phase: (n,) in [0, 1], the point of a circle or bounce where the clip begins.
    """

    colour: Tensor
    shape: Tensor
    motion: Tensor
    background: Tensor
    size: Tensor
    speed: Tensor
    along: Tensor
    across: Tensor
    phase: Tensor

    def __len__(self) -> int:
        return len(self.colour)

    def __getitem__(self, index: slice) -> "Clips":
        return Clips(*(getattr(self, field.name)[index] for field in fields(self)))

    def words(self, i: int) -> tuple[str, str, str, str]:
        """Colour, shape, motion and background of clip i."""
        colour, shape, motion, background = (values[int(getattr(self, name)[i])] for name, values in ATTRIBUTES.items())
        return colour, shape, motion, background

    def size_word(self, i: int) -> int | None:
        """Index into `SIZES` of a clip that is clearly small or large all the time, else None."""
        size = float(self.size[i])
        if int(self.motion[i]) in RESIZING:
            return None
        return 0 if size < 0.35 else 1 if size > 0.65 else None

    def place_word(self, i: int) -> int | None:
        """Index into `PLACES` of a clip that is clearly off the middle, else None."""
        motion, across = int(self.motion[i]), float(self.across[i])
        if abs(across) < 0.3 or motion not in HORIZONTAL + VERTICAL:
            return None
        return (0 if across < 0 else 1) if motion in HORIZONTAL else (2 if across < 0 else 3)

    def to(self, device: str | torch.device) -> "Clips":
        return Clips(*(getattr(self, field.name).to(device) for field in fields(self)))


def sentence(colour: str, shape: str, motion: str, background: str) -> str:
    """The standard sentence of a clip."""
    return f"{_article(colour)} {colour} {shape} {motion} on a {background} background"


def paraphrase(
    generator: torch.Generator,
    colour: str | None,
    shape: str | None,
    motion: str | None,
    background: str | None,
    size: str | None = None,
    place: str | None = None,
) -> str:
    """A looser wording that says the same and leaves out what is None."""

    def pick(*options: str) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    noun = " ".join(word for word in (size, colour, shape or pick("shape", "object")) if word)
    words = pick(_article(noun) + " ", _article(noun) + " ", "the ", "one ", "") + noun
    if motion is not None:
        if motion.startswith("moving"):
            way = motion.split()[1]
            motion = pick(motion, motion, f"moves {way}", f"is {motion}", f"going {way}", f"moving to the {way}")
        elif motion == "circling":
            motion = pick(
                motion, motion, "circles", "moving in a circle", "going around in a circle", "circling around"
            )
        elif motion == "bouncing":
            motion = pick(motion, motion, "bounces", "is bouncing", "bouncing up and down", "bounces up and down")
        else:
            motion = pick(motion, motion, f"{motion.removesuffix('ing')}s", f"is {motion}", f"{motion} in size")
        words += " " + motion
    if place is not None:
        words += " " + place
    if background is not None:
        name = pick("gray", "grey") if background == "gray" else background
        words += pick(
            f" on a {name} background", f" on a {name} background", f" on {name}", f", {name} background",
            f" over a {name} background", f" in front of a {name} background",
        )  # fmt: skip
    return words


def random_clips(n: int, generator: torch.Generator, held_out: bool | None = None) -> Clips:
    """Draw n clips.

    Args:
        held_out: True draws pairs of `HELD_OUT` alone, False draws all others alone, None draws all.
    """

    def choice(count: int) -> Tensor:
        return torch.randint(count, (n,), generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    names = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [i for i, pair in enumerate(names) if held_out is None or (pair in HELD_OUT) == held_out]
    pair = torch.tensor(pairs)[choice(len(pairs))]
    return Clips(
        colour=pair // len(SHAPES),
        shape=pair % len(SHAPES),
        motion=choice(len(MOTIONS)),
        background=choice(len(BACKGROUNDS)),
        size=uniform(0, 1),
        speed=uniform(0, 1),
        along=uniform(-1, 1),
        across=uniform(-1, 1),
        phase=uniform(0, 1),
    )


def render(clips: Clips, frames: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Draw clips.

    Args:
        frames: indices of the frames to draw; all where None.

    Returns:
        pixels (n, F, 3, SIZE, SIZE) float32 in [-1, 1] and mask (n, F, 1, SIZE, SIZE) in [0, 1], the share of each
        pixel that the shape covers, on the device of the clips.
    """
    device = clips.colour.device
    x, y, radius = (values[:, :, None, None] for values in path(clips, frames))
    grid = torch.arange(SIZE, device=device) + 0.5
    distance = signed_distance(clips.shape[:, None, None, None], grid - x, y - grid[:, None], radius)
    mask = (0.5 - distance).clamp(0, 1)[:, :, None]
    fore, back = (
        torch.tensor(list(table.values()), device=device)[index].view(-1, 1, 3, 1, 1) / 127.5 - 1
        for table, index in ((COLOURS, clips.colour), (BACKGROUNDS, clips.background))
    )
    return back + (fore - back) * mask, mask


def path(clips: Clips, frames: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Centre x and y (downwards) and half width of each shape in each frame, (n, F) pixels each."""
    index = torch.arange(FRAMES) if frames is None else torch.tensor(frames)
    u = (index.to(clips.size) / (FRAMES - 1))[None]  # 0 at the first frame, 1 at the last
    turn = index.to(clips.size)[None] / FRAMES + clips.phase[:, None]  # a period is FRAMES frames: the clip can loop
    size, speed, along, across = (v[:, None] for v in (clips.size, clips.speed, clips.along, clips.across))
    motion = clips.motion[:, None]

    travel = (32 + 8 * speed) * (u - 0.5) + along
    orbit, angle = 13 + 4 * speed, 2 * math.pi * turn
    height = 26 + 6 * speed
    hop = turn % 1
    x = torch.full_like(travel, SIZE / 2)
    y = torch.full_like(travel, SIZE / 2)
    zero = torch.zeros_like(travel)
    dx = torch.stack(
        [-travel, travel, 10 * across + zero, 10 * across + zero, 5 * across + zero, 5 * across + zero,
         orbit * angle.sin() + 4 * across, 12 * across + zero]
    )  # fmt: skip
    dy = torch.stack(
        [10 * across + zero, 10 * across + zero, -travel, travel, 5 * along + zero, 5 * along + zero,
         -orbit * angle.cos() + 4 * along, height / 2 - height * 4 * hop * (1 - hop) + 2 * along]
    )  # fmt: skip
    x = x + dx.gather(0, motion.expand_as(travel)[None])[0]
    y = y + dy.gather(0, motion.expand_as(travel)[None])[0]

    moving = 16 + 4.5 * size
    turning = 14 + 4 * size
    small = 8 + 1.5 * size
    ramp = torch.where(motion == MOTIONS.index("growing"), u, 1 - u)
    growing = small * (1 + (1.5 + 0.3 * speed) * ramp)
    radius = torch.where(motion < 4, moving, torch.where(motion < 6, growing, turning)).expand_as(travel)
    return x, y, radius


def signed_distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance in pixels to the outline of a shape of half width `radius` centred on 0, negative inside.

    A star of n points is a half plane folded n times: turn every point into the sector of the nearest tip, mirror it
    on the tip's axis, and measure against the line from the tip to the notch beside it. All arguments broadcast.

    Args:
        shape: int64, index into `SHAPES`.
        x, y: pixels; up is positive.
    """
    rows = [spec or (1, 1.0, 0.0, 1.0) for spec in SHAPES.values()]
    points, inner, degrees, outer = (
        torch.tensor([float(row[k]) for row in rows], device=x.device)[shape] for k in range(4)
    )
    distance = torch.hypot(x, y)
    sector = 2 * math.pi / points
    angle = torch.atan2(x, y) - torch.deg2rad(degrees)  # from straight up
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    px, py = distance * folded.cos(), distance * folded.sin()
    tip = radius * outer
    notch_x, notch_y = tip * inner * (sector / 2).cos(), tip * inner * (sector / 2).sin()
    nx, ny = notch_y, tip - notch_x
    outline = ((px - tip) * nx + py * ny) / torch.hypot(nx, ny)
    circle = torch.tensor([spec is None for spec in SHAPES.values()], device=x.device)[shape]
    return torch.where(circle, distance - radius, outline)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"

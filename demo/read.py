"""Two readers of the demo world's videos. They share no code, and neither knows the prompt.

`by_outline` overlaps the object with the world's outlines and compares the directions of colours. `by_ratios` looks at
the object's area, convex hull and box, and at hues. Both take a video (F, H, W, 3) uint8 and return a `Reading`.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from demo import world


@dataclass(frozen=True)
class Reading:
    """What a video shows; None where nothing can be read.

    Attributes:
        travel: of the centre from the first to the last frame, as a share of the frame's side.
        growth: width in the last frames over width in the first.
    """

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None
    travel: float = 0.0
    growth: float = 1.0


# ---- by outline


def by_outline(video: np.ndarray) -> Reading:
    pixels = video.astype(float)
    side = pixels.shape[1]
    edges = (pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:])
    border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
    ground = np.median(border, axis=0)
    background = min(world.BACKGROUNDS, key=lambda name: np.abs(ground - world.BACKGROUNDS[name]).sum())
    masks = np.abs(pixels - ground).max(axis=-1) > 60
    tracked = [(i, *_extent(mask)) for i, mask in enumerate(masks) if mask.sum() >= 20]
    if len(tracked) < len(video) // 2:
        return Reading(None, None, None, background)

    fore = np.concatenate([frame[ndimage.binary_erosion(mask)] for frame, mask in zip(pixels, masks)])
    if not len(fore):
        return Reading(None, None, None, background)
    colour = min(world.COLOURS, key=lambda name: _colour_distance(np.median(fore, axis=0), world.COLOURS[name]))
    votes = [_outline(masks[i]) for i, *_ in tracked[::3]]
    shape = max(world.SHAPES, key=votes.count)

    t = np.array([i for i, *_ in tracked]) / (len(video) - 1)
    x, y, width = (np.array(values) for values in list(zip(*tracked))[1:])
    dx, dy, dw = (np.polyfit(t, values, 1)[0] for values in (x, y, width))
    first, last = np.median(width[:3]), np.median(width[-3:])
    travel, growth = float(np.hypot(dx, dy) / side), float(last / first)
    wide, high = np.ptp(x) / side, np.ptp(y) / side
    straight = np.hypot(x[-1] - x[0], y[-1] - y[0]) / (np.hypot(np.diff(x), np.diff(y)).sum() + 1e-6)
    clockwise = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() > 0  # y points down
    if straight < 0.5 and min(wide, high) > 0.18 and clockwise:
        motion = "circling"
    elif straight < 0.6 and high > 0.18 and wide < 0.12:
        motion = "bouncing"
    elif travel > 0.2 and straight > 0.6 and travel * side > abs(dw) / 2:
        motion = (
            ("moving right" if dx > 0 else "moving left")
            if abs(dx) > abs(dy)
            else ("moving down" if dy > 0 else "moving up")
        )
    elif (growth > 1.5 or growth < 1 / 1.5) and max(wide, high) < 0.2:
        motion = "growing" if growth > 1 else "shrinking"
    else:
        motion = None
    return Reading(colour, shape, motion, background, travel, growth)


def _extent(mask: np.ndarray) -> tuple[float, float, float]:
    """Centre x, y and width of the pixels that are set; the width of the disc of equal area is robust to specks."""
    rows, columns = np.nonzero(mask)
    return float(np.median(columns)), float(np.median(rows)), float(2 * np.sqrt(mask.sum() / np.pi))


def _colour_distance(a: np.ndarray, b: tuple[int, int, int]) -> float:
    """Distance of two colours' directions: brightness hardly counts, hue does."""
    u, v = a / (np.linalg.norm(a) + 1e-6), np.array(b) / np.linalg.norm(b)
    return float(np.linalg.norm(u - v) + 0.1 * abs(np.linalg.norm(a) - np.linalg.norm(b)) / 255)


def _outline(mask: np.ndarray) -> str:
    """The outline that overlaps most, at the best of some places and sizes."""
    x, y, _ = _extent(mask)
    columns = np.nonzero(mask)[1]
    half = float(np.percentile(columns, 98) - np.percentile(columns, 2)) / 2 + 0.5
    shape, radius, up, right = torch.meshgrid(
        torch.arange(len(world.SHAPES), dtype=torch.float32),
        half * torch.tensor([0.85, 0.95, 1.05, 1.15]),
        half * torch.tensor([-0.15, 0.0, 0.15, 0.3]),
        torch.tensor([-1.0, 1.0]),
        indexing="ij",
    )
    shape, radius, up, right = (values.reshape(-1, 1, 1) for values in (shape, radius, up, right))
    grid = torch.arange(len(mask)) + 0.5
    drawn = world.signed_distance(shape.long(), grid - (x + 0.5 + right), (y + 0.5 + up) - grid[:, None], radius) < 0
    target = torch.from_numpy(mask)
    overlap = (drawn & target).sum((1, 2)) / (drawn | target).sum((1, 2))
    return list(world.SHAPES)[int(shape[overlap.argmax(), 0, 0])]


# ---- by ratios


def by_ratios(video: np.ndarray) -> Reading:
    corners = video[:, [1, 1, -2, -2], [1, -2, 1, -2]].reshape(-1, 3)
    ground = corners[np.argsort(corners.astype(int).sum(1))[len(corners) // 2]]
    background = _named(ground)
    objects = [_object(frame, ground) for frame in video]
    seen = [found for found in objects if found is not None]
    if 2 * len(seen) < len(video):
        return Reading(None, None, None, background)
    hue = _circular_mean([_hue(frame[part]) for frame, part in zip(video, objects) if part is not None])
    colour = min(world.COLOURS, key=lambda name: abs(_turn(hue - _hue(np.array([world.COLOURS[name]])))))
    shapes = [_by_hull(part) for part in seen]
    shape = max(world.SHAPES, key=shapes.count)
    boxes = np.array([_box(part) for part in seen])  # left, top, right, bottom
    motion, travel, growth = _motion(boxes / video.shape[1])
    return Reading(colour, shape, motion, background, travel, growth)


def _named(ground: np.ndarray) -> str:
    """The background by lightness and hue."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(ground / 255))
    if value < 0.2:
        return "black"
    if saturation < 0.12:
        return "gray"
    return "teal" if 0.35 < hue < 0.65 else "pink"


def _object(frame: np.ndarray, ground: np.ndarray) -> np.ndarray | None:
    """The largest connected part that differs from the ground."""
    differs = np.linalg.norm(frame.astype(float) - ground, axis=-1) > 70
    parts, count = ndimage.label(differs)
    if not count:
        return None
    sizes = np.bincount(parts.ravel())[1:]
    return parts == 1 + sizes.argmax() if sizes.max() >= 25 else None


def _hue(colours: np.ndarray) -> float:
    """Degrees, of the mean colour (n, 3)."""
    return 360 * colorsys.rgb_to_hsv(*(colours.mean(0) / 255))[0]


def _turn(degrees: float) -> float:
    return (degrees + 180) % 360 - 180


def _circular_mean(degrees: list[float]) -> float:
    return float(np.degrees(np.angle(np.exp(1j * np.radians(degrees)).mean())) % 360)


def _box(part: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(part.any(1))[0], np.nonzero(part.any(0))[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _by_hull(part: np.ndarray) -> str | None:
    left, top, right, bottom = _box(part)
    rows, columns = np.nonzero(part)
    corners = np.concatenate([np.stack([rows + i, columns + j], 1) for i in (0, 1) for j in (0, 1)])
    try:
        hull = ConvexHull(corners).volume
    except QhullError:
        return None
    filled, boxed = part.sum() / hull, hull / ((right - left) * (bottom - top))
    if filled < 0.77:
        return "star"
    return "square" if boxed > 0.93 else "circle" if boxed > 0.71 else "triangle"


def _motion(boxes: np.ndarray) -> tuple[str | None, float, float]:
    """Motion, travel and growth from boxes (n, 4) in shares of the side."""
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    width = boxes[:, 2] - boxes[:, 0]
    start, end = middle[:2].mean(0), middle[-2:].mean(0)
    growth = float(np.median(width[-3:]) / np.median(width[:3]))
    (right, down), spread = end - start, middle.max(0) - middle.min(0)
    travel = float(np.hypot(right, down))
    if max(growth, 1 / growth) > 1.6 and travel < 0.2:
        return ("growing" if growth > 1 else "shrinking"), travel, growth
    if spread.min() > 0.19 and travel < 0.25:
        about = middle - (middle.max(0) + middle.min(0)) / 2
        angles = np.unwrap(np.arctan2(about[:, 1], about[:, 0]))  # clockwise, as y points down
        return ("circling" if angles[-1] - angles[0] > np.pi else None), travel, growth
    if spread[1] > 0.19 and travel < 0.2 and spread[0] < 0.12:
        return "bouncing", travel, growth
    if travel < 0.2:
        return None, travel, growth
    if abs(right) > abs(down):
        return ("moving right" if right > 0 else "moving left"), travel, growth
    return ("moving down" if down > 0 else "moving up"), travel, growth


# ---- how crisp and steady


@dataclass(frozen=True)
class Crispness:
    """Figures of one video.

    Attributes:
        background: share of the pixels away from the object that are within 6 of 255 of their colour.
        hue_steps: (F - 1,) degrees that the object's hue moves from frame to frame.
        hue_range: degrees between the object's extreme hues.
        area_errors: (F,) relative distance of the object's area from its trend.
        without_specks: share of the frames in which nothing stands beside the object.
    """

    background: float
    hue_steps: np.ndarray
    hue_range: float
    area_errors: np.ndarray
    without_specks: float


def crispness(video: np.ndarray, background: str, colour: str) -> Crispness:
    """Measure a video of which the background and the colour are known."""
    ground, fore = np.array(world.BACKGROUNDS[background], float), np.array(world.COLOURS[colour], float)
    pixels = video.astype(float)
    differs = np.abs(pixels - ground).max(-1) > 40
    way = fore - ground
    coverage = np.clip((pixels - ground) @ way / (way @ way), 0, 1)
    exact, hues, areas, clean = [], [], [], 0
    for frame, mask, covered in zip(pixels, differs, coverage):
        parts, count = ndimage.label(mask, np.ones((3, 3)))
        clean += count <= 1
        near = ndimage.binary_dilation(mask, iterations=3)
        exact.append((np.abs(frame - ground).max(-1) <= 6)[~near].mean() if not near.all() else 0.0)
        sizes = np.bincount(parts.ravel())[1:] if count else np.zeros(1)
        inner = ndimage.binary_erosion(parts == 1 + sizes.argmax(), iterations=2)
        if inner.any():
            hues.append(_hue(frame[inner]))
        areas.append(covered[near].sum())
    area = np.array(areas)
    t = np.arange(len(area))
    trend = np.polyval(np.polyfit(t, np.sqrt(area), 1), t) ** 2
    if len(hues) < 2:
        return Crispness(float(np.mean(exact)), np.full(1, 180.0), 180.0, np.abs(area / trend - 1), clean / len(video))
    turns = np.array([_turn(hue - _circular_mean(hues)) for hue in hues])
    return Crispness(
        background=float(np.mean(exact)),
        hue_steps=np.abs(np.diff(turns)),
        hue_range=float(np.ptp(turns)),
        area_errors=np.abs(area / np.maximum(trend, 1) - 1),
        without_specks=clean / len(video),
    )

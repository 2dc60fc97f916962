"""Score the demo model: make videos for prompts of its world with fresh seeds, and read what they show off the pixels.

    python scripts/score_demo.py --prompts 100

Nothing of the reading knows the prompt: the background is the colour of the frame's border, the object what differs
from it, its colour the nearest in hue, its shape the best overlap with the world's outlines, its motion the trend of
its centre and width. Prints a line per prompt, a table, and one line of JSON.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import demo_world as world
from t2v.engine import Engine
from t2v.request import Request

ROOT = Path(__file__).resolve().parent.parent


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


def read(video: np.ndarray) -> Reading:
    """Read a video (F, H, W, 3) uint8."""
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

    fore = np.concatenate([frame[_inner(mask)] for frame, mask in zip(pixels, masks)])
    if not len(fore):
        return Reading(None, None, None, background)
    colour = min(world.COLOURS, key=lambda name: _colour_distance(np.median(fore, axis=0), world.COLOURS[name]))
    votes = [_shape(masks[i]) for i, *_ in tracked]
    shape = max(world.SHAPES, key=votes.count)

    t = np.array([i for i, *_ in tracked]) / (len(video) - 1)
    x, y, width = (np.array(values) for values in list(zip(*tracked))[1:])
    dx, dy, dw = (np.polyfit(t, values, 1)[0] for values in (x, y, width))
    first, last = np.median(width[:3]), np.median(width[-3:])
    travel, growth = float(np.hypot(dx, dy) / side), float(last / first)
    if travel > 0.2 and travel * side > abs(dw) / 2:
        motion = (
            ("moving right" if dx > 0 else "moving left")
            if abs(dx) > abs(dy)
            else ("moving down" if dy > 0 else "moving up")
        )
    elif growth > 1.5 or growth < 1 / 1.5:
        motion = "growing" if growth > 1 else "shrinking"
    else:
        motion = None
    return Reading(colour, shape, motion, background, travel, growth)


def _extent(mask: np.ndarray) -> tuple[float, float, float]:
    """Centre x, y and width of the pixels that are set; the width of the disc of equal area is robust to specks."""
    rows, columns = np.nonzero(mask)
    return float(np.median(columns)), float(np.median(rows)), float(2 * np.sqrt(mask.sum() / np.pi))


def _inner(mask: np.ndarray) -> np.ndarray:
    """The mask without its outline, where colours mix."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return inner


def _colour_distance(a: np.ndarray, b: tuple[int, int, int]) -> float:
    """Distance of two colours' directions: brightness hardly counts, hue does."""
    u, v = a / (np.linalg.norm(a) + 1e-6), np.array(b) / np.linalg.norm(b)
    return float(np.linalg.norm(u - v) + 0.1 * abs(np.linalg.norm(a) - np.linalg.norm(b)) / 255)


def _shape(mask: np.ndarray) -> str:
    """The outline, at the best place and size, that overlaps most."""
    x, y, _ = _extent(mask)
    rows, columns = np.nonzero(mask)
    half = (np.percentile(columns, 98) - np.percentile(columns, 2)) / 2 + 0.5
    size = torch.arange(len(mask)) + 0.5
    target = torch.from_numpy(mask)

    def overlap(name: str) -> float:
        best = 0.0
        for radius in (0.85 * half, 0.95 * half, 1.05 * half, 1.15 * half):
            for shift_y in (-2, 0, 2, 4):
                for shift_x in (-1, 1):
                    px = (size[None] - (x + 0.5 + shift_x)).expand(len(mask), -1)
                    py = ((y + 0.5 + shift_y) - size[:, None]).expand(-1, len(mask))
                    drawn = world.signed_distance(name, px, py, torch.tensor(float(radius))) < 0
                    best = max(best, float((drawn & target).sum() / (drawn | target).sum()))
        return best

    return max(world.SHAPES, key=overlap)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--weights", default=str(ROOT / "weights" / "demo"))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1000, help="draws the prompts, and the videos' seeds from it on")
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, help="the model's own if omitted")
    parser.add_argument("--filmstrip", type=Path, help="a PNG of every fourth frame, a row per prompt, as it goes")
    args = parser.parse_args()

    engine = Engine.load(args.weights)
    generator = torch.Generator().manual_seed(args.seed)
    right = dict.fromkeys(("colour", "shape", "motion", "background"), 0)
    strips: list[np.ndarray] = []
    travels: list[float] = []
    growths: list[float] = []
    started = time.perf_counter()
    for i in range(args.prompts):
        told = dict(zip(right, (clip := world.random_clip(generator)).words()))
        request = Request(
            clip.sentence(),
            seed=args.seed + i,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
        )
        video = np.concatenate(list(engine.generate(request)))
        found = read(video)
        wrong = [f"{name} {getattr(found, name)}" for name in right if getattr(found, name) != told[name]]
        for name in right:
            right[name] += getattr(found, name) == told[name]
        if found.motion == told["motion"]:
            if "moving" in told["motion"]:
                travels.append(found.travel)
            else:
                growths.append(max(found.growth, 1 / found.growth))
        print(f"{i + 1:4}/{args.prompts} {request.prompt}: {', '.join(wrong) or 'right'}", flush=True)
        if args.filmstrip:
            strips.append(np.concatenate(list(video[::4]) + [video[-1]], axis=1))
            save_png(np.concatenate(strips), args.filmstrip)

    seconds = (time.perf_counter() - started) / args.prompts
    shares = {name: count / args.prompts for name, count in right.items()}
    for name, share in shares.items():
        print(f"{name:12} {share:6.1%}")
    summary = shares | {
        "prompts": args.prompts,
        "seed": args.seed,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale or engine.model.info.guidance_scale,
        "median_travel": round(float(np.median(travels)), 3) if travels else None,
        "median_growth": round(float(np.median(growths)), 3) if growths else None,
        "seconds_per_video": round(seconds, 2),
    }
    print(json.dumps(summary))


def save_png(image: np.ndarray, path: Path) -> None:
    """Write (H, W, 3) uint8."""
    from PIL import Image

    Image.fromarray(image).save(path)


if __name__ == "__main__":
    main()

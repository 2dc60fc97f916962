"""Score the demo model: make videos for prompts of its world with fresh seeds, and read what they show off the pixels.

    python -m demo.score --prompts 200
    python -m demo.score --prompts 100 --held-out        # pairs of colour and shape that no training clip shows
    python -m demo.score --source autoencoder            # the renderer's clips through the autoencoder alone
    python -m demo.score --source renderer               # the readers on the renderer's own clips

Two readers that share no code read every video; see `demo.read`. Prints a line per prompt, a table, and one line of
JSON.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from demo import read, world
from t2v.engine import Engine
from t2v.request import Request

ROOT = Path(__file__).resolve().parent.parent
READERS = {"by outline": read.by_outline, "by ratios": read.by_ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--weights", default=str(ROOT / "weights" / "demo"))
    parser.add_argument("--source", choices=("model", "autoencoder", "renderer"), default="model")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--held-out", action="store_true", help="pairs of colour and shape left out of training")
    parser.add_argument("--seed", type=int, default=1000, help="draws the prompts, and the videos' seeds from it on")
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, help="the model's own if omitted")
    parser.add_argument("--preset", default="quality")
    parser.add_argument("--filmstrip", type=Path, help="a PNG of every third frame, a row per prompt, as it goes")
    args = parser.parse_args()

    engine = None if args.source == "renderer" else Engine.load(args.weights)
    clips = world.random_clips(args.prompts, torch.Generator().manual_seed(args.seed), args.held_out or None)
    right = {reader: dict.fromkeys((*world.ATTRIBUTES, "all four"), 0) for reader in READERS}
    figures: list[read.Crispness] = []
    strips: list[np.ndarray] = []
    started = time.perf_counter()
    for i in range(args.prompts):
        told = dict(zip(world.ATTRIBUTES, clips.words(i)))
        prompt = world.sentence(*clips.words(i))
        if args.source == "model":
            assert engine
            request = Request(
                prompt,
                seed=args.seed + i,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                preset=args.preset,
            )
            video = np.concatenate(list(engine.generate(request)))
        else:
            video = drawn(clips, i)
            if engine:
                video = np.concatenate(list(engine.vae.decode(engine.vae.encode(video))))
        wrong = []
        for reader, reading in READERS.items():
            found = reading(video)
            amiss = [name for name in told if getattr(found, name) != told[name]]
            for name in told:
                right[reader][name] += name not in amiss
            right[reader]["all four"] += not amiss
            wrong += [f"{name} {getattr(found, name)} ({reader})" for name in amiss]
        figures.append(read.crispness(video, told["background"], told["colour"]))
        print(f"{i + 1:4}/{args.prompts} {prompt}: {', '.join(wrong) or 'right'}", flush=True)
        if args.filmstrip:
            strips.append(np.concatenate(list(video[::3]), axis=1))
            Image.fromarray(np.concatenate(strips)).save(args.filmstrip)

    summary = {
        "source": args.source,
        "prompts": args.prompts,
        "held_out": args.held_out,
        "seed": args.seed,
        "num_inference_steps": args.num_inference_steps,
        "seconds_per_video": round((time.perf_counter() - started) / args.prompts, 2),
        "right": {r: {name: count / args.prompts for name, count in counts.items()} for r, counts in right.items()},
        "crispness": summarise(figures),
    }
    print(f"{'':12}" + "".join(f"{reader:>12}" for reader in READERS))
    for name in (*world.ATTRIBUTES, "all four"):
        print(f"{name:12}" + "".join(f"{right[reader][name] / args.prompts:12.1%}" for reader in READERS))
    for name, value in summary["crispness"].items():
        print(f"{name.replace('_', ' '):44} {value:.4g}")
    print(json.dumps(summary))


def drawn(clips: world.Clips, i: int) -> np.ndarray:
    """The renderer's clip i, (F, H, W, 3) uint8."""
    pixels, _ = world.render(clips[i : i + 1])
    return ((pixels[0].permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def summarise(figures: list[read.Crispness]) -> dict[str, float]:
    """Of all videos: means of shares; medians, and nine-in-ten bounds, of what moves."""
    hue = np.concatenate([one.hue_steps for one in figures])
    area = np.concatenate([one.area_errors for one in figures])
    return {
        "background_share_within_6": float(np.mean([one.background for one in figures])),
        "hue_step_median_degrees": float(np.median(hue)),
        "hue_step_90_percent_degrees": float(np.percentile(hue, 90)),
        "hue_range_median_degrees": float(np.median([one.hue_range for one in figures])),
        "area_error_median": float(np.median(area)),
        "area_error_90_percent": float(np.percentile(area, 90)),
        "frames_without_specks": float(np.mean([one.without_specks for one in figures])),
    }


if __name__ == "__main__":
    main()

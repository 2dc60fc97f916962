"""Interleaved rounds of several arms, the errors of their results, and whether these are small enough."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.arms import WINDOWS, Arm, Run
from t2v.job import MAX_FRAMES_AT_ONCE
from t2v.request import Request

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense half precision
MAX_ERROR, MIN_PSNR = 1e-3, 50  # against stock, in float32
MAX_RATIO = 1.1  # in half precision: our error against float32, divided by stock's
STAGES = ("text", "denoise", "decode", "encode", "total")


def compare(
    arms: Mapping[str, Arm], request: Request, rounds: int, warmups: int, exact: np.ndarray | None = None
) -> dict[str, Any]:
    """Run the arms in turn, in the opposite order every second round.

    Args:
        rounds: that are timed.
        warmups: rounds before, that are not.
        exact: latents of the request in float32, where the arms run in half precision.

    Returns:
        For every arm: the median seconds of each stage, and where `stock` is among the arms how many times as fast as
        stock it is, its errors, and whether it passes the gate.
    """
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    for i in range(warmups + rounds):
        for name in list(arms)[:: 1 if i % 2 == 0 else -1]:
            run = arms[name](request)
            if i >= warmups:
                runs[name].append(run)
    result: dict[str, Any] = {name: times(made, request) for name, made in runs.items()}
    if "stock" not in runs:
        return result
    if exact is not None:
        for name, made in runs.items():
            result[name]["error_to_float32"] = error(made[0].latents, exact)
    base = runs["stock"]
    for name, made in runs.items():
        if name == WINDOWS:  # it makes another video
            continue
        ratios = [theirs.seconds["total"] / ours.seconds["total"] for theirs, ours in zip(base, made)]
        result[name] |= {
            "times_as_fast": statistics.median(ratios),
            "latents_error": error(made[0].latents, base[0].latents),
            "frames_psnr": psnr(made[0].frames, base[0].frames),
        }
        if not name.startswith("ours") or request.num_frames <= MAX_FRAMES_AT_ONCE:
            result[name]["gate"] = passes(result[name], result["stock"])
    return result


def times(runs: Sequence[Run], request: Request) -> dict[str, float]:
    """Median seconds of each stage, the fastest total, the spread of the totals, and what follows from them."""
    totals = [run.seconds["total"] for run in runs]
    steps = request.num_inference_steps
    result = {stage: statistics.median(run.seconds[stage] for run in runs) for stage in STAGES}
    return result | {
        "min": min(totals),
        "spread": max(totals) - min(totals),
        "host_ms": statistics.median(run.seconds["host"] for run in runs) / steps * 1e3,
        "steps_per_second": steps / result["denoise"],
    }


def error(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|."""
    return float(np.linalg.norm(a.astype(float) - b) / np.linalg.norm(b.astype(float)))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of uint8 frames, in dB."""
    mse = np.square(a.astype(float) - b).mean()
    return float(10 * np.log10(255**2 / mse)) if mse else float("inf")


def passes(made: Mapping[str, float], stock: Mapping[str, float]) -> bool:
    """Whether an arm makes the video that stock makes; in half precision, whether it is as near to float32."""
    if "error_to_float32" in made:
        return made["error_to_float32"] <= MAX_RATIO * stock["error_to_float32"]
    return made["latents_error"] <= MAX_ERROR and made["frames_psnr"] >= MIN_PSNR


def stock_flops(folder: Path, request: Request) -> float:
    """Floating-point operations of one guided step of the stock network."""
    from diffusers import UNet3DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    config = UNet3DConditionModel.load_config(folder / "unet")
    levels = json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]
    factor = 2 ** (len(levels) - 1)  # pixels per latent
    with torch.device("meta"):
        unet = UNet3DConditionModel.from_config(config)
        side = [length // factor if length else config["sample_size"] for length in (request.height, request.width)]
        x = torch.empty(2, config["in_channels"], request.num_frames, *side)
        context = torch.empty(2, 77, config["cross_attention_dim"])
        with FlopCounterMode(display=False) as counter:
            unet(x, 1, context)
    return float(counter.get_total_flops())


def fit(x: Sequence[int], y: Sequence[float]) -> dict[str, float]:
    """The straight line nearest to the points, and the share of their variance that it explains; empty for fewer than
    three points."""
    if len(x) < 3:
        return {}
    slope, base = np.polyfit(x, y, 1)
    rest = np.square(np.array(y) - (base + slope * np.array(x))).sum() / np.square(np.array(y) - np.mean(y)).sum()
    return {"base": float(base), "slope": float(slope), "r2": float(1 - rest)}

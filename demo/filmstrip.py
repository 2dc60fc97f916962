"""Frames of videos as rows of one picture.

python -m demo.filmstrip outputs/a.mp4 outputs/b.mp4 --out strip.jpg
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from t2v.errors import VideoError
from t2v.media.encode import read_video


def row(video: np.ndarray, frames: int, height: int) -> np.ndarray:
    """(height, W, 3) uint8: so many frames of (F, h, w, 3), spread evenly from the first to the last, side by side."""
    width = round(height * video.shape[2] / video.shape[1])
    chosen = video[np.linspace(0, len(video) - 1, frames).round().astype(int)]
    return np.concatenate([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in chosen], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--frames", type=int, default=12, help="of each video (default 12)")
    parser.add_argument("--height", type=int, default=64, help="of a row in pixels (default 64)")
    parser.add_argument("--out", type=Path, required=True, help="a PNG or JPEG")
    args = parser.parse_args()
    try:
        rows = [row(read_video(path)[1], args.frames, args.height) for path in args.videos]
    except VideoError as error:
        sys.exit(str(error))
    widest = max(one.shape[1] for one in rows)
    padded = [np.pad(one, ((0, 4), (0, widest - one.shape[1]), (0, 0)), constant_values=255) for one in rows]
    Image.fromarray(np.concatenate(padded)[:-4]).save(args.out, quality=85)


if __name__ == "__main__":
    main()

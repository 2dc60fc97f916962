"""Decodes a caller's picture or video to frames of the requested size and rate. The file is not trusted.

The first bytes of the file decide its format. ffmpeg must use that format and cannot guess another, so a playlist
cannot make it open other files or addresses. Bytes, pixels and time are limited.
"""

import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from t2v.errors import InvalidRequest

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 2**24  # of one frame, 4096x4096
MAX_SECONDS = 60  # processor time for decoding

# (offset in the file, signature, ffmpeg's name of the format)
SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "png_pipe"),
    (0, b"\xff\xd8\xff", "jpeg_pipe"),
    (0, b"GIF8", "gif"),
    (8, b"WEBP", "webp_pipe"),
    (8, b"AVI ", "avi"),
    (4, b"ftyp", "mov"),
    (0, b"\x1aE\xdf\xa3", "matroska"),
)


def read_frames(path: Path, num_frames: int, size: tuple[int, int], fps: int) -> Iterator[np.ndarray]:
    """Decode the first frames of a picture or video.

    Frames are scaled to cover the size and cropped to their middle. A video is sampled at `fps` from its beginning, and
    its last frame is repeated once it has ended; a picture is repeated from the start.

    Args:
        size: (height, width) in pixels.

    Yields:
        `num_frames` arrays (height, width, 3) uint8 RGB.

    Raises:
        InvalidRequest: the file has an unknown format, is too large, or is broken.
    """
    with path.open("rb") as file:
        head = file.read(16)
    kind = next((name for offset, sign, name in SIGNATURES if head[offset : offset + len(sign)] == sign), None)
    if kind is None:
        raise InvalidRequest(
            "init_video has an unknown format; send an MP4, MOV, WebM, MKV, AVI, GIF, PNG, JPEG or WebP file."
        )
    if path.stat().st_size > MAX_BYTES:
        raise InvalidRequest(f"init_video is larger than {MAX_BYTES // 2**20} MiB; send a shorter or smaller one.")
    height, width = size
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-protocol_whitelist", "file"]
    command += ["-timelimit", str(MAX_SECONDS), "-max_pixels", str(MAX_PIXELS)]
    command += ["-t", str(math.ceil(num_frames / fps) + 1), "-f", kind, "-i", f"file:{path}"]
    # Crop before scaling, because a long thin picture would be huge once scaled; and to no less than one pixel.
    crop = f"crop=max(1\\,min(iw\\,ih*{width}/{height})):max(1\\,min(ih\\,iw*{height}/{width})):exact=1"
    scale = f"{crop},scale={width}:{height}:flags=lanczos"
    command += ["-map", "0:v:0", "-vf", f"fps={fps},{scale}" if "pipe" not in kind else scale]
    command += ["-frames:v", str(num_frames), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    decoder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert decoder.stdout
    last = None
    missing = num_frames
    try:
        while missing and len(data := decoder.stdout.read(height * width * 3)) == height * width * 3:
            last = np.frombuffer(data, np.uint8).reshape(height, width, 3)
            missing -= 1
            yield last
        if last is None or (missing and decoder.wait()):
            raise InvalidRequest(
                f"init_video cannot be decoded. It is broken, or one of its frames has more than {MAX_PIXELS} pixels."
            )
        for _ in range(missing):
            yield last
    finally:
        decoder.kill()
        decoder.wait()
        decoder.stdout.close()

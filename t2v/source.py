"""A caller's picture or video -> frames of the size and rate asked for. Whoever sent it is not trusted.

What a file is, its first bytes say, and ffmpeg is told: it does not guess, so that no playlist makes it open other
files or addresses. Size, pixels and time are bounded. This module knows no tensors.
"""

import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from t2v.errors import InvalidRequest

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 2**24  # of one picture, 4096x4096
MAX_SECONDS = 60  # of the processor's time for decoding

# Where in the file, what stands there, and ffmpeg's name of the format.
FORMATS = (
    (0, b"\x89PNG\r\n\x1a\n", "png_pipe"),
    (0, b"\xff\xd8\xff", "jpeg_pipe"),
    (0, b"GIF8", "gif"),
    (8, b"WEBP", "webp_pipe"),
    (8, b"AVI ", "avi"),
    (4, b"ftyp", "mov"),
    (0, b"\x1aE\xdf\xa3", "matroska"),
)


def frames(path: Path, count: int, height: int, width: int, fps: int) -> Iterator[np.ndarray]:
    """The first frames of a picture or video.

    Scaled to cover the size, and cut to its middle; taken at `fps` of the file's own time. After the file's end its
    last frame stands still, a picture from the beginning.

    Yields:
        (height, width, 3) uint8 RGB, `count` of them.

    Raises:
        InvalidRequest: it is no picture or video of a known kind, too large, or broken.
    """
    with path.open("rb") as file:
        head = file.read(16)
    kind = next((name for at, sign, name in FORMATS if head[at : at + len(sign)] == sign), None)
    if kind is None:
        raise InvalidRequest("init_video is of no known kind; send MP4, MOV, WebM, MKV, AVI, GIF, PNG, JPEG or WebP.")
    if path.stat().st_size > MAX_BYTES:
        raise InvalidRequest(f"init_video is larger than {MAX_BYTES // 2**20} MiB; send a shorter or smaller one.")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-protocol_whitelist", "file"]
    command += ["-timelimit", str(MAX_SECONDS), "-max_pixels", str(MAX_PIXELS)]
    command += ["-t", str(math.ceil(count / fps) + 1), "-f", kind, "-i", f"file:{path}"]
    # Cut before it is scaled: of a long thin picture the whole would be huge. Not to less than a pixel.
    cut = f"crop=max(1\\,min(iw\\,ih*{width}/{height})):max(1\\,min(ih\\,iw*{height}/{width})):exact=1"
    scale = f"{cut},scale={width}:{height}:flags=lanczos"
    command += ["-map", "0:v:0", "-vf", f"fps={fps},{scale}" if "pipe" not in kind else scale]
    command += ["-frames:v", str(count), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    decoder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert decoder.stdout
    last = None
    try:
        for _ in range(count):
            data = decoder.stdout.read(height * width * 3)
            if len(data) < height * width * 3:
                break
            last = np.frombuffer(data, np.uint8).reshape(height, width, 3)
            count -= 1
            yield last
        if last is None or (count and decoder.wait()):
            raise InvalidRequest(
                f"init_video cannot be decoded; it is broken, or a frame of it has more than {MAX_PIXELS} pixels."
            )
        for _ in range(count):
            yield last
    finally:
        decoder.kill()
        decoder.wait()
        decoder.stdout.close()

"""Writes uint8 frames to a video file, and decodes the file again to verify it."""

import contextlib
import json
import re
import subprocess
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np

from t2v.errors import VideoError

CRF = 18  # constant rate factor: 18 is visually lossless, 0 lossless, 51 worst
MAX_TAG = 1000  # characters of a text in the metadata, because they pass through a command line
ENCODER_TIMEOUT = 120  # seconds that the encoder has after the last frame


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video file, as a decoder finds them."""

    frames: int
    width: int
    height: int
    fps: float


def write_video(
    path: Path, chunks: Iterable[np.ndarray], fps: int, metadata: dict[str, Any], crf: int = CRF
) -> VideoInfo:
    """Encode frames as they arrive, then decode the file to verify it.

    The size and frame rate are exact; a GIF, whose unit is 0.01 s, gets the nearest rate. MP4: H.264, yuv420p, BT.709,
    +faststart. WebM: VP9, yuv420p, BT.709. GIF: a palette of 256 colours for every frame (one palette for all would
    keep all frames in memory), an endless loop, no metadata.

    Args:
        path: of the file, ending in .mp4, .webm or .gif; an existing file is replaced.
        chunks: (n, H, W, 3) uint8 RGB arrays of one H x W, both even.
        fps: frames per second.
        metadata: JSON values. Texts are cleaned by `clean_tag`; `prompt` becomes the title, everything the comment.
        crf: constant rate factor of MP4 and WebM, 1 to 51.

    Raises:
        VideoError: there were no frames, or the file does not decode to the expected video (disk full, encoder killed).
            No file is left, also if `chunks` raises or the call is stopped.
    """
    writer = None
    count = 0
    size = (0, 0)
    try:
        for chunk in chunks:
            for frame in chunk:
                if writer is None:
                    size = (frame.shape[1], frame.shape[0])
                    writer = imageio_ffmpeg.write_frames(path, size, **_options(path.suffix, fps, metadata, crf))
                    writer.send(None)
                writer.send(np.ascontiguousarray(frame))
                count += 1
        if writer is None:
            raise VideoError("There are no frames to write.")
        writer.close()
        return _verify(path, VideoInfo(count, *size, fps))
    except BaseException as error:  # `Stopped` is no Exception, and must leave no file either
        if writer is not None:
            _kill(writer)
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a dead encoder; the message holds its complete command line
            reason = str(error).split("\n", 1)[0]
            raise VideoError(f"The video encoder stopped after {count} frames: {reason}") from error
        raise


def read_video(path: Path) -> tuple[VideoInfo, np.ndarray]:
    """Decode a file; returns its properties and its frames (F, H, W, 3) uint8 RGB.

    Raises:
        VideoError: the file cannot be decoded.
    """
    try:
        reader = imageio_ffmpeg.read_frames(str(path))
        meta = next(reader)
        width, height = meta["source_size"]
        frames = [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]
    except (OSError, RuntimeError, StopIteration, KeyError, IndexError) as error:
        raise VideoError(f"{path.name} cannot be decoded.") from error
    if not frames:
        raise VideoError(f"{path.name} holds no frames.")
    return VideoInfo(len(frames), width, height, meta["fps"]), np.stack(frames)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `write_video` put into the file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    # The format is lines of key=value; a backslash escapes = ; # \\ and the newline.
    comment = re.search(r"^comment=((?:\\.|[^\\\n])*)", text, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    return json.loads(re.sub(r"\\(.)", r"\1", comment[1], flags=re.DOTALL)) if comment else {}


def clean_tag(text: str) -> str:
    """The text without control, direction and unpaired surrogate characters, with single spaces, cut to 1,000
    characters."""
    kept = (c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn") else " " for c in text)
    return " ".join("".join(kept).split())[:MAX_TAG]


def _options(suffix: str, fps: int, metadata: dict[str, Any], crf: int) -> dict[str, Any]:
    tags = {key: clean_tag(value) if isinstance(value, str) else value for key, value in metadata.items()}
    comment = json.dumps(tags, ensure_ascii=False)
    codec, params = {
        ".mp4": ("libx264", ["-crf", str(crf), "-preset", "veryfast", "-movflags", "+faststart"]),
        ".webm": ("libvpx-vp9", ["-crf", str(crf), "-b:v", "0", "-deadline", "good", "-cpu-used", "4"]),
        ".gif": ("gif", ["-vf", "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1", "-loop", "0"]),
    }[suffix]
    if codec != "gif":
        # Unless the matrix is stated, ffmpeg converts by BT.601 and players of large videos assume BT.709.
        params += ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709"]
        params += ["-color_primaries", "bt709", "-color_trc", "bt709"]
    params += ["-metadata", f"title={tags.get('prompt', '')}", "-metadata", f"comment={comment}"]
    params += ["-fflags", "+bitexact"]
    return {
        "fps": fps,
        "codec": codec,
        "pix_fmt_out": "pal8" if codec == "gif" else "yuv420p",
        "quality": None,
        "macro_block_size": 1,  # the default, 16, would resize silently
        "ffmpeg_log_level": "error",
        "ffmpeg_timeout": ENCODER_TIMEOUT,
        "output_params": params,
    }


def _verify(path: Path, expected: VideoInfo) -> VideoInfo:
    """Decode the file without keeping frames: ffmpeg prints its size, its time base and one line per frame."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror", "-i", str(path), "-f", "framecrc", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ENCODER_TIMEOUT)
    size = re.search(r"^#dimensions 0: (\d+)x(\d+)$", done.stdout, re.MULTILINE)
    tick = re.search(r"^#tb 0: (\d+)/(\d+)$", done.stdout, re.MULTILINE)
    if done.returncode or not size or not tick:
        raise VideoError(f"{path.name} cannot be decoded. Is the disk full?")
    frames = len(re.findall(r"^0,", done.stdout, re.MULTILINE))
    fps = expected.fps if path.suffix == ".gif" else int(tick[2]) / int(tick[1])
    found = VideoInfo(frames, int(size[1]), int(size[2]), fps)
    if found != expected:
        raise VideoError(f"The written video has {found}, expected {expected}. Is the disk full?")
    return found


def _kill(writer: Any) -> None:
    """End the encoder at once; closing it would wait until the file is finished."""
    with contextlib.suppress(BaseException):  # raised again by the generator, which ends with it
        writer.throw(KeyboardInterrupt)

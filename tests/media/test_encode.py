"""Files are read back: what is claimed is what a decoder sees."""

import re
import subprocess
import threading
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import psutil
import pytest

from t2v.errors import VideoError
from t2v.media.encode import VideoInfo, clean_tag, read_metadata, read_video, write_video

COLOURS = [(225, 30, 30), (20, 165, 40), (30, 80, 235), (255, 255, 255), (128, 128, 128), (0, 0, 0)]


def bars(frames: int, width: int = 96, height: int = 64) -> np.ndarray:
    """Colour bars, and a white block that steps to the right: (F, H, W, 3)."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    for i, colour in enumerate(COLOURS):
        video[:, :, i * width // 6 : (i + 1) * width // 6] = colour
    for i in range(frames):
        video[i, :8, 8 * (i % (width // 8)) : 8 * (i % (width // 8)) + 8] = 255
    return video


def header(path: Path) -> str:
    return subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], capture_output=True, text=True).stderr


def no_encoder_is_left() -> bool:
    encoders = [c for c in psutil.Process().children(recursive=True) if "ffmpeg" in c.name()]
    _, alive = psutil.wait_procs(encoders, timeout=3)
    return not alive


@pytest.mark.parametrize(
    "frames, fps, size", [(1, 8, (96, 64)), (16, 8, (72, 40)), (33, 60, (96, 64)), (5, 1, (88, 24))]
)
def test_count_size_rate_and_format(tmp_path: Path, frames: int, fps: int, size: tuple[int, int]):
    path = tmp_path / "a.mp4"
    info = write_video(path, [bars(frames, *size)], fps, {})
    assert info == VideoInfo(frames, *size, fps)
    found, decoded = read_video(path)
    assert found == info and decoded.shape == (frames, size[1], size[0], 3)
    assert "h264" in header(path) and "yuv420p(tv, bt709" in header(path)


def test_colours_and_order_survive(tmp_path: Path):
    video = bars(12)
    write_video(tmp_path / "a.mp4", [video[:5], video[5:6], video[6:]], 8, {})
    _, decoded = read_video(tmp_path / "a.mp4")
    for i, colour in enumerate(COLOURS):
        inside = decoded[:, 20:60, i * 16 + 4 : i * 16 + 12].astype(int)
        assert np.abs(inside - colour).max() <= 6
    assert [int(frame[:8, :32].min(2).mean(0).reshape(4, 8).mean(1).argmax()) for frame in decoded[:4]] == [0, 1, 2, 3]


def test_the_index_stands_before_the_frames(tmp_path: Path):
    """+faststart: a browser can play before it has the whole file."""
    write_video(tmp_path / "a.mp4", [bars(4)], 8, {})
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_same_frames_same_bytes(tmp_path: Path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, [bars(4)], 8, {"seed": 1})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle",
        "quotes ' \" ; $(touch x) `id` | & > \\ = # % {}",
        "-metadata comment=x -y /tmp/x",
        "日本語 العربية 😀",
        "",
    ],
)
def test_metadata_round_trips(tmp_path: Path, prompt: str):
    metadata = {"prompt": prompt, "seed": 0, "model": "demo", "num_inference_steps": 50, "guidance_scale": 9.0}
    write_video(tmp_path / "a.mp4", [bars(2)], 8, metadata)
    assert read_metadata(tmp_path / "a.mp4") == metadata


def test_prompts_that_no_command_line_can_hold_are_cleaned(tmp_path: Path):
    prompt = "line\nbreak\x00nul\x1b[31m \u202ebidi \ud800 " + "long " * 100_000
    write_video(tmp_path / "a.mp4", [bars(2)], 8, {"prompt": prompt})
    kept = read_metadata(tmp_path / "a.mp4")["prompt"]
    assert kept == clean_tag(prompt)
    assert kept.startswith("line break nul [31m bidi long long") and len(kept) <= 1000


def test_no_frames_is_an_error(tmp_path: Path):
    with pytest.raises(VideoError, match="no frames"):
        write_video(tmp_path / "a.mp4", [], 8, {})
    assert not list(tmp_path.iterdir())


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path):
    """The encoder itself says nothing of a full disk, and nor does its library."""
    (tmp_path / "a.mp4").symlink_to("/dev/full")
    with pytest.raises(VideoError):
        write_video(tmp_path / "a.mp4", [bars(9)], 8, {})
    assert not list(tmp_path.iterdir()) and no_encoder_is_left()


def test_a_broken_file_is_not_taken_for_a_video(tmp_path: Path):
    path = tmp_path / "a.mp4"
    write_video(path, [bars(30)], 8, {})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(VideoError, match=re.escape("a.mp4")):
        read_video(path)


def test_killed_encoder_is_an_error_and_leaves_nothing(tmp_path: Path):
    def chunks():
        yield bars(2)
        for child in psutil.Process().children():
            if "ffmpeg" in child.name():
                child.kill()
                child.wait(5)
        for _ in range(200):
            yield bars(10)

    with pytest.raises(VideoError, match="encoder stopped"):
        write_video(tmp_path / "a.mp4", chunks(), 8, {})
    assert not list(tmp_path.iterdir())


class Cancelled(BaseException):
    """As Cog cancels: not an Exception."""


@pytest.mark.parametrize("error", [Cancelled, RuntimeError])
def test_an_interrupted_source_leaves_no_file_and_no_encoder(tmp_path: Path, error: type[BaseException]):
    def chunks():
        yield bars(2)
        raise error

    started = time.monotonic()
    with pytest.raises(error):
        write_video(tmp_path / "a.mp4", chunks(), 8, {})
    assert not list(tmp_path.iterdir()) and no_encoder_is_left()
    assert time.monotonic() - started < 30


def test_works_outside_the_main_thread(tmp_path: Path):
    thread = threading.Thread(target=lambda: write_video(tmp_path / "a.mp4", [bars(2)], 8, {}))
    thread.start()
    thread.join(60)
    assert read_video(tmp_path / "a.mp4")[0].frames == 2


@pytest.mark.parametrize("suffix", ["webm", "gif"])
@pytest.mark.parametrize("fps", [7, 24, 50])
def test_other_formats(tmp_path: Path, suffix: str, fps: int):
    video = bars(12)
    info = write_video(tmp_path / f"a.{suffix}", [video[:5], video[5:]], fps, {"prompt": "x", "seed": 1})
    assert info == VideoInfo(12, video.shape[2], video.shape[1], fps)
    found, decoded = read_video(tmp_path / f"a.{suffix}")
    assert (found.width, found.height) == (info.width, info.height)
    assert np.abs(decoded[0].astype(int) - video[0]).mean() < 12
    if suffix == "webm":
        assert np.abs(decoded.astype(int) - video).mean() < 12
        assert read_metadata(tmp_path / "a.webm")["seed"] == 1


def test_quality_is_the_rate_factor(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    for suffix in ("mp4", "webm"):
        sizes = []
        for crf in (1, 18, 51):
            write_video(tmp_path / f"a.{suffix}", [noise], 8, {}, crf)
            sizes.append((tmp_path / f"a.{suffix}").stat().st_size)
        assert sizes[0] > sizes[1] > 2 * sizes[2]

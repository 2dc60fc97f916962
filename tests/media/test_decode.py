"""Decoding of callers' pictures and videos: real files, also malicious ones."""

import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from conftest import ROOT
from t2v.errors import InvalidRequest
from t2v.media.decode import MAX_BYTES, read_frames
from t2v.media.encode import write_video


def clip(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame i is grey of 10 i, its left third red."""
    video = np.full((count, height, width, 3), 0, np.uint8)
    video += (10 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    video[:, :, : width // 3] = (220, 20, 20)
    return video


def greys(frames: list[np.ndarray]) -> list[int]:
    return [round(float(frame[:, -8:].mean()) / 10) for frame in frames]


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_a_video_is_sampled_at_the_requested_rate_and_its_last_frame_repeats(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    write_video(path, [clip(16)], 8, {})
    frames = list(read_frames(path, 6, (32, 48), 8))
    assert greys(frames) == [0, 1, 2, 3, 4, 5] and frames[0].shape == (32, 48, 3)
    assert greys(list(read_frames(path, 4, (32, 48), 4))) in ([0, 2, 4, 6], [1, 3, 5, 7])
    assert greys(list(read_frames(path, 20, (32, 48), 8)))[14:] == [14, 15, 15, 15, 15, 15]


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp"])
def test_a_picture_repeats(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    iio.imwrite(path, clip(3)[2])
    frames = list(read_frames(path, 5, (32, 48), 8))
    assert len(frames) == 5 and greys(frames) == [2] * 5
    assert np.abs(frames[0][:, :12].astype(int) - (220, 20, 20)).mean() < 12


def test_frames_are_scaled_to_cover_and_cropped_to_the_middle(tmp_path: Path):
    path = tmp_path / "a.png"
    iio.imwrite(path, clip(3)[2])
    (frame,) = read_frames(path, 1, (64, 32), 8)  # 96x64 before the cut: its red ends at 32, where the cut begins
    assert frame.shape == (64, 32, 3) and np.abs(frame[:, 3:].astype(int) - 20).mean() < 3


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "has an unknown format; send an MP4"),
        (b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\nfile:///etc/passwd\n", "has an unknown format"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "has an unknown format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "has an unknown format"),
        (b"\x89PNG\r\n\x1a\n" + b"nonsense" * 9, "cannot be decoded"),
        (b"\0\0\0\x20ftypisom" + bytes(900), "cannot be decoded"),
    ],
)
def test_a_file_that_is_no_video_is_refused(tmp_path: Path, content: bytes, sentence: str):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=sentence):
        list(read_frames(path, 2, (32, 32), 8))


def test_bytes_and_pixels_are_bounded(tmp_path: Path):
    large = tmp_path / "a.png"
    iio.imwrite(large, np.zeros((4100, 4100), np.uint8))
    with pytest.raises(InvalidRequest, match="one of its frames has more than 16777216 pixels"):
        list(read_frames(large, 1, (32, 32), 8))
    heavy = tmp_path / "b.png"
    with heavy.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InvalidRequest, match="larger than 64 MiB"):
        list(read_frames(heavy, 1, (32, 32), 8))


def test_a_long_thin_picture_is_cropped_before_it_is_scaled(tmp_path: Path):
    iio.imwrite(tmp_path / "a.png", np.zeros((16, 4000, 3), np.uint8))  # 256,000x1024 if it were scaled first
    program = (
        "import resource, sys; from pathlib import Path; from t2v.media.decode import read_frames\n"
        "(frame,) = read_frames(Path(sys.argv[1]), 1, (1024, 1024), 8)\n"
        "assert frame.shape == (1024, 1024, 3)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", program, tmp_path / "a.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000  # kB; 940,000 when scaled first, 43,000 when cropped first


def test_a_truncated_video_is_refused(tmp_path: Path):
    path = tmp_path / "a.mp4"
    write_video(path, [clip(16)], 8, {})
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(InvalidRequest, match="cannot be decoded"):
        list(read_frames(path, 16, (32, 48), 8))


def test_closing_the_iterator_ends_the_decoder(tmp_path: Path):
    path = tmp_path / "a.mp4"
    write_video(path, [clip(16)], 8, {})
    stream = read_frames(path, 16, (32, 48), 8)
    next(stream)
    stream.close()
    assert not subprocess.run(["pgrep", "-f", f"file:{path}"], capture_output=True).stdout

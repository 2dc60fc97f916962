"""Pictures of videos."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import filmstrip
from t2v.media.encode import write_video


def test_a_filmstrip_has_a_row_for_each_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    videos = []
    for i, shade in enumerate((50, 200)):
        ramp = np.linspace(0, shade, 7).astype(np.uint8)[:, None, None, None].repeat(16 * (1 + i), axis=2)
        write_video(tmp_path / f"{i}.mp4", [ramp.repeat(16, axis=1).repeat(3, axis=3)], 8, {})
        videos.append(str(tmp_path / f"{i}.mp4"))
    options = ["--frames", "3", "--height", "16", "--out", str(tmp_path / "strip.png")]
    monkeypatch.setattr(sys, "argv", ["filmstrip.py", *videos, *options])
    filmstrip.main()
    strip = np.asarray(Image.open(tmp_path / "strip.png")).astype(int)
    assert strip.shape == (36, 96, 3)
    for y, x, shade in ((8, 8, 0), (8, 24, 25), (8, 40, 50), (8, 56, 255), (18, 8, 255), (28, 80, 200)):
        assert abs(strip[y, x] - shade).max() < 8, (y, x)

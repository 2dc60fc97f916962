"""bench/bench.py: its arms make the same video, and it would notice if they did not."""

import runpy
import sys
from pathlib import Path

import pytest

from bench import bench
from bench.arms import Process, Setting
from bench.compare import STAGES, compare, passes
from t2v.request import Request

pytestmark = pytest.mark.slow  # half a minute in all

REQUEST = Request("a red circle", num_frames=3, num_inference_steps=2, seed=0)


def test_the_arms_make_the_same_video(tiny_folder: Path):
    setting = Setting(tiny_folder, "cpu")
    with Process("stock", setting) as stock, Process("ours", setting) as ours:
        result = compare({"stock": stock, "ours": ours}, REQUEST, rounds=2, warmups=0)
        assert all(0.1 < arm.peak_memory() < 4 for arm in (stock, ours))
    assert result["ours"]["latents_error"] < 1e-4 and result["ours"]["frames_psnr"] > 60
    assert result["stock"]["gate"] and result["ours"]["gate"]
    for arm in result.values():
        stages = sum(arm[stage] for stage in STAGES if stage != "total")
        assert stages == pytest.approx(arm["total"], rel=0.5) and arm["min"] <= arm["total"]


def test_another_video_does_not_pass(tiny_folder: Path):
    """Both arms are ours; one makes it with other noise."""
    ours = Setting(tiny_folder, "cpu").arm("ours")
    other = Request("a red circle", num_frames=3, num_inference_steps=2, seed=1)
    result = compare({"stock": ours, "ours": lambda request: ours(other)}, REQUEST, rounds=1, warmups=0)
    assert not result["ours"]["gate"]


def test_an_arm_that_fails_ends_the_run(tiny_folder: Path):
    setting = Setting(tiny_folder / "absent", "cpu")
    with Process("ours", setting) as ours, pytest.raises(SystemExit, match="An arm ended with 1"):
        ours(REQUEST)


@pytest.mark.parametrize("error, expected", [(1.0e-3, True), (1.09e-3, True), (1.2e-3, False), (float("nan"), False)])
def test_half_precision_may_be_as_far_from_float32_as_stock(error: float, expected: bool):
    made = {"error_to_float32": error, "latents_error": 0.1, "frames_psnr": 30.0}
    assert passes(made, {"error_to_float32": 1e-3}) is expected


def test_a_profile_names_what_takes_time(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    options = ["--device", "cpu", "--frames", "2", "--steps", "1", "--profile"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "--model", str(tiny_folder), *options])
    bench.main()
    arms = capsys.readouterr().out.split("\nours\n")
    assert len(arms) == 2 and all("conv " in arm and arm.count(" ms ") > 20 for arm in arms)


@pytest.mark.parametrize("name", ["bench", "gpu", "random_weights", "soak"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"bench.{name}", run_name="__main__")
    assert not end.value.code and "usage" in capsys.readouterr().out

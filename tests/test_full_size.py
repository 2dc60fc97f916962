"""The 1.7B network with random weights, in the real folder layout, through the very same code.

scripts/test -m full_size -s
"""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from t2v.media.encode import VideoInfo, read_video

PROGRAM = """
import resource, sys
from t2v.engine import Engine
from t2v.request import Request
from t2v.media.encode import write_video
from pathlib import Path
engine = Engine.load(sys.argv[1], device="cpu")
assert sum(p.numel() for p in engine.unet.parameters()) == 1_411_233_860 and engine.model.info.native_size == (256, 256)
request = Request(num_frames=4, num_inference_steps=2, width=64, height=64, seed=0)
job = engine.prepare(request)
write_video(Path(sys.argv[2]), engine.run(job), request.fps, dict(job.metadata))
"""


@pytest.mark.full_size
def test_the_full_size_network_makes_a_video_on_the_cpu(tmp_path: Path):
    model, video = tmp_path / "ms-1.7b-random", tmp_path / "a.mp4"
    subprocess.run([sys.executable, ROOT / "scripts" / "random_weights.py", model], check=True)
    subprocess.run([sys.executable, "-c", PROGRAM, model, video], check=True, cwd=ROOT)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\npeak memory of the children: {peak:.1f} GiB")
    assert read_video(video)[0] == VideoInfo(4, 64, 64, 8)
    assert peak < 8  # of which the mapped files are 3.4; the weights alone would be 6.4 in float32

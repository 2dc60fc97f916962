"""Setup time: fresh processes that import, load a model and make videos, ours and stock in turn."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from bench.arms import PROMPT, settled

ROOT = Path(__file__).resolve().parent.parent

# What a fresh process imports, does until the model is ready, and does for a video.
SETUP = {
    "stock": (
        "import torch; from diffusers import TextToVideoSDPipeline",
        "model = TextToVideoSDPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)",
        "model(prompt, num_frames=frames, num_inference_steps=steps).frames",
    ),
    "ours": (
        "import torch; from t2v.engine import Engine; from t2v.request import Request",
        "model = Engine.load(folder, device, dtype)",
        "list(model.generate(Request(prompt, num_frames=frames, num_inference_steps=steps, seed=0)))",
    ),
}
SETUP_PROGRAM = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
imports, load, ask, folder, device, dtype, prompt, frames, steps = sys.argv[1:]
frames, steps = int(frames), int(steps)
marks = [time.perf_counter()]
for code in [imports, load] + [ask] * (2 if steps else 0):
    exec(code)
    if device.startswith("cuda"): torch.cuda.synchronize()
    marks.append(time.perf_counter())
seconds = dict(zip(("import", "load", "first", "second"), (b - a for a, b in zip(marks, marks[1:]))))
print(json.dumps(seconds | {"ready": marks[2] - marks[0]}))
"""


def compare_setup(
    folder: Path, device: str, dtype: str, rounds: int, frames: int = 16, steps: int = 0
) -> dict[str, dict[str, float]]:
    """Median seconds of importing, of loading and of both, arms interleaved, files in the page cache, a process for
    each. They are compared by both: ours imports most of what it needs while it loads.

    Args:
        steps: of a first and a second video, which are timed too; none if 0.
    """
    dtype = settled(dtype, device)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SETUP}
    for i in range(1 + rounds):
        for name in list(SETUP) if i % 2 == 0 else list(reversed(SETUP)):
            program = [sys.executable, "-c", SETUP_PROGRAM, *SETUP[name], str(folder), device, dtype, PROMPT]
            program += [str(frames), str(steps if i else 0)]
            done = subprocess.run(program, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            if i:  # the first round fills the page cache
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    result = {}
    for name, made in runs.items():
        result[name] = {stage: statistics.median(run[stage] for run in made) for stage in made[0]}
        result[name]["times_as_fast"] = statistics.median(a["ready"] / b["ready"] for a, b in zip(runs["stock"], made))
        shown = "".join(f"{stage.replace('_', ' '):>15} {value:7.2f}" for stage, value in result[name].items())
        print(f"{name:9}{shown}", flush=True)
    return result

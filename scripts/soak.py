"""Ask the real server for many predictions in a row, and see whether anything of it grows.

    python scripts/soak.py --predictions 1000
    python scripts/soak.py --predictions 60 --leak 10

Six requests of ten are videos of 2 frames; the others are refused by the schema, refused by the predictor, cancelled,
or left by their caller. Prints a table of memory, descriptors, threads, temporary files and zombies, a sentence for
each that grew, and one line of JSON; exits with 1 if anything grew.
"""

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from serving import Server, serve  # noqa: E402

QUICK: dict[str, Any] = {"prompt": "a red circle moving right", "num_frames": 2, "num_inference_steps": 2, "seed": 0}
LONG = QUICK | {"num_inference_steps": 500}
GOOD = ("succeeded", "succeeded")
KINDS = (*GOOD, "refused", *GOOD, "failed", *GOOD, "cancelled", "left")  # over and over
COGS = Path("/tmp/coglet/predictions")  # where Cog makes a directory for each prediction, whatever TMPDIR says
WARM_UP = 20  # predictions, or a tenth of them: pools fill, a shape is traced
MOST_MB = 100
MOST = {"descriptors": 3, "threads": 2, "files": 2, "directories": 6, "zombies": 0}


@dataclass(frozen=True)
class Sample:
    """What the idle server held after so many predictions.

    Attributes:
        server_mb, worker_mb, others_mb: resident memory of Cog's server, of the process with the model, and of the
            processes these two have started besides.
        descriptors, threads: of all of them.
        files, directories: in the server's temporary directory, and of its predictions where Cog puts them.
    """

    predictions: int
    server_mb: float
    worker_mb: float
    others_mb: float
    descriptors: int
    threads: int
    files: int
    directories: int
    zombies: int

    @property
    def memory_mb(self) -> float:
        return self.server_mb + self.worker_mb + self.others_mb


def sample(server: Server, predictions: int, run: str, again: int = 3) -> Sample:
    """Taken again, so many times, where a process ends meanwhile."""
    try:
        return _sample(server, predictions, run)
    except psutil.NoSuchProcess:
        if not again:
            raise
    return sample(server, predictions, run, again - 1)


def _sample(server: Server, predictions: int, run: str) -> Sample:
    top, worker = psutil.Process(server.process.pid), server.worker()
    family = [top, *top.children(recursive=True)]
    zombies = [process for process in family if process.status() == psutil.STATUS_ZOMBIE]
    alive = [process for process in family if process not in zombies]
    memory = {process: process.memory_info().rss / 2**20 for process in alive}
    entries = [*server.tmp.rglob("*"), *COGS.glob(f"{run}-*"), *COGS.glob(f"{run}-*/**/*")]
    return Sample(
        predictions=predictions,
        server_mb=round(memory.pop(top), 1),
        worker_mb=round(memory.pop(worker), 1),
        others_mb=round(sum(memory.values()), 1),
        descriptors=sum(process.num_fds() for process in alive),
        threads=sum(process.num_threads() for process in alive),
        files=sum(path.is_file() for path in entries),
        directories=sum(path.is_dir() for path in entries),
        zombies=len(zombies),
    )


def grown(samples: list[Sample]) -> list[str]:
    """A sentence for everything that grew after the warm-up."""
    warm_up = max(WARM_UP, samples[-1].predictions / 10)
    later = [one for one in samples if one.predictions >= warm_up]
    if len(later) < 4:
        return [f"{len(later)} samples after the warm-up of {warm_up:.0f} predictions are too few to judge."]
    sentences = []
    more = later[-1].memory_mb - later[0].memory_mb
    if more > MOST_MB:
        sentences.append(f"Memory grew by {more:.0f} MB, to {later[-1].memory_mb:.0f}; at most {MOST_MB}.")
    quarter = len(later) // 4
    for name, most in MOST.items():
        first, last = (
            statistics.median(getattr(one, name) for one in part) for part in (later[:quarter], later[-quarter:])
        )
        if last - first > most:
            sentences.append(
                f"The number of {name} grew by {last - first:g}, from {first:g} to {last:g}; at most {most}."
            )
    return sentences


def ask(server: Server, kind: str, moment: float, name: str) -> None:
    """Send one request of that kind.

    Args:
        moment: seconds until it is cancelled or left.
        name: the prediction's id.

    Raises:
        SystemExit: it was not answered as that kind should be.
    """
    if kind == "cancelled":
        server.start(name, input=LONG)
        time.sleep(moment)
        server.cancel(name)
    elif kind == "left":
        request: dict[str, Any] = {"id": name, "input": LONG}
        with contextlib.suppress(requests.ReadTimeout):
            server.patiently(lambda: requests.post(f"{server.url}/predictions", json=request, timeout=moment))
            sys.exit("A prediction of 500 steps was over before its caller left.")
    else:
        wrong: dict[str, dict[str, Any]] = {"refused": {"num_frames": 0}, "failed": {"prompt": " "}}
        answer = server.predict(id=name, input=QUICK | wrong.get(kind, {}))
        found = "refused" if answer.status_code == 422 else answer.json().get("status")
        if found != kind:
            sys.exit(f"A prediction that should have {kind} was answered {answer.status_code} {answer.text[:500]}")


def soak(server: Server, predictions: int) -> tuple[list[Sample], Counter[str]]:
    """Ask for that many predictions; samples on the way, and how many there were of each kind."""
    moments, run = random.Random(0), f"soak-{uuid.uuid4().hex}"
    samples: list[Sample] = []
    kinds: Counter[str] = Counter()
    print("".join(f"{name:>13}" for name in Sample.__dataclass_fields__), flush=True)
    for i in range(predictions + 1):
        if i % max(1, predictions // 50) == 0 or i == predictions:
            server.until(lambda: server.health()["status"] == "READY", 60, "idle")
            samples.append(sample(server, i, run))
            print("".join(f"{value:13.0f}" for value in asdict(samples[-1]).values()), flush=True)
        if i < predictions:
            kind = KINDS[i % len(KINDS)]
            ask(server, kind, moments.uniform(0.05, 0.5), f"{run}-{i}")
            kinds[kind] += 1
    return samples, kinds


# A predictor that is ours but for what it keeps at every prediction.
LEAKING = """
import importlib.util

spec = importlib.util.spec_from_file_location("ours", {path!r})
ours = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ours)
kept = []

class Predictor(ours.Predictor):
    def setup(self):
        super().setup()
        run = self.engine.run

        def leaking(*args, **kwargs):
            kept.append((b"x" * {size}, open(__file__)))
            return run(*args, **kwargs)

        self.engine.run = leaking
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "demo")
    parser.add_argument("--predictions", type=int, default=1000)
    parser.add_argument("--leak", type=int, help="MB, and an open file, that a predictor on purpose keeps every time")
    args = parser.parse_args()
    predictor = None
    if args.leak is not None:
        predictor = LEAKING.format(path=str(ROOT / "predict.py"), size=args.leak * 2**20)
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder) / "server", args.weights.resolve(), predictor=predictor) as server,
    ):
        samples, kinds = soak(server, args.predictions)
    sentences = grown(samples)
    print("\n".join(sentences or ["Nothing grew."]))
    result = {
        "predictions": args.predictions,
        "seconds": round(time.monotonic() - started),
        "kinds": kinds,
        "samples": [asdict(samples[0]), asdict(samples[-1])],
        "grown": sentences,
    }
    print(json.dumps(result), flush=True)
    if sentences:
        sys.exit(1)


if __name__ == "__main__":
    main()

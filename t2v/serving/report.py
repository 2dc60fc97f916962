"""What a prediction reports while it runs: a line of JSON for every stage, and a progress bar of denoising steps."""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm


class Report:
    """Prints and times the stages of one prediction.

    Every denoising step prints a line in tqdm's format, which Replicate's clients parse.

    Attributes:
        seconds: by stage: "start", "text", "denoise", "decode", "encode".
    """

    def __init__(self, prompt: str, log_prompt: bool = False):
        """
        Args:
            log_prompt: print the prompt itself, not only its length and digest.
        """
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._since = time.perf_counter()
        fields: dict[str, Any] = {
            "prompt_characters": len(prompt),
            "prompt_sha256": hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest(),
        }
        if log_prompt:
            fields["prompt"] = prompt
        _print("request", fields)

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """The engine's `on_progress` callback."""
        if stage == "denoise":
            print(tqdm.format_meter(done, total, time.perf_counter() - self._since, ncols=80), flush=True)
        if stage != "decode" and done == total:
            self.end(stage)

    def timed(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same chunks. Waiting for a chunk counts as decoding, the time between two as encoding."""
        self._since = time.perf_counter()
        for chunk in chunks:
            self._count("decode")
            yield chunk
            self._count("encode")
        self.end("decode")

    def end(self, stage: str) -> None:
        """Count the time since the last stage for this one, and print its sum."""
        self._count(stage)
        _print(stage, {"seconds": round(self.seconds[stage], 4)})

    def _count(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self._since
        self._since = now


def _print(stage: str, fields: dict[str, Any]) -> None:
    print(json.dumps({"stage": stage, **fields}), flush=True)

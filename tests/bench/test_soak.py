"""bench/soak.py: what it calls growth, and a short run of it with and without a leak."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from bench import soak
from bench.soak import Sample, grown

STEADY = [Sample(i, 50, 500, 0, 30, 20, 1, 4, 0) for i in range(0, 201, 5)]


def growing(name: str, each: float, samples: list[Sample] = STEADY) -> list[Sample]:
    """The samples, and so much more of that with each prediction."""
    return [dataclasses.replace(s, **{name: getattr(s, name) + each * s.predictions}) for s in samples]


def test_a_steady_server_has_not_grown():
    assert grown(STEADY) == []


def test_what_grows_before_the_warm_up_is_over_does_not_count():
    early = [dataclasses.replace(s, worker_mb=500 + 50 * min(s.predictions, 20), threads=s.predictions) for s in STEADY]
    assert "threads" in grown(early)[0] and len(grown(early)) == 1
    assert grown([dataclasses.replace(s, threads=20) for s in early]) == []


@pytest.mark.parametrize("name", ["server_mb", "worker_mb", "others_mb"])
def test_memory_may_grow_by_a_hundred_megabytes(name: str):
    assert grown(growing(name, 100 / 180)) == []
    assert grown(growing(name, 101 / 180))[0].startswith("Memory grew by 101 MB")


@pytest.mark.parametrize("name, slack", soak.MOST.items())
def test_counts_may_not_grow(name: str, slack: int):
    assert grown(growing(name, 0.1)) == [s for s in grown(growing(name, 0.1)) if name in s] != []
    assert grown([dataclasses.replace(s, **{name: 1 + slack * (s.predictions > 100)}) for s in STEADY]) == []
    one_odd_sample = [*STEADY[:-1], dataclasses.replace(STEADY[-1], **{name: 1000})]
    assert grown(one_odd_sample) == []


def test_too_short_a_run_is_no_proof():
    assert "too few" in grown(STEADY[:6])[0]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str | Path) -> tuple[int, dict]:
    """(exit code, the last line) of a run of 40 predictions."""
    monkeypatch.setattr(sys, "argv", ["soak.py", "--predictions", "40", *map(str, options)])
    try:
        soak.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_nothing_grows(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    code, result = run(monkeypatch, capsys, "--weights", tiny_folder)
    assert (code, result["grown"]) == (0, [])
    assert result["kinds"] == {"succeeded": 24, "refused": 4, "failed": 4, "cancelled": 4, "left": 4}


@pytest.mark.slow
def test_a_leak_is_seen(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    code, result = run(monkeypatch, capsys, "--weights", tiny_folder, "--leak", "10")
    assert code == 1
    assert {"Memory", "The number of descriptors"} <= {sentence.partition(" grew")[0] for sentence in result["grown"]}

"""What a prediction prints about itself."""

import json
import re
import time

import numpy as np
import pytest

from t2v.serving.report import Report


def test_stages_are_timed_and_printed_and_the_prompt_only_on_demand(capsys: pytest.CaptureFixture[str]):
    report = Report("a secret circle")
    report.on_progress("text", 1, 1)
    for done in (1, 2):
        report.on_progress("denoise", done, 2)
    for _ in report.timed(np.zeros((1, 2, 2, 3), np.uint8) for _ in range(2) if time.sleep(0.02) is None):
        time.sleep(0.05)
    report.end("encode")
    out = capsys.readouterr().out
    stages = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [stage["stage"] for stage in stages] == ["request", "text", "denoise", "decode", "encode"]
    assert stages[0]["prompt_characters"] == 15 and len(stages[0]["prompt_sha256"]) == 64 and "secret" not in out
    assert re.findall(r"^ *(\d+)%\|.*\| (\d/\d) \[", out, re.MULTILINE) == [("50", "1/2"), ("100", "2/2")]
    assert report.seconds["decode"] >= 0.04 and report.seconds["encode"] >= 0.1
    Report("a secret circle", log_prompt=True)
    assert json.loads(capsys.readouterr().out)["prompt"] == "a secret circle"

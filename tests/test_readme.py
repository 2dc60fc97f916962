"""What the README shows runs."""

import json
import re

import yaml

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(capsys, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(code.replace("seed=0", "seed=0, num_inference_steps=2"), {})
    printed = re.findall(r"^\((\d+), (\d+), (\d+), 3\) uint8$", capsys.readouterr().out, re.MULTILINE)
    config = json.loads((ROOT / "weights" / "demo" / "unet" / "config.json").read_text())
    side = str(8 * config["sample_size"])
    assert sum(int(n) for n, *_ in printed) == 16 and {size for _, *size in printed for size in size} == {side}


def test_the_commands_and_links_exist():
    for path in re.findall(r"\b(scripts/\w+(?:\.py)?)", README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_cog_yaml_follows_cogs_rules():
    """Keys that cog 0.23 knows, a quoted python_version, a stated CUDA version, a pinned SDK."""
    text = (ROOT / "cog.yaml").read_text()
    config = yaml.safe_load(text)
    assert set(config) == {"build", "environment", "predict"}
    assert set(config["build"]) == {"gpu", "cuda", "python_version", "python_requirements", "sdk_version"}
    assert config["predict"] == "predict.py:Predictor"
    streaming = yaml.safe_load((ROOT / "cog-stream.yaml").read_text())
    assert streaming == config | {"predict": "predict.py:StreamingPredictor"}
    assert config["environment"][0] == "T2V_WEIGHTS=weights/ms-1.7b"
    build = config["build"]
    assert build["gpu"] is True and all(isinstance(build[k], str) for k in ("cuda", "python_version", "sdk_version"))
    requirements = (ROOT / build["python_requirements"]).read_text().split()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in requirements)
    assert f"cog=={build['sdk_version']}" in requirements

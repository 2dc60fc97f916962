"""The command line, as people run it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from ast import literal_eval
from pathlib import Path

import psutil
import pytest
import requests
import yaml
from PIL import Image

import t2v
from conftest import ROOT
from t2v.cli import MALLOC
from t2v.media.encode import VideoInfo, read_metadata, read_video
from t2v.request import INPUTS
from t2v.resources import DEMO, MANIFESTS, PREDICTOR

pytestmark = pytest.mark.slow  # starts processes

QUICK = ["--num-frames", "2", "--num-inference-steps", "2", "--seed", "0"]


def run(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "t2v", *map(str, arguments)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("T2V_")}
    variables |= {"COLUMNS": "300", **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("generate",),
        ("serve",),
        ("weights",),
        ("weights", "download"),
        ("weights", "convert"),
        ("weights", "verify"),
    ],
)
def test_every_command_has_help_and_loads_no_torch_for_it(command: tuple[str, ...]):
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); from t2v.cli import main; main()"
    )
    arguments = [sys.executable, "-c", code, *command, "--help"]
    done = subprocess.run(arguments, env=os.environ | MALLOC, capture_output=True, text=True)
    assert done.stdout.endswith("False\n")
    assert done.returncode == 0 and "Usage: t2v" in done.stdout, done.stderr


def test_generate_has_an_option_for_every_input_with_its_sentence_and_limits():
    shown = " ".join(run("generate", "--help").stdout.split())
    for name, spec in INPUTS.items():
        assert spec.description in shown
        if name != "prompt":
            assert f"--{name.replace('_', '-')} " in shown
        if spec.low is not None:
            assert f"{spec.low}..{spec.high}" in shown
    assert "--init-video" in shown


def test_generate_writes_the_file_that_was_asked_for(tiny_folder: Path, tmp_path: Path):
    out = tmp_path / "a.mp4"
    done = run("generate", "a red circle", "--weights", tiny_folder, *QUICK, "--fps", 5, "--width", 40, "--out", out)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == str(out) and "Model: tiny" in lines and "Denoising steps: 2/2, 0 s left" in lines
    assert read_video(out)[0] == VideoInfo(2, 40, 32, 5)
    metadata = read_metadata(out)
    assert metadata["seed"] == 0 and metadata["t2v"] == t2v.__version__


def test_generate_takes_every_input(tiny_folder: Path, tmp_path: Path):
    """A picture to start from, a second pass, a loop and another format; the model from the environment."""
    Image.new("RGB", (50, 30), "red").save(tmp_path / "red.png")
    options = ["--num-frames", 6, "--num-inference-steps", 2, "--loop", "--output-format", "gif", "--upscale", 2]
    options += ["--init-video", tmp_path / "red.png", "--strength", 0.5, "--window", 4, "--scheduler", "unipc"]
    options += ["--next-prompts", "a blue square", "--negative-prompt", "a star", "--upscaler", tiny_folder]
    done = run("generate", "A red circle!", *options, cwd=tmp_path, T2V_WEIGHTS=str(tiny_folder))
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").iterdir()
    assert re.fullmatch(r"a-red-circle-\d+\.gif", path.name) and path.read_bytes()[:4] == b"GIF8"
    assert "6 frames of 64x64" in done.stdout and done.stdout.splitlines()[-1] == f"outputs/{path.name}"


def test_the_demo_model_is_the_default_and_says_what_it_knows(tmp_path: Path):
    options = ["--num-frames", 1, "--num-inference-steps", 1]
    done = run("generate", "An astronaut riding a horse", *options, "--out", "a.mp4", cwd=tmp_path)
    assert done.returncode == 0 and "Model: t2v-demo. It knows " in done.stdout, done.stderr


@pytest.mark.parametrize(
    "options, code, sentence",
    [
        (["--num-frames", "0"], 1, "t2v: num_frames must be a whole number from 1 to 256, not 0."),
        (["--width", "65"], 1, "t2v: width must be a multiple of 8"),
        (["--preset", "best"], 1, "t2v: preset must be one of auto, quality, fast, turbo, not 'best'."),
        (["--weights", "absent"], 1, "t2v: There is no weights folder absent"),
        (["--out", "a.gif"], 2, "a.gif does not end in .mp4"),
        (["--init-video", "absent.png"], 2, "absent.png"),
        (["--fps", "eight"], 2, "valid integer"),
    ],
)
def test_generate_refuses_in_one_sentence(options: list[str], code: int, sentence: str):
    done = run("generate", "a red circle", *options)
    assert done.returncode == code and sentence in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_verify_compares_with_the_manifest(broken_copy: Path):
    done = run("weights", "verify", DEMO)
    assert done.returncode == 0 and "is complete and undamaged" in done.stdout, done.stderr
    assert "has no manifest" in run("weights", "verify", broken_copy).stdout
    (broken_copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    done = run("weights", "verify", broken_copy)
    assert done.returncode == 1 and "unet/diffusion_pytorch_model.safetensors" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_serve_works_from_any_folder(tiny_folder: Path, tmp_path: Path, stream: bool):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "t2v", "serve", "--port", str(port), *(["--stream"] if stream else [])]
    variables = os.environ | {"T2V_WEIGHTS": os.path.relpath(tiny_folder, tmp_path), "T2V_DEVICE": "cpu"}
    server = subprocess.Popen([*command, "--upload-url", f"http://127.0.0.1:{port}/"], cwd=tmp_path, env=variables)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                health = requests.get(f"http://127.0.0.1:{port}/health-check", timeout=5).json()
                if health["status"] != "STARTING":
                    break
            except requests.ConnectionError:
                time.sleep(0.2)
        assert health["status"] == "READY", health
        schema = requests.get(f"http://127.0.0.1:{port}/openapi.json", timeout=5).json()
        assert ("previews" in schema["components"]["schemas"]["Input"]["properties"]) == stream
        (worker,) = psutil.Process(server.pid).children()
        assert worker.environ().items() >= MALLOC.items()
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


def test_the_allocator_is_set_up_before_the_process_starts(tiny_folder: Path):
    """glibc reads these variables once; so the images state them, and the command line starts itself again."""
    for name in ("cog.yaml", "cog-stream.yaml"):
        environment = yaml.safe_load((ROOT / name).read_text())["environment"]
        assert {f"{key}={value}" for key, value in MALLOC.items()} <= set(environment)
    code = "import os; from t2v.cli import main; print({k: v for k, v in os.environ.items() if 'MALLOC' in k}); main()"
    bare = {name: value for name, value in os.environ.items() if name not in MALLOC}
    for given in ({}, MALLOC, {"MALLOC_ARENA_MAX": "2"}):
        command = [sys.executable, "-u", "-c", code, "version"]
        shown = subprocess.run(command, env=bare | given, capture_output=True, text=True, check=True).stdout
        runs = [literal_eval(line) for line in shown.splitlines()[:-1]]
        assert runs == ([given] if given == MALLOC else [given, MALLOC | given])  # the operator's own values stay


def test_the_version_is_stated_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (
        project["project"]["dynamic"] == ["version"]
        and project["tool"]["hatch"]["version"]["path"] == "t2v/__init__.py"
    )
    assert run("version").stdout.strip() == t2v.__version__


def test_an_installed_package_contains_the_files_that_it_looks_for():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for path in (DEMO, MANIFESTS, PREDICTOR):
        name = path.relative_to(ROOT).as_posix()
        assert path.exists() and build["force-include"][name] == f"t2v/_files/{name}"


def test_the_pinned_packages_are_within_the_ranges_of_the_package():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.strip().split("==") for line in (ROOT / "requirements.txt").read_text().splitlines())
    ranges = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    assert set(ranges) == set(pins)
    assert all(ranges[name].specifier.contains(pin) for name, pin in pins.items())

"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGE = sorted(p.stem for p in (ROOT / "t2v").glob("*.py") if not p.stem.startswith("__"))
ALLOWED = {
    "errors": set(),
    "request": {"errors"},
    "config": {"errors"},
    "clip": {"config", "errors"},
    "text": {"clip", "errors"},
    "unet3d": {"config", "errors", "convolution"},
    "convolution": set(),
    "autoencoder": {"config", "errors", "convolution"},
    "sampler": {"errors", "distilled"},
    "distilled": set(),
    "noise": {"timeline"},
    "denoiser": {"sampler", "timeline"},
    "trace": set(),
    "recording": {"errors", "trace"},
    "weights": {"errors", "networks", "convolution"},
    "vae": {"autoencoder"},
    "device": {"errors"},
    "job": {"errors", "request", "distilled", "timeline"},
    "budget": {"device", "errors", "job", "model"},
    "resources": set(),
    "cli": {"convert", "checkpoints", "engine", "errors", "media", "request", "resources", "serving", "weights"},
    "timeline": set(),
    "networks": {"autoencoder", "clip", "errors", "unet3d"},
    "pickles": {"errors"},
    "convert": {"errors", "networks", "pickles", "unet3d", "weights"},
    "lora": {"errors", "convert", "pickles", "distilled", "unet3d", "convolution", "weights"},
    "model": {
        *("denoiser", "device", "errors", "job", "lora", "noise", "recording", "sampler", "text", "unet3d", "vae"),
        "weights",
    },
    "engine": {"budget", "job", "model", "request", "text", "unet3d", "vae"},
}


LIGHT = ("errors", "request", "resources", "job", "cli", "media.encode", "media.decode")
LIGHT += tuple(f"serving.{name}" for name in ("worker", "report", "schema", "watchdog"))


def imports(path: Path) -> set[str]:
    """Full names of what a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", PACKAGE)
def test_modules_import_only_what_they_may(module: str):
    ours = {name.split(".")[1] for name in imports(ROOT / "t2v" / f"{module}.py") if name.startswith("t2v.")}
    assert ours - {"__version__"} <= ALLOWED[module]


@pytest.mark.parametrize("wing", ["media", "serving"])
def test_these_folders_import_nothing_of_the_package_but_errors(wing: str):
    ours = {name for path in (ROOT / "t2v" / wing).glob("*.py") for name in imports(path) if name.startswith("t2v.")}
    assert {name.split(".")[1] for name in ours} <= {wing, "errors"}


def test_cog_is_known_to_the_predictor_alone_and_the_environment_to_the_edges():
    for path in (ROOT / "t2v").rglob("*.py"):
        if path.stem in ("cli", "schema"):
            continue
        assert not {n for n in imports(path) if n.split(".")[0] == "cog"}
        assert "environ" not in path.read_text() and "getenv" not in path.read_text()


def test_what_makes_videos_loads_none_of_the_libraries_it_is_compared_with():
    """They take several seconds to import, all the rest one."""
    code = """
import sys, predict
from t2v.request import Request
list(predict.load_engine().generate(Request(num_frames=1, num_inference_steps=1)))
assert "torch" in sys.modules and not {"diffusers", "transformers", "accelerate"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_without_torch(module: str):
    code = f"import sys, t2v.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("module", [m for m in PACKAGE if m not in ("distilled", "resources", "__main__")])
def test_every_module_has_its_tests(module: str):
    assert (ROOT / "tests" / f"test_{module}.py").is_file()

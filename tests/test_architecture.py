"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGE = sorted(p.stem for p in (ROOT / "t2v").glob("*.py") if p.stem != "__init__")
ALLOWED = {
    "errors": set(),
    "request": {"errors"},
    "video": {"errors"},
    "config": {"errors"},
    "clip": {"config", "errors"},
    "text": {"clip", "errors"},
    "unet3d": {"config", "errors", "convolution", "fused"},
    "convolution": {"fused"},
    "fused": {"triton_kernels"},
    "triton_kernels": set(),
    "autoencoder": {"config", "errors", "convolution", "fused"},
    "sampler": {"errors"},
    "graph": {"memory"},
    "weights": {"errors"},
    "vae": {"autoencoder", "memory"},
    "memory": set(),
    "watchdog": set(),
    "thread": set(),
    "source": {"errors"},
    "timeline": set(),
    "networks": {"autoencoder", "clip", "errors", "unet3d"},
    "pickles": {"errors"},
    "convert": {"errors", "networks", "pickles", "unet3d", "weights"},
    "lora": {"errors", "convert", "pickles", "sampler", "unet3d", "convolution", "weights"},
    "engine": set(PACKAGE) - {"video", "source", "convert", "pickles", "engine"},
}


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
    assert ours <= ALLOWED[module]


def test_cog_is_known_to_the_predictor_alone_and_the_environment_to_the_edges():
    for module in PACKAGE:
        path = ROOT / "t2v" / f"{module}.py"
        assert not {n for n in imports(path) if n.split(".")[0] == "cog"}
        assert "environ" not in path.read_text() and "getenv" not in path.read_text()


def test_what_makes_videos_loads_none_of_the_libraries_it_is_compared_with():
    """They take several seconds to import, all the rest one."""
    code = """
import sys, predict
from t2v.request import Request
list(predict.load().generate(Request(num_frames=1, num_inference_steps=1)))
assert "torch" in sys.modules and not {"diffusers", "transformers", "accelerate"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", ["errors", "request", "video", "source"])
def test_light_modules_load_without_torch(module: str):
    code = f"import sys, t2v.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("module", [m for m in PACKAGE if m != "errors"])
def test_every_module_has_its_tests(module: str):
    assert (ROOT / "tests" / f"test_{module}.py").is_file()

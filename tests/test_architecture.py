"""Who may import whom."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGE = ROOT / "t2v"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
# A wing is a folder that knows one trade. It imports itself, `errors` and what is named here; the modules at the top
# tell the story and import the wings.
WINGS: dict[str, set[str]] = {
    "networks": set(),
    "sampling": set(),
    "checkpoints": {"networks", "resources"},
    "media": set(),
    "serving": set(),
}


# These, and every module of the wings media and serving, are loaded without torch.
LIGHT = ["t2v", "t2v.cli", "t2v.errors", "t2v.job", "t2v.request", "t2v.resources"]
LIGHT += [f"t2v.{wing}.{path.stem}" for wing in ("media", "serving") for path in (PACKAGE / wing).glob("[a-z]*.py")]
# sampling/distilled is plain data, which tests/test_job.py reads; tests/test_cli.py installs and runs the others.
TESTED_ELSEWHERE = ("sampling/distilled", "resources", "__main__")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


@functools.cache
def imports(path: Path) -> set[str]:
    """Full names of the modules, or of their members, that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_wing_imports_itself_and_errors(path: Path):
    wing = path.parent.name
    if wing not in WINGS:
        return
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("t2v.")}
    assert ours <= {wing, "errors"} | WINGS[wing]


def test_the_imports_form_no_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    arrows = {
        name: {other for other in names for found in imports(path) if f"{found}.".startswith(f"{other}.")}
        for name, path in names.items()
    }
    while leaves := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in leaves}
    assert not arrows


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_cog_is_known_to_the_predictor_alone_and_the_environment_to_the_edges(path: Path):
    assert not {name for name in imports(path) if name.split(".")[0] == "cog"}
    if name_of(path) not in ("cli", "__main__"):
        assert "environ" not in path.read_text() and "getenv" not in path.read_text()


@pytest.mark.slow
def test_making_a_video_loads_none_of_the_reference_libraries():
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
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_has_its_tests(path: Path):
    tests = ROOT / "tests" / path.relative_to(PACKAGE).with_name(f"test_{path.name}")
    assert tests.is_file() or name_of(path) in TESTED_ELSEWHERE

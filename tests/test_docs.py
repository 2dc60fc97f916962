"""The documents and the release's configuration say what the code does."""

import ast
import re
from typing import Any

import pytest
import yaml

from conftest import ROOT
from documents import check_table
from t2v import __version__
from t2v.errors import InvalidRequest
from t2v.job import ModelInfo, resolve
from t2v.request import Request, inputs_table


def read_yaml(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_table_of_inputs_is_current(page: str):
    check_table(ROOT / page, "inputs", inputs_table())


def test_the_readme_lists_every_environment_variable_that_the_code_reads():
    code = "".join(path.read_text() for path in (ROOT / "predict.py", ROOT / "t2v" / "cli.py"))
    readme = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"^\| `(T2V_\w+)` \|", readme, re.MULTILINE))
    assert listed == set(re.findall(r"""["'](T2V_[A-Z_]+)["']""", code))


def test_every_page_links_to_files_that_exist():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "weights" / "README.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_architecture_page_names_files_and_functions_that_exist():
    """Every `folder/file.py` is a file, and every `file.py: name` is defined in it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    paths = set(re.findall(r"`((?:\w+/)*\w+\.py)\b", text))
    assert len(paths) > 20
    for path in paths:
        assert any((base / path).is_file() for base in (ROOT, ROOT / "t2v")), path
    found = re.findall(r"`((?:\w+/)*\w+\.py): ([\w.]+)`", text)
    assert len(found) > 15
    for path, name in found:
        file = next(base / path for base in (ROOT / "t2v", ROOT) if (base / path).is_file())
        defined = {getattr(node, "name", "") for node in ast.walk(ast.parse(file.read_text()))}
        assigned = re.findall(r"^\s*(\w+)(?:: [^=\n]+)? = ", file.read_text(), re.MULTILINE)
        assert set(name.split(".")) <= defined | set(assigned), f"{path}: {name}"


def test_the_changelog_begins_with_this_version_and_dates_every_release():
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0].startswith(f"{__version__} ")
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(20\d\d-\d\d-\d\d\)", head) for head in heads)


def test_pre_commit_runs_the_ruff_of_the_tests():
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert f"ruff=={repository['rev'].removeprefix('v')}\n" in (ROOT / "requirements-dev.txt").read_text()


@pytest.mark.parametrize("case", read_yaml("cog-safe-push.yaml")["predict"]["test_cases"], ids=str)
def test_every_case_of_the_push_is_possible_or_refused_as_expected(case: dict[str, Any]):
    words = case.get("error_contains")
    try:
        resolve(Request(**case["inputs"]), ModelInfo("t2v"))
    except InvalidRequest as error:
        assert words and words in str(error)
    else:
        assert words is None


def test_the_workflows_run_what_is_in_the_repository():
    ci, push = read_yaml(".github/workflows/ci.yml"), read_yaml(".github/workflows/push.yml")
    steps = [step for job in (ci["jobs"]["ci"], push["jobs"]["push"]) for step in job["steps"]]
    commands = "\n".join(step.get("run", "") for step in steps)
    for path in re.findall(r"(?:\.ci/run|scripts/\w+|cog-safe-push\.yaml)", commands):
        assert (ROOT / path).is_file(), path
    assert ci["jobs"]["ci"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    (cog,) = (step["with"]["cog-version"] for step in steps if "cog-version" in step.get("with", {}))
    assert cog == f"v{read_yaml('cog.yaml')['build']['sdk_version']}"

"""Paths of the files that belong to the package but are not Python modules.

An installed package holds copies in t2v/_files (see [tool.hatch] in pyproject.toml); in a checkout they stand beside
the package.
"""

from pathlib import Path

_INSTALLED = Path(__file__).with_name("_files")
ROOT = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parent.parent
DEMO = ROOT / "weights" / "demo"
MANIFESTS = ROOT / "weights" / "manifests"
PREDICTOR = ROOT / "predict.py"

"""The generated schema is the one `cog build` emits, and it promises what predict.py and request.py hold."""

import json
from pathlib import Path

import jsonschema
import pytest

import openapi_schema
from conftest import ROOT
from t2v.errors import InvalidRequest
from t2v.request import BOUNDS, CHOICES, Request

# The predictor for which tests/golden/cog_openapi_example.json was emitted by cog's own generator.
EXAMPLE = """
from cog import BasePredictor, Input, Path

class Predictor(BasePredictor):
    def predict(
        self,
        prompt: str = Input(default="a cat", description="Text prompt"),
        num_frames: int = Input(default=16, ge=1, le=129, description="Frames"),
        num_inference_steps: int = Input(default=50, ge=1, le=500, description="Steps"),
        fps: int = Input(default=8, ge=1, le=60, description="Frames per second"),
        seed: int | None = Input(default=None, description="Seed, random if omitted"),
        negative_prompt: str = Input(default="", description="Negative prompt"),
        guidance_scale: float = Input(default=7.5, ge=0, le=30, description="CFG"),
        scheduler: str = Input(default="ddim", choices=["ddim", "euler", "dpm"], description="Scheduler"),
    ) -> Path:
        pass
"""


def inputs() -> dict:
    document = openapi_schema.document((ROOT / "predict.py").read_text(), "Predictor", "0.23.1")
    return document["components"]["schemas"]["Input"]


def test_equals_what_cog_build_emits():
    golden = json.loads((Path(__file__).parent / "golden" / "cog_openapi_example.json").read_text())
    ours = openapi_schema.document(EXAMPLE, "Predictor", "dev")
    assert ours == golden
    ours_input, golden_input = (d["components"]["schemas"]["Input"]["properties"] for d in (ours, golden))
    assert json.dumps(ours_input) == json.dumps(golden_input)  # the order of the keys too


def test_every_default_and_limit_of_the_inputs():
    """A changed number here is a changed interface."""
    shown = {
        name: {k: v for k, v in entry.items() if k not in ("title", "description", "x-order")}
        for name, entry in inputs()["properties"].items()
    }
    assert shown == {
        "prompt": {"type": "string", "default": "An astronaut riding a horse"},
        "num_frames": {"type": "integer", "default": 16, "minimum": 1, "maximum": 256},
        "num_inference_steps": {"type": "integer", "default": 50, "minimum": 1, "maximum": 500},
        "fps": {"type": "integer", "default": 8, "minimum": 1, "maximum": 60},
        "seed": {"type": "integer", "default": None, "nullable": True, "minimum": 0, "maximum": 4294967295},
        "guidance_scale": {"type": "number", "default": None, "nullable": True, "minimum": 1, "maximum": 30},
        "width": {"type": "integer", "default": None, "nullable": True, "minimum": 16, "maximum": 1024},
        "height": {"type": "integer", "default": None, "nullable": True, "minimum": 16, "maximum": 1024},
        "preset": {"allOf": [{"$ref": "#/components/schemas/preset"}], "default": "auto"},
        "negative_prompt": {"type": "string", "default": ""},
        "scheduler": {"allOf": [{"$ref": "#/components/schemas/scheduler"}], "default": "dpm++"},
        "output_format": {"allOf": [{"$ref": "#/components/schemas/output_format"}], "default": "mp4"},
        "quality": {"type": "integer", "default": 18, "minimum": 1, "maximum": 51},
        "window": {"type": "integer", "default": None, "nullable": True, "minimum": 4, "maximum": 128},
        "loop": {"type": "boolean", "default": False},
        "next_prompts": {"type": "string", "default": ""},
        "init_video": {"type": "string", "format": "uri", "default": None, "nullable": True},
        "strength": {"type": "number", "default": None, "nullable": True, "minimum": 0, "maximum": 1},
        "upscale": {"type": "integer", "default": 1, "minimum": 1, "maximum": 2},
    }
    assert "required" not in inputs()


def test_request_holds_the_same_defaults_and_limits():
    choices = openapi_schema.document((ROOT / "predict.py").read_text(), "Predictor", "")["components"]["schemas"]
    for name, entry in inputs()["properties"].items():
        if "minimum" in entry:
            assert BOUNDS[name] == (entry["minimum"], entry["maximum"])
        if "allOf" in entry:
            assert list(CHOICES[name]) == choices[name]["enum"]
        if name not in ("seed", "init_video"):
            assert getattr(Request(), name) == entry["default"]


@pytest.mark.parametrize(
    "name", [n for n in BOUNDS if n not in ("guidance_scale", "width", "height", "window", "strength")]
)
def test_schema_and_request_agree_at_the_limits(name: str):
    low, high = BOUNDS[name]
    for value in (low - 1, low, high, high + 1, 1.5, "16", True):
        try:
            jsonschema.validate({name: value}, inputs())
            by_schema = True
        except jsonschema.ValidationError:
            by_schema = False
        try:
            Request(**{name: value})
            by_request = True
        except InvalidRequest:
            by_request = False
        assert by_schema == by_request, value


@pytest.mark.parametrize(
    "change, complaint",
    [
        (("le=129", "le=LIMIT"), "num_frames: le=LIMIT is not a literal"),
        (("le=129", "le=2**7"), r"num_frames: le=2 \*\* 7 is not a literal"),
        (('default="a cat"', '"a cat"'), "prompt: Input takes keywords"),
        (("Input(default=16", "cog.Input(default=16"), r"num_frames: the default is cog\.Input"),
        (("-> Path", ""), "the output is annotated with nothing"),
        (("guidance_scale: float", "guidance_scale: Literal[1]"), "guidance_scale is annotated with"),
    ],
)
def test_what_cog_would_lose_silently_is_an_error(change: tuple[str, str], complaint: str):
    assert change[0] in EXAMPLE
    with pytest.raises(openapi_schema.NotStatic, match=complaint):
        openapi_schema.document(EXAMPLE.replace(*change), "Predictor", "dev")

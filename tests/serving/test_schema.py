"""The generated schema equals the one `cog build` emits, and agrees with predict.py and `Request`."""

import json

import jsonschema
import pytest

from conftest import ROOT
from t2v.errors import InvalidRequest
from t2v.request import INIT_VIDEO, INPUTS, Request
from t2v.serving.schema import NotStatic, document

# The predictor for which Cog's own generator wrote tests/golden/cog_openapi_example.json.
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


def schemas(class_name: str = "Predictor") -> dict:
    return document((ROOT / "predict.py").read_text(), class_name, "0.23.1")["components"]["schemas"]


def inputs() -> dict:
    return schemas()["Input"]


def test_equals_what_cog_build_emits():
    golden = json.loads((ROOT / "tests" / "golden" / "cog_openapi_example.json").read_text())
    ours = document(EXAMPLE, "Predictor", "dev")
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


def test_cogs_inputs_are_the_fields_of_a_request():
    """Default, kind, limits, choices and description of each."""
    kinds = {"text": "string", "integer": "integer", "number": "number", "boolean": "boolean", "file": "string"}
    properties, enums = inputs()["properties"], schemas()
    assert set(properties) == {*INPUTS, "init_video"}
    for name, spec in {**INPUTS, "init_video": INIT_VIDEO}.items():
        entry = properties[name]
        choices = enums[name] if spec.choices else {"type": entry.get("type"), "enum": []}
        assert entry["description"] == spec.description
        assert choices["type"] == kinds[spec.kind] and tuple(choices["enum"]) == spec.choices
        assert (entry.get("minimum"), entry.get("maximum")) == (spec.low, spec.high)
        assert entry.get("nullable", False) == spec.optional
        assert entry["default"] == (None if name in ("seed", "init_video") else getattr(Request(), name))
        assert len(spec.description) < 100 and not spec.description.endswith(".")


def test_the_streaming_predictor_has_the_same_inputs_and_previews():
    streaming = schemas("StreamingPredictor")
    previews = streaming["Input"]["properties"].pop("previews")
    assert (previews["default"], previews["minimum"], previews["maximum"]) == (4, 0, 20)
    output = streaming.pop("Output")
    assert output == {
        "title": "Output",
        "type": "array",
        "items": {"type": "string", "format": "uri"},
        "x-cog-array-type": "iterator",
    }
    plain = schemas()
    del plain["Output"]
    assert streaming == plain
    paths = document((ROOT / "predict.py").read_text(), "StreamingPredictor", "0.23.1")["paths"]
    assert paths["/predictions"]["post"]["x-cog-streaming"] is True


@pytest.mark.parametrize("name", [name for name, spec in INPUTS.items() if spec.kind == "integer"])
def test_schema_and_request_agree_at_the_limits(name: str):
    low, high = INPUTS[name].low, INPUTS[name].high
    for value in (low - 1, low, high, high + 1, low + 0.5, "16", True):
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


def test_a_class_attribute_means_the_same_as_an_input_in_the_signature():
    call = 'Input(default="a cat", description="Text prompt")'
    attribute = EXAMPLE.replace(call, "Inputs.prompt").replace(
        "class Predictor", f"class Inputs:\n    prompt = {call}\n\n\nclass Predictor"
    )
    assert "prompt: str = Inputs.prompt" in attribute
    assert document(attribute, "Predictor", "dev") == document(EXAMPLE, "Predictor", "dev")
    with pytest.raises(NotStatic, match=r"prompt: the default is Inputs\.text"):
        document(attribute.replace("= Inputs.prompt", "= Inputs.text"), "Predictor", "dev")


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
def test_a_limit_that_cog_would_silently_lose_is_an_error(change: tuple[str, str], complaint: str):
    assert change[0] in EXAMPLE
    with pytest.raises(NotStatic, match=complaint):
        document(EXAMPLE.replace(*change), "Predictor", "dev")

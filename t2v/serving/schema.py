"""The OpenAPI document of a predictor, as `cog build` writes it, so that a server without Docker validates its inputs.

Like Cog's generator (pkg/schema/python in its repository) this one parses the source and runs none of it. Where Cog's
would silently lose a limit or default that is not a literal, this one raises an error.
"""

import ast
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

TYPES = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "Path": {"type": "string", "format": "uri"},
}
LIMITS = {"ge": "minimum", "le": "maximum", "min_length": "minLength", "max_length": "maxLength", "regex": "pattern"}


class NotStatic(Exception):
    """The source contains something that Cog's generator would not understand."""


def write_schema(predictor: Path, class_name: str, path: Path) -> None:
    """Write the document of the predictor's source file to `path`; Cog's server reads .cog/openapi_schema.json.

    Raises:
        NotStatic: see `document`.
    """
    schema = document(predictor.read_text(), class_name, version("cog"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(schema, separators=(",", ":")) + "\n")


def document(source: str, class_name: str, cog_version: str) -> dict[str, Any]:
    """The OpenAPI 3.0.2 document of a predictor's source.

    Raises:
        NotStatic: an input is not an `Input(...)` of literal keywords, nor the attribute of a class in the same source
            that is one; or a type is not one of `TYPES`.
    """
    tree = ast.parse(source)
    attributes = _input_attributes(tree)
    method = _method(tree, class_name)
    arguments = method.args.args[1:]
    if len(method.args.defaults) != len(arguments) and arguments:
        first_default = len(arguments) - len(method.args.defaults)
        raise NotStatic(f"{arguments[max(0, first_default - 1)].arg}: every input needs = Input(...)")
    properties: dict[str, Any] = {}
    enums: dict[str, Any] = {}
    required = []
    for order, (argument, call) in enumerate(zip(arguments, method.args.defaults)):
        name = argument.arg
        kind, optional = _type(name, argument.annotation)
        given = _keywords(name, attributes.get(ast.unparse(call), call))
        if "default" not in given and not optional:
            required.append(name)
        properties[name], enum = _property(name, kind, optional, given, order)
        if enum:
            enums[name] = enum
    inputs: dict[str, Any] = {"properties": properties, "title": "Input", "type": "object"}
    if required:
        inputs["required"] = required
    schema = _document(inputs, {"title": "Output", **_output(method.returns)}, enums, cog_version)
    if any(isinstance(decorator, ast.Name) and decorator.id == "streaming" for decorator in method.decorator_list):
        schema["paths"]["/predictions"]["post"]["x-cog-streaming"] = True
    return schema


def _input_attributes(tree: ast.Module) -> dict[str, ast.expr]:
    """The class attributes that are `Input(...)`, by their names as in "Inputs.prompt"."""
    attributes: dict[str, ast.expr] = {}
    for owner in tree.body:
        if not isinstance(owner, ast.ClassDef):
            continue
        for item in owner.body:
            match item:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id="Input")) as call):
                    attributes[f"{owner.name}.{name}"] = call
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.Call(func=ast.Name(id="Input")) as call):
                    attributes[f"{owner.name}.{name}"] = call
    return attributes


def _method(tree: ast.Module, class_name: str) -> ast.FunctionDef:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name in ("predict", "run"):
                    return item
    raise NotStatic(f"there is no class {class_name} with a predict() or run() method")


def _type(name: str, annotation: ast.expr | None) -> tuple[str, bool]:
    """(name in TYPES, whether None is allowed) of `T` or `T | None`."""
    match annotation:
        case ast.BinOp(left=ast.Name(id=kind), op=ast.BitOr(), right=ast.Constant(value=None)) if kind in TYPES:
            return kind, True
        case ast.Name(id=kind) if kind in TYPES:
            return kind, False
    shown = "nothing" if annotation is None else ast.unparse(annotation)
    raise NotStatic(f"{name} is annotated with {shown}, not with one of {', '.join(TYPES)}, or one of them | None")


def _output(annotation: ast.expr | None) -> dict[str, Any]:
    """The schema of the output type, T or Iterator[T]."""
    match annotation:
        case ast.Subscript(value=ast.Name(id="Iterator"), slice=item):
            return {"type": "array", "items": _output(item), "x-cog-array-type": "iterator"}
    return TYPES[_type("the output", annotation)[0]]


def _keywords(name: str, call: ast.expr) -> dict[str, Any]:
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Input"):
        raise NotStatic(f"{name}: the default is {ast.unparse(call)}, not Input(...)")
    if call.args:
        raise NotStatic(f"{name}: Input takes keywords here, default={ast.unparse(call.args[0])}")
    given = {}
    for keyword in call.keywords:
        try:
            given[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError as error:
            raise NotStatic(f"{name}: {keyword.arg}={ast.unparse(keyword.value)} is not a literal") from error
    return given


def _property(
    name: str, kind: str, optional: bool, given: dict[str, Any], order: int
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The schema of one input, and that of its enumeration if it has choices."""
    entry: dict[str, Any] = {}
    if "default" in given:
        entry["default"] = given["default"]
    if given.get("description"):
        entry["description"] = given["description"]
    entry |= {LIMITS[key]: given[key] for key in LIMITS if key in given}
    if optional:
        entry["nullable"] = True
    entry["x-order"] = order
    enum = None
    if "choices" in given:
        entry["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
        enum = {"description": "An enumeration.", "enum": given["choices"], "title": name, **TYPES[kind]}
    else:
        entry |= {"title": name.replace("_", " ").title(), **TYPES[kind]}
    return dict(sorted(entry.items())), enum


def _document(
    inputs: dict[str, Any], output: dict[str, Any], enums: dict[str, Any], cog_version: str
) -> dict[str, Any]:
    def ref(name: str) -> dict[str, str]:
        return {"$ref": f"#/components/schemas/{name}"}

    def text(title: str, **more: Any) -> dict[str, Any]:
        return {"title": title, "type": "string", **more}

    def thing(title: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"title": title, "type": "object", "properties": properties, **more}

    def answer(schema: dict[str, Any], description: str = "Successful Response") -> dict[str, Any]:
        return {"content": {"application/json": {"schema": schema}}, "description": description}

    invalid = answer(ref("HTTPValidationError"), "Validation Error")
    moment = {"format": "date-time"}
    location = {"title": "Location", "type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}}
    schemas = {
        "Input": inputs,
        "Output": output,
        **enums,
        "PredictionRequest": thing("PredictionRequest", {"id": text("Id"), "input": ref("Input")}),
        "PredictionResponse": thing(
            "PredictionResponse",
            {
                "completed_at": text("Completed At", **moment),
                "created_at": text("Created At", **moment),
                "error": text("Error"),
                "id": text("Id"),
                "input": ref("Input"),
                "logs": text("Logs"),
                "metrics": {"title": "Metrics", "type": "object"},
                "output": ref("Output"),
                "started_at": text("Started At", **moment),
                "status": text("Status"),
                "version": text("Version"),
            },
        ),
        "Status": {
            "description": "An enumeration.",
            "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
            "title": "Status",
            "type": "string",
        },
        "HTTPValidationError": thing(
            "HTTPValidationError", {"detail": {"title": "Detail", "type": "array", "items": ref("ValidationError")}}
        ),
        "ValidationError": thing(
            "ValidationError",
            {"loc": location, "msg": text("Message"), "type": text("Error Type")},
            required=["loc", "msg", "type"],
        ),
    }
    predict = {
        "description": "Run a single prediction on the model",
        "operationId": "predict_predictions_post",
        "requestBody": {"content": {"application/json": {"schema": ref("PredictionRequest")}}},
        "responses": {"200": answer(ref("PredictionResponse")), "422": invalid},
        "summary": "Predict",
    }
    cancel = {
        "operationId": "cancel_predictions__prediction_id__cancel_post",
        "parameters": [{"in": "path", "name": "prediction_id", "required": True, "schema": text("Prediction Id")}],
        "responses": {"200": answer({}), "422": invalid},
        "summary": "Cancel",
    }
    root = {"operationId": "root__get", "responses": {"200": answer({})}, "summary": "Root"}
    health = {
        "operationId": "healthcheck_health_check_get",
        "responses": {"200": answer({})},
        "summary": "Healthcheck",
    }
    return {
        "components": {"schemas": schemas},
        "info": {"title": "Cog", "version": cog_version},
        "openapi": "3.0.2",
        "paths": {
            "/": {"get": root},
            "/health-check": {"get": health},
            "/predictions": {"post": predict},
            "/predictions/{prediction_id}/cancel": {"post": cancel},
        },
    }

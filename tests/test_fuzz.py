"""Requests of every kind against the real server: an answer to each, a reason in each refusal, and the same worker
after all of them. T2V_FUZZ is the number of requests; pytest -s shows how they were answered."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bench.server import PATIENCE, Server, serve

pytestmark = pytest.mark.slow  # starts servers

COUNT = int(os.environ.get("T2V_FUZZ", 150))
CAPS = {"num_frames": 2, "num_inference_steps": 2, "width": 32, "height": 32}  # a larger value costs time, no more
CHEAP: dict[str, Any] = {"num_frames": 1, "num_inference_steps": 1}
SENTENCE = re.compile(r"(Prediction failed: )*InvalidRequest: .+\.", re.DOTALL)  # no other failure is the caller's
LEAK = re.compile(r"Traceback|site-packages|\.py\b|(?<![\w.])/\w+/|\b0x[0-9a-f]{6,}")
LATER = {"Prefer": "respond-async"}
JSON = {"Content-Type": "application/json"}

STRANGE = [
    *(
        "",
        " ",
        "\t\n",
        "\0",
        "a\0b",
        "\u202eevil",
        "\u200b",
        "\ufeff",
        "\ufffe",
        "\ud800",
        "😀" * 50,
        "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L",
        "日本語",
        "é",
    ),
    *(
        "16",
        "null",
        "NaN",
        "-1",
        "{}",
        "-y /tmp/x",
        "--help",
        "%s%n",
        "$(id)",
        "`id`",
        "'; --",
        "<|endoftext|>",
        "../../x",
    ),
    *("x" * 10_000, "x" * 10_001, "word " * 3000, "x" * 1_000_000),
]
NUMBERS = [0, -1, 1, 16.0, 1.5, -0.0, 1e-320, 1e308, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63), -(2**64), 10**400]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=50),
    st.sampled_from(STRANGE),
    st.sampled_from(NUMBERS),
)
NESTED = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
JUNK = SCALARS | NESTED
NAMES = st.from_regex(r"[a-z0-9-]{8,24}", fullmatch=True)
TYPES = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/xml",
    "x",
    "",
]
RAW = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from(
        [b"", b" ", b"NaN", b'{"input": {"seed": 1e400}}', b'{"input": {"prompt": "\xff"}}', b"\xef\xbb\xbf{}"]
    ),
    st.integers(1, 50).map(lambda n: b'{"input": {"num_frames": 1, "num_inference_steps": 1}}'[:n]),
)


@dataclass(frozen=True)
class Sent:
    """A request.

    Attributes:
        path: behind /predictions.
    """

    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    path: str = ""
    method: str = "POST"

    def to(self, server: Server) -> requests.Response:
        url = f"{server.url}/predictions{self.path}"
        return requests.request(self.method, url, data=self.body, headers=self.headers, timeout=PATIENCE)


class Inputs:
    """What the served document says about the inputs, as strategies."""

    def __init__(self, document: dict[str, Any]):
        self.schemas = document["components"]["schemas"]
        self.properties = {name: self._settled(entry) for name, entry in self.schemas["Input"]["properties"].items()}

    def _settled(self, entry: dict[str, Any]) -> dict[str, Any]:
        for part in entry.get("allOf", []):
            entry = entry | self.schemas[part["$ref"].rpartition("/")[2]]
        return entry

    def valid(self, name: str) -> st.SearchStrategy[Any]:
        entry = self.properties[name]
        low, high = entry.get("minimum"), entry.get("maximum")
        if "enum" in entry:
            return st.sampled_from(entry["enum"])
        match entry["type"]:
            case "integer":
                return st.integers(low, high)
            case "number":
                return st.floats(low, high, allow_nan=False, allow_infinity=False)
            case "boolean":
                return st.booleans()
        longest = min(entry.get("maxLength", 200), 200)
        return st.text(min_size=entry.get("minLength", 0), max_size=longest) | st.just("a red circle")

    def edges(self, name: str) -> list[Any]:
        """Values about the limits, and strange texts where it is a text."""
        entry = self.properties[name]
        edges: list[Any] = [entry.get("default"), None, *entry.get("enum", [])]
        for limit in (entry[key] for key in ("minimum", "maximum") if key in entry):
            edges += [limit - 1, limit, limit + 1, float(limit), limit + 0.5, str(limit)]
        for length in (entry[key] for key in ("minLength", "maxLength") if key in entry):
            edges += ["x" * max(0, length - 1), "x" * length, "x" * (length + 1), "😀" * length]
        if entry["type"] != "string" or "enum" in entry:
            return edges
        # All of them as a prompt or a file, of which much is made; of the other texts every third.
        return edges + (STRANGE if name in ("prompt", "init_video") else STRANGE[::3])

    def cheap(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same inputs, without the values that are right and cost much."""

        def costs(name: str, value: Any) -> bool:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return name in CAPS and number and CAPS[name] < value <= self.properties.get(name, {}).get("maximum", value)

        return CHEAP | {name: CAPS[name] if costs(name, value) else value for name, value in inputs.items()}


@st.composite
def values(draw: st.DrawFn, inputs: Inputs) -> dict[str, Any]:
    """Right values, and then at most two doubtful ones and two unknown keys."""
    names = st.sampled_from(list(inputs.properties))
    drawn = {name: draw(inputs.valid(name)) for name in draw(st.lists(names, unique=True))}
    if draw(st.booleans()):
        for name in draw(st.lists(names, max_size=2, unique=True)):
            drawn[name] = draw(st.sampled_from(inputs.edges(name)) | JUNK)
    if draw(st.integers(0, 3)) == 0:
        drawn |= draw(st.dictionaries(st.text(max_size=20), JUNK, max_size=2))
    return inputs.cheap(drawn)


@st.composite
def envelopes(draw: st.DrawFn, inputs: Inputs) -> Sent:
    """Whatever may stand around the inputs."""
    body: Any = {"input": draw(values(inputs))}
    keys = st.sampled_from(
        ["id", "webhook", "webhook_events_filter", "output_file_prefix", "context", "created_at", "x"]
    )
    not_text = JUNK.filter(lambda value: not isinstance(value, str))  # no webhook is called, no odd path is made
    body |= draw(st.dictionaries(keys, not_text, max_size=2))
    body |= draw(
        st.fixed_dictionaries({}, optional={"webhook_events_filter": st.lists(st.text(max_size=9), max_size=2)})
    )
    if draw(st.booleans()):
        body["id"] = draw(NAMES)
    prefer = draw(st.sampled_from(["", "respond-async", "RESPOND-ASYNC", "wait=1", "respond-async, wait=5", "x"]))
    match draw(st.integers(0, 9)):
        case 0:
            del body["input"]
        case 1:
            body["input"] = draw(JUNK)
        case 2:
            body = [body]
        case 3:
            body = draw(JUNK)
    if not isinstance(body, dict) or not isinstance(body.get("input"), dict):
        prefer = "respond-async"  # it may be run with the defaults, which takes long
    headers = JSON | ({"Prefer": prefer} if prefer else {})
    return Sent(json.dumps(body).encode(), headers)


def twice(inputs: dict[str, Any], other: dict[str, Any]) -> Sent:
    """Every key two times."""
    pairs = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in [*other.items(), *inputs.items()])
    return Sent(f'{{"input": {{{pairs}}}, "input": {{{pairs}}}}}'.encode())


def nested(depth: int, outside: bool) -> Sent:
    deep = "[" * depth + "]" * depth
    return Sent((deep if outside else f'{{"input": {{"seed": {deep}, "num_frames": 0}}}}').encode())


def sendings(inputs: Inputs) -> st.SearchStrategy[Sent]:
    drawn = values(inputs)
    plain = drawn.map(lambda one: Sent(json.dumps({"input": one}).encode()))
    other_type = st.builds(lambda sent, kind: Sent(sent.body, {"Content-Type": kind}), plain, st.sampled_from(TYPES))
    put = st.builds(
        lambda sent, name, more: Sent(sent.body, sent.headers | more, f"/{name}", "PUT"),
        plain,
        NAMES,
        st.sampled_from([{}, LATER]),
    )
    deep = st.builds(nested, st.sampled_from([2, 60, 120, 130, 500, 100_000]), st.booleans())
    cancel = NAMES.map(lambda name: Sent(b"", {}, f"/{name}/cancel"))
    kinds = [plain] * 5 + [envelopes(inputs)] * 3 + [st.builds(Sent, RAW)] * 2
    kinds += [put, other_type, st.builds(twice, drawn, drawn), deep, cancel]
    return st.sampled_from(kinds).flatmap(lambda kind: kind)


def check(response: requests.Response) -> str:
    """The kind of answer, in a word or two.

    Raises:
        AssertionError: it is none that a caller should get.
    """
    code = response.status_code
    shown = f"{code} {response.text[:500]} to {(response.request.body or b'')[:500]!r}"
    assert code in (200, 202) or 400 <= code < 500, shown
    assert code != 409, f"the server stayed busy: {shown}"
    is_json = "json" in response.headers.get("Content-Type", "")
    answer = response.json() if is_json else response.text
    if code == 404:
        assert response.request.url.endswith("/cancel"), shown
        return "404 no such prediction"
    status = answer.get("status") if is_json else None
    if status in ("succeeded", "starting", "processing", "canceled"):
        return f"{code} {status}"
    reason = (answer.get("error") or answer.get("detail")) if is_json else answer
    assert reason, f"no reason is given: {shown}"
    if code == 200:
        assert status == "failed", shown
        assert SENTENCE.fullmatch(reason), f"no sentence for the caller: {shown}"
        assert not LEAK.search(reason), f"it tells too much: {shown}"
        return "200 failed"
    return f"{code} refused"


def check_health(server: Server, worker: psutil.Process, seconds: float = PATIENCE) -> None:
    """The server is ready, with the worker that it had."""
    server.until(lambda: server.health()["status"] == "READY", seconds, "ready again")
    assert server.worker() == worker


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("fuzzed") / "server", tiny_folder) as started:
        yield started


@pytest.fixture(scope="module")
def inputs(server: Server) -> Inputs:
    return Inputs(requests.get(f"{server.url}/openapi.json", timeout=PATIENCE).json())


def test_every_edge_of_every_input_is_answered_with_a_reason(server: Server, inputs: Inputs):
    worker = server.worker()
    for name in inputs.properties:
        for value in inputs.edges(name):
            sent = Sent(json.dumps({"input": inputs.cheap({name: value})}).encode())
            check(server.patiently(lambda: sent.to(server)))  # noqa: B023
    check_health(server, worker)


def test_every_request_is_answered_with_a_reason_and_the_worker_survives(server: Server, inputs: Inputs):
    worker = server.worker()
    kinds: Counter[str] = Counter()

    # No shrinking: a smaller request says nothing about a server that the first one has killed.
    @settings(
        max_examples=COUNT,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(sendings(inputs))
    def fuzz(sent: Sent) -> None:
        response = server.patiently(lambda: sent.to(server))
        kinds[check(response)] += 1
        if response.status_code == 202:
            url = f"{server.url}/predictions/{response.json()['id']}/cancel"
            assert requests.post(url, timeout=PATIENCE).status_code in (200, 404)  # 404: it has ended

    try:
        fuzz()
    finally:
        print(f"\n{sum(kinds.values())} requests", *(f"{kinds[kind]:6} {kind}" for kind in sorted(kinds)), sep="\n")
    check_health(server, worker)
    assert server.predict(input=CHEAP).json()["status"] == "succeeded"
    assert {"200 succeeded", "200 failed", "422 refused"} <= kinds.keys()


UNFIT = """
import os
from cog import BasePredictor, Input

class InvalidRequest(Exception):
    pass

class Predictor(BasePredictor):
    def predict(self, prompt: str = Input(default="")) -> str:
        if prompt == "crash":
            os._exit(1)
        sentences = {"path": f"There is no {__file__}.", "address": f"{object()} is wrong.", "none": ""}
        raise InvalidRequest(sentences[prompt])
"""


def test_the_checks_see_a_path_an_address_a_missing_reason_and_a_crash(tmp_path: Path):
    with serve(tmp_path / "server", None, schema=False, predictor=UNFIT) as unfit:
        worker = unfit.worker()
        check_health(unfit, worker)
        expected = {"path": "too much", "address": "too much", "none": "no sentence", "crash": "no sentence"}
        for prompt, words in expected.items():
            with pytest.raises(AssertionError, match=words):
                check(unfit.predict(input={"prompt": prompt}))
        with pytest.raises(AssertionError, match="ready again"):
            check_health(unfit, worker, seconds=1)

"""Hostile requests: every one ends, in an answer or in a 4xx of OpenAI's shape, and the gateway answers on."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.app import Settings

PATHS = ("/chat/completions", "/completions")
GOOD = {"/chat/completions": {"messages": [{"role": "user", "content": "x"}]}, "/completions": {"prompt": "x"}}
COMMON = {"model": "d2sd", "max_tokens": 2}


@pytest.fixture(scope="module")
def asked(url):
    with httpx.Client(base_url=url, timeout=30, headers={"content-type": "application/json"}) as client:
        yield client


def refused(response):
    """Whether it is a 4xx in OpenAI's shape; a 5xx never is right."""
    assert response.status_code < 500, response.text
    if response.status_code == 200:
        return False
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 2000
    return True


DEEP = b'{"model": "d2sd", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
WRONG = [None, True, -1, 2**31, 2**70, 1.5, 1e400, float("nan"), "", "5", "x" * 5000, [], [[]], [None], {}, {"a": {}}]
BAD_BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"\xff\xfe{}",
    b'{"model": "d2sd", "prompt": "\xff\xfe"}',
    b'{"model": "d2sd", "prompt": "\\ud800"}',
    b'{"model": "\\udfff", "prompt": "x"}',
    b'{"\\ud800": 1, "model": "d2sd", "prompt": "x"}',
    b'{"model": "d2sd", "prompt": "x", "temperature": NaN}',
    b'{"model": "d2sd", "prompt": "x", "top_p": Infinity}',
    b'{"model": "d2sd", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"model": "d2sd", "prompt": "x", "seed": ' + b"9" * 30 + b"}",
    b'{"model": "d2sd", "prompt": "x"} trailing',
    DEEP,
    b" " * (Settings.body_limit + 1),
    b"x" * (4 * Settings.body_limit),
    json.dumps({**COMMON, "prompt": "x", "stop": [f"word {n}" for n in range(10_000)]}).encode(),
    json.dumps({**COMMON, "prompt": "x", "stop": ["x" * 10_000]}).encode(),
    json.dumps({**COMMON, "prompt": ["x"] * 10_000}).encode(),
    json.dumps({**COMMON, "prompt": [2**31]}).encode(),
    json.dumps({**COMMON, "prompt": [5000]}).encode(),
    json.dumps({**COMMON, "prompt": [-1]}).encode(),
    json.dumps({**COMMON, "prompt": "x", "n": 10_000}).encode(),
    json.dumps({**COMMON, "prompt": "x" * 2_000_000}).encode(),
    json.dumps({**COMMON, "messages": [{"role": "user", "content": "x"}] * 20_000}).encode(),
    json.dumps({**COMMON, "prompt": "x", **{f"key {n}": n for n in range(1000)}}).encode(),
]


@pytest.mark.parametrize("path", PATHS)
def test_bodies_that_are_no_request(asked, path):
    for body in BAD_BODIES:
        assert refused(asked.post(path, content=body)), body[:100]
    assert not refused(asked.post(path, json=COMMON | GOOD[path]))


@pytest.mark.parametrize("path", PATHS)
def test_every_parameter_with_every_wrong_value(asked, path):
    """A value that is right for a parameter is answered, the rest is refused; none of a type that it has not passes."""
    schema = asked.get(f"{asked.base_url}".replace("/v1/", "/openapi.json")).json()["components"]["schemas"]
    name = "ChatRequest" if "chat" in path else "CompletionRequest"
    passed = []
    for key, about in schema[name]["properties"].items():
        for value in WRONG:
            body = json.dumps({**COMMON, **GOOD[path], key: value}).encode()
            if not refused(asked.post(path, content=body)):
                passed.append((key, value))
                assert _matches(value, about, schema), passed[-1]
    assert not {key for key, value in passed if value == "x" * 5000} - {"user", "service_tier", "request_id", *OPAQUE}


OPAQUE = {"safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
KINDS = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def _matches(value, about, schema):
    """Whether a value has a type that an OpenAPI schema names."""
    if "anyOf" in about:
        return any(_matches(value, one, schema) for one in about["anyOf"])
    if "enum" in about:
        return value in about["enum"]
    if "$ref" in about:
        return isinstance(value, dict)
    return isinstance(value, KINDS[about["type"]]) and (about["type"] == "boolean") == isinstance(value, bool)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "stream")
KEYS += ("stream_options", "echo", "logprobs", "top_logprobs", "tools", "response_format", "logit_bias", "user", "metadata")


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    path=st.sampled_from(PATHS), changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), json_values, max_size=3)
)
def test_random_requests(asked, path, changes):
    refused(asked.post(path, content=json.dumps({**COMMON, **GOOD[path], **changes}).encode("utf-8", "surrogatepass")))


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", [*PATHS, "/models", "/nothing", "/../../etc/passwd", "/models/%00", "/embeddings"])
def test_other_verbs_and_places(asked, method, path):
    if (method, path) != ("GET", "/models"):
        assert refused(asked.request(method, path))

"""Keys and what they may use, bounds on bodies, clients that leave: before a service that is made up."""

import asyncio
import hashlib
import json

import httpx
import pytest

from client import Piece
from client.request import join
from gateway import limits
from gateway.app import Settings, create
from gateway.errors import ApiError
from gateway.limits import Account, Keys, KeysError
from gateway.replicas import Replicas

BODY = {"model": "d2sd", "prompt": "x", "max_tokens": 5}


class Slow:
    """A client whose service answers with ``said`` when ``go`` is set, and knows how many were dropped."""

    go: asyncio.Event
    dropped = 0
    said = "yes"

    def __init__(self, address):
        pass

    async def ready(self):
        return True

    async def stream(self, prompt, options, request_id, headers):
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            Slow.dropped += 1
            raise
        yield Piece(self.said, 7, 3, "length", 3)

    async def generate(self, prompt, options, request_id, headers):
        return join([piece async for piece in self.stream(prompt, options, request_id, headers)])

    async def close(self):
        pass


@pytest.fixture
async def application(tmp_path):
    """Makes an application with keys, and a client of it."""
    Slow.go, Slow.dropped = asyncio.Event(), 0
    Slow.go.set()
    replicas = Replicas(["127.0.0.1:1"], Slow)
    async with replicas.watched():

        def make(keys="", **settings):
            file = tmp_path / "keys.yaml"
            file.write_text(keys)
            app = create(replicas, Keys.read(file) if keys else Keys(), Settings(**settings))
            return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway/v1")

        yield make


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


async def test_keys(application):
    digest = hashlib.sha256(b"sk-second-key").hexdigest()
    asked = application(f"- {{name: a, key: sk-first-key}}\n- {{name: b, sha256: {digest}}}\n")
    for header in ({}, bearer("sk-other-key"), bearer(digest), bearer(""), {"Authorization": "sk-first-key"}, bearer("ü")):
        header = {name: value.encode() for name, value in header.items()}
        answer = await asked.post("/completions", json=BODY, headers=header)
        assert answer.status_code == 401, header
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert (await asked.get("/models", headers=header)).status_code == 401
    for key in ("sk-first-key", "sk-second-key"):
        assert (await asked.post("/completions", json=BODY, headers=bearer(key))).status_code == 200
    assert (await asked.get("http://gateway/health/live")).status_code == 200


async def test_requests_in_flight(application):
    asked = application("- {name: a, key: sk-first-key, requests: 2}\n- {name: b, key: sk-second-key}\n")
    Slow.go.clear()
    waiting = [asyncio.create_task(asked.post("/completions", json=BODY, headers=bearer("sk-first-key"))) for _ in range(2)]
    await asyncio.sleep(0.05)
    refused = await asked.post("/completions", json=BODY, headers=bearer("sk-first-key"))
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["message"] == "requests: found 2 of a in flight, allowed: 2"
    other = asyncio.create_task(asked.post("/completions", json=BODY, headers=bearer("sk-second-key")))
    await asyncio.sleep(0.05)
    Slow.go.set()
    assert [answer.status_code for answer in await asyncio.gather(*waiting, other)] == [200] * 3
    assert (await asked.post("/completions", json=BODY, headers=bearer("sk-first-key"))).status_code == 200
    metrics = (await asked.get("http://gateway/metrics")).text
    assert 'd2sd_gateway_refused_total{key="a"} 1.0' in metrics
    assert 'd2sd_gateway_tokens_total{key="a",kind="completion"} 21.0' in metrics


async def test_tokens_a_minute(application):
    """Ten tokens an answer, 15 a minute: the second answer ends in debt, and the third request waits for it."""
    asked = application("- {name: a, key: sk-first-key, tokens_per_minute: 15}\n")
    codes = []
    for stream in (False, True, False):
        answer = await asked.post("/completions", json={**BODY, "stream": stream}, headers=bearer("sk-first-key"))
        codes.append(answer.status_code)
    assert codes == [200, 200, 429]
    assert 20 <= int(answer.headers["retry-after"]) <= 24  # 5 in debt and one more, a token every 4 s


def test_an_account_fills_again(monkeypatch):
    now = 100.0
    monkeypatch.setattr(limits.time, "monotonic", lambda: now)
    account = Account("a", tokens_per_minute=60)
    account.spend(90)
    with pytest.raises(ApiError) as caught, account.request():
        pass
    assert caught.value.retry_after == 31
    now += 31
    with account.request():
        account.spend(1)
    now += 1000
    account.spend(59)
    with account.request():
        pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found None, allowed: a valid list"),
        ("[]", "allowed: List should have at least 1 item"),
        ("- {name: a}", r"\[0\]: allowed: one of key and sha256"),
        ("- {name: a, key: sk-first-key, sha256: " + "a" * 64 + "}", r"\[0\]: allowed: one of key and sha256"),
        ("- {name: a, key: short}", r"\[0\].key: allowed: String should have at least 8 characters"),
        ("- {name: a, key: sk-first-key, requests: 0}", r"\[0\].requests: found 0, allowed: greater than or equal to 1"),
        ("- {name: a, key: sk-first-key, speed: 1}", r"\[0\].speed: found 1, which is no parameter"),
        ("- {name: a, key: sk-first-key}\n- {name: a, key: sk-second-key}", "two entries of the same name or key"),
        ("{", "while parsing"),
    ],
)
def test_a_bad_file_of_keys(tmp_path, text, said):
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(KeysError, match=said) as caught:
        Keys.read(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "short" not in str(caught.value)


async def test_an_event_is_one_line_however_lines_are_told_apart(application, monkeypatch):
    """``httpx`` for one breaks them wherever Unicode does."""
    monkeypatch.setattr(Slow, "said", "日本 one\u2028two\x85three\u2029four\x1cfive")
    async with application().stream("POST", "/completions", json=BODY | {"stream": True}) as response:
        events = [line async for line in response.aiter_lines() if line]
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["text"] == Slow.said
    assert all(event.startswith("data: ") for event in events)


async def test_bodies_are_bounded(application):
    asked = application(body_limit=1000)
    assert (await asked.post("/completions", json=BODY)).status_code == 200

    async def parts(count):
        for _ in range(count):
            yield b"x" * 1000

    for content in (b"x" * 1001, b"x" * 50_000, parts(2), parts(100)):
        answer = await asked.post("/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


async def test_more_at_once_than_there_is_room_for(application):
    asked = application(at_once=2)
    Slow.go.clear()
    waiting = [asyncio.create_task(asked.post("/completions", json=BODY)) for _ in range(2)]
    await asyncio.sleep(0.05)
    refused = await asked.post("/completions", json=BODY)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    Slow.go.set()
    assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_while_it_waits(application, stream):
    """The service's side is dropped at once, though nothing was ever sent."""
    app = application()._transport.app
    Slow.go.clear()
    sent, gone = [], asyncio.Event()
    body = f'{{"model": "d2sd", "prompt": "x", "n": 3, "stream": {str(stream).lower()}}}'.encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http", "root_path": ""}
    scope |= {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
    running = asyncio.create_task(app(scope, receive, send))
    await asyncio.sleep(0.05)
    gone.set()
    await asyncio.wait_for(running, 1)
    assert (Slow.dropped, sent) == (3, [])

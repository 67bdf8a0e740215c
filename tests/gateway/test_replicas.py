"""Two real Tritons behind one gateway, one of them killed; and how requests are spread, over clients that are made up."""

import asyncio
import json
import time
from dataclasses import replace
from typing import ClassVar

import httpx
import psutil
import pytest

from client import Options, Piece, ServiceError
from client.request import join
from export.build import build
from export.config import load
from gateway.replicas import Replicas
from tests import tiny
from tests.gateway.conftest import opened, serving


async def test_one_of_two_is_killed_under_load(tmp_path):
    built = tmp_path / "build"
    build(load(tiny.save_long_pipeline(tmp_path, waiting=16)), built)
    with serving(built, tmp_path / "first") as first, serving(built, tmp_path / "second") as second:
        names = [option for one in (first, second) for option in ("--triton", f"127.0.0.1:{one.ports.grpc}")]
        with opened(*names) as url:
            async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as asked:
                ended = await _streams(asked, first)
                # What the dead one had begun (two places) ends with an error; what waited there is asked again elsewhere.
                lost = ended.count("unavailable")
                assert 1 <= lost <= 2
                assert set(ended) == {"unavailable", "length"}
                began = time.monotonic()
                body = {"model": "d2sd", "prompt": "x", "max_tokens": 2}
                answers = await asyncio.gather(*(asked.post("/completions", json=body) for _ in range(16)))
                assert [answer.status_code for answer in answers] == [200] * 16
                assert time.monotonic() - began < 5
                while (await asked.get("/../health/ready")).json()["replicas"] != 1:  # looked at every second
                    assert time.monotonic() - began < 5
                    await asyncio.sleep(0.1)


async def _streams(asked, victim):
    """How each of eight long streams ends, a server being killed once all wait or run."""
    started = 0

    async def read(number):
        nonlocal started
        body = {"model": "d2sd", "prompt": f"stream {number}", "max_tokens": 600, "ignore_eos": True, "stream": True}
        async with asked.stream("POST", "/completions", json=body) as response:
            assert response.status_code in (200, 503)
            last = None
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    started += last is None
                    last = json.loads(line.removeprefix("data: "))
                elif line.startswith("{"):
                    last = json.loads(line)
            return last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"]

    reading = [asyncio.create_task(read(number)) for number in range(8)]
    while started < 4:
        await asyncio.sleep(0.02)
    tree = psutil.Process(victim.process.pid)
    stubs = tree.children(recursive=True)
    victim.process.kill()
    for stub in stubs:
        stub.kill()
    return await asyncio.wait_for(asyncio.gather(*reading), 60)


class Fake:
    """A client whose service answers with its own address, or with what ``fails`` says."""

    fails: ClassVar[dict[str, tuple[int, str]]] = {}  # by address: after how many pieces, and with which status

    def __init__(self, address):
        self.address, self.is_ready, self.closed = address, True, False
        self.go = asyncio.Event()
        self.go.set()

    async def ready(self):
        return self.is_ready

    async def stream(self, prompt, options, request_id, headers):
        after, status = self.fails.get(self.address, (99, ""))
        for number in range(3):
            if number == after:
                raise ServiceError(self.address, status)
            await asyncio.sleep(0.01)
            await self.go.wait()
            yield Piece(self.address, number + 1, number + 1, "length" if number == 2 else "", 1)

    async def generate(self, prompt, options, request_id, headers):
        pieces = [piece async for piece in self.stream(prompt, options, request_id, headers)]
        return replace(join(pieces), text=self.address)

    async def close(self):
        self.closed = True


@pytest.fixture
async def three(monkeypatch):
    monkeypatch.setattr(Fake, "fails", {})
    replicas = Replicas(["127.0.0.1:1", "127.0.0.2:1", "127.0.0.3:1"], Fake)
    async with replicas.watched():
        yield replicas


async def ask(replicas):
    return (await replicas.generate("x", Options(), "", {})).text


async def test_requests_go_where_fewest_are(three):
    for count in (3, 12):
        answers = await asyncio.gather(*(ask(three) for _ in range(count)))
        assert [answers.count(address) for address in three.known] == [count // 3] * 3
    assert {await ask(three) for _ in range(3)} == set(three.known)


async def test_what_has_not_begun_is_asked_again(three, monkeypatch):
    monkeypatch.setattr(Fake, "fails", {"127.0.0.1:1": (0, "UNAVAILABLE"), "127.0.0.2:1": (0, "UNAVAILABLE")})
    assert [await ask(three) for _ in range(6)] == ["127.0.0.3:1"] * 6


async def test_what_has_begun_ends_with_its_error(three, monkeypatch):
    monkeypatch.setattr(Fake, "fails", dict.fromkeys(three.known, (1, "UNAVAILABLE")))
    pieces = []

    async def read():
        async for piece in three.stream("x", Options(), "", {}):
            pieces.append(piece)

    with pytest.raises(ServiceError):
        await read()
    assert len(pieces) == 1


async def test_a_refusal_is_not_asked_again(three, monkeypatch):
    monkeypatch.setattr(Fake, "fails", dict.fromkeys(three.known, (0, "INVALID_ARGUMENT")))
    with pytest.raises(ServiceError) as caught:
        await ask(three)
    assert caught.value.status == "INVALID_ARGUMENT"
    assert [replica.in_flight for replica in three.known.values()] == [0, 0, 0]


async def test_where_all_fail_the_last_error_is_told(three, monkeypatch):
    monkeypatch.setattr(Fake, "fails", dict.fromkeys(three.known, (0, "UNAVAILABLE")))
    with pytest.raises(ServiceError, match=r"127\.0\.0"):
        await ask(three)


async def test_one_that_goes_ends_what_it_began_and_gets_nothing_new(three):
    leaving = next(iter(three.known.values()))
    leaving.client.go.clear()
    running = [asyncio.create_task(ask(three)) for _ in range(3)]
    await asyncio.sleep(0.005)
    leaving.client.is_ready = False
    await three.look()
    assert {await ask(three) for _ in range(4)} == set(three.known) - {leaving.address}
    leaving.client.go.set()
    assert leaving.address in await asyncio.gather(*running)


async def test_one_no_longer_listed_is_closed_when_it_has_ended(three):
    leaving = three.known["127.0.0.3:1"]
    leaving.client.go.clear()
    running = [asyncio.create_task(ask(three)) for _ in range(3)]
    await asyncio.sleep(0.005)
    three.names = three.names[:2]
    await three.look()
    assert not leaving.client.closed
    leaving.client.go.set()
    assert leaving.address in await asyncio.gather(*running)
    await three.look()
    assert leaving.client.closed
    assert sorted(three.known) == ["127.0.0.1:1", "127.0.0.2:1"]


async def test_without_a_replica():
    replicas = Replicas(["no-such-host.invalid:1"], Fake)
    async with replicas.watched():
        with pytest.raises(ServiceError, match="no replica") as caught:
            await ask(replicas)
    assert caught.value.status == "UNAVAILABLE"

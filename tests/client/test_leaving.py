"""What the clients say over HTTP when they leave: a service that was left with something to do is told, by the request's id."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from client import AsyncClient, Client, ServiceError

NUMBERS = {"output_tokens": 1, "cycles": 1, "num_input_tokens": 1, "num_draft_tokens": 0, "acceptance_histogram": 1}
TEXT = "日本\u2028\x85"  # which breaks no line of an event
TEXTS = {"log_probs": "", "prompt_log_probs": "", "trace_output": ""}


class Service(BaseHTTPRequestHandler):
    """Says of a text what it is told to by it."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.heard.append((self.path.removeprefix("/v2/models/"), body))
        text = body.get("text_input")
        if text == "silent":
            self.server.over.wait(10)
        refused = text == "refused"
        told = NUMBERS | TEXTS | {"text_output": TEXT, "finish_reason": "length" if text == "whole" else ""}
        if refused:
            told = {"error": "x: found 1, allowed: 2"}
        said = ("data: " * self.path.endswith("_stream") + json.dumps(told, ensure_ascii=False) + "\n\n").encode()
        self.send_response(400 if refused else 200)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_):
        pass


@pytest.fixture
def service():
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        server.heard, server.over = [], threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def ask(service, plain, text, stream, timeout):
    address = f"127.0.0.1:{service.server_address[1]}"
    if plain:
        asked = Client(address, "http", timeout)
        return "".join(piece.text for piece in asked.stream(text)) if stream else asked.generate(text).text

    async def answer():
        async with AsyncClient(address, "http", timeout) as client:
            if stream:
                return "".join([piece.text async for piece in client.stream(text, request_id="mine")])
            return (await client.generate(text, request_id="mine")).text

    return asyncio.run(answer())


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("text", "left"), [("whole", False), ("refused", False), ("silent", True), ("cut", True)])
def test_a_stop_is_sent_if_there_is_anything_to_end(service, plain, stream, text, left):
    if text in ("refused", "silent"):
        with pytest.raises(ServiceError):
            ask(service, plain, text, stream, timeout=0.2 if text == "silent" else 60)
    else:
        assert ask(service, plain, text, stream, timeout=60) == TEXT
    (where, asked), *stops = service.heard
    assert where == ("ensemble/generate_stream" if stream else "ensemble/generate")
    assert asked["id"].startswith("" if plain else "mine-")
    left = left and (stream or text == "silent")  # a whole answer is one, whatever it says
    assert stops == ([("d2sd/generate", {"id": asked["id"], "stop": True})] if left else [])


def test_requests_of_one_name_are_stopped_one_by_one(service):
    for _ in range(2):
        ask(service, False, "whole", True, timeout=60)
    assert len({asked["id"] for _, asked in service.heard}) == 2


async def test_a_client_that_is_closed_already_leaves_in_silence(service):
    client = AsyncClient(f"127.0.0.1:{service.server_address[1]}", "http")
    pieces = client.stream("cut")
    await anext(pieces)
    await client.close()
    await pieces.aclose()
    assert len(service.heard) == 1

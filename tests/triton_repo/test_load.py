"""A tiny target through a real Triton that has few places: who waits, is refused or leaves, and that all is free again."""

import asyncio
import json
import queue
import re
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import aclosing, contextmanager
from itertools import chain

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpc

from benchmarks.speed import Case, Served
from client import AsyncClient, Client, Options, ServiceError
from client.request import Events, join, to_tensors
from export.build import build
from export.config import load
from tests import tiny
from tests.triton_repo.at_hand import eventually, requests_at_hand
from triton_repo.metrics import EVERY
from triton_repo.serve import Ports, Server

LONG = 3600  # tokens, two seconds at least
SHORT = Options(max_tokens=4)
ENDLESS = Options(max_tokens=12_000, ignore_eos=True)  # ten seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("load")
    build(load(tiny.save_long_pipeline(root, waiting=3)), root / "build")
    with Server(root / "build", "127.0.0.1", Ports(0, 0, 0), log=root / "triton.log") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def asked(server):
    return Client(f"127.0.0.1:{server.ports.grpc}", timeout=60)


@pytest.fixture(scope="module")
def options(server):
    """For an answer to "now" that has its full length, because no token of it is an end."""
    asked = Client(f"127.0.0.1:{server.ports.grpc}", timeout=60)
    for end_id in range(299, 200, -1):
        options = Options(max_tokens=LONG, end_id=end_id)
        if asked.generate("now", options).finish_reason == "length":
            return options
    raise AssertionError("every token is in it")


def post(server, body, kind="generate"):
    return httpx.post(f"http://127.0.0.1:{server.ports.http}/v2/models/ensemble/{kind}", json=body, timeout=60)


def last_response(server, text, **options):
    """To a long request over a bare stream; with Triton's own fields."""
    prompt = grpc.InferInput("text_input", [1, 1], "BYTES")
    prompt.set_data_from_numpy(np.array([[text]], dtype=np.object_))
    count = grpc.InferInput("max_tokens", [1, 1], "INT32")
    count.set_data_from_numpy(np.array([[900]], dtype=np.int32))
    arrived: queue.Queue[tuple] = queue.Queue()
    with grpc.InferenceServerClient(f"127.0.0.1:{server.ports.grpc}") as service:
        service.start_stream(lambda result, error: arrived.put((result, error)))
        service.async_stream_infer("ensemble", [prompt, count], **options)
        return arrived.get(timeout=60)


def cancelled(server):
    """How many requests ended so, by the server's own count."""
    text = httpx.get(f"http://127.0.0.1:{server.ports.metrics}/metrics").text
    return sum(float(n) for n in re.findall(r'^d2sd:request_success_total\{finished_reason="cancelled".* (\S+)$', text, re.M))


@contextmanager
def all_left(server, count):
    """Inside, clients leave so many long requests, which end then."""
    time.sleep(1.2 * EVERY)  # for what others have left
    before = cancelled(server)
    yield
    eventually(lambda: requests_at_hand(server) == 0)
    eventually(lambda: cancelled(server) == before + count)


def begun(asked, options):
    """Two long answers that have both places, until they are read."""
    taken = [asked.stream("now", options) for _ in range(2)]
    return [chain([next(pieces)], pieces) for pieces in taken]


def all_is_free(asked):
    """As many requests of full length as there are places are answered side by side: no row is lost."""
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda text: asked.generate(text, Options(max_tokens=ENDLESS.max_tokens)), ("free", "too")))
    assert {answer.finish_reason for answer in answers} <= {"end", "length"}


def test_whoever_finds_no_place_waits_and_one_too_many_is_refused_at_once(server, asked, options):
    text = asked.generate("now", SHORT).text
    with ThreadPoolExecutor(4) as pool:
        taken = begun(asked, options)
        others = [pool.submit(asked.generate, "now", SHORT) for _ in range(4)]
        done, waiting = wait(others, return_when=FIRST_COMPLETED)
        [refused] = done
        with pytest.raises(ServiceError, match=r"limits.waiting: found 3 requests waiting for a place, allowed: no") as told:
            refused.result()
        assert told.value.status == "UNAVAILABLE"
        eventually(lambda: (requests_at_hand(server, "running"), requests_at_hand(server, "waiting")) == (2, 3))
        began = time.monotonic()
        response = post(server, {"text_input": "now", "max_tokens": 4})
        assert time.monotonic() - began < 1
        assert response.status_code == 400  # Triton's own, of all errors that come as responses
        assert "limits.waiting" in response.json()["error"]
        assert not any(other.done() for other in waiting), "the places are taken all the while"
        longer = [join(list(pieces)) for pieces in taken]
        assert [answer.output_tokens for answer in longer] == [LONG, LONG]
        shorter = [other.result() for other in waiting]
        assert [answer.output_tokens for answer in shorter] == [4, 4, 4]
    assert all(answer.text.startswith(text) for answer in (*longer, *shorter))
    all_is_free(asked)


async def test_clients_that_leave_while_they_wait_are_taken_in_or_answered(server, asked):
    async def answered(client, text, begun):
        async for _ in client.stream(text, Options(max_tokens=LONG - 300)):
            begun.set()

    async with AsyncClient(f"127.0.0.1:{server.ports.grpc}") as client:
        for wait in (True, True, False):
            begun = asyncio.Event()
            texts = ("word " * 40, "other " * 40, "third", "fourth")  # places for two
            leaving = [asyncio.create_task(answered(client, text, begun)) for text in texts]
            await (begun.wait() if wait else asyncio.sleep(0.02))
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
    began = time.monotonic()
    assert asked.generate("x", SHORT).output_tokens <= 4
    assert time.monotonic() - began < 2
    all_is_free(asked)


def test_a_deadline_ends_an_answer_with_what_it_has(server, asked, options):
    body = {"text_input": "now", "max_tokens": LONG, "end_id": options.end_id, "parameters": {"timeout": 300_000}}
    response = post(server, body).json()
    assert (response["finish_reason"], response["output_tokens"] < LONG) == ("timeout", True)
    shorter = Options(max_tokens=response["output_tokens"], end_id=options.end_id)
    assert asked.generate("now", shorter).text == response["text_output"]


def test_a_deadline_before_the_first_token_is_an_error(server, asked, options):
    taken = begun(asked, options)
    result, error = last_response(server, b"timed", timeout=100_000)
    assert result is None
    assert "timeout: found no place for this request in its time" in str(error)
    assert [join(list(pieces)).output_tokens for pieces in taken] == [LONG, LONG]


def test_a_request_is_stopped_by_its_id(server):
    """Over HTTP, where Triton does not tell that a client has hung up: while it runs, and before it is here."""
    body = {"text_input": "long", "max_tokens": LONG, "ignore_eos": True}
    url = f"http://127.0.0.1:{server.ports.http}/v2/models/{{}}".format

    def stop(name):
        return httpx.post(url("d2sd/generate"), json={"id": name, "stop": True}).json()["finish_reason"]

    ended, names = list[str](), iter(("one", "another", "a third", "a fourth"))
    while len(ended) < 2:
        name = next(names)
        asked = body | {"id": name, "stream": True}
        with httpx.stream("POST", url("ensemble/generate_stream"), json=asked, timeout=60) as stream:
            events = Events()
            said = (json.loads(one) for chunk in stream.iter_bytes() for one in events.take(chunk))
            assert next(said)["finish_reason"] == ""
            told = stop(name)
            last = [*said][-1]
        assert last["finish_reason"] == (told or "length"), "where the machine stood still the answer may have been over"
        if told:
            assert last["output_tokens"] < LONG
            ended.append(name)
        eventually(lambda: requests_at_hand(server) == 0)
    assert stop(ended[0]) == stop("early") == ""
    assert post(server, body | {"id": "early"}).json()["finish_reason"] == "cancelled"
    nameless = httpx.post(url("d2sd/generate"), json={"stop": True})
    assert nameless.status_code == 400
    assert "stop: found in a request without an id" in nameless.json()["error"]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_whoever_leaves_a_stream_frees_its_place(server, protocol):
    asked = Client(f"127.0.0.1:{getattr(server.ports, protocol)}", protocol, timeout=60)
    with all_left(server, 3):
        for _ in range(2):
            for _ in asked.stream("x", ENDLESS):
                break
        closed = asked.stream("x", ENDLESS)
        next(closed)
        closed.close()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_whoever_is_cancelled_frees_its_place(server, protocol):
    """Of a stream and of whole answers, one of which is cancelled again while it leaves."""
    with all_left(server, 3):
        async with AsyncClient(f"127.0.0.1:{getattr(server.ports, protocol)}", protocol, timeout=60) as client:
            async with aclosing(client.stream("x", ENDLESS, request_id="mine")) as pieces:
                await anext(pieces)
            leaving = [asyncio.create_task(client.generate("x", ENDLESS, "mine")) for _ in range(2)]
            await asyncio.to_thread(eventually, lambda: requests_at_hand(server) == 2)
            for task in (*leaving, leaving[0]):
                task.cancel()
                await asyncio.sleep(0)
            assert {type(end) for end in await asyncio.gather(*leaving, return_exceptions=True)} == {asyncio.CancelledError}


def test_a_client_of_the_decoder_frees_its_place_by_leaving(server):
    """Without a word: Triton tells a model that a stream of its own was cancelled."""
    with all_left(server, 1), grpc.InferenceServerClient(f"127.0.0.1:{server.ports.grpc}") as service:
        first = threading.Event()
        service.start_stream(lambda result, error: first.set())
        ids = grpc.InferInput("input_ids", [1, 3], "INT32")
        ids.set_data_from_numpy(np.array([[5, 6, 7]], np.int32))
        options = to_tensors({"max_tokens": LONG, "ignore_eos": True, "stream": True}, grpc)
        service.async_stream_infer("d2sd", [ids, *options])
        assert first.wait(60)
        service.stop_stream(cancel_requests=True)


def test_a_unary_request_ends_when_its_client_leaves(server):
    with grpc.InferenceServerClient(f"127.0.0.1:{server.ports.grpc}") as service:
        long = to_tensors({"text_input": "x", "max_tokens": LONG, "ignore_eos": True}, grpc)
        calls = [service.async_infer("tensorrt_llm_bls", long, lambda result, error: None) for _ in range(4)]
        eventually(lambda: requests_at_hand(server, "running") > 0)
        for call in calls:
            call.cancel()
        eventually(lambda: requests_at_hand(server) == 0)


@pytest.mark.parametrize("found", ["soon", -1, 1.5, True])
def test_a_timeout_that_is_none(server, found):
    response = post(server, {"text_input": "x", "max_tokens": 2, "parameters": {"timeout": found}})
    assert response.status_code == 400
    assert f"timeout: found {json.dumps(found)}, allowed: microseconds, an integer" in response.json()["error"]


def test_a_long_answer_has_a_trace_of_its_first_cycles(server, asked, options):
    longer = Options(max_tokens=1015, end_id=options.end_id, ignore_eos=True, trace=True)
    answer = asked.generate("now", longer)
    cycles, left = answer.trace["cycles"], answer.trace["left_out"]
    assert (len(cycles), left) == (1000, {"cycles": 15, "tokens": 15})
    assert answer.text.startswith("".join(cycle["text"] for cycle in cycles))


def test_a_known_beginning_changes_no_answer(server, asked):
    """The second of each pair finds the blocks of the first."""
    text = "the quick brown fox jumps over the lazy dog " * 6
    options = Options(max_tokens=40)
    fresh = asked.generate("again: " + text, options)
    assert asked.generate("again: " + text, options) == fresh
    turn = asked.generate("again: " + text + fresh.text + " and then?", options)
    assert asked.generate("again: " + text + fresh.text + " and then?", options) == turn


@pytest.mark.parametrize("prompts", [((5, 6, 7),), ((5, 6, 7), (8, 9))])
def test_the_speed_benchmark_counts_what_came_while_all_answers_grew(server, prompts):
    case = Case("concurrency", "some", prompts, 400)
    served = Served(f"127.0.0.1:{server.ports.grpc}")
    for made in served.race(case, ["autoregressive", "autoregressive"], seed=0):
        assert 0 < made["tokens"] <= 399 * len(prompts)
        assert made["passes"] == made["tokens"], "plain decoding says a token a pass"
        assert made["seconds"] > 0

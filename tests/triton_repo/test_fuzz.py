"""Requests that nobody should send: each is answered, or refused in a line, and the next one is right."""

import random
import subprocess
import time

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from client import Client, Options
from client.request import status_of, to_tensors
from tests.triton_repo.at_hand import eventually, requests_at_hand
from triton_repo.serve import Ports, Server

SEED, REQUESTS = 14, 150
DTYPES = {
    **dict.fromkeys(("text_input", "messages", "chat_template_kwargs", "mode", "stop_words", "bad_words"), np.object_),
    **dict.fromkeys(("max_tokens", "end_id", "top_k", "pad_id", "beam_width", "num_return_sequences", "min_tokens"), np.int32),
    **dict.fromkeys(("top_p", "temperature", "length_penalty", "repetition_penalty"), np.float32),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), np.float32),
    **dict.fromkeys(("prompt_ids", "num_top_log_probs"), np.int32),
    **dict.fromkeys(
        ("stream", "parse_special", "return_log_probs", "return_prompt_log_probs", "ignore_eos", "trace"), np.bool_
    ),
    **dict.fromkeys(("add_generation_prompt", "continue_final_message"), np.bool_),
    "seed": np.uint64,
}
USUAL = {
    "text_input": [b"the quick"],
    "messages": [b'[{"role": "user", "content": "x"}]'],
    "chat_template_kwargs": [b"{}"],
    "mode": [b"d2sd"],
    "stop_words": [b"fox", b""],
    "bad_words": [b""],
    "max_tokens": [3],
    "end_id": [-1],
    "top_k": [5],
    "top_p": [0.9],
    "temperature": [0.7],
    "seed": [3],
    "stream": [True],
    "parse_special": [True],
    "return_log_probs": [True],
    "return_prompt_log_probs": [True],
    "num_top_log_probs": [3],
    "ignore_eos": [True],
    "trace": [True],
    "add_generation_prompt": [True],
    "continue_final_message": [False],
    "prompt_ids": [5, 6, 7],
    "beam_width": [1],
    "num_return_sequences": [1],
    "pad_id": [0],
    "min_tokens": [0],
    "length_penalty": [1.0],
    "repetition_penalty": [1.0],
    "presence_penalty": [0.0],
    "frequency_penalty": [0.0],
}
DEEP = b"[" * 600 + b"]" * 600
ODD = {
    np.object_: [
        *([b""], [b"\xff\xfe\x00"], [b"\x00" * 9], [b"x" * 1_000_000], [b"<s>" * 200], ["\ufffd日🎉\u200d".encode()]),
        *([b"["], [b"[" * 100_000], [b"null"], [b'[{"role": "user", "content": null}]'], [b'{"a": NaN}'], [b"1e999"]),
        *([b'{"x": ' + DEEP + b"}"], [b'[{"role": "assistant", "tool_calls": [{"x": ' + DEEP + b"}]}]"]),
        *([b'{"a\\nb": 1}'], [b'{"\\ud800": 1}'], [b'[{"role": "user", "content": "x", "a\\nb": 1}]']),
        *([b'[{"role": "user", "content": "x", "\\ud800": 1}]'], [b'[{"role": "user", "content": "\\ud800"}]']),
        *([b"a", b"b"], [b"y"] * 2000, []),
    ],
    np.int32: [[0], [-1], [-(2**31)], [2**31 - 1], [299], [300], [1, 2], []],
    np.float32: [[np.nan], [np.inf], [-np.inf], [0.0], [-0.0], [1e-45], [3.4e38], [-1.0], [1.0000001], [0.5, 0.5], []],
    np.bool_: [[True], [False], [True, False], []],
    np.uint64: [[0], [2**64 - 1], [2**63], [1, 2], []],
}
# What Triton says itself of inputs that are not those of the model; a stream has no status but these words.
TRITONS = ("unexpected shape for input", "batch size does not match other inputs", "data-type is")
LISTS = ("stop_words", "bad_words", "prompt_ids")  # inputs of any number of values
OTHER = (np.int64, np.float64, np.int8, np.object_)  # types that no input has, or only some


def request(rng):
    """Any inputs, most as they are usual, some odd in value; or, so that Triton refuses them itself, in shape or type."""
    given, deformed = {}, rng.random() < 0.2
    for name, usual in USUAL.items():
        if rng.random() < (0.8 if name == "text_input" else 0.2):
            odd = rng.random() < 0.25
            dtype, shape = DTYPES[name], (1, -1)
            fits = name in LISTS or deformed
            values = rng.choice([values for values in ODD[dtype] if fits or len(values) == 1]) if odd else usual
            if odd and deformed:
                shape = rng.choice([(1, -1), (-1,), (1, 1, -1)])
                if rng.random() < 0.15:
                    dtype = rng.choice(OTHER)
                    values = [b"7"] if dtype == np.object_ else [7]
            given[name] = np.array(values, dtype=dtype).reshape(shape)
    if "messages" in given and rng.random() < 0.8:
        given.pop("text_input", None)
    return given


def ask(port, model, given):
    """What a request gets, over a stream or, from the twin, at once: its answers, and the error that ends them."""
    with grpc.InferenceServerClient(f"127.0.0.1:{port}") as service:
        inputs = []
        for name, array in given.items():
            tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        if model == "tensorrt_llm_bls":
            try:
                return [service.infer(model, inputs, client_timeout=60)], None
            except InferenceServerException as error:
                return [], error
        responses = []
        service.start_stream(lambda result, error: responses.append((result, error)))
        service.async_stream_infer(model, inputs, enable_empty_final_response=True)
        deadline = time.monotonic() + 60
        while not (responses and ended(*responses[-1])):
            assert time.monotonic() < deadline, {name: (array.dtype, array.shape) for name, array in given.items()}
            time.sleep(0.002)
        service.stop_stream()
    return [result for result, _ in responses if result and result.get_response().outputs], responses[-1][1]


def ended(result, error):
    return error is not None or result.get_response().parameters["triton_final_response"].bool_param


@pytest.fixture(scope="module")
def server(built, tmp_path_factory):
    with Server(built, "127.0.0.1", Ports(0, 0, 0), log=tmp_path_factory.mktemp("triton") / "log") as running:
        running.wait_until_ready()
        yield running


def memory(server):
    """MB that the service's processes hold."""
    numbers = [str(process) for process in (server.process.pid, *server.stubs)]
    done = subprocess.run(["ps", "-o", "rss=", "-p", ",".join(numbers)], capture_output=True, text=True, check=True)
    return sum(map(int, done.stdout.split())) / 1024


def test_every_request_is_answered_or_refused(server):
    rng = random.Random(SEED)
    plain = {name: np.array([USUAL[name]], DTYPES[name]) for name in ("text_input", "max_tokens")}
    expected = Client(f"127.0.0.1:{server.ports.grpc}").generate("the quick", Options(max_tokens=3)).text
    answered, half = 0, 0.0
    for number in range(REQUESTS):
        model, given = rng.choice(["ensemble", "tensorrt_llm_bls"]), request(rng)
        answers, error = ask(server.ports.grpc, model, given)
        if error is None:
            answered += 1
            assert answers[-1].as_numpy("finish_reason").item()
        else:
            message = error.message()
            status = (error.status() or f"StatusCode.{status_of(message)}").removeprefix("StatusCode.")
            assert status == "INVALID_ARGUMENT" or any(words in message for words in TRITONS), (status, message, given)
            assert "\n" not in message, given
        if number == REQUESTS // 2:
            half = memory(server)
        [right], _ = ask(server.ports.grpc, model, plain)
        assert right.as_numpy("text_output").item().decode() == expected
    assert REQUESTS * 0.05 < answered < REQUESTS * 0.9
    assert memory(server) < half * 1.05 + 5
    assert server.fault() is None
    eventually(lambda: requests_at_hand(server, "running") == 0)


def test_unary_requests_have_the_same_answers(server):
    """NVIDIA's clients ask ``tensorrt_llm_bls`` by a unary call, over gRPC and HTTP."""
    plain = {"text_input": "the quick", "max_tokens": 9}
    expected = Client(f"127.0.0.1:{server.ports.grpc}").generate("the quick", Options(max_tokens=9)).text
    with grpc.InferenceServerClient(f"127.0.0.1:{server.ports.grpc}") as service:
        answer = service.infer("tensorrt_llm_bls", to_tensors(plain, grpc))
        assert answer.as_numpy("text_output").item().decode() == expected
        text = grpc.InferInput("text_input", [1, 1], "BYTES")
        text.set_data_from_numpy(np.array([[b"\xff\xfe"]], dtype=np.object_))
        for bad, message in (
            (to_tensors(plain | {"max_tokens": 0}, grpc), "max_tokens: found 0"),
            (to_tensors(plain | {"stream": True}, grpc), "stream: found true, allowed"),
            (to_tensors(plain | {"mode": "🎉" * 9000}, grpc), "mode: found '🎉"),  # more than fits a trailer
            ([text], "text_input: found bytes that are not UTF-8 text"),
        ):
            with pytest.raises(InferenceServerException, match=message) as caught:
                service.infer("tensorrt_llm_bls", bad)
            assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        with pytest.raises(InferenceServerException, match="doesn't support models with decoupled transaction policy"):
            service.infer("ensemble", to_tensors(plain, grpc))
    base = f"http://127.0.0.1:{server.ports.http}/v2/models/tensorrt_llm_bls"
    assert httpx.post(f"{base}/generate", json=plain).json()["text_output"] == expected
    tensors = [
        {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["the quick"]},
        {"name": "max_tokens", "shape": [1, 1], "datatype": "INT32", "data": [9]},
    ]
    found = {
        output["name"]: output["data"] for output in httpx.post(f"{base}/infer", json={"inputs": tensors}).json()["outputs"]
    }
    assert found["text_output"] == [expected]


def test_the_twin_has_the_tensors_of_the_ensemble(built):
    def tensors(model):
        text = (built / "model_repository" / model / "config.pbtxt").read_text()
        return text[text.index("input [") :].partition("ensemble_scheduling")[0]

    assert tensors("ensemble") == tensors("tensorrt_llm_bls")

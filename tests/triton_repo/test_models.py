"""The models before and beside the engines, without Triton: what one request does to the others."""

import importlib.util
import json
import queue
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import triton_repo
from tests.triton_repo.at_hand import eventually

MODELS = Path(triton_repo.__file__).parent


class Error:
    INVALID_ARG, UNAVAILABLE, INTERNAL = "invalid", "unavailable", "internal"

    def __init__(self, text, kind=INTERNAL):
        self.text, self.kind = text, kind
        text.encode()  # as Triton does

    def message(self):
        return self.text


class Response:
    def __init__(self, tensors=(), error=None):
        self.tensors, self.failure = tensors, error

    def has_error(self):
        return self.failure is not None

    def error(self):
        return self.failure

    def output_tensors(self):
        return self.tensors


class Tensor:
    def __init__(self, name, array):
        self.name, self.array = name, array

    def as_numpy(self):
        return self.array


class Backend(ModuleType):
    """Stands for ``triton_python_backend_utils``; asked for another model, it calls the ``ask`` that a test sets, with
    the model's name and an id."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    TritonError, InferenceResponse, Tensor = Error, Response, Tensor

    def __init__(self):
        super().__init__("triton_python_backend_utils")
        self.logged = []
        self.Logger = SimpleNamespace(log_warn=self.logged.append, log_error=self.logged.append)

    def get_input_tensor_by_name(self, request, name):
        return Tensor(name, np.array([request.inputs[name]], np.object_)) if name in request.inputs else None

    def InferenceRequest(self, model_name, request_id, **_):
        return SimpleNamespace(exec=lambda decoupled: self.ask(model_name, request_id))


class Sender:
    """Of a client that has left or not; ``looks`` counts how often it was asked."""

    def __init__(self, left=False, failures=0):
        self.left, self.failures, self.looks = left, failures, 0
        self.sent = queue.SimpleQueue()

    def is_cancelled(self):
        self.looks += 1
        if self.looks <= self.failures:
            raise RuntimeError("not to be told")
        return self.left

    def send(self, response, flags):
        self.sent.put(response)


class Request:
    def __init__(self, id="", sender=None, **inputs):
        self.id, self.sender, self.inputs = id, sender or Sender(), inputs

    def request_id(self):
        return self.id

    def get_response_sender(self):
        return self.sender

    def requested_output_names(self):
        return ["text_output"]


@pytest.fixture
def backend(monkeypatch):
    backend = Backend()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    tensors = loaded("tensors.py")
    monkeypatch.setitem(sys.modules, "triton_repo.tensors", tensors)
    monkeypatch.setattr(triton_repo, "tensors", tensors, raising=False)
    return backend


def loaded(file):
    spec = importlib.util.spec_from_file_location(file.replace("/", "_"), MODELS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def twin(backend, monkeypatch):
    """A twin of at most three requests, ``stopped``: the ids that it had ended. A request is answered when it is stopped, or
    its id is put into ``answered``."""
    module = loaded("tensorrt_llm_bls/1/model.py")
    monkeypatch.setattr(module, "WAITING", 3)
    monkeypatch.setattr(module, "LOOK", 0.001)
    twin = module.TritonPythonModel()
    twin.stopped, twin.answered, twin.changed = [], set(), threading.Condition()

    def ask(model, request_id):
        with twin.changed:
            if model == "d2sd":
                twin.stopped.append(request_id)
                twin.answered.add(request_id)
                twin.changed.notify_all()
            else:
                assert twin.changed.wait_for(lambda: request_id in twin.answered, timeout=60)
        return [Response([request_id])]

    backend.ask = ask
    twin.initialize({"model_config": json.dumps({"input": [{"name": "text_input"}]})})
    yield twin
    with twin.changed:
        twin.answered |= {request_id for request_id, _ in twin.waiting.values()}
        twin.changed.notify_all()
    twin.finalize()


def test_a_look_that_fails_hides_no_other_leaving(twin, backend):
    failing, leaving = Sender(left=True, failures=1), Sender(left=True)
    twin.execute([Request("first", failing), Request("second", leaving)])
    eventually(lambda: set(twin.stopped) == {"first", "second"})  # one that is slow to end is told again
    assert not leaving.sent.get(timeout=60).has_error()
    assert not failing.sent.get(timeout=60).has_error()
    assert backend.logged == ["request 'first': its client cannot be looked at: RuntimeError('not to be told')"]


def test_a_stop_that_fails_is_tried_again(twin, backend):
    asked, failures = backend.ask, ["first", "second"]

    def ask(model, request_id):
        if model == "d2sd" and request_id in failures:
            failures.remove(request_id)
            raise RuntimeError("no")
        return asked(model, request_id)

    backend.ask = ask
    twin.execute([Request("first", Sender(left=True)), Request("second", Sender(left=True))])
    eventually(lambda: {"first", "second"} <= set(twin.stopped))


def test_one_that_leaves_ends_no_other_of_its_id(twin):
    leaves, stays = Sender(), Sender()
    twin.execute([Request("same", leaves), Request("same", stays)])
    leaves.left, before = True, stays.looks
    eventually(lambda: stays.looks > before + 3)
    assert twin.stopped == []
    stays.left = True
    eventually(lambda: "same" in twin.stopped)


def test_more_requests_than_can_wait_are_refused_at_once(twin):
    first, *others = [Request(id) for id in ("a", "b", "c", "d")]
    twin.execute([first, *others])
    refused = others[-1].sender.sent.get(timeout=60).error()
    assert refused.kind == Error.UNAVAILABLE
    assert refused.text == "tensorrt_llm_bls: found 3 requests at once, allowed: no more; try again later"
    first.sender.left = True
    assert not first.sender.sent.get(timeout=60).has_error()
    later = Request("e", Sender(left=True))
    twin.execute([later])
    assert not later.sender.sent.get(timeout=60).has_error()


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("in ensemble 'ensemble', text_input: found bytes that are not UTF-8 text", Error.INVALID_ARG),
        ("in ensemble 'ensemble', messages: the target's tokenizer refuses it (no)", Error.INVALID_ARG),
        ("limits.waiting: found 3 requests waiting for a place, allowed: no more; try again later", Error.UNAVAILABLE),
        ("[request id: 7] Exceeds maximum queue size", Error.UNAVAILABLE),
        ("the engine failed", Error.INTERNAL),
        ("mode: found 'x" + 5000 * "🎉", Error.INVALID_ARG),
    ],
)
def test_an_error_of_the_ensemble_keeps_its_kind(twin, backend, message, kind):
    backend.ask = lambda model, request_id: [Response(error=Error(message))]
    request = Request("a")
    twin.execute([request])
    error = request.sender.sent.get(timeout=60).error()
    assert error.kind == kind
    assert error.text == message[:600]
    assert backend.logged == ([f"tensorrt_llm_bls: {message}"] if kind == Error.INTERNAL else [])


def test_a_request_that_cannot_be_read_takes_no_other_down(backend):
    model = loaded("preprocessing/1/model.py").TritonPythonModel()

    def text(text, parse_special):
        if text == "bad":
            raise RuntimeError("two\nlines")
        return [1, 2]

    model.prompts = SimpleNamespace(text=text)
    right, wrong, empty = model.execute([Request(text_input=text) for text in (b"x", b"bad", b"\xff")])
    assert right.tensors[0].as_numpy().tolist() == [[1, 2]]
    assert (wrong.error().kind, wrong.error().text) == (
        Error.INTERNAL,
        r"the request could not be read: RuntimeError('two\nlines')",
    )
    assert (empty.error().kind, empty.error().text) == (
        Error.INVALID_ARG,
        "text_input: found bytes that are not UTF-8 text",
    )
    assert backend.logged == [r"preprocessing: a request could not be read: RuntimeError('two\nlines')"]

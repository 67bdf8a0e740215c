"""The ensemble for clients that ask once and are answered once: unary ``infer``, which Triton refuses to models that stream.

NVIDIA's own name for such a twin, and its tensors. It also hears that a client has left, which an ensemble does not.
"""

import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from client.request import status_of
from triton_repo import tensors

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
WAITING = 256  # requests at a time; a thread waits for each
LOOK = 0.05  # seconds between looks at whose client has left
SAID = 600  # characters of an error: gRPC sends it in a trailer, of which clients take 8 KiB
KINDS = {"INVALID_ARGUMENT": "INVALID_ARG"}  # statuses whose name in TritonError is another


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.waiting: dict[str, tuple[str, Any]] = {}  # ids and senders of requests that are not answered yet
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(WAITING)
        self.closing = threading.Event()
        self.watcher = threading.Thread(target=self._watch, name="leaving")
        self.watcher.start()

    def execute(self, requests: list[Any]) -> None:
        """Take requests in. One response each comes later, through its sender."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take_in(request, sender)
            except Exception as error:  # whatever it is, it is this request's alone
                _send(sender, _refusal(str(error)))

    def _take_in(self, request: Any, sender: Any) -> None:
        """Have a thread answer a request.

        Raises:
            ValueError: what it asks for is not done here. RuntimeError: every thread waits for others.
        """
        if tensors.scalar(request, "stream", False):
            raise ValueError("stream: found true, allowed: false, since one response answers; ask ensemble for more")
        given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self.inputs}
        copies = [pb_utils.Tensor(name, given[name].as_numpy().copy()) for name in given if given[name] is not None]
        # What nobody wants is not asked for: dropped by Triton, it would corrupt this process (see answer.py).
        outputs = list(request.requested_output_names())
        if len(self.waiting) >= WAITING:
            raise RuntimeError(f"tensorrt_llm_bls: found {WAITING} requests at once, allowed: no more; try again later")
        key = uuid.uuid4().hex  # clients may give one id to several requests
        self.waiting[key] = (request.request_id() or key, sender)
        try:
            self.pool.submit(self._answer, copies, outputs, key)
        except RuntimeError:  # no thread can be started
            self._forget(key)
            raise

    def _answer(self, inputs: list[Any], outputs: list[str], key: str) -> None:
        """Ask the ensemble and pass on what it says."""
        request_id, sender = self.waiting[key]
        try:
            responses = _ask("ensemble", outputs, inputs, request_id)
            answers = [response for response in responses if response.has_error() or response.output_tensors()]
            response = answers[0]
            if response.has_error():
                response = _refusal(response.error().message())
        except Exception as error:
            response = _refusal(f"the ensemble cannot be asked: {error}")
        finally:
            self._forget(key)
        _send(sender, response)

    def _forget(self, key: str) -> None:
        """Look no more at a request's sender, which is about to have its last response."""
        with self.lock:
            del self.waiting[key]

    def _watch(self) -> None:
        """End the requests whose clients have left. An id that others wait under is left alone until they are answered."""
        while not self.closing.is_set():
            looks = [self._look(key) for key in list(self.waiting)]
            for request_id in {name for name, gone in looks if gone} - {name for name, gone in looks if not gone}:
                self._stop(request_id)
            time.sleep(LOOK)

    def _look(self, key: str) -> tuple[str, bool]:
        """The id of a request, and whether its client has left. No answer leaves meanwhile: a sender that is asked behind its
        last response is the server's death."""
        with self.lock:
            request_id, sender = self.waiting.get(key, ("", None))
            try:
                return request_id, sender is not None and bool(sender.is_cancelled())
            except Exception as error:
                pb_utils.Logger.log_warn(f"request {request_id!r}: its client cannot be looked at: {error!r}")
                return request_id, False

    def _stop(self, request_id: str) -> None:
        try:
            list(_ask("d2sd", ["finish_reason"], [pb_utils.Tensor("stop", np.array([[True]]))], request_id))
        except Exception as error:
            pb_utils.Logger.log_warn(f"request {request_id!r}: cannot be ended: {error!r}")

    def finalize(self) -> None:
        self.closing.set()
        self.watcher.join()
        self.pool.shutdown()


def _refusal(message: str) -> Any:
    """The response that is an error. One model hears of another's its words alone, so they tell its kind."""
    status = status_of(message)
    if status == "INTERNAL":
        pb_utils.Logger.log_error(f"tensorrt_llm_bls: {message}")
    kind = getattr(pb_utils.TritonError, KINDS.get(status, status))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message[:SAID], kind))


def _send(sender: Any, response: Any) -> None:
    try:
        sender.send(response, flags=FINAL)
    except Exception as error:
        pb_utils.Logger.log_warn(f"a request cannot be answered: {error!r}")


def _ask(model: str, outputs: list[str], inputs: list[Any], request_id: str) -> Any:
    """Ask a model of this server; returns an iterator over its responses."""
    request = pb_utils.InferenceRequest(model_name=model, requested_output_names=outputs, inputs=inputs, request_id=request_id)
    return request.exec(decoupled=True)

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

from triton_repo import tensors

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
WAITING = 256  # requests at a time; a thread waits for each
LOOK = 0.05  # seconds between looks at whose client has left


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.waiting: dict[str, Any] = {}  # senders by request id
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
                if tensors.scalar(request, "stream", False):
                    raise ValueError("stream: found true, allowed: false, since one response answers; ask ensemble for more")
                given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self.inputs}
                copies = [pb_utils.Tensor(name, given[name].as_numpy().copy()) for name in given if given[name] is not None]
                # What nobody wants is not asked for: dropped by Triton, it would corrupt this process (see answer.py).
                outputs = list(request.requested_output_names())
                self.pool.submit(self._answer, copies, outputs, request.request_id() or uuid.uuid4().hex, sender)
            except ValueError as error:
                sender.send(pb_utils.InferenceResponse(error=tensors.invalid(error)), flags=FINAL)

    def _answer(self, inputs: list[Any], outputs: list[str], request_id: str, sender: Any) -> None:
        """Ask the ensemble and pass on what it says."""
        key = uuid.uuid4().hex  # clients may give one id to several requests
        with self.lock:
            self.waiting[key] = (request_id, sender)
        try:
            responses = _ask("ensemble", outputs, inputs, request_id)
            answers = [response for response in responses if response.has_error() or response.output_tensors()]
            response = answers[0]
            if response.has_error():
                message = response.error().message()
                response = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, _kind(message)))
        except Exception as error:
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(f"the ensemble cannot be asked: {error}"))
        finally:
            with self.lock:
                del self.waiting[key]
        try:
            sender.send(response, flags=FINAL)
        except Exception as error:
            pb_utils.Logger.log_warn(f"request {request_id!r}: cannot be answered: {error}")

    def _watch(self) -> None:
        """End the requests whose clients have left."""
        while not self.closing.is_set():
            for key in list(self.waiting):
                if request_id := self._left(key):
                    stop = [pb_utils.Tensor("stop", np.array([[True]]))]
                    list(_ask("d2sd", ["finish_reason"], stop, request_id))
            time.sleep(LOOK)

    def _left(self, key: str) -> str:
        """The id of a request, if its client has left; else nothing. No answer leaves meanwhile: a sender that is asked behind
        its last response is the server's death."""
        with self.lock:
            request_id, sender = self.waiting.get(key, ("", None))
            return request_id if sender is not None and sender.is_cancelled() else ""

    def finalize(self) -> None:
        self.closing.set()
        self.watcher.join()
        self.pool.shutdown()


def _kind(message: str) -> Any:
    """The kind of an error, of which one model hears from another the words alone."""
    if "try again" in message:
        return pb_utils.TritonError.UNAVAILABLE
    refused = "allowed: " in message or "messages: " in message or "not JSON" in message or "0 inputs" in message
    return pb_utils.TritonError.INVALID_ARG if refused else pb_utils.TritonError.INTERNAL


def _ask(model: str, outputs: list[str], inputs: list[Any], request_id: str) -> Any:
    """Ask a model of this server; returns an iterator over its responses."""
    request = pb_utils.InferenceRequest(model_name=model, requested_output_names=outputs, inputs=inputs, request_id=request_id)
    return request.exec(decoupled=True)

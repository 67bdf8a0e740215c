"""Token ids → the target's answer as text, a cycle at a time: the engines, and the loop that runs them."""

import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from decoding.cycle import Decoder
from decoding.modes import MODES
from decoding.sampling import Sampling
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from engines.build_directory import BuildDirectory
from triton_repo import tensors, text

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


@dataclass(eq=False)
class Request:
    """A request while it is answered."""

    sequence: Sequence
    sender: Any
    id: str
    stream: bool
    text: text.Growing
    stops: bool  # whether stop words can end it
    read: int = field(default=0)  # tokens of the answer that are text
    unsent: str = field(default="")  # text that the client does not have yet
    sent: int = field(default=0)  # tokens that it has


@dataclass(frozen=True)
class Stop:
    """A request to end the requests of an id."""

    id: str
    sender: Any


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.build = BuildDirectory.open(Path(args["model_repository"]).resolve().parent.parent)
        manifest = self.build.manifest
        self.limits, self.end_ids = manifest["limits"], manifest["end_ids"]
        options = manifest["decoding"]
        target, first, second = self.build.load()
        self.modes = [name for name, mode in MODES.items() if first is not None or not mode.drafts]
        self.vocabulary = target.engine.info.vocabulary
        decoder = Decoder(
            target,
            first,
            second,
            block_size=options["block_size"],
            branches=options["branches"],
            vocabulary=self.vocabulary,
            selection=options["selection"],
            redraft=options["redraft"],
        )
        self.text = text.Vocabulary(Tokenizer.from_file(str(self.build.tokenizer / "tokenizer.json")))
        self.scheduler = Scheduler(decoder, self.limits["sequences"], options["mode"])
        self._warm_up()
        self.metrics = Metrics()
        self.requests: dict[Sequence, Request] = {}
        self.inbox: queue.SimpleQueue[Request | Stop | None] = queue.SimpleQueue()
        self.loop = threading.Thread(target=self._loop, name="d2sd")
        self.loop.start()

    def _warm_up(self) -> None:
        """Meet the common shapes before the first request does."""
        began = time.monotonic()
        length = min(200, self.limits["length"] - 8)
        self.scheduler.add(Sequence([0] * length, max_tokens=8))
        while self.scheduler:
            self.scheduler.step()
        pb_utils.Logger.log_info(f"d2sd: warmed up in {time.monotonic() - began:.1f} s")

    def execute(self, requests: list[Any]) -> None:
        """Take requests in; the loop answers them. A decoupled model returns nothing here."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self.inbox.put(self._read(request, sender))
            except ValueError as error:
                _send(sender, pb_utils.InferenceResponse(error=tensors.invalid(error)), final=True)
            except Exception as error:  # whatever it is, it is this request's alone
                pb_utils.Logger.log_error(f"d2sd: a request could not be read: {error!r}")
                message = pb_utils.TritonError(f"the request could not be read: {error}")
                _send(sender, pb_utils.InferenceResponse(error=message), final=True)

    def _read(self, request: Any, sender: Any) -> Request | Stop:
        """Check a request.

        Raises:
            ValueError: naming the input, what was found and what is allowed.
        """
        if tensors.scalar(request, "stop", False):
            if not request.request_id():
                raise ValueError("stop: found in a request without an id, allowed: with the id of what is to end")
            return Stop(request.request_id(), sender)
        prompt = tensors.integers(request, "input_ids")
        if bad := [token for token in prompt if not 0 <= token < self.vocabulary]:
            raise ValueError(f"input_ids: found {bad[0]}, allowed: 0 to {self.vocabulary - 1}")
        limit = self.limits["length"]
        if len(prompt) >= limit:
            raise ValueError(f"prompt: found {len(prompt)} tokens, allowed: up to {limit - 1} (limits.length of the pipeline)")
        room = limit - len(prompt)
        max_tokens = tensors.scalar(request, "max_tokens", min(self.limits["max_tokens"], room))
        if max_tokens > room:
            raise ValueError(
                f"max_tokens: found {max_tokens} behind a prompt of {len(prompt)}, allowed: up to {room} "
                f"({limit} together, limits.length of the pipeline)"
            )
        mode = tensors.scalar(request, "mode")
        if mode is not None and mode not in self.modes:
            raise ValueError(f"mode: found {mode!r}, allowed: {', '.join(self.modes)}")
        end_id = tensors.scalar(request, "end_id", -1)
        if not -1 <= end_id < self.vocabulary:
            raise ValueError(f"end_id: found {end_id}, allowed: -1 (the target's own) to {self.vocabulary - 1}")
        ends = frozenset(self.end_ids if end_id < 0 else [end_id])
        sequence = Sequence(prompt, max_tokens, _sampling(request), ends, mode)
        words = tensors.strings(request, "stop_words")
        growing = text.Growing(self.text, text.StopWords(words) if words else None)
        return Request(
            sequence, sender, request.request_id(), bool(tensors.scalar(request, "stream", False)), growing, bool(words)
        )

    def _loop(self) -> None:
        while True:
            if not self._take_in(wait=not self.scheduler):
                return
            try:
                steps = self.scheduler.step()
            except Exception as error:  # the requests at hand are lost, the server is not
                pb_utils.Logger.log_error(f"d2sd: a cycle failed: {error!r}")
                self._fail(error)
                continue
            for sequence, tokens in steps:
                self.metrics.count(sequence, len(tokens))
                self._respond(self.requests[sequence])

    def _take_in(self, wait: bool) -> bool:
        """Hand new requests to the scheduler; sleep for one if there is nothing else to do. False: the server stops."""
        while wait or not self.inbox.empty():
            request = self.inbox.get()
            if request is None:
                return False
            if isinstance(request, Stop):
                self._stop(request)
                continue
            self.requests[request.sequence] = request
            self.scheduler.add(request.sequence)
            wait = False
        return True

    def _stop(self, stop: Stop) -> None:
        """End the requests of an id, and say whether there were any."""
        named = [request for request in self.requests.values() if request.id == stop.id]
        for request in named:
            self._drop(request.sequence, "cancelled")
            self._respond(request)
        _send(stop.sender, _response(finish_reason="cancelled" if named else ""), final=True)

    def _respond(self, request: Request) -> None:
        """Send what a cycle added to an answer, and end it at a stop word or when its client has gone."""
        sequence = request.sequence
        if not sequence.finish and request.sender.is_cancelled():
            self._drop(sequence, "cancelled")
        piece = ""
        if request.stream or request.stops or sequence.finish:
            answer = sequence.answer
            new = answer[request.read :]
            request.read = len(answer)
            # The token that ends an answer is no text, though a stop word may read like it.
            piece = request.text.add(new[:-1] if sequence.finish == "end" else new, final=sequence.finish is not None)
            if request.text.stopped:
                self._drop(sequence, "stop")
        request.unsent += piece
        if request.stream or sequence.finish:
            count = request.text.tokens + (sequence.finish == "end")
            response = _response(
                request.unsent, answer[request.sent : count], count, sequence.cycles, finish_reason=sequence.finish or ""
            )
            request.unsent, request.sent = "", count
            if not _send(request.sender, response, final=sequence.finish is not None):
                self._drop(sequence, "cancelled")
        if sequence.finish:
            del self.requests[sequence]

    def _drop(self, sequence: Sequence, why: Any) -> None:
        if sequence.finish is None:
            self.scheduler.drop(sequence, why)
        else:
            sequence.finish = why

    def _fail(self, error: Exception) -> None:
        """Answer every request at hand with an error and start afresh."""
        for request in self.requests.values():
            message = f"the engine failed: {error}"
            _send(request.sender, pb_utils.InferenceResponse(error=pb_utils.TritonError(message)), final=True)
        self.requests.clear()
        self.scheduler.reset()

    def finalize(self) -> None:
        self.inbox.put(None)
        self.loop.join()


def _send(sender: Any, response: Any, final: bool) -> bool:
    """Send a response. False if that failed, which concerns its request alone."""
    try:
        sender.send(response, flags=FINAL if final else 0)
    except Exception as error:
        pb_utils.Logger.log_warn(f"d2sd: a response could not be sent: {error}")
        return False
    return True


def _response(piece: str = "", ids: Any = (), tokens: int = 0, cycles: int = 0, *, finish_reason: str) -> Any:
    return pb_utils.InferenceResponse(
        [
            tensors.texts("text_output", [piece]),
            tensors.output("output_ids", ids, np.int32),
            tensors.output("output_tokens", [tokens], np.int32),
            tensors.output("cycles", [cycles], np.int32),
            tensors.texts("finish_reason", [finish_reason]),
        ]
    )


def _sampling(request: Any) -> Sampling:
    """Greedy if a request says nothing; as soon as it names a way to sample, what it leaves out is neutral."""
    given = {name: tensors.scalar(request, name) for name in ("temperature", "top_k", "top_p", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if given.keys() & {"top_k", "top_p"}:
        given.setdefault("temperature", 1.0)
    return Sampling(**given)


class Metrics:
    """Triton metrics: acceptance length is committed tokens over cycles."""

    def __init__(self) -> None:
        self.tokens = self._counter("d2sd_committed_tokens", "Tokens committed to answers")
        self.cycles = self._counter("d2sd_cycles", "Target passes spent on answers, one a sequence and cycle")

    def _counter(self, name: str, description: str) -> Any:
        self.families = [
            *getattr(self, "families", []),
            pb_utils.MetricFamily(name, description, pb_utils.MetricFamily.COUNTER),
        ]
        return self.families[-1].Metric(labels={"model": "d2sd"})

    def count(self, sequence: Sequence, tokens: int) -> None:
        self.tokens.increment(tokens)
        self.cycles.increment(1)

"""Token ids → the target's answer, a cycle at a time: the engines, and the loop that runs them."""

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
    stream: bool
    stop_words: list[str]
    shown: int = field(default=0)  # tokens that the client has


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.build = BuildDirectory.open(Path(args["model_repository"]).parent.parent)
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
        self.tokenizer = Tokenizer.from_file(str(self.build.tokenizer / "tokenizer.json"))
        self.scheduler = Scheduler(decoder, self.limits["sequences"], options["mode"])
        self._warm_up()
        self.metrics = Metrics()
        self.requests: dict[Sequence, Request] = {}
        self.inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
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
                sender.send(pb_utils.InferenceResponse(error=tensors.invalid(error)), flags=FINAL)

    def _read(self, request: Any, sender: Any) -> Request:
        """Check a request.

        Raises:
            ValueError: naming the input, what was found and what is allowed.
        """
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
        end_id = tensors.scalar(request, "end_id")
        sequence = Sequence(
            prompt,
            max_tokens,
            _sampling(request),
            frozenset(self.end_ids if end_id is None or end_id < 0 else [end_id]),
            mode,
        )
        stream = bool(tensors.scalar(request, "stream", False))
        return Request(sequence, sender, stream, tensors.strings(request, "stop_words"))

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
            self.requests[request.sequence] = request
            self.scheduler.add(request.sequence)
            wait = False
        return True

    def _respond(self, request: Request) -> None:
        """Send what a cycle added to an answer, and end it at a stop word or when its client has gone."""
        sequence = request.sequence
        if request.stop_words and text.shown(self.tokenizer, sequence.answer, request.stop_words, final=True)[1]:
            self._drop(sequence, "stop")
        elif not sequence.finish and request.sender.is_cancelled():
            self._drop(sequence, "cancelled")
        final = sequence.finish is not None
        if request.stream or final:
            answer = sequence.answer
            response = pb_utils.InferenceResponse(
                [
                    tensors.output("output_ids", answer, np.int32),
                    tensors.output("shown_ids", [request.shown], np.int32),
                    tensors.output("final", [final], np.bool_),
                    tensors.texts("stop_words", request.stop_words or [""]),
                    tensors.output("output_tokens", [len(answer)], np.int32),
                    tensors.output("cycles", [sequence.cycles], np.int32),
                    tensors.texts("finish_reason", [sequence.finish or ""]),
                ]
            )
            request.sender.send(response, flags=FINAL if final else 0)
            request.shown = len(answer)
        if final:
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
            request.sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message)), flags=FINAL)
        self.requests.clear()
        self.scheduler.reset()

    def finalize(self) -> None:
        self.inbox.put(None)
        self.loop.join()


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

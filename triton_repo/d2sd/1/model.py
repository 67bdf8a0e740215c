"""Token ids → the target's answer as text: loads the engines, reads requests and hands them to the serving loop."""

import gc
import json
import math
import os
import secrets
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from decoding import ngrams
from decoding.cycle import Decoder
from decoding.modes import MODES
from decoding.sampling import Sampling
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from decoding.trace import Trace
from engines.build_directory import BuildDirectory
from triton_repo import tensors, text
from triton_repo.answer import Answer, refuse, stopped
from triton_repo.metrics import Metrics, Watch
from triton_repo.serving_loop import ServingLoop, Stop

TOP = 20  # likeliest tokens that may be asked for


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.build = BuildDirectory.open(Path(args["model_repository"]).resolve().parent.parent)
        manifest = self.build.manifest
        self.limits, self.end_ids = manifest["limits"], manifest["end_ids"]
        options = manifest["decoding"]
        engines = target, first, second = self.build.load()
        costs = self.build.costs(*engines, say=partial(print, file=sys.stderr, flush=True))
        counted = ngrams.load(self.build.ngrams)
        self.mode = options["mode"]
        drafts = first is not None
        self.modes = [
            name for name, mode in MODES.items() if (drafts or not mode.drafts) and (counted is not None or name != "ngrams")
        ]
        self.vocabulary = self.build.vocabulary
        decoder = Decoder(
            target,
            first,
            second,
            mode=options["mode"],
            block_size=options["block_size"],
            branches=options["branches"],
            vocabulary=self.vocabulary,
            selection=options["selection"],
            redraft=options["redraft"],
            costs=costs,
            ngrams=counted,
        )
        self.text = text.Vocabulary(Tokenizer.from_file(str(self.build.tokenizer / "tokenizer.json")))
        self.scheduler = Scheduler(decoder, self.limits["sequences"], costs, self.limits["waiting"])
        self._warm_up()
        gc.freeze()  # what is there for good need not be gone through while somebody waits
        log = pb_utils.Logger
        self.metrics = Metrics(pb_utils)
        self.watch = Watch(self.metrics, self.scheduler)
        self.loop = ServingLoop(self.scheduler, self.watch.cycle, lambda line: log.log_error(f"d2sd: {line}"), _give_up)
        self.metrics.start()
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
                self.loop.put(self._read(request, sender))
            except Exception as error:  # whatever it is, it is this request's alone
                if not isinstance(error, ValueError):
                    pb_utils.Logger.log_error(f"d2sd: a request could not be read: {error!r}")
                try:
                    refuse(sender, error)
                except Exception as another:
                    pb_utils.Logger.log_error(f"d2sd: a request cannot be told of {error!r}: {another!r}")

    def _read(self, request: Any, sender: Any) -> Answer | Stop:
        """Check a request.

        Raises:
            ValueError: naming the input, what was found and what is allowed.
        """
        outputs = frozenset(request.requested_output_names())
        if tensors.scalar(request, "stop", False):
            if not request.request_id():
                raise ValueError("stop: found in a request without an id, allowed: with the id of what is to end")
            return Stop(request.request_id(), partial(stopped, outputs, sender))
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
        if tensors.scalar(request, "ignore_eos", False):
            ends = frozenset()
        deadline = time.monotonic() + min(_timeout(request), self.limits["deadline"])
        top, scores_prompt = _scoring(request)
        trace = Trace(mode or self.mode) if tensors.scalar(request, "trace", False) else None
        sequence = Sequence(prompt, max_tokens, _sampling(request), ends, mode, deadline, top, scores_prompt, trace)
        words = tensors.strings(request, "stop_words")
        growing = text.Growing(self.text, text.StopWords(words) if words else None)
        stream = bool(tensors.scalar(request, "stream", False))
        answer = Answer(request.request_id(), sequence, sender, stream, growing, bool(words), outputs)
        self.watch.arrived(answer)
        return answer

    def finalize(self) -> None:
        self.loop.close()
        self.metrics.close()


def _give_up() -> None:
    """Let the server see that this model is dead."""
    os._exit(1)


def _timeout(request: Any) -> float:
    """Seconds that a request gives us. Triton's own field is in microseconds; ``/generate`` knows it as a parameter alone.

    Raises:
        ValueError: it is not a number of microseconds.
    """
    given = request.timeout() or json.loads(request.parameters() or "{}").get("timeout", 0)
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ValueError(f"timeout: found {json.dumps(given)}, allowed: microseconds, an integer")
    return given / 1e6 if given else math.inf


def _scoring(request: Any) -> tuple[int | None, bool]:
    """How many of the likeliest tokens are told with log-probabilities, None for no such; and whether those of the prompt are.

    Raises:
        ValueError: there are not so many.
    """
    top = tensors.scalar(request, "num_top_log_probs", 0)
    if not 0 <= top <= TOP:
        raise ValueError(f"num_top_log_probs: found {top}, allowed: 0 to {TOP}")
    scores_prompt = bool(tensors.scalar(request, "return_prompt_log_probs", False))
    return (top if tensors.scalar(request, "return_log_probs", False) or scores_prompt else None), scores_prompt


def _sampling(request: Any) -> Sampling:
    """Greedy if a request says nothing; as soon as it names a way to sample, what it leaves out is neutral, and a seed is
    made up."""
    given = {name: tensors.scalar(request, name) for name in ("temperature", "top_k", "top_p", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if given.keys() & {"top_k", "top_p"}:
        given.setdefault("temperature", 1.0)
    given.setdefault("seed", secrets.randbits(63))
    return Sampling(**given)

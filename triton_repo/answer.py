"""An answer on its way to its client: tokens come in, text goes out."""

import json
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from decoding.scheduler import Full
from decoding.sequence import Finish, Score, Sequence
from triton_repo import tensors, text, trace
from triton_repo.serving_loop import Stopped

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
BUSY = (Full, Stopped, TimeoutError)  # another moment, or another server, may do


@dataclass(eq=False)
class Answer:
    """A request of the serving loop, answered through a Triton sender.

    Attributes:
        stream: whether its client wants pieces. stops: whether stop words can end it. outputs: names of those that it wants.
    """

    id: str
    sequence: Sequence
    sender: Any
    stream: bool
    text: text.Growing
    stops: bool
    outputs: frozenset[str]
    unread: list[int] = field(default_factory=list)  # tokens that are not text yet
    unsent: str = field(default="")  # text that the client does not have yet
    unsent_ids: list[int] = field(default_factory=list)
    sent: int = field(default=0)  # tokens that the client has
    opened: bool = field(default=False)  # whether it has any response
    # Behind the last response Triton forgets the sender: asked then whether its client has left, the server dies.
    _ended: bool = field(init=False, default=False)
    _sending: threading.Lock = field(init=False, default_factory=threading.Lock)

    def has_left(self) -> bool:
        with self._sending:
            return not self._ended and bool(self.sender.is_cancelled())

    def respond(self, tokens: list[int], cycles: int, finish: Finish | None) -> bool:
        """Send what there is beyond the last response, if it is streamed or ended; a stop word ends it.

        Raises:
            TimeoutError: its time ran out before its first token.
        """
        if finish == "timeout" and not tokens and not self.text.tokens and not self.unread:
            raise TimeoutError("timeout: found no place for this request in its time; try again later")
        self.unread += tokens
        if self.stream or self.stops or finish:
            before, new = self.text.tokens, self.unread
            # The token that ends an answer is no text, though a stop word may read like it.
            self.unsent += self.text.add(new[:-1] if finish == "end" else new, final=finish is not None)
            if self.text.stopped:
                finish = "stop"
            count = self.text.tokens + (finish == "end")
            self.unsent_ids += new[: count - before]
            self.unread = []
            if self.stream or finish:
                sequence = self.sequence
                response = _response(
                    self.outputs,
                    *(self.unsent, self.unsent_ids, count, cycles),
                    *(len(sequence.prompt), sequence.drafted, sequence.accepted),
                    self._scores(self.unsent_ids, sequence.scores[self.sent :]),
                    "" if self.opened else self._prompt_scores(),
                    trace.told(sequence.trace, self.text.vocabulary) if finish and sequence.trace else "",
                    finish_reason=finish or "",
                )
                self.sent, self.opened = self.sent + len(self.unsent_ids), True
                self.unsent, self.unsent_ids = "", []
                with self._sending:
                    self._ended = finish is not None
                    self.sender.send(response, flags=FINAL if finish else 0)
        return finish is not None

    def _scores(self, ids: list[int], scores: list[Score]) -> str:
        """Log-probabilities of tokens as JSON, ``[[id, text, log-probability, [likeliest the same way]], …]``; or nothing."""
        if self.sequence.top is None:
            return ""
        text = self.text.vocabulary.text_of
        told = [
            [token, text(token), own, [[other, text(other), value] for other, value in best]]
            for token, (own, best) in zip(ids, scores, strict=False)
        ]
        return json.dumps(told, ensure_ascii=False)

    def _prompt_scores(self) -> str:
        """The same of the prompt; the first of its tokens follows nothing."""
        if not self.sequence.scores_prompt:
            return ""
        first, *others = self.sequence.prompt
        told = json.loads(self._scores(others, self.sequence.prompt_scores))
        return json.dumps([[first, self.text.vocabulary.text_of(first), None, []], *told], ensure_ascii=False)

    def fail(self, error: Exception) -> None:
        with self._sending:
            self._ended = True
            refuse(self.sender, error)


def refuse(sender: Any, error: Exception) -> None:
    """Answer with an error: the request's own, one of the moment, or ours."""
    kind = pb_utils.TritonError.INTERNAL
    if isinstance(error, ValueError):
        kind = pb_utils.TritonError.INVALID_ARG
    elif isinstance(error, BUSY):
        kind = pb_utils.TritonError.UNAVAILABLE
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), kind)), flags=FINAL)


def stopped(outputs: frozenset[str], sender: Any, count: int) -> None:
    """Tell the client that asked for a stop whether there was anything to end."""
    sender.send(_response(outputs, finish_reason="cancelled" if count else ""), flags=FINAL)


def _response(
    outputs: frozenset[str],
    piece: str = "",
    ids: Any = (),
    tokens: int = 0,
    cycles: int = 0,
    prompt: int = 0,
    drafted: int = 0,
    accepted: Any = (),
    scores: str = "",
    prompt_scores: str = "",
    trace: str = "",
    *,
    finish_reason: str,
) -> Any:
    """What of a response is wanted. Triton drops the rest itself, but Python's objects without Python's lock, which corrupts
    this process in time (python_backend #390, in 24.12)."""
    texts = {
        "text_output": piece,
        "log_probs": scores,
        "prompt_log_probs": prompt_scores,
        "trace_output": trace,
        "finish_reason": finish_reason,
    }
    numbers = {
        "output_ids": ids,
        "output_tokens": [tokens],
        "cycles": [cycles],
        "num_input_tokens": [prompt],
        "num_draft_tokens": [drafted],
        "acceptance_histogram": list(accepted),
    }
    wanted = [tensors.texts(name, [value]) for name, value in texts.items() if name in outputs]
    wanted += [tensors.output(name, value, np.int32) for name, value in numbers.items() if name in outputs]
    return pb_utils.InferenceResponse(wanted)

"""An answer on its way to its client: tokens come in, text goes out."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from decoding.scheduler import Full
from decoding.sequence import Sequence
from triton_repo import tensors, text
from triton_repo.serving_loop import Stopped

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
BUSY = (Full, Stopped, TimeoutError)  # another moment, or another server, may do


@dataclass(eq=False)
class Answer:
    """A request of the serving loop, answered through a Triton sender."""

    id: str
    sequence: Sequence
    sender: Any
    stream: bool
    text: text.Growing
    stops: bool  # whether stop words can end it
    read: int = field(default=0)  # tokens of the answer that are text
    unsent: str = field(default="")  # text that the client does not have yet
    sent: int = field(default=0)  # tokens that it has

    def has_left(self) -> bool:
        return bool(self.sender.is_cancelled())

    def respond(self) -> None:
        """Send what there is beyond the last response, if it is streamed or ended; a stop word ends it.

        Raises:
            TimeoutError: its time ran out before its first token.
        """
        sequence, answer = self.sequence, self.sequence.answer
        if sequence.finish == "timeout" and not answer:
            raise TimeoutError("timeout: found no place for this request in its time; try again later")
        if self.stream or self.stops or sequence.finish:
            new = answer[self.read :]
            self.read = len(answer)
            # The token that ends an answer is no text, though a stop word may read like it.
            self.unsent += self.text.add(new[:-1] if sequence.finish == "end" else new, final=sequence.finish is not None)
            if self.text.stopped:
                sequence.finish = "stop"
        if self.stream or sequence.finish:
            count = self.text.tokens + (sequence.finish == "end")
            finish = sequence.finish or ""
            response = _response(self.unsent, answer[self.sent : count], count, sequence.cycles, finish_reason=finish)
            self.unsent, self.sent = "", count
            self.sender.send(response, flags=FINAL if finish else 0)

    def fail(self, error: Exception) -> None:
        refuse(self.sender, error)


def refuse(sender: Any, error: Exception) -> None:
    """Answer with an error: the request's own, one of the moment, or ours."""
    kind = pb_utils.TritonError.INTERNAL
    if isinstance(error, ValueError):
        kind = pb_utils.TritonError.INVALID_ARG
    elif isinstance(error, BUSY):
        kind = pb_utils.TritonError.UNAVAILABLE
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), kind)), flags=FINAL)


def stopped(sender: Any, count: int) -> None:
    """Tell the client that asked for a stop whether there was anything to end."""
    sender.send(_response(finish_reason="cancelled" if count else ""), flags=FINAL)


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

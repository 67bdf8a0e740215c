"""Answers leave in a thread of their own: a send waits half a millisecond for the server, and the engines need not.

A request gets what each cycle made of it, in order, and one last message: the end of its answer, or an error. If its client
has all that it will get before that, by a stop word or because it cannot be reached, the rest is kept from it.
"""

import queue
import threading
from collections.abc import Callable
from typing import Protocol

from decoding.sequence import Finish, Sequence


class Request(Protocol):
    """A request while it is answered. What its methods raise ends this request and no other."""

    id: str
    sequence: Sequence

    def has_left(self) -> bool:
        """Whether its client has."""

    def respond(self, tokens: list[int], cycles: int, finish: Finish | None) -> bool:
        """Take what a cycle added to the answer, and send what can be sent. Returns whether the client now has all.

        Args:
            cycles: spent on the answer so far. finish: why it ended, if it did.
        """

    def fail(self, error: Exception) -> None:
        """Send that there will be no answer, or no more of it."""


Message = tuple[Request, list[int], int, Finish | Exception | None]


class Outbox:
    """Calls ``respond`` and ``fail``.

    Args:
        ended: called for a request that is done before its last message.
        log: for what an operator should know.
    """

    def __init__(self, ended: Callable[[Request], None], log: Callable[[str], None]) -> None:
        self._ended, self._log = ended, log
        self._done: set[Request] = set()  # whose last message is still to come
        self._messages: queue.SimpleQueue[tuple[Request, list[int], int, Finish | Exception | None] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="d2sd-outbox")

    def start(self) -> None:
        self._thread.start()

    def put(self, request: Request, tokens: list[int], finish: Finish | Exception | None) -> None:
        """Send what is new. finish: what ends the request, if this is its last message."""
        self._messages.put((request, tokens, request.sequence.cycles, finish))

    def close(self) -> None:
        """Send what there is, and end."""
        self._messages.put(None)
        self._thread.join()

    def _run(self) -> None:
        while message := self._messages.get():
            request, tokens, cycles, finish = message
            if request not in self._done:
                try:
                    self._send(request, tokens, cycles, finish)
                except Exception as error:
                    self._log(f"request {request.id!r}: {error!r}")
            if finish:
                self._done.discard(request)

    def _send(self, request: Request, tokens: list[int], cycles: int, finish: Finish | Exception | None) -> None:
        if isinstance(finish, Exception):
            request.fail(finish)
            return
        done = True
        try:
            done = request.respond(tokens, cycles, finish)
        except Exception as error:
            request.fail(error)
        finally:
            if done and not finish:
                self._done.add(request)
                self._ended(request)

"""The loop that answers requests, a cycle at a time. It knows nothing of Triton, and nothing of text."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from decoding.scheduler import Scheduler
from decoding.sequence import Sequence

Advanced = list[tuple[Sequence, list[int]]]
GIVE_UP = 3  # failing cycles in a row: no engine works that way again by itself


class Request(Protocol):
    """A request while it is answered. Whatever its methods raise ends this request and no other."""

    id: str
    sequence: Sequence

    def has_left(self) -> bool:
        """Whether its client has."""

    def respond(self) -> None:
        """Send what the answer has more than was sent; the last time its sequence has a ``finish``, which may be set here."""

    def fail(self, error: Exception) -> None:
        """Send that there will be no answer, or no more of it."""


class Stopped(RuntimeError):
    """The service ends."""


@dataclass(frozen=True)
class Stop:
    """The wish to end the requests of an id, as if their clients had left. told: called with how many there were."""

    id: str
    told: Callable[[int], None]


class ServingLoop:
    """Takes requests in from any thread and answers them in one of its own.

    Args:
        watch: called once a cycle with what it advanced.
        log: for what an operator should know.
        give_up: called when the engines fail again and again, after all requests at hand were told.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        watch: Callable[[Advanced], None],
        log: Callable[[str], None],
        give_up: Callable[[], None],
    ) -> None:
        self.scheduler, self._watch, self._log, self._give_up = scheduler, watch, log, give_up
        self.requests: dict[Sequence, Request] = {}
        self._inbox: queue.SimpleQueue[Request | Stop | None] = queue.SimpleQueue()
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="d2sd")

    def start(self) -> None:
        self._thread.start()

    def put(self, request: Request | Stop) -> None:
        self._inbox.put(request)

    def close(self) -> None:
        """End the loop within a cycle. Requests that are not answered yet fail."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._take_in(wait=not self.scheduler):
            self._let_go()
            try:
                advanced = self.scheduler.step()
            except Exception as error:
                self._recover(error)
                continue
            self._failures = 0
            for sequence, _ in advanced:
                self._respond(self.requests[sequence])
            for request in [r for r in self.requests.values() if r.sequence.finish]:  # past their deadlines
                self._respond(request)
            try:
                self._watch(advanced)
            except Exception as error:
                self._log(f"a cycle cannot be counted: {error!r}")
        for request in list(self.requests.values()):
            self._fail(request, Stopped("the service ends"))

    def _take_in(self, wait: bool) -> bool:
        """Hand what has arrived to the scheduler; sleep if there is nothing else to do. False: the service ends."""
        while wait or not self._inbox.empty():
            arrived = self._inbox.get()
            if arrived is None:
                return False
            if isinstance(arrived, Stop):
                self._stop(arrived)
                continue
            try:
                self.scheduler.add(arrived.sequence)
            except Exception as error:  # no room to wait
                self._fail(arrived, error)
                continue
            self.requests[arrived.sequence] = arrived
            wait = False
        return True

    def _stop(self, stop: Stop) -> None:
        named = [r for r in self.requests.values() if r.id == stop.id and not r.sequence.finish]
        for request in named:
            self.scheduler.drop(request.sequence, "cancelled")
        try:
            stop.told(len(named))
        except Exception as error:
            self._log(f"request {stop.id!r}: cannot be told that it ended others: {error!r}")

    def _let_go(self) -> None:
        """Drop the requests whose clients have left, whether they are answered already or wait."""
        for request in list(self.requests.values()):
            try:
                left = request.has_left()
            except Exception as error:
                self._fail(request, error)
                continue
            if left and not request.sequence.finish:
                self.scheduler.drop(request.sequence, "cancelled")

    def _respond(self, request: Request) -> None:
        try:
            request.respond()
        except Exception as error:
            self._fail(request, error)
            return
        if request.sequence.finish:
            self.requests.pop(request.sequence, None)

    def _fail(self, request: Request, error: Exception) -> None:
        """End a request with an error, if it can still be told."""
        self.requests.pop(request.sequence, None)
        if not request.sequence.finish:
            self.scheduler.drop(request.sequence, "cancelled")
        try:
            request.fail(error)
        except Exception as another:
            self._log(f"request {request.id!r}: cannot be told of {error!r}: {another!r}")

    def _recover(self, error: Exception) -> None:
        """A cycle failed: what was running is lost, what waits is not."""
        self._log(f"a cycle failed: {error!r}")
        self._failures += 1
        lost = list(self.scheduler.running)
        try:
            self.scheduler.reset()
        except Exception as another:
            self._log(f"the engines cannot be reset: {another!r}")
            self._failures = GIVE_UP
        if self._failures >= GIVE_UP:
            lost = list(self.requests)
        for sequence in lost:
            if sequence in self.requests:
                self._fail(self.requests[sequence], RuntimeError(f"the engine failed: {error}"))
        if self._failures >= GIVE_UP:
            self._give_up()

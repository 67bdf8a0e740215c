"""The loop that answers requests, a cycle at a time. It knows nothing of Triton, and nothing of text."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from triton_repo.outbox import Outbox, Request

Advanced = list[tuple[Sequence, list[int]]]
GIVE_UP = 3  # failing cycles in a row: no engine works that way again by itself
OVERTAKING = 2.0  # seconds that a stop may come before what it is to end, which the server tokenises first


class Stopped(RuntimeError):
    """The service ends."""


@dataclass(frozen=True)
class Stop:
    """The wish to end the requests of an id, as if their clients had left. told: called with how many there were."""

    id: str
    told: Callable[[int], None]


@dataclass(frozen=True)
class Done:
    """A request whose client has all that it will get."""

    request: Request


class ServingLoop:
    """Takes requests in from any thread and answers them in its own two.

    Args:
        watch: called once a cycle with what it advanced and the seconds that it took.
        log: for what an operator should know.
        give_up: called when the engines fail again and again, after all requests at hand were told.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        watch: Callable[[Advanced, float], None],
        log: Callable[[str], None],
        give_up: Callable[[], None],
    ) -> None:
        self.scheduler, self._watch, self._log, self._give_up = scheduler, watch, log, give_up
        self.requests: dict[Sequence, Request] = {}
        self._inbox: queue.SimpleQueue[Request | Stop | Done | None] = queue.SimpleQueue()
        self._outbox = Outbox(lambda request: self._inbox.put(Done(request)), log)
        self._early: dict[str, float] = {}  # ids that were to be stopped and are not here yet, and until when
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="d2sd")

    def start(self) -> None:
        self._outbox.start()
        self._thread.start()

    def put(self, request: Request | Stop) -> None:
        self._inbox.put(request)

    def close(self) -> None:
        """End the loop within a cycle. Requests that are not answered yet fail."""
        self._inbox.put(None)
        self._thread.join()
        self._outbox.close()

    def _run(self) -> None:
        while self._take_in(wait=not self.scheduler):
            self._let_go()
            began = time.monotonic()
            try:
                advanced = self.scheduler.step()
            except Exception as error:
                self._recover(error)
                if self._failures >= GIVE_UP:
                    self._outbox.close()
                    self._give_up()
                    return
                continue
            took = time.monotonic() - began
            self._failures = 0
            self._hand_out(advanced)
            try:
                self._watch(advanced, took)
            except Exception as error:
                self._log(f"a cycle cannot be counted: {error!r}")
        for sequence in list(self.requests):
            self._fail(sequence, Stopped("the service ends; try again later"))

    def _take_in(self, wait: bool) -> bool:
        """Hand what has arrived to the scheduler; sleep if there is nothing else to do. False: the service ends."""
        while wait or not self._inbox.empty():
            arrived = self._inbox.get()
            if arrived is None:
                return False
            if isinstance(arrived, Stop):
                self._stop(arrived)
            elif isinstance(arrived, Done):
                self._drop(arrived.request)
            else:
                self.requests[arrived.sequence] = arrived
                if self._early.pop(arrived.id, 0.0) > time.monotonic():
                    arrived.sequence.finish, wait = "cancelled", False
                    continue
                try:
                    self.scheduler.add(arrived.sequence)
                    wait = False
                except Exception as error:  # too many wait
                    self._fail(arrived.sequence, error)
        return True

    def _stop(self, stop: Stop) -> None:
        named = [request for request in self.requests.values() if request.id == stop.id]
        for request in named:
            self._drop(request)
        now = time.monotonic()
        self._early = {id: until for id, until in self._early.items() if until > now}
        if not named:
            self._early[stop.id] = now + OVERTAKING
        try:
            stop.told(len(named))
        except Exception as error:
            self._log(f"request {stop.id!r}: cannot be told that it ended others: {error!r}")

    def _let_go(self) -> None:
        """Drop the requests whose clients have left, whether they are answered already or wait."""
        for sequence, request in list(self.requests.items()):
            try:
                if request.has_left():
                    self._drop(request)
            except Exception as error:
                self._fail(sequence, error)

    def _drop(self, request: Request) -> None:
        if not request.sequence.finish:
            self.scheduler.drop(request.sequence, "cancelled")

    def _hand_out(self, advanced: Advanced) -> None:
        """Give each request what a cycle made of it; those that have ended leave."""
        new = dict(advanced)
        for sequence, request in list(self.requests.items()):
            if sequence in new or sequence.finish:
                self._outbox.put(request, new.get(sequence, []), sequence.finish)
            if sequence.finish:
                del self.requests[sequence]

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        request = self.requests.pop(sequence)
        self._drop(request)
        self._outbox.put(request, [], error)

    def _recover(self, error: Exception) -> None:
        """A cycle failed: what was running is lost, what waits is not."""
        self._log(f"a cycle failed: {error!r}")
        self._failures += 1
        lost = set(self.scheduler.running)
        try:
            self.scheduler.reset()
        except Exception as another:
            self._log(f"the engines cannot be reset: {another!r}")
            self._failures = GIVE_UP
        for sequence in list(self.requests):
            if sequence in lost or self._failures >= GIVE_UP:
                self._fail(sequence, RuntimeError(f"the engine failed: {error}"))
        self._hand_out([])

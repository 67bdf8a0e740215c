"""The loop without Triton: who is answered, who is told of what, and that nobody else notices."""

import queue
import threading
import time

import pytest

from decoding.scheduler import Full, Scheduler
from decoding.sequence import Sequence
from tests.decoding.paced import Costs, Decoder
from triton_repo.serving_loop import GIVE_UP, ServingLoop, Stop, Stopped


class Request:
    """Notes what it sends.

    Args:
        left: its client has left after so many tokens. stops: it ends itself after so many. raises: the methods that fail.
    """

    def __init__(self, id="", length=3, count=5, left=None, stops=None, raises=(), deadline=float("inf")):
        self.id, self.left, self.stops, self.raises = id, left, stops, raises
        self.sequence = Sequence([1] * length, count, deadline=deadline)
        self.sent = []
        self.ended: queue.Queue[object] = queue.Queue()

    def has_left(self):
        assert "has_left" not in self.raises
        return self.left is not None and len(self.sequence.answer) >= self.left

    def respond(self, tokens, cycles, finish):
        assert "respond" not in self.raises
        self.sent += tokens
        if len(self.sent) == self.stops:
            finish = "stop"
        if finish:
            self.ended.put(finish)
        return finish is not None

    def fail(self, error):
        self.ended.put(error)
        assert "fail" not in self.raises

    def end(self):
        """How it ended, and that it ended once."""
        end = self.ended.get(timeout=10)
        time.sleep(0.01)
        assert self.ended.empty()
        return end


class Slow(Decoder):
    """Takes its time, so that a test can come in between."""

    def cycle(self, sequences, pieces=()):
        time.sleep(0.002)
        return super().cycle(sequences, pieces)


@pytest.fixture
def serve():
    running = []

    def start(places=4, queue=8, **options):
        scheduler = Scheduler(Slow(**options), places, Costs(), queue)
        loop = ServingLoop(
            scheduler, lambda advanced, _: loops_watch.append(advanced), loops_log.append, lambda: loops_log.append("gave up")
        )
        loop.seen, loop.said = loops_watch, loops_log
        loop.start()
        running.append(loop)
        return loop

    loops_watch, loops_log = [], []
    yield start
    for loop in running:
        loop.close()
        assert not loop.requests
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("d2sd")]


def idle(loop):
    """Wait until nothing runs, and see that nothing is held."""
    deadline = time.monotonic() + 10
    while loop.scheduler or loop.requests:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert loop.scheduler.decoder.held == {}


def test_every_request_is_answered_piece_by_piece(serve):
    loop = serve()
    requests = [Request(length=1 + 40 * n, count=1 + n) for n in range(7)]
    for request in requests:
        loop.put(request)
    assert [request.end() for request in requests] == ["length"] * 7
    assert [request.sent for request in requests] == [[7] * (n + 1) for n in range(7)]
    idle(loop)
    assert sum(len(tokens) for advanced in loop.seen for _, tokens in advanced) == sum(range(1, 8))
    assert loop.said == []


def test_clients_that_leave(serve):
    """While they are answered, while their prompts are taken in, while they wait."""
    loop = serve(places=2)
    answered, stays = Request(count=10_000, left=3), Request(count=50)
    prefilled, waits = Request(length=10_000, left=0), Request(count=10_000, left=0)
    for request in (answered, stays, prefilled, waits):
        loop.put(request)
    assert [request.end() for request in (answered, prefilled, waits)] == ["cancelled"] * 3
    assert len(answered.sequence.answer) == 3
    assert stays.end() == "length"
    idle(loop)


def test_a_request_that_ends_itself_is_sent_nothing_more(serve):
    loop = serve()
    stops, at_its_end, other = Request(count=10_000, stops=3), Request(count=3, stops=3), Request(count=40)
    for request in (stops, at_its_end, other):
        loop.put(request)
    assert [request.end() for request in (stops, at_its_end, other)] == ["stop", "stop", "length"]
    assert [len(request.sent) for request in (stops, at_its_end, other)] == [3, 3, 40]
    idle(loop)
    assert len(stops.sequence.answer) < 10
    assert not loop._outbox._done


def test_a_request_is_stopped_by_its_id(serve):
    loop = serve()
    one, other, unnamed = Request("one", count=10_000), Request("other", count=60), Request(count=60)
    for request in (one, other, unnamed):
        loop.put(request)
    told = queue.Queue()
    loop.put(Stop("one", told.put))
    loop.put(Stop("nobody", told.put))
    loop.put(Stop("one", None))  # whose own client has left
    assert (told.get(timeout=10), told.get(timeout=10)) == (1, 0)
    assert [request.end() for request in (one, other, unnamed)] == ["cancelled", "length", "length"]
    idle(loop)
    assert len(loop.said) == 1


def test_a_stop_may_overtake_what_it_ends(serve, monkeypatch):
    loop = serve()
    told = queue.Queue()
    loop.put(Stop("late", told.put))
    assert told.get(timeout=10) == 0
    late, again = Request("late", count=10_000), Request("late", count=5)
    loop.put(late)
    assert (late.end(), late.sent) == ("cancelled", [])
    loop.put(again)
    assert again.end() == "length"
    monkeypatch.setattr("triton_repo.serving_loop.OVERTAKING", 0.0)
    loop.put(Stop("long ago", told.put))
    assert told.get(timeout=10) == 0
    other = Request("long ago")
    loop.put(other)
    assert other.end() == "length"
    idle(loop)


def test_a_deadline_ends_an_answer_with_what_it_has(serve):
    loop = serve(places=1)
    answered, waits = (Request(count=10_000, deadline=time.monotonic() + 0.1) for _ in range(2))
    loop.put(answered)
    loop.put(waits)
    assert [answered.end(), waits.end()] == ["timeout", "timeout"]
    assert len(answered.sequence.answer) > 0 == len(waits.sequence.answer)
    idle(loop)


def test_too_many_requests(serve):
    loop = serve(places=1, queue=1)
    requests = [Request(count=100) for _ in range(5)]
    for request in requests:
        loop.put(request)
    ends = [request.end() for request in requests]
    assert ends[:2] == ["length", "length"]
    assert all(isinstance(end, Full) for end in ends[2:])
    idle(loop)


@pytest.mark.parametrize("raises", [("respond",), ("has_left",), ("respond", "fail")])
def test_a_request_whose_client_cannot_be_reached_ends_alone(serve, raises):
    loop = serve()
    bad, good = Request(count=10_000, raises=raises), Request(count=30)
    loop.put(bad)
    loop.put(good)
    assert isinstance(bad.end(), AssertionError)
    assert good.end() == "length"
    idle(loop)
    assert len(loop.said) == ("fail" in raises)


def test_a_cycle_that_fails_ends_what_was_running(serve):
    loop = serve(places=2)
    lost, waits = [Request(count=10_000) for _ in range(2)], Request(count=5)
    for request in (*lost, waits):
        loop.put(request)
    while not lost[1].sent:
        time.sleep(0.001)
    loop.scheduler.decoder.breaks = 1
    assert [str(request.end()) for request in lost] == ["the engine failed: out of order"] * 2
    assert waits.end() == "length"
    idle(loop)
    assert loop.said == ["a cycle failed: RuntimeError('out of order')"]


def test_engines_that_fail_again_and_again_are_given_up(serve):
    loop = serve(places=1, breaks=GIVE_UP)
    requests = [Request() for _ in range(GIVE_UP + 2)]
    for request in requests:
        loop.put(request)
    assert {str(request.end()) for request in requests} == {"the engine failed: out of order"}
    while loop.said[-1] != "gave up":
        time.sleep(0.001)
    assert len(loop.said) == GIVE_UP + 1


def test_the_end_of_the_service_is_told(serve):
    loop = serve(places=1)
    requests = [Request(count=10_000) for _ in range(3)]
    for request in requests:
        loop.put(request)
    loop.close()
    assert all(isinstance(request.end(), Stopped) for request in requests)

"""Who is served when: by order of arrival, beside answers that may not wait, within memory, and gone when gone."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.scheduler import ALONE, LEAST, PATIENCE, Full, Scheduler
from decoding.sequence import Sequence
from tests.decoding.paced import Costs, Decoder


def scheduler(places=4, queue=100, **decoder):
    return Scheduler(Decoder(**decoder), places, Costs(), queue)


def prompt(length, max_tokens=5, **options):
    return Sequence([1] * length, max_tokens, **options)


def run(scheduled, cycles=10_000):
    """Step until all is done; returns the sequences by order of their first tokens, with the cycles of these."""
    first = {}
    for cycle in range(cycles):
        if not scheduled:
            return first
        first |= {s: cycle for s, _ in scheduled.step() if len(s.answer) == 1}
    raise AssertionError("this never ends")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 700), st.integers(1, 12)), min_size=1, max_size=12),
    places=st.integers(1, 5),
    memory=st.integers(720, 3000),
    knows=st.integers(0, 300),
    verifies=st.integers(1, 30),
    ragged=st.booleans(),
)
def test_first_tokens_come_in_order_of_arrival_and_everything_is_freed(lengths, places, memory, knows, verifies, ragged):
    scheduled = scheduler(places, memory=memory, knows=knows, verifies=verifies, ragged=ragged)
    sequences = [prompt(length, count) for length, count in lengths]
    for sequence in sequences:
        scheduled.add(sequence)
    first = run(scheduled)
    # One whose prompt is known to its last token need not wait for the last piece of the one before it.
    assert all(first[earlier] <= first[later] + 1 for earlier, later in itertools.pairwise(sequences))
    assert [s.finish for s in sequences] == ["length"] * len(sequences)
    assert scheduled.decoder.held == {}
    assert max(len(answering) + len(pieces) for answering, pieces in scheduled.decoder.log) <= places
    assert scheduled.prompt_tokens == sum(length for length, _ in lengths)
    assert scheduled.reused_tokens == sum(min(knows, length - 1) for length, _ in lengths)


@pytest.mark.parametrize("verifies", [1, 12, 40, 1500])
@pytest.mark.parametrize("ragged", [True, False])
def test_no_answer_waits_for_two_cycles_of_all_that_are_to_be_answered(verifies, ragged):
    scheduled = scheduler(verifies=verifies, ragged=ragged)
    stream = prompt(1, 400)
    scheduled.add(stream)
    scheduled.step()
    for _ in range(3):
        scheduled.add(prompt(1900))
    cost = Costs().target
    carried = 0
    for cycle in range(399):
        before = len(stream.answer)
        wanting = len([s for s in (*scheduled.running, *scheduled.waiting) if not s.finish])
        scheduled.step()
        assert len(stream.answer) == before + 1, "a cycle without the stream"
        answering, pieces = scheduled.decoder.log[-1]
        rows, riding = verifies * len(answering), sum(count for _, count in pieces)
        usual = cost(verifies * wanting, 1, 0)
        took = cost(rows + riding, 1, 0) if ragged else cost(rows, 1, 0) + cost(riding, 1, 0) * bool(riding)
        assert took <= min(2 * usual, PATIENCE) or riding <= LEAST
        carried += riding
        if cycle == 10:
            assert carried >= 11 * 16, "the newcomers get on as fast as they may"
    assert carried == 3 * 1899


def test_newcomers_are_taken_in_together_and_faster_when_nobody_waits():
    scheduled = scheduler()
    short, long, last = prompt(31), prompt(1001), prompt(11)
    for sequence in (short, long, last):
        scheduled.add(sequence)
    scheduled.step()
    assert scheduled.decoder.log[-1] == ([], [(short, 30), (long, ALONE - 30)])
    assert scheduled.running == [short, long], "the third is opened when its turn comes"
    scheduled.step()
    answering, pieces = scheduled.decoder.log[-1]
    assert answering == [short]
    assert pieces == [(long, 31)]  # 32 rows take twice as long as three


def test_what_the_engine_knows_is_not_computed_again():
    scheduled = scheduler(knows=640)
    sequence = prompt(700)
    scheduled.add(sequence)
    scheduled.step()
    assert scheduled.decoder.log[-1] == ([], [(sequence, 59)])
    assert (scheduled.prompt_tokens, scheduled.reused_tokens) == (700, 640)


def test_a_newcomer_waits_for_memory_and_none_passes_it():
    scheduled = scheduler(memory=100)
    first, large, small = prompt(10, 20), prompt(50, 40), prompt(5, 5)
    for sequence in (first, large, small):
        scheduled.add(sequence)
    while not first.finish:
        scheduled.step()
        assert scheduled.running == [first]
    scheduled.step()
    assert scheduled.running == [large, small]
    assert list(run(scheduled)) == [large, small]


def test_the_queue_is_bounded():
    scheduled = scheduler(places=2, queue=3)
    for _ in range(5):
        scheduled.add(prompt(3))
    with pytest.raises(Full, match=r"limits.waiting: found 3 requests waiting for a place, allowed: no more"):
        scheduled.add(prompt(3))
    run(scheduled)
    scheduled.add(prompt(3))


def test_a_place_that_memory_has_not_counts_as_none():
    """Memory holds one sequence, and there are sixteen places: no more may wait than the queue holds."""
    scheduled = scheduler(places=16, queue=3, memory=100)
    scheduled.add(prompt(60, 30))
    scheduled.step()
    for _ in range(3):
        scheduled.add(prompt(60, 30))
    with pytest.raises(Full, match="found 3 requests waiting"):
        scheduled.add(prompt(60, 30))
    assert len(run(scheduled)) == 4


@pytest.mark.parametrize("why", ["cancelled", "timeout"])
def test_whoever_leaves_frees_everything_by_the_next_cycle(why):
    scheduled = scheduler(places=3)
    answering, prefilling, stays, waiting = prompt(2, 50), prompt(2000, 50), prompt(3, 50), prompt(2000, 50)
    for sequence in (answering, stays, prefilling, waiting):
        scheduled.add(sequence)
    for _ in range(3):
        scheduled.step()
    assert len(answering.answer) > 0 == len(prefilling.answer) < prefilling.computed
    assert list(scheduled.waiting) == [waiting]
    for sequence in (answering, prefilling, waiting):
        if why == "timeout":
            sequence.deadline = time.monotonic()
        else:
            scheduled.drop(sequence, why)
    scheduled.step()
    assert list(scheduled.decoder.held) == scheduled.running == [stays]
    assert not scheduled.waiting
    assert {s.finish for s in (answering, prefilling, waiting)} == {why}
    assert not run(scheduled)
    assert stays.finish == "length"


def test_requests_that_left_while_they_waited_cost_nothing():
    scheduled = scheduler(places=4)
    long = [prompt(1900, 100) for _ in range(12)]
    for sequence in long:
        scheduled.add(sequence)
    for sequence in long:
        scheduled.drop(sequence, "cancelled")
    short = prompt(20, 3)
    scheduled.add(short)
    assert list(run(scheduled)) == [short]
    assert len(scheduled.decoder.log) == 1 + 3


def test_after_a_failing_cycle_those_that_wait_go_on():
    scheduled = scheduler(places=1)
    lost, waiting = prompt(3), prompt(3)
    scheduled.add(lost)
    scheduled.add(waiting)
    scheduled.step()
    scheduled.decoder.breaks = 1
    with pytest.raises(RuntimeError, match="out of order"):
        scheduled.step()
    scheduled.reset()
    assert scheduled.decoder.held == {}
    assert list(run(scheduled)) == [waiting]

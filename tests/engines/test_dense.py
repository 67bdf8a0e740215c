"""Where sequences lie in dense caches, and what a call of theirs moves."""

import numpy as np
import pytest

from engines.dense import SIZES, DenseEngine, pad, padded
from engines.engine import GraphInfo
from engines.kv_cache import Buffer
from tests.engines.conftest import PAIRS

INFO = GraphInfo(layers=1, kv_heads=1, head_dim=1, feature_width=1, vocabulary=7)


class Echo(DenseEngine):
    """A graph whose new rows are its input."""

    def allocate(self, sequences, capacity):
        return [Buffer(np.zeros((sequences, 1, capacity, 1), np.float32), None)]

    def call(self, cache, inputs):
        assert len(cache.lengths) == len(inputs["x"])
        return {"cache": cache}, [inputs["x"]]


def run(engine, *sequences, kept=1):
    """Keep rows that hold a sequence's number. Returns the cache."""
    x = np.broadcast_to(np.array(sequences, np.float32)[:, None, None, None], (len(sequences), 1, 4, 1))
    engine.run(sequences, {"x": x})
    engine.keep([range(kept)] * len(sequences))
    cache, _ = engine._places[sequences[0]]
    for row, sequence in enumerate(sequences):
        assert engine._places[sequence] == (cache, row)
        assert (cache.buffers[0].array[row, 0, : engine.length(sequence), 0] == sequence).all()
    return cache


def opened(engine, count):
    return [engine.open([], 1) for _ in range(count)]


def test_nothing_moves_while_the_same_run_in_the_same_order():
    engine = Echo(INFO)
    a, b, c = opened(engine, 3)
    both = run(engine, a, b)
    alone = run(engine, c)
    assert run(engine, a, b) is both
    assert run(engine, c) is alone
    assert run(engine, b, a) is not both
    assert engine.length(a) == engine.length(b) == 3


def test_newcomers_take_the_places_of_those_that_left():
    engine = Echo(INFO)
    a, b, c, d, e = opened(engine, 5)
    three = run(engine, a, b, c, kept=3)
    run(engine, d, kept=2)
    engine.close(b)
    assert run(engine, a, d, c) is three
    assert [engine.length(n) for n in (a, d, c)] == [4, 3, 4]
    engine.close(a)
    engine.close(c)
    assert run(engine, e, d, engine.open([], 1)) is three


def test_a_place_is_not_taken_from_a_sequence_that_only_sits_out():
    engine = Echo(INFO)
    a, b, c = opened(engine, 3)
    pair = run(engine, a, b)
    other = run(engine, a, c)
    assert other is not pair
    assert engine.in_use(pair)  # b is still there
    assert run(engine, c, b) is not pair
    assert not engine.in_use(pair)
    assert not engine.in_use(other) or engine._places[a] == (other, 0)
    run(engine, a, b, c)


def test_a_newcomer_that_is_longer_than_the_cache_makes_it_grow():
    engine = Echo(INFO)
    a, b, c = opened(engine, 3)
    small = run(engine, a, b)
    for _ in range(100):
        run(engine, c, kept=3)
    engine.close(b)
    grown = run(engine, a, c)
    assert (small.capacity, grown.capacity) == (256, 512)


def test_slots_bound_the_room():
    engine = Echo(INFO, slots=2)
    a, _ = opened(engine, 2)
    assert not engine.room(1)
    engine.close(a)
    assert engine.room(1)


def test_sizes():
    assert [padded(n) for n in (0, 1, 2, 5, 9, 128, 129, 300)] == [1, 1, 4, 8, 16, 128, 256, 384]
    assert list(SIZES) == sorted(SIZES)
    assert pad(np.ones((2, 3, 1)), 4, 2).sum() == 6


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[1] != "openvino"], ids="-".join, indirect=True)
def test_the_cache_is_handed_over_without_a_copy(served):
    """What is written into the cache's own memory is what the next call reads."""
    target = served[1][0]
    engine, sequence = target.engine, target.open([5, 6, 7, 8], 4)
    target.forward([sequence], np.array([[5, 6, 7]]), np.arange(3)[None], np.tri(3, dtype=bool)[None], [3])
    target.keep([range(3)])
    one = ([sequence], np.array([[8]]), np.array([[3]]), np.ones((1, 1, 1), bool), [1])
    logits = lambda: engine.read(target.forward(*one)._logits).copy()  # noqa: E731
    before = logits()
    np.testing.assert_array_equal(logits(), before)
    call = next(reversed(engine._calls.values()))
    cache, _ = engine._places[sequence]
    for buffer in cache.buffers:
        buffer.array[..., :3, :] = 0
    assert np.abs(logits() - before).max() > 1e-3
    assert next(reversed(engine._calls.values())) is call, "the call was bound anew"
    target.close(sequence)

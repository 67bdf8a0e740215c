"""The pool of blocks, on a graph that is a function of what it is given; what a real one decodes: ``test_conformance.py``."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.engine import EngineError, GraphInfo
from engines.kept import move
from engines.paged import BLOCK, SCRATCH, BlockPool, PagedTarget, block_bytes, scratch_rows, sequence_blocks


class Echo:
    """A graph whose K/V and features of a row are its token and position, and whose logits say what the row sees."""

    runtime = "echo"

    def __init__(self, blocks):
        self.info = GraphInfo(layers=2, kv_heads=1, head_dim=2, feature_width=2, vocabulary=5)
        self.cache = np.zeros((4, blocks + 1, 1, BLOCK, 2), np.float32)

    def prepare(self):
        pass

    def fit(self, rows):
        return -(-rows // 3) * 3

    def move(self, *rows):
        move(self.cache, "f32", *rows)

    def run(self, inputs):
        tokens, positions = inputs["token_ids"][0], inputs["positions"][0]
        rows = np.stack([tokens, positions], -1).astype(np.float32)
        begins, tables = inputs["subsequence_begins"], inputs["block_indices_begins"]
        for b, past in enumerate(inputs["past_lens"]):
            table = inputs["block_indices"][tables[b] : tables[b + 1]]
            at = past + np.arange(begins[b + 1] - begins[b])
            self.cache[:, table[at // BLOCK], 0, at % BLOCK] = rows[begins[b] : begins[b + 1]]
        logits = np.zeros((1, len(inputs["asked"]), 5), np.float32)
        return {"logits": logits, "features": rows[None]}


def held(target, sequence):
    """Tokens and positions that a sequence's cache holds, in every layer the same."""
    one = target.held[sequence]
    rows = np.concatenate([target.graph.cache[:, block, 0] for block in one.table], axis=1)[:, : one.length]
    assert (rows == rows[0]).all()
    return rows[0].tolist()


def run(target, batch):
    """``(sequence, tokens, kept)`` each, in one call."""
    most = max(len(tokens) for _, tokens, _ in batch)
    ids, positions = np.zeros((2, len(batch), most), np.int64)
    mask = np.broadcast_to(np.tri(most, dtype=bool), (len(batch), most, most))
    for b, (sequence, tokens, _) in enumerate(batch):
        ids[b, : len(tokens)] = tokens
        positions[b, : len(tokens)] = target.length(sequence) + np.arange(len(tokens))
    target.forward([s for s, _, _ in batch], ids, positions, mask, [len(tokens) for _, tokens, _ in batch])
    target.keep([kept for _, _, kept in batch])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_cache_holds_what_was_kept(data):
    """Random cycles over sequences that come and go, trees of which a part is kept, in a pool that is often full."""
    target = PagedTarget(Echo(4 * sequence_blocks(150)))
    expected, tokens = {}, {}
    for _ in range(data.draw(st.integers(1, 25))):
        if target.room(150) and data.draw(st.booleans()):
            beginning = [1] * data.draw(st.integers(1, 70))
            number = target.open(beginning, 150)
            tokens[number] = beginning
            expected[number] = [[1, place] for place in range(target.length(number))]
        batch = []
        for sequence in expected:
            if len(expected[sequence]) > 120 or not data.draw(st.booleans()):
                continue
            count = data.draw(st.integers(1, 12))
            new = (tokens[sequence][target.length(sequence) :] + list(range(count)))[:count]
            kept = sorted(data.draw(st.sets(st.integers(0, count - 1), max_size=count)))
            batch.append((sequence, new, kept))
        if batch:
            for sequence, new, kept in batch:
                at = target.length(sequence)
                expected[sequence] += [[new[row], at + row] for row in kept]
                del tokens[sequence][at:]
                tokens[sequence] += [new[row] for row in kept]
            run(target, batch)
        for sequence in list(expected):
            assert held(target, sequence) == expected[sequence]
            rows = target.features(sequence, 0, target.length(sequence))
            assert rows.tolist() == expected[sequence]
            if data.draw(st.integers(0, 5)) == 0:
                target.close(sequence)
                del expected[sequence], tokens[sequence]
    for sequence in list(expected):
        target.close(sequence)
    assert target.pool.available == target.pool.blocks


def test_rows_that_fill_a_call_up_attend_to_nothing():
    target, seen = PagedTarget(Echo(100)), []
    run_graph = target.graph.run
    target.graph.run = lambda inputs: seen.append(inputs) or run_graph(inputs)
    first, second = target.open([1] * 70, 120), target.open([2] * 70, 120)
    run(target, [(first, [1] * 60, range(60))])
    run(target, [(second, [2] * 2, range(2)), (first, [1] * 2, range(2))])
    assert seen[0]["past_lens"].tolist() == [0]
    assert seen[1]["past_lens"].tolist() == [0, 60, 0, 0]
    assert seen[1]["subsequence_begins"].tolist() == [0, 2, 4, 5, 6]
    assert seen[1]["block_indices"][-2:].tolist() == [target.spare] * 2
    assert target.spare not in target.held[first].table + target.held[second].table + target.pool.free


def test_a_beginning_that_was_computed_is_shared():
    target = PagedTarget(Echo(100))
    prompt = list(range(5)) * 20  # 100 tokens: three whole blocks
    first = target.open(list(prompt), 120)
    run(target, [(first, prompt[:99], range(99))])
    second = target.open(list(prompt), 120)
    assert target.length(second) == 3 * BLOCK
    assert target.held[second].table[:3] == target.held[first].table[:3]
    other = target.open([*prompt[:40], 9, *prompt[41:]], 120)
    assert target.length(other) == BLOCK
    target.close(first)
    assert held(target, second) == [[token, place] for place, token in enumerate(prompt[: 3 * BLOCK])]
    target.close(second)
    target.close(other)
    assert target.length(target.open(list(prompt), 120)) == 3 * BLOCK, "forgotten though nobody needed the room"
    assert (target.pool.hits, target.pool.asked) == (3 * BLOCK + BLOCK + 3 * BLOCK, 4 * 3 * BLOCK)


def test_not_all_of_a_prompt_is_shared():
    """Its last token has to be run, or nothing says what follows."""
    target = PagedTarget(Echo(50))
    tokens = [1] * (2 * BLOCK)
    first = target.open(list(tokens), 100)
    run(target, [(first, tokens, range(len(tokens)))])
    assert target.length(target.open(list(tokens), 100)) == BLOCK


def test_what_was_used_longest_ago_is_forgotten_first():
    pool = BlockPool(3)
    a, b, c = pool.take(3)
    number = pool.learn(a, 0, [1] * BLOCK)
    pool.learn(b, number, [2] * BLOCK)
    pool.release([a, b, c])
    assert pool.available == 3
    pool.take(2)  # the free one, and the end of the chain
    assert pool.share([1] * BLOCK + [2] * BLOCK + [3]) == ([a], number)


def test_a_pool_that_is_full():
    target = PagedTarget(Echo(sequence_blocks(64)))
    assert target.room(64)
    first = target.open([1], 64)
    assert not target.room(1)
    with pytest.raises(EngineError, match="the KV cache is full: 9 blocks of 32 tokens are needed, 0 are free"):
        target.open([2], 32)
    target.close(first)
    assert target.room(64)
    target.reset()
    assert sequence_blocks(64) == 2 + SCRATCH // BLOCK


def test_a_pool_holds_what_calls_make_and_nobody_keeps():
    """Branches so many and long that the usual room does not do: a sequence that is admitted never lacks a block for them."""
    assert scratch_rows(8, 4) == SCRATCH
    scratch = scratch_rows(64, 16)
    target = PagedTarget(Echo(2 * sequence_blocks(64, scratch)), scratch)
    two = [target.open([1] * 64, 64) for _ in range(2)]
    for one in two:
        run(target, [(one, [1] * 64, range(64))])
    run(target, [(one, list(range(scratch)), []) for one in two])
    assert [target.length(one) for one in two] == [64, 64]
    assert block_bytes(target.graph.info, 4) == 4 * BLOCK * (2 * 2 * 1 * 2 + 2)
    assert block_bytes(target.graph.info, 2) == BLOCK * (2 * 2 * 2 * 1 * 2 + 4 * 2)

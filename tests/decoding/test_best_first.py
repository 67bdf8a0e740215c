"""Trees grown on arrays against a plain heap; in NumPy's memory and in PyTorch's, which stands for a device's."""

import heapq

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import sources
from decoding.best_first import grow
from decoding.drafts import Draft, Redrafts
from decoding.sources import FIRST, ORIGINS, SECOND, TEXT, Source

NEUTRAL = np.ones((1, 1 << len(ORIGINS)), np.float32)
MEMORIES = [np.asarray, torch.asarray]


def marginals(rng, *shape):
    """Distinct candidates, best first, whose probabilities sum to less than 1."""
    tokens = np.argsort(rng.random((*shape[:-1], 9)), axis=-1)[..., : shape[-1]]
    odds = -np.sort(-(rng.random(shape) ** 3), axis=-1)
    return tokens, (odds / odds.sum(-1, keepdims=True) * rng.uniform(0.3, 1, (*shape[:-1], 1))).astype(np.float32)


def drafted(rng, batch, length, width):
    return Draft([None] * batch, rng.integers(0, 9, batch), *marginals(rng, batch, length, width))


def redrafts_of(rng, batch, length, width, branches):
    kept = np.stack([np.sort(rng.choice(length, min(branches, length), replace=False)) for _ in range(batch)])
    return Redrafts(kept, *marginals(rng, *kept.shape, length, width))


def chains(rng, batch, length):
    """A source that proposes two tokens of its own a state, and ends where its path is left."""
    states = length + 1
    tokens, odds = marginals(rng, batch, states, 2)
    odds[:, length:], tokens[:, length:] = 0, -1
    after = np.broadcast_to(np.minimum(np.arange(states) + 1, length)[:, None], (batch, states, 2))
    otherwise = np.full((batch, states), length)
    return Source(tokens, odds, after, otherwise, np.full_like(tokens, TEXT), length)


def moved(x, memory):
    fields = {name: memory(value.copy()) if isinstance(value, np.ndarray) else value for name, value in vars(x).items()}
    return type(x)(**fields)


def factors_of(rng):
    return np.exp(rng.normal(size=(4, 1 << len(ORIGINS)))).astype(np.float32)


def by_heap(given, b, nodes, factors):
    """{path: value} of the most valuable nodes of sequence b, and all their values."""

    def proposed(source, state, what):
        own = dict(zip(source.tokens[b, state].tolist(), what[b, state].tolist(), strict=True))
        own.pop(-1, None)
        return own

    def options(states, depth):
        found, origins = {}, {}
        for source, state in zip(given, states, strict=True):
            own = proposed(source, state, source.probabilities)
            both = {t: 1 - (1 - p) * (1 - found.get(t, 0.0)) for t, p in own.items()}
            left = max(0.0, 1 - sum(both.values()))
            by = proposed(source, state, source.origins)
            origins = origins | {t: o | origins.get(t, 0) for t, o in by.items()}
            found = {t: p * left for t, p in found.items() if t not in own} | both
        weights = {t: float(factors[min(depth, 3), origins[t]]) for t in found}
        return {t: p * weights[t] / (1 - p + p * weights[t]) for t, p in found.items()}

    def step(states, token):
        return tuple(
            proposed(source, state, source.after).get(token, int(source.otherwise[b, state]))
            for source, state in zip(given, states, strict=True)
        )

    values, heap = {(): 1.0}, []

    def push(path, value, states):
        for token, p in options(states, len(path) + 1).items():
            heapq.heappush(heap, (-value * p, len(path), (*path, token), step(states, token)))

    push((), 1.0, (0,) * len(given))
    while heap and len(values) < nodes:
        negative, _, path, states = heapq.heappop(heap)
        if negative == 0:
            break
        values[path] = -negative
        push(path, -negative, states)
    return values


@pytest.mark.parametrize("memory", MEMORIES)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    width=st.integers(2, 6),
    branches=st.integers(0, 6),
    texts=st.integers(0, 2),
    nodes=st.integers(1, 24),
)
def test_the_most_valuable_nodes_are_those_of_a_heap(memory, seed, batch, length, width, branches, texts, nodes):
    rng = np.random.default_rng(seed)
    draft = drafted(rng, batch, length, width)
    base = sources.redrafted(draft, redrafts_of(rng, batch, length, width, branches)) if branches else sources.first(draft)
    given = [base, *(chains(rng, batch, int(rng.integers(1, 8))) for _ in range(texts))]
    factors = factors_of(rng)
    tree = grow(memory(draft.anchors), [moved(source, memory) for source in given], nodes, memory(factors))
    for b in range(batch):
        expected = by_heap(given, b, nodes, factors)
        values = np.asarray(tree.values[b])
        found = sorted(values[values > 0].tolist(), reverse=True)
        wanted = sorted(expected.values(), reverse=True)
        short = max(len(found), len(wanted))  # what is next to nothing may be nothing in f32
        np.testing.assert_allclose(*(np.pad(x, (0, short - len(x))) for x in (found, wanted)), rtol=1e-3, atol=1e-6)
        assert values.tolist() == sorted(values.tolist(), reverse=True)
        number = {}
        for node in range(len(found)):
            parent = int(tree.parents[b, node])
            path = () if node == 0 else (*number[parent], int(tree.tokens[b, node]))
            assert path not in number.values()
            number[node] = path
            assert int(tree.depths[b, node]) == len(path)
            ancestors = [n for n, other in number.items() if path[: len(other)] == other]
            assert np.flatnonzero(np.asarray(tree.mask[b, node])).tolist() == ancestors
            if path in expected:  # all but equals at the border
                assert float(values[node]) == pytest.approx(expected[path], rel=1e-3, abs=1e-6)
        assert int(tree.tokens[b, 0]) == draft.anchors[b]
        assert tree.parents[b, 0] == -1
        assert not np.asarray(tree.mask[b, len(found) :]).any()
        assert set(tree.parents[b, len(found) :].tolist()) <= {-1}
        if memory is np.asarray:
            assert tree.counts[b] == len(found)
        else:
            assert tree.counts[b] == tree.tokens.shape[1] >= len(found)


def test_a_redraft_stands_in_for_what_is_rejected():
    """By hand: a draft of two places, redrafted behind no token; the rejected token keeps its c, the others share the rest."""
    draft = Draft(
        [None], np.array([7]), np.array([[[1, 2, 3], [4, 5, 6]]]), np.array([[[0.6, 0.3, 0.1], [0.5, 0.3, 0.2]]], np.float32)
    )
    redrafts = Redrafts(
        np.array([[0]]),
        np.array([[[[1, 3, 8], [5, 4, 2]]]]),
        np.array([[[[0.5, 0.3, 0.2], [0.9, 0.05, 0.05]]]], np.float32),
    )
    tree = grow(draft.anchors, [sources.redrafted(draft, redrafts)], 6, NEUTRAL)
    paths = [tree.tokens[0, np.flatnonzero(mask)][1:].tolist() for mask in tree.mask[0]]
    #                            c     c·0.5   (1-c)·3/5  …·0.9   c·0.3
    expected = {(): 1, (1,): 0.6, (1, 4): 0.3, (3,): 0.24, (3, 5): 0.216, (1, 5): 0.18}
    assert dict(zip(map(tuple, paths), tree.values[0].tolist(), strict=True)) == pytest.approx(expected)
    assert tree.origins[0].tolist() == [0, FIRST, FIRST, SECOND, SECOND, FIRST]


def test_a_token_that_two_propose_is_likelier_than_either_says():
    one = Source(
        np.array([[[1, 2], [-1, -1]]]),
        np.array([[[0.5, 0.4], [0, 0]]], np.float32),
        np.ones((1, 2, 2), int),
        np.ones((1, 2), int),
        np.full((1, 2, 2), FIRST),
        1,
    )
    other = Source(
        np.array([[[1], [-1]]]),
        np.array([[[0.8], [0]]], np.float32),
        np.ones((1, 2, 1), int),
        np.ones((1, 2), int),
        np.full((1, 2, 1), TEXT),
        1,
    )
    tree = grow(np.array([9]), [one, other], 4, NEUTRAL)
    assert tree.tokens[0].tolist() == [9, 1, 2]
    assert tree.values[0].tolist() == pytest.approx([1, 0.9, 0.04])
    assert tree.origins[0].tolist() == [0, FIRST | TEXT, FIRST]

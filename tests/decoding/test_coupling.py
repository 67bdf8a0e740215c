"""What random numbers say of draws: the engines' numbers, odds that come true, and no other answers."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding import best_first, coupling
from decoding.coupling import Coupling
from decoding.sampling import Sampling
from decoding.sequence import Sequence
from decoding.sources import NGRAMS, ORIGINS, Source
from engines.sampling import choose, exponentials

NEUTRAL = np.ones((1, 1 << len(ORIGINS)), np.float32)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 2**20))
def test_its_numbers_are_those_that_the_engines_draw_by(uniform, token):
    own = coupling.exponential(Coupling([uniform], 1.0).streams[0], token)
    assert own == pytest.approx(float(exponentials(np.float64(uniform), np.array([token]))[0]), rel=1e-12)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=1)])
def test_where_the_likeliest_token_is_chosen_there_is_none(sampling):
    assert coupling.of(Sequence([1], 4, sampling)) is None


def test_it_looks_ahead_and_takes_no_number_from_a_request():
    one, other = (Sequence([1], 40, Sampling(1.0, seed=3)) for _ in range(2))
    assert (found := coupling.of(one)) is not None
    for place in range(30):
        if place < coupling.LAST:
            assert found.streams[place] == Coupling(other.uniforms(1).tolist(), 1.0).streams[0]
        assert one.uniforms(1) == other.uniforms(1)
        for sequence in (one, other):
            sequence.commit([5])


def test_deeper_than_its_numbers_reach_nothing_changes():
    assert Coupling([0.5] * 3, 1.0).coupled(0.3, 4, 7) == pytest.approx(0.3)


@given(
    st.floats(0, sys.float_info.max, exclude_min=True),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**20),
    st.floats(0, 1),
)
def test_at_any_temperature_a_probability_stays_one(temperature, uniform, token, p):
    own = Coupling([uniform], temperature)
    assert 0 <= own.coupled(p, 1, token) <= 1
    assert 0 < own.power <= 1 or temperature < 1e-300


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_more_drafts_are_drawn_and_no_more_is_promised_than_without(temperature):
    """A source that knows the target's distribution but for some noise proposes four of 40 tokens; two are taken."""
    rng = np.random.default_rng(4)
    count, hits, plain, promised, plainly = 3000, 0, 0, 0.0, 0.0
    for _ in range(count):
        logits = rng.normal(0, 2.5, 40).astype(np.float32)
        thought = np.exp((logits + rng.normal(0, 1.0, 40)) / temperature)
        thought /= thought.sum()
        uniform = float(rng.random())
        drawn = choose(logits, Sampling(temperature), uniform)
        options = np.argsort(-thought)[:4].tolist()
        own = Coupling([uniform], temperature)
        coupled = {token: own.coupled(float(thought[token]), 1, token) for token in options}
        best = sorted(options, key=lambda token, by=coupled: -by[token])[:2]
        hits, plain = hits + (drawn in best), plain + (drawn in options[:2])
        promised += sum(coupled[token] for token in best)
        plainly += float(thought[options[:2]].sum())
    assert hits > 1.05 * plain
    assert 0.9 < promised / hits < plainly / plain


def test_a_tree_is_grown_by_coupled_probabilities():
    rng = np.random.default_rng(5)
    tokens = rng.permutation(60).reshape(1, 3, 20)[:, :, :4]
    odds = np.broadcast_to(np.array([0.3, 0.25, 0.2, 0.1], np.float32), (1, 3, 4)).copy()
    after, end = np.array([[[1] * 4, [2] * 4, [2] * 4]]), np.full((1, 3), 2)
    odds[:, 2] = 0
    source = Source(tokens, odds, after, end, np.full_like(tokens, NGRAMS), 2)
    own = Coupling(rng.random(2).tolist(), 1.0)
    tree = best_first.grow(np.array([9]), [source], 12, NEUTRAL, couplings=[own])
    expected = {}
    for first, p in zip(tokens[0, 0].tolist(), odds[0, 0].tolist(), strict=True):
        expected[first,] = own.coupled(p, 1, first)
        for second, q in zip(tokens[0, 1].tolist(), odds[0, 1].tolist(), strict=True):
            expected[first, second] = own.coupled(p, 1, first) * own.coupled(q, 2, second)
    for node in range(1, 12):
        above = int(tree.parents[0, node])
        path = (*([int(tree.tokens[0, above])] if above else []), int(tree.tokens[0, node]))
        assert tree.values[0, node] == pytest.approx(expected.pop(path), rel=1e-6)
    assert max(expected.values()) <= tree.values[0, 11] + 1e-6

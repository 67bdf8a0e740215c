"""A table of n-grams against a search of all its contexts; grown on the host, and spread for a device."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.best_first import grow
from decoding.ngrams import NGrams, NGramsError, key, load
from decoding.sequence import Sequence
from decoding.sources import NGRAMS, ORIGINS, spread
from tests.decoding import toys

NEUTRAL = np.ones((1, 1 << len(ORIGINS)), np.float32)


def contexts_of(table):
    """``{context: row}``, its keys read as numbers of so many digits."""
    found = {}
    for row, number in enumerate(table.keys.tolist()):
        context = []
        while number:
            number, digit = divmod(number, table.vocabulary + 1)
            context.insert(0, digit - 1)
        found[tuple(context)] = row
    return found


@settings(deadline=None)
@given(seed=st.integers(0, 99), tokens=st.lists(st.integers(0, 4), max_size=6), order=st.integers(1, 3))
def test_the_longest_known_context_answers(seed, tokens, order):
    table = toys.ngrams(5, order, seed)
    known = contexts_of(table)
    longest = max((c for c in known if tuple(tokens[len(tokens) - len(c) :]) == c), key=len)
    row = known[longest]
    expected = [(p, t, NGRAMS) for p, t in zip(table.probabilities[row].tolist(), table.tokens[row].tolist(), strict=True) if p]
    assert table.options(tuple(tokens)[-order:]) == expected


def test_a_key_is_of_one_context():
    keys = [key(context, 3) for size in range(4) for context in np.ndindex(*[3] * size)]
    assert len(set(keys)) == len(keys) == 1 + 3 + 9 + 27


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), nodes=st.integers(1, 12))
def test_a_device_is_sent_what_the_host_would_grow(seed, nodes):
    table = toys.ngrams(5, 2, seed)
    rng = np.random.default_rng(seed)
    sequences = [Sequence(rng.integers(0, 5, n).tolist(), 4) for n in (1, 2, 7)]
    anchors = np.array([s.anchor for s in sequences])
    proposed = table.propose(sequences)
    host = grow(anchors, [proposed], nodes, NEUTRAL)
    sent = spread(proposed, len(sequences))
    device = grow(torch.asarray(anchors), [sent.sent(_Memory())], nodes, torch.asarray(NEUTRAL))
    for b in range(3):
        found = np.asarray(device.values[b])
        np.testing.assert_allclose(found[found > 0], host.values[b, : host.counts[b]], rtol=1e-5)


class _Memory:
    def send(self, array):
        return torch.asarray(array)


def test_nodes_of_too_little_value_are_not_grown():
    table, sequence = toys.ngrams(5, 2, 3), Sequence([1, 2], 4)
    anchors = np.array([2])
    whole, cut = (grow(anchors, [table.propose([sequence])], 20, NEUTRAL, least) for least in (0.0, 0.2))
    kept = int((whole.values[0] > 0.2).sum())
    assert 1 < kept < 20
    assert cut.tokens[0].tolist() == whole.tokens[0, :kept].tolist()


def test_what_it_is_worth_at_a_glance_is_among_what_it_is_worth():
    for seed in range(20):
        table, sequence = toys.ngrams(5, 2, seed), Sequence([1, 2], 4)
        glance = table.worth(sequence)
        grown = grow(np.array([2]), [table.propose([sequence])], 200, NEUTRAL).values[0, 1:]
        assert max(glance) == pytest.approx(max(grown))
        for value in (v for v in glance if v > grown[-1]):
            assert np.isclose(grown, value, rtol=1e-5).any()


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = toys.ngrams(5, 2, 1)
    table.write(tmp_path / "t.npz")
    again = load(tmp_path / "t.npz")
    assert (again.vocabulary, again.order) == (5, 2)
    for name in ("keys", "tokens", "probabilities"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    assert load(None) is None


@pytest.mark.parametrize(
    "break_it",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b"no archive"),
        lambda file: file.write_bytes(file.read_bytes()[:-200]),
        lambda file: np.savez(file, vocabulary=5),
        lambda file: _without_its_last_row(file),
        lambda file: toys.ngrams(5, 2, 1, beyond=7).write(file),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, break_it):
    file = tmp_path / "t.npz"
    toys.ngrams(5, 2, 1).write(file)
    break_it(file)
    with pytest.raises(NGramsError, match=r"t\.npz: not a table of n-grams"):
        NGrams.read(file)


def _without_its_last_row(file):
    with np.load(file) as stored:
        arrays = dict(stored)
    np.savez(file, **arrays | {"tokens": arrays["tokens"][:-1]})

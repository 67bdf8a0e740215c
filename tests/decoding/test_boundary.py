import itertools

import numpy as np
import pytest
import torch

from decoding.boundary import anywhere, likeliest, rejection_probabilities


def test_rejection_probabilities_are_those_of_independent_acceptances():
    """Brute force over all outcomes of γ-1 coins: the chance that the first tail stands at place i."""
    c = np.array([0.9, 0.4, 0.7, 0.2])
    expected = np.zeros(len(c))
    for outcome in itertools.product([True, False], repeat=len(c)):
        chance = np.prod([p if hit else 1 - p for p, hit in zip(c, outcome, strict=True)])
        if not all(outcome):
            expected[outcome.index(False)] += chance
    np.testing.assert_allclose(rejection_probabilities(c), expected, rtol=1e-12)
    np.testing.assert_allclose(rejection_probabilities(c).sum() + np.prod(c), 1)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_certain_and_hopeless_drafts(size):
    assert rejection_probabilities(np.ones(size)).tolist() == [0.0] * size
    assert rejection_probabilities(np.zeros(size)).tolist() == [1.0] + [0.0] * (size - 1)


@pytest.mark.parametrize("memory", [np.asarray, torch.asarray])
def test_the_likeliest_boundaries_of_every_sequence(memory):
    c = np.array([[0.95, 0.3, 0.9, 0.5, 0.99], [0.2, 0.9, 0.9, 0.9, 0.1], [1, 1, 1, 1, 1]], np.float32)
    r = rejection_probabilities(c)
    for k in range(1, 8):
        expected = np.sort(np.argsort(-r, axis=-1, kind="stable")[:, :k], axis=-1)
        np.testing.assert_array_equal(np.asarray(likeliest(memory(c), k)), expected)


def test_boundaries_anywhere():
    rng = np.random.default_rng(1)
    counts = np.zeros(4)
    for _ in range(4000):
        chosen = anywhere(4, 2, rng)
        assert chosen[0] < chosen[1]
        counts[chosen] += 1
    np.testing.assert_allclose(counts / 4000, 0.5, atol=0.05)
    assert anywhere(3, 9, rng).tolist() == [0, 1, 2]

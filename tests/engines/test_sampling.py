import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from decoding.sampling import Sampling
from engines.sampling import choose, distribution, exponentials


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 300),
    temperature=st.floats(0.1, 4),
    top_k=st.integers(0, 320),
    top_p=st.floats(0.05, 1.0),
)
def test_the_processed_distribution_is_transformers(seed, size, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(scale=3, size=size).astype(np.float32)
    tokens, probabilities = distribution(logits, Sampling(temperature, top_k, top_p))
    scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits, dtype=torch.float64)[None])
    if 0 < top_k < size:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    found = np.zeros(size)
    found[tokens] = probabilities
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_draws_follow_the_distribution():
    """Chi-square of 20,000 draws, each of its own uniform number; 0.999 of 5 degrees of freedom is 20.5."""
    odds = np.array([0.1, 0.4, 0.02, 0.3, 0.15, 0.03])
    logits = np.log(odds).astype(np.float32)
    uniforms = np.random.default_rng(5).random(20_000)
    counts = np.bincount([choose(logits, Sampling(1.0), u) for u in uniforms], minlength=6)
    expected = odds * len(uniforms)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


def test_numbers_of_tokens_and_of_uniforms_are_independent():
    uniforms, tokens = np.random.default_rng(6).random(300), np.arange(300)
    numbers = exponentials(uniforms[:, None], tokens)
    assert np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1] == pytest.approx(0, abs=0.01)
    assert np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1] == pytest.approx(0, abs=0.01)
    assert numbers.mean() == pytest.approx(1, abs=0.02)
    assert (numbers > 1).mean() == pytest.approx(np.exp(-1), abs=0.01)
    assert (numbers > 0).all()
    assert np.isfinite(exponentials(np.float64(0.0), tokens)).all()


def test_numbers_are_the_same_on_a_device():
    uniforms, tokens = np.random.default_rng(7).random((8, 1)), np.arange(50_000)
    found = exponentials(torch.tensor(uniforms), torch.tensor(tokens)).numpy()
    np.testing.assert_allclose(found, exponentials(uniforms, tokens), rtol=1e-12)


def test_rounding_seldom_moves_a_draw():
    """Logits of another batch shape or mode differ in their last bits: of 400 draws among 49,152 tokens none is another."""
    rng = np.random.default_rng(8)
    moved = 0
    for _ in range(400):
        logits = rng.normal(scale=2, size=49_152).astype(np.float32)
        again = logits * (1 + rng.normal(scale=1e-6, size=logits.shape)).astype(np.float32)
        uniform = rng.random()
        moved += choose(logits, Sampling(1.5), uniform) != choose(again, Sampling(1.5), uniform)
    assert moved == 0


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1e-300)])
def test_greedy_and_its_limits(sampling):
    logits = np.array([1.0, 5.0, 4.999], dtype=np.float32)
    assert choose(logits, sampling, 0.99) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"temperature": -1.0}, "temperature: found -1.0"),
        ({"temperature": float("inf")}, "temperature: found inf"),
        ({"top_p": 0.0}, "top_p: found 0.0"),
        ({"top_p": 1.5}, "top_p: found 1.5"),
        ({"top_p": float("nan")}, "top_p: found nan"),
        ({"top_k": -1}, "top_k: found -1"),
        ({"seed": -1}, "seed: found -1"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from decoding.sampling import Sampling
from engines.sampling import choose, distribution


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


def test_the_draw_inverts_the_cumulative_distribution():
    logits = np.log(np.array([0.1, 0.0 + 1e-9, 0.6, 0.3], dtype=np.float32))
    sampling = Sampling(1.0)
    draws = [choose(logits, sampling, u) for u in (0.0, 0.05, 0.2, 0.69, 0.71, 0.9999999)]
    assert draws == [0, 0, 2, 2, 3, 3]


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

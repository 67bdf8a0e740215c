"""The target's log-probabilities of answers and prompts are its own, whatever was drafted, batched or known already."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.sampling import Sampling
from decoding.sequence import Sequence
from tests.decoding.test_lossless import decoder, prompts, run
from tests.decoding.toys import logits_after


def expected(context, token, top):
    """By the definition: log softmax, and the likeliest tokens, best first."""
    logits = logits_after(context).astype(np.float64)
    values = logits - np.log(np.exp(logits).sum())
    best = np.argsort(-values, kind="stable")[:top]
    return values[token], [(int(one), values[one]) for one in best]


@pytest.mark.parametrize("mode", ["autoregressive", "d2sd", "dflash", "pooled"])
@settings(max_examples=20, deadline=None)
@given(
    batch=st.lists(
        st.tuples(prompts, st.integers(1, 9), st.none() | st.integers(0, 7), st.booleans(), st.sampled_from([0.0, 1.0])),
        min_size=1,
        max_size=4,
    ),
    ragged=st.booleans(),
    remembers=st.integers(0, 5),
)
def test_scores(mode, batch, ragged, remembers):
    sequences = [
        Sequence(prompt, count, Sampling(temperature, seed=7), top=top, scores_prompt=scores_prompt)
        for prompt, count, top, scores_prompt, temperature in batch
    ]
    run(decoder(mode, ragged=ragged, remembers=remembers), sequences, slots=3)
    for sequence in sequences:
        asked, start = len(sequence.prompt), len(sequence.prompt)
        assert len(sequence.scores) == (len(sequence.answer) if sequence.top is not None else 0)
        assert len(sequence.prompt_scores) == (asked - 1 if sequence.scores_prompt else 0)
        scored = [(start + place, score) for place, score in enumerate(sequence.scores)]
        scored += list(enumerate(sequence.prompt_scores, 1))
        for place, (own, best) in scored:
            value, likeliest = expected(sequence.tokens[:place], sequence.tokens[place], sequence.top or 0)
            assert own == pytest.approx(value, abs=1e-6)
            assert [token for token, _ in best] == [token for token, _ in likeliest]
            assert [one for _, one in best] == pytest.approx([one for _, one in likeliest], abs=1e-6)


def test_all_together_are_certain():
    """Named down to the last token, they sum to 1."""
    sequence = Sequence([1, 2, 3], 5, top=99)
    run(decoder(), [sequence])
    for _, best in sequence.scores:
        assert sum(np.exp(value) for _, value in best) == pytest.approx(1.0)

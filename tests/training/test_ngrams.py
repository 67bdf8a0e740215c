"""Counting, by hand; what the command refuses. The whole way, up to a build: ``test_commands.py``."""

from pathlib import Path

import numpy as np
import pytest

from decoding.ngrams import NGrams
from training.corpus import Answer, read_corpus
from training.ngrams import count, hits, longest


def answer(prompt, response):
    return Answer("x", "t", prompt, response, 0.0)


def test_contexts_are_counted_once_an_answer_and_mixed_with_shorter_ones():
    answers = [answer([1], [2, 3, 2, 3, 4]), answer([1], [2, 4]), answer([5], [2, 3])]
    table = count(answers, 6, order=1, least=2, width=3)
    # Nothing before it: 2, 3 and 4 follow in 3, 2 and 2 answers.
    assert [(t, pytest.approx(p, abs=1e-3)) for p, t, _ in table.options(())] == [(2, 3 / 7), (3, 2 / 7), (4, 2 / 7)]
    # Behind 2 comes 3 in two answers and 4 in one: two kinds that count as 6 for the shorter context's say.
    expected = {3: (2 + 6 * 2 / 7) / 9, 4: (1 + 6 * 2 / 7) / 9, 2: 6 * 3 / 7 / 9}
    assert {t: pytest.approx(p, abs=1e-3) for p, t, _ in table.options((2,))} == expected
    # Behind 5 something came in one answer alone: that is not known.
    assert table.options((5,)) == table.options(())
    assert hits(table, [answer([9], [2, 3, 5])]) == pytest.approx((2 / 3, 2 / 3))


def test_what_stands_in_prompts_is_context_and_not_counted():
    table = count([answer([1, 2], [3, 4])] * 2, 6, order=2, least=1)
    assert table.options((1, 2))[0][1] == 3
    assert all(token in (3, 4) for _, token, _ in table.options(()))
    assert table.options((1,)) == table.options(())


def test_what_cannot_be_counted():
    with pytest.raises(ValueError, match="found no answer"):
        count([], 6)
    with pytest.raises(ValueError, match="--order: found 4, allowed with a vocabulary of 151936: fewer"):
        count([answer([1], [2])], 151936, order=4)


def test_contexts_are_as_long_as_they_have_numbers_for():
    assert [longest(vocabulary) for vocabulary in (300, 49_152, 151_936, 2**40)] == [4, 4, 3, 1]


@pytest.mark.slow
def test_the_shipped_table_is_counted_from_the_shipped_answers():
    root = Path(__file__).parents[2]
    shipped = NGrams.read(root / "models" / "smollm2-135m-instruct-ngrams" / "ngrams.npz")
    own = count(read_corpus(root / "training" / "answers" / "smollm2-135m-instruct.jsonl.xz"), shipped.vocabulary)
    assert own.order == shipped.order
    for name in ("keys", "tokens", "probabilities"):
        np.testing.assert_array_equal(getattr(own, name), getattr(shipped, name))

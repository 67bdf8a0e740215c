"""Which tokens of an answer the text foresees."""

from training.corpus import Answer
from training.foreseen import foreseen


def test_a_repetition_is_foreseen_as_far_as_it_goes():
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    runs = foreseen(Answer("a", "t", prompt, [2, 3, 4, 5, 90, 2, 3, 7], 0.0))
    # Behind 2, 3 of the answer the prompt says 4, 5, 6: two of them come. Behind the later 2, 3 it is 4, and 7 comes.
    assert runs == [0] * 8 + [0, 0, 2, 1, 0, 0, 0, 0, 0]


def test_a_loop_is_foreseen_to_its_end():
    runs = foreseen(Answer("a", "t", [7], [1, 2, 1, 2, 1, 2, 1], 0.0))
    assert runs == [0, 0, 0, 0, 3, 2, 1, 0]


def test_what_repeats_nothing_is_not_foreseen():
    assert foreseen(Answer("a", "t", [1, 2], [3, 4, 5], 0.0)) == [0] * 5

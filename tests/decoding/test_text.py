"""What a text proposes of its own repetitions, against a search of all of it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.sequence import Sequence
from decoding.text import HEIGHT, LONGEST, SIZES, Text, TextIndex


def longest_match(tokens):
    """How long the longest earlier match of the last tokens is, ``LONGEST`` at most."""
    lengths = [0]
    for end in range(1, len(tokens)):
        n = 0
        while n < min(end, LONGEST) and tokens[end - n - 1] == tokens[-n - 1]:
            n += 1
        lengths.append(n)
    return max(lengths)


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40), cuts=st.lists(st.integers(1, 6), max_size=6))
def test_continuations_follow_matches(tokens, cuts):
    """However the text has grown, what is found is there; and if anything matches, something is found."""
    text = []
    index = TextIndex(text)
    for cut in [*cuts, len(tokens)]:
        text += tokens[len(text) : len(text) + cut]
        found = index.lookup(len(tokens))
        for continuation in found:
            ends = [e for e in range(1, len(text)) if text[e - continuation.match : e] == text[-continuation.match :]]
            assert any(([*text, *continuation.tokens])[e : e + HEIGHT] == continuation.tokens for e in ends)
        assert bool(found) == (longest_match(text) >= min(SIZES))
        firsts = [tuple(c.tokens) for c in found]
        assert len(set(firsts)) == len(firsts)
        for continuation in found[1:]:
            assert continuation.tokens[: continuation.left] == found[0].tokens[: continuation.left]
            assert continuation.tokens[continuation.left] != found[0].tokens[continuation.left]


def test_the_longest_of_recent_matches_comes_first():
    text = [1, 2, 3, 4, 7, 9, 3, 4, 8, 9, 1, 2, 3, 4]
    first, second = TextIndex(text).lookup(len(text))
    assert (first.match, first.tokens[:2]) == (4, [7, 9])
    assert (second.match, second.tokens[:2]) == (2, [8, 9])
    assert second.left == 0


def test_a_loop_goes_on():
    (found,) = TextIndex([5, 1, 2, 3, 1, 2, 3]).lookup(7)
    assert found.tokens == ([1, 2, 3] * HEIGHT)[:HEIGHT]


def test_a_source_is_a_trie_of_continuations():
    text = Text()
    sequence = Sequence([1, 2, 5, 6, 7, 1, 2, 5, 8, 9, 1, 2], 5)
    source = text.propose([sequence, Sequence([1, 2, 3], 4)])
    root = source.start(0)
    assert [token for _, token, _ in root.options] == [5]
    fork = root.after(5)
    assert sorted(token for _, token, _ in fork.options) == [6, 8]
    assert sum(p for p, _, _ in fork.options) <= 1.0001
    assert [token for _, token, _ in fork.after(6).options] == [7]
    assert fork.after(4).options == []
    assert source.start(1).options == []


def test_a_continuation_ends():
    text = Text()
    source = text.propose([Sequence([1, 2, 1, 2], 5)])
    state = source.start(0)
    for _ in range(HEIGHT):
        ((_, token, _),) = state.options
        state = state.after(token)
    assert state.options == []


def test_what_matches_are_worth_is_learned():
    """A text whose matches always hold, and one whose never do: each is believed by its own record."""
    text = Text()

    def said(prompt, answer):
        sequence = Sequence(prompt, 50)
        sequence.commit(answer)
        return sequence

    true, false = said([1, 2, 3, 4], [1, 2]), said([1, 2, 3, 4], [1, 2])

    def believed(sequence):
        source = text.propose([sequence])
        return max(p for p, _, _ in source.start(0).options)

    before = believed(true)
    text.propose([false])
    for _ in range(30):
        text.propose([true, false])
        text.learn(true, text.proposed[true][0].tokens[:3])
        text.learn(false, [9])
    assert believed(false) < before - 0.2
    assert believed(true) > before + 0.1
    fresh = believed(said([1, 2, 3, 4], [1, 2]))
    assert believed(false) < fresh < believed(true)
    text.close(true)
    assert abs(believed(true) - fresh) < 1e-6


def test_what_a_prompt_repeats_of_itself_is_no_evidence():
    repeated = Sequence([1, 2, 3, 4, 5] * 6, 50)
    assert Text().look(repeated)[0].match == 0
    repeated.commit([1, 2, 3])
    (found,) = Text().look(repeated)
    assert (found.match, found.tokens[:2]) == (3, [4, 5])


def test_what_the_target_never_said_is_not_judged():
    text = Text()
    sequence = Sequence([1, 2, 3, 4, 5, 1, 2], 50)
    text.propose([sequence])
    before = np.array(text.hits.tried)
    text.learn(sequence, [3, 4])
    assert (np.array(text.hits.tried) - before).sum() == 2
